"""SAM's weights: find (or download) the file, read it whatever its layout, load it with an exact report.

``find`` knows the official files, where they may lie and how to fetch them; ``read`` turns any file into a flat float32
state dict or says what the file really is; ``load`` fits position tables to the image size of the network and refuses
everything else that does not fit.
"""

from __future__ import annotations

from samseg_monai.sam.weights.find import (
    ENVIRONMENT,
    KNOWN,
    RANDOM,
    WeightsFile,
    cache_folder,
    find_weights,
    name_of,
    sha256_of,
    weights_folders,
)
from samseg_monai.sam.weights.load import MASK_HEAD, LoadReport, load_sam_weights, plain_names
from samseg_monai.sam.weights.read import is_sam_lst, is_samed, read_state

__all__ = [
    "ENVIRONMENT",
    "KNOWN",
    "MASK_HEAD",
    "RANDOM",
    "LoadReport",
    "WeightsFile",
    "cache_folder",
    "find_weights",
    "is_sam_lst",
    "is_samed",
    "load_sam_weights",
    "name_of",
    "plain_names",
    "read_state",
    "sha256_of",
    "weights_folders",
]
