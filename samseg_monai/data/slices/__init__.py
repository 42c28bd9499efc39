"""Slices of volumes: which ones, as a dataset, and the cache of slices and embeddings."""

from samseg_monai.data.slices.dataset import DEFAULT_VARIANTS, SliceDataset
from samseg_monai.data.slices.kept import KeptVolumes
from samseg_monai.data.slices.padding import SliceCollate
from samseg_monai.data.slices.pickers import AllSlices, EveryNth, Foreground, MaxArea, Patches, Picker, RandomN

__all__ = [
    "DEFAULT_VARIANTS", "AllSlices", "EveryNth", "Foreground", "KeptVolumes", "MaxArea", "Patches", "Picker",
    "RandomN", "SliceCollate", "SliceDataset",
]  # fmt: skip
