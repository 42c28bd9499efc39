"""Slices of volumes: which ones, as a dataset, and the cache of slices and embeddings."""

from samseg_monai.data.slices.dataset import (
    DEFAULT_VARIANTS,
    AllSlices,
    EveryNth,
    Foreground,
    MaxArea,
    Picker,
    RandomN,
    SliceDataset,
)  # fmt: skip

__all__ = [
    "DEFAULT_VARIANTS", "AllSlices", "EveryNth", "Foreground", "MaxArea", "Picker", "RandomN", "SliceDataset",
]  # fmt: skip
