"""MONAI dictionary transforms that MONAI lacks: prompts as a volume, the boxes in it, boxes of 2-D images as numbers, a
check that files share a grid, labels recoded to classes, mirroring that knows the sides of classes, small components
removed, predicted images written.

Volumes are channel-first (C, H, W, D), slices (C, H, W). The first spatial axis is y (H), the second is x (W) of the
network input.
"""

from __future__ import annotations

from samseg_monai.transforms.augmentation import (
    RandBiasFromMinimumd,
    RandMirroredd,
    left_right_axis,
    named_transforms,
    side_mirror,
)
from samseg_monai.transforms.boxes import BoxFromPromptd, EllipseFromPromptd, boxes_of
from samseg_monai.transforms.float_boxes import (
    BoxesFromGivend,
    BoxesFromImaged,
    BoxesFromLabeld,
    EllipseFromBoxesd,
    ShrinkBoxesd,
    clip_boxes,
    move_boxes,
)
from samseg_monai.transforms.grids import CheckSameGridd, CropOrPadd
from samseg_monai.transforms.labels import RecodeLabeld, RemoveSmallComponentsd
from samseg_monai.transforms.pixels import ScaleGreysd, SplineResized
from samseg_monai.transforms.prompts import PromptFromBoxesd, PromptFromImaged, PromptFromLabeld
from samseg_monai.transforms.saving import NameAfterCased, SaveImagePngd
from samseg_monai.transforms.sources import (
    FinalBoxesd,
    GivenPromptd,
    ScaleInputd,
    SimulatedBoxesd,
    SimulatedPromptd,
    resized_slices,
    stored_slices,
)

__all__ = [
    "BoxFromPromptd",
    "BoxesFromGivend",
    "BoxesFromImaged",
    "BoxesFromLabeld",
    "CheckSameGridd",
    "CropOrPadd",
    "EllipseFromBoxesd",
    "EllipseFromPromptd",
    "FinalBoxesd",
    "GivenPromptd",
    "NameAfterCased",
    "PromptFromBoxesd",
    "PromptFromImaged",
    "PromptFromLabeld",
    "RandBiasFromMinimumd",
    "RandMirroredd",
    "RecodeLabeld",
    "RemoveSmallComponentsd",
    "SaveImagePngd",
    "ScaleGreysd",
    "ScaleInputd",
    "ShrinkBoxesd",
    "SimulatedBoxesd",
    "SimulatedPromptd",
    "SplineResized",
    "boxes_of",
    "clip_boxes",
    "left_right_axis",
    "move_boxes",
    "named_transforms",
    "resized_slices",
    "side_mirror",
    "stored_slices",
]
