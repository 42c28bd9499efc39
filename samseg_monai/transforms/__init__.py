"""MONAI dictionary transforms that MONAI lacks: prompts as a volume, the boxes in it, boxes of 2-D images as numbers, a
check that files share a grid, labels recoded to classes, mirroring that knows the sides of classes, small components
removed, predicted images written.

Volumes are channel-first (C, H, W, D), slices (C, H, W). The first spatial axis is y (H), the second is x (W) of the
network input.
"""

from __future__ import annotations

from samseg_monai.transforms.boxes import BoxFromPromptd, EllipseFromPromptd, boxes_of
from samseg_monai.transforms.components import RemoveSmallComponentsd
from samseg_monai.transforms.drawn_boxes import BoxesFromLabeld
from samseg_monai.transforms.float_boxes import (
    BoxesFromGivend,
    BoxesFromImaged,
    EllipseFromBoxesd,
    ShrinkBoxesd,
    clip_boxes,
    move_boxes,
)
from samseg_monai.transforms.greys import ScaleGreysd
from samseg_monai.transforms.grids import CheckSameGridd
from samseg_monai.transforms.image_files import SaveImagePngd
from samseg_monai.transforms.labels import RecodeLabeld
from samseg_monai.transforms.mirroring import RandMirroredd, left_right_axis, side_mirror
from samseg_monai.transforms.naming import NameAfterCased
from samseg_monai.transforms.presets import RandBiasFromMinimumd, named_transforms
from samseg_monai.transforms.prompts import PromptFromBoxesd, PromptFromImaged, PromptFromLabeld
from samseg_monai.transforms.sources import (
    FinalBoxesd,
    GivenPromptd,
    ScaleInputd,
    SimulatedBoxesd,
    SimulatedPromptd,
    resized_slices,
    stored_slices,
)
from samseg_monai.transforms.spline import SplineResized

__all__ = [
    "SimulatedPromptd",
    "SimulatedBoxesd",
    "ScaleInputd",
    "GivenPromptd",
    "FinalBoxesd",
    "BoxFromPromptd",
    "BoxesFromGivend",
    "BoxesFromImaged",
    "BoxesFromLabeld",
    "CheckSameGridd",
    "EllipseFromBoxesd",
    "EllipseFromPromptd",
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
    "ShrinkBoxesd",
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
