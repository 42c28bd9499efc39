"""Boxes of 2-D images as numbers, from the file or the label to the network: never a mask, never rounded.

A 2-D image is a volume of one slice, (C, H, W, 1). Boxes are float32 (N, 4) as x0 y0 x1 y1 in pixel edges of the
tensor beside them (x along W, y along H): a box that covers the pixels a to b reads (a, b + 1). A row of NaN is no box.
An edge is half a pixel from a pixel's centre, to which affines refer, so that edge = index + 0.5; boxes follow any
resize, crop, flip or exchange of axes that MONAI writes into the affine.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from samseg_monai.errors import ConfigError, PromptError, raise_all
from samseg_monai.transforms.grids import on_grid_of

_PARALLEL = 1e-6  # of a pixel's side: what an affine may be off the axes by rounding
_DUST = 1e-3  # pixels: what rounding may put beyond the border


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number and no truth value: the command line also gives texts."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def move_boxes(boxes: torch.Tensor, before: Any, after: Any) -> torch.Tensor:
    """Boxes on one grid as boxes on another grid over the same picture.

    Args:
        boxes: (N, 4) in pixel edges of the grid whose affine is ``before``; rows with NaN stay NaN.
        before, after: affines (4, 4) from indices (i along H, j along W, k) to a common space.
    Returns: float32 (N, 4) in pixel edges of the grid of ``after``; not clipped.
    Raises: PromptError if the two grids are turned by other than right angles.
    """
    matrices = (np.asarray(torch.as_tensor(a).cpu(), dtype=np.float64) for a in (before, after))
    source, target = matrices
    matrix = np.linalg.solve(target, source)
    plane = np.abs(matrix[:2, :2])
    if plane.min(axis=0).max() > _PARALLEL * plane.max():
        raise PromptError(f"boxes cannot follow a rotation other than by right angles, got {matrix[:2, :2].tolist()}")
    x0, y0, x1, y1 = np.asarray(boxes.detach().cpu(), dtype=np.float64).T
    moved = []
    for y, x in ((y0, x0), (y1, x1)):
        index = np.stack([y - 0.5, x - 0.5, np.zeros_like(x), np.ones_like(x)])
        moved.append((matrix @ index)[:2] + 0.5)
    low, high = np.minimum(*moved), np.maximum(*moved)
    return torch.from_numpy(np.stack([low[1], low[0], high[1], high[0]], axis=1).astype(np.float32))


def clip_boxes(boxes: torch.Tensor, size: tuple[int, int], case: str = "unnamed case") -> torch.Tensor:
    """Boxes cut off at the border of an image of ``size`` (H, W).

    Raises: PromptError naming the case and every box of which nothing is left.
    """
    height, width = size
    high = boxes.new_tensor([width, height, width, height])
    clipped = torch.minimum(boxes.clamp(min=0), high)  # NaN stays NaN in both
    lost = (clipped[:, 2] - clipped[:, 0] <= _DUST) | (clipped[:, 3] - clipped[:, 1] <= _DUST)
    problems = [
        f"box {n} lies outside: {[round(v, 2) for v in boxes[n].tolist()]} as x0, y0, x1, y1 in pixels of the image "
        "that the network is given, after crops"
        for n in lost.nonzero()[:, 0].tolist()
    ]
    raise_all(problems, PromptError, f"{case}: nothing is left of boxes in an image of {width} x {height} pixels")
    return clipped


def no_boxes(rows: int = 1) -> torch.Tensor:
    """``rows`` rows of NaN: an image in which nothing is asked for."""
    return torch.full((rows, 4), torch.nan, dtype=torch.float32)


class BoxesFromGivend(MapTransform):
    """Boxes that a person gave, in pixels of the stored image, as boxes on the image as it is now.

    Args:
        image_key: MetaTensor (C, H, W, 1) with the affine of its file as ``original_affine``; any transform that keeps
            its affine may have run.
        boxes_key: list of [x0, y0, x1, y1] in, float32 (N, 4) out, clipped to the image.
        case_key: where the name of the case is found for messages.
    Raises: PromptError, naming the case: there are no boxes, they are no numbers, or one lies wholly outside.
    """

    def __init__(self, image_key: str = "image", boxes_key: str = "boxes", *, case_key: str = "case") -> None:
        super().__init__(image_key)
        self.boxes_key = boxes_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        case = str(d.get(self.case_key, "unnamed case"))
        given = d.get(self.boxes_key)
        try:
            boxes = torch.as_tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            boxes = torch.empty(0)
        if boxes.ndim != 2 or boxes.shape[-1] != 4 or not len(boxes) or not boxes.isfinite().all():
            raise PromptError(
                f"{case}: {self.boxes_key!r} must be a list of boxes [x0, y0, x1, y1] in pixels, got {given!r}; set "
                "prompt::boxes to a file that has this case"
            )
        for key in self.key_iterator(d):
            image = d[key]
            if not isinstance(image, MetaTensor) or "original_affine" not in image.meta:
                raise PromptError(f"{case}: {key} has no affine of its file; load it with LoadImaged")
            moved = move_boxes(boxes, image.meta["original_affine"], image.affine)
            d[self.boxes_key] = clip_boxes(moved, (image.shape[1], image.shape[2]), case)
        return d


class BoxesFromImaged(MapTransform):
    """The whole image as one box, for networks that want a box when nobody gave one.

    Args:
        image_key: (C, H, W, 1) or (C, H, W).
        boxes_key: where the box goes, float32 (1, 4).
    """

    def __init__(self, image_key: str = "image", boxes_key: str = "boxes") -> None:
        super().__init__(image_key)
        self.boxes_key = boxes_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            height, width = d[key].shape[1:3]
            d[self.boxes_key] = torch.tensor([[0, 0, width, height]], dtype=torch.float32)
        return d


class ShrinkBoxesd(MapTransform):
    """Move each side of every box inwards, against boxes that are known to be drawn too large; last before the network.

    Args:
        boxes_key: float (N, 4).
        fraction: of the box's length along the axis, at least 0 and less than 0.5; the middle of the box stays.
        case_key: where the name of the case is found for messages.
    Raises: ConfigError for another fraction; PromptError if nothing before has made boxes.
    """

    def __init__(self, boxes_key: str = "boxes", *, fraction: float = 0.0, case_key: str = "case") -> None:
        super().__init__(boxes_key)
        self.case_key = case_key
        if not is_number(fraction) or not 0 <= fraction < 0.5:
            raise ConfigError(f"shrink must be at least 0 and less than 0.5, got {fraction!r}")
        self.fraction = float(fraction)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            if not isinstance(d.get(key), torch.Tensor):
                raise PromptError(
                    f"{d.get(self.case_key, 'unnamed case')}: there are no boxes; prompt::source of 2-D images is "
                    "label, json (with a file of boxes), image or none"
                )
            low, high = d[key][:, :2], d[key][:, 2:]
            inwards = self.fraction * (high - low)
            d[key] = torch.cat([low + inwards, high - inwards], dim=1)
        return d


class EllipseFromBoxesd(MapTransform):
    """The ellipses inscribed in the boxes of an image, all together: how good are the boxes without any network?

    A pixel is inside when its centre is.

    Args:
        boxes_key: (N, 4) on the grid of the image; rows of NaN give nothing.
        image_key: (C, H, W, 1) or (C, H, W).
        key: where the float32 mask of 0 and 1 goes, (1, H, W, 1) or (1, H, W), with geometry and history of the image.
    """

    def __init__(self, boxes_key: str = "boxes", image_key: str = "image", key: str = "ellipse") -> None:
        super().__init__(boxes_key)
        self.image_key = image_key
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for boxes_key in self.key_iterator(d):
            image = d[self.image_key]
            y = torch.arange(image.shape[1])[:, None] + 0.5
            x = torch.arange(image.shape[2])[None, :] + 0.5
            inside = torch.zeros(tuple(image.shape[1:3]), dtype=torch.bool)
            for x0, y0, x1, y1 in torch.as_tensor(d[boxes_key]).cpu().tolist():  # NaN compares false everywhere
                inside |= ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
            ellipse = inside.to(torch.float32).reshape(1, *image.shape[1:])
            d[self.key] = on_grid_of(image, ellipse)
        return d
