"""MONAI dictionary transforms that MONAI lacks: a crop that cuts no prompt, prompts as a volume, the boxes in it, boxes
of 2-D images as numbers, a check that files share a grid, labels recoded to classes, mirroring that knows the sides
of classes, small components removed, predicted images written.

Volumes are channel-first (C, H, W, D), slices (C, H, W). The first spatial axis is y (H), the second is x (W) of the
network input. ``allow_missing_keys`` is MONAI's: keys that a case does not have are passed over.
"""

from __future__ import annotations

from samseg_monai.transforms.augmentation import (
    RandBiasFromMinimumd,
    RandMirroredd,
    RandShiftedAffined,
    left_right_axis,
    named_transforms,
    side_mirror,
)
from samseg_monai.transforms.boxes import boxes_of, clip_boxes, move_boxes
from samseg_monai.transforms.crop import CropInPlaned, ResampleInPlaned, for_training
from samseg_monai.transforms.grids import CheckSameGridd
from samseg_monai.transforms.labels import ForegroundProbabilityd, RecodeLabeld, RemoveSmallComponentsd
from samseg_monai.transforms.loading import LoadCased
from samseg_monai.transforms.pixels import (
    NeighbourSlicesd,
    ScaleGreysd,
    ScaleInputd,
    SplineResized,
    resized_slices,
    stored_slices,
)
from samseg_monai.transforms.prompts import (
    BoxFromPromptd,
    EllipseFromBoxesd,
    EllipseFromPromptd,
    FinalBoxesd,
    GivenPromptd,
    SimulatedBoxesd,
    SimulatedPromptd,
    UnpromptedIgnoredd,
)
from samseg_monai.transforms.requested import CarriedPromptd, RequestedPromptd
from samseg_monai.transforms.saving import NameAfterCased, SaveImagePngd, SaveOverlayd, SaveVolumed

__all__ = [
    "BoxFromPromptd", "CarriedPromptd", "CheckSameGridd", "CropInPlaned", "EllipseFromBoxesd", "EllipseFromPromptd",
    "FinalBoxesd", "ForegroundProbabilityd", "GivenPromptd", "LoadCased", "NameAfterCased", "NeighbourSlicesd",
    "RandBiasFromMinimumd",
    "RandMirroredd", "RandShiftedAffined", "RecodeLabeld", "RemoveSmallComponentsd", "RequestedPromptd",
    "ResampleInPlaned", "SaveImagePngd", "SaveOverlayd", "SaveVolumed", "ScaleGreysd", "ScaleInputd", "SimulatedBoxesd",
    "SimulatedPromptd", "SplineResized", "UnpromptedIgnoredd", "boxes_of", "clip_boxes", "for_training",
    "left_right_axis", "move_boxes", "named_transforms", "resized_slices", "side_mirror", "stored_slices",
]  # fmt: skip
