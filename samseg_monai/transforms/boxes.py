"""From a prompt mask to boxes: computed last, after all geometry, so that no box has to be transformed.

Boxes are x0 y0 x1 y1 in pixels of the slice (x along the last axis); a box that covers the pixels a to b, both
included, reads (a, b + 1), so that its width is the number of pixels. NaN stands for "no box".
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.transforms import MapTransform

from samseg_monai.errors import PromptError
from samseg_monai.transforms.grids import on_grid_of

Rectangle = tuple[int, int, int, int]


def rectangles(mask: torch.Tensor, *, per_component: bool = False) -> list[Rectangle]:
    """Tight rectangles around a mask.

    Args:
        mask: (H, W) bool.
        per_component: one rectangle per 8-connected component, largest first, instead of one around everything.
    Returns: (x0, y0, x1, y1) each, upper ends exclusive; an empty list for an empty mask.
    """
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    if not len(rows):
        return []
    if not per_component:
        return [(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)]
    image = sitk.GetImageFromArray(mask.cpu().numpy().astype(np.uint8))
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(sitk.ConnectedComponent(image, True))
    found = [(shapes.GetNumberOfPixels(label), *shapes.GetBoundingBox(label)) for label in shapes.GetLabels()]
    found.sort(key=lambda entry: (-entry[0], entry[2], entry[1]))
    return [(x, y, x + width, y + height) for _, x, y, width, height in found]


def boxes_of(prompt: torch.Tensor, *, per_component: bool = False, max_boxes: int = 8) -> torch.Tensor:
    """The box, or boxes, of one prompt slice.

    A pixel belongs to the prompt when it exceeds 0.5, or half of the slice's maximum where that is less: a thin prompt
    that was averaged away by a downscale keeps its box.

    Args:
        prompt: (H, W) or (1, H, W).
        per_component: one box per connected component; the ``max_boxes`` largest are kept.
        max_boxes: number of rows when ``per_component``.
    Returns: float32 (4,), or (max_boxes, 4) with unused rows NaN; on the device of ``prompt``.
    Raises: PromptError if ``prompt`` is not one slice.
    """
    plane = prompt.as_subclass(torch.Tensor)
    if plane.ndim == 3 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim != 2:
        raise PromptError(f"a prompt slice is (H, W) or (1, H, W), got {tuple(prompt.shape)}; take one slice at a time")
    level = 0.5 * plane.max().float().clamp(0.0, 1.0) if plane.numel() else 0.5
    boxes = torch.full((max_boxes if per_component else 1, 4), torch.nan, dtype=torch.float32, device=plane.device)
    found = rectangles(plane > level, per_component=per_component)[: len(boxes)]
    if found:
        boxes[: len(found)] = torch.tensor(found, dtype=torch.float32, device=plane.device)
    return boxes if per_component else boxes[0]


class BoxFromPromptd(MapTransform):
    """Slice-level, the last of the slice transforms: put the box of the prompt slice under ``box_key``.

    Args:
        prompt_key: prompt slice, (1, H, W).
        box_key: where the boxes go, see ``boxes_of``.
        per_component: one box per connected component.
        max_boxes: rows when ``per_component``; the same for every slice, so that batches collate.
        allow_missing_keys: leave a slice without a prompt as it is.
    """

    def __init__(
        self,
        prompt_key: str = "prompt",
        box_key: str = "boxes",
        *,
        per_component: bool = False,
        max_boxes: int = 8,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(prompt_key, allow_missing_keys)
        self.box_key = box_key
        self.per_component = per_component
        self.max_boxes = max_boxes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.box_key] = boxes_of(d[key], per_component=self.per_component, max_boxes=self.max_boxes)
        return d


class EllipseFromPromptd(MapTransform):
    """The ellipse inscribed in the box of every slice: how good is the box alone, without any network?

    A pixel is inside when its centre is.

    Args:
        prompt_key: prompt volume (1, H, W, D) or slice (1, H, W).
        key: where the float32 mask of 0 and 1 goes; same shape, metadata and history as the prompt.
    """

    def __init__(self, prompt_key: str = "prompt", key: str = "ellipse") -> None:
        super().__init__(prompt_key)
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for prompt_key in self.key_iterator(d):
            prompt = d[prompt_key].as_subclass(torch.Tensor)
            if prompt.ndim == 3:
                ellipse = _inscribed(prompt)
            else:
                ellipse = torch.stack([_inscribed(plane) for plane in prompt.unbind(-1)], dim=-1)
            d[self.key] = on_grid_of(d[prompt_key], ellipse)
        return d


def _inscribed(prompt: torch.Tensor) -> torch.Tensor:
    x0, y0, x1, y1 = boxes_of(prompt).cpu()
    y = torch.arange(prompt.shape[-2])[:, None] + 0.5
    x = torch.arange(prompt.shape[-1])[None, :] + 0.5
    # a NaN box compares false everywhere, which is the empty ellipse wanted
    inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return inside.to(torch.float32)[None]
