"""Boxes as numbers: around a mask, moved and cut off along with their image, and the ellipse in them.

Boxes are x0 y0 x1 y1 in pixel edges of a slice (x along the last axis, W): one that covers the pixels a to b, both
included, reads (a, b + 1), so that its width is the number of pixels. A row of NaN is no box. An edge is half a pixel
from a pixel's centre, to which affines refer, so that edge = index + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from samseg_monai.data.files.boxes import rectangles
from samseg_monai.errors import PromptError, raise_all

_PARALLEL = 1e-6  # of a pixel's side: what an affine may be off the axes by rounding
_DUST = 1e-3  # pixels: what rounding may put beyond the border


def boxes_of(prompt: torch.Tensor, *, per_component: bool = False, max_boxes: int = 8) -> torch.Tensor:
    """The box, or boxes, of one prompt slice.

    A pixel belongs to the prompt when it exceeds 0.5, or half of the slice's maximum where that is less: a thin prompt
    that was averaged away by a downscale keeps its box.

    Args:
        prompt: (H, W), or (N, H, W) with a box in each channel.
        per_component: of one channel: one box per connected component; the ``max_boxes`` largest are kept.
        max_boxes: number of rows when ``per_component``.
    Returns: float32 (4,), of several channels (N, 4), or (max_boxes, 4); unused rows are NaN; on the device of
        ``prompt``.
    Raises: PromptError if ``prompt`` is not one slice.
    """
    plane = prompt.as_subclass(torch.Tensor)
    if plane.ndim == 3 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim == 3:
        return torch.stack([boxes_of(channel) for channel in plane])
    if plane.ndim != 2:
        raise PromptError(f"a prompt slice is (H, W) or (N, H, W), got {tuple(prompt.shape)}; take one slice at a time")
    level = 0.5 * plane.max().float().clamp(0.0, 1.0) if plane.numel() else 0.5
    boxes = torch.full((max_boxes if per_component else 1, 4), torch.nan, dtype=torch.float32, device=plane.device)
    found = rectangles((plane > level).cpu().numpy(), per_component=per_component)[: len(boxes)]
    if found:
        boxes[: len(found)] = torch.tensor(found, dtype=torch.float32, device=plane.device)
    return boxes if per_component else boxes[0]


def move_boxes(boxes: torch.Tensor, before: Any, after: Any) -> torch.Tensor:
    """``move_prompts`` of the first slice of both grids."""
    return move_prompts(boxes, [0] * len(boxes), before, after)[0]


def move_prompts(
    boxes: torch.Tensor, slices: Sequence[int], before: Any, after: Any
) -> tuple[torch.Tensor, np.ndarray]:
    """Boxes and clicks on one grid as those on another grid over the same picture or volume.

    Args:
        boxes: (N, 4), with P clicks (N, 4 + 3 P) as of ``points``, in pixel edges of the grid whose affine is
            ``before``; NaN stays NaN.
        slices: the index k of each.
        before, after: affines (4, 4) from indices (i along H, j along W, k) to a common space.
    Returns: float32, as ``boxes``, in pixel edges of the grid of ``after``, not clipped; and the slices there of the
        corners of each box, and of its clicks, (N, 2 + P), fractions and NaN included.
    Raises: PromptError if the two grids are turned by other than right angles.
    """
    source, target = (np.asarray(torch.as_tensor(a).cpu(), dtype=np.float64) for a in (before, after))
    matrix = np.linalg.solve(target, source)
    plane = np.abs(matrix[:2, :2])
    if plane.min(axis=0).max() > _PARALLEL * plane.max():
        raise PromptError(f"boxes cannot follow a rotation other than by right angles, got {matrix[:2, :2].tolist()}")
    rows = np.array(boxes.detach().cpu(), dtype=np.float64)
    k, depths = np.asarray(slices, dtype=np.float64), []

    def moved(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = matrix @ np.stack([y - 0.5, x - 0.5, k, np.ones_like(x)])
        depths.append(found[2])
        return found[1::-1] + 0.5  # x and y

    ends = moved(*rows[:, :2].T), moved(*rows[:, 2:4].T)
    rows[:, :4] = np.concatenate([np.minimum(*ends), np.maximum(*ends)]).T
    for n in range(4, rows.shape[1], 3):
        rows[:, n : n + 2] = moved(*rows[:, n : n + 2].T).T
    return torch.from_numpy(rows.astype(np.float32)), np.stack(depths, axis=1)


def clip_boxes(boxes: torch.Tensor, size: tuple[int, int], case: str = "unnamed case") -> torch.Tensor:
    """Boxes cut off at the border of an image of ``size`` (H, W); their clicks, if there are any, lie within it.

    Raises: PromptError naming the case, every box of which nothing is left, and every click outside.
    """
    height, width = size
    high = boxes.new_tensor([width, height, width, height] + [width, height, 1] * ((boxes.shape[1] - 4) // 3))
    clipped = torch.minimum(boxes.clamp(min=0), high)  # NaN stays NaN in both
    lost = (clipped[:, 2] - clipped[:, 0] <= _DUST) | (clipped[:, 3] - clipped[:, 1] <= _DUST)
    problems = [
        f"box {n} lies outside: {[round(v, 2) for v in boxes[n].tolist()]} as x0, y0, x1, y1 in pixels of the image "
        "that the network is given, after crops"
        for n in lost.nonzero()[:, 0].tolist()
    ]
    off = ((clipped - boxes).abs() > _DUST)[:, 4:]
    problems += [
        f"a click of prompt {n} lies outside: {[round(v, 2) for v in boxes[n, 4:].tolist()]} as x, y, 1 (inside) or 0 "
        "of each click, in pixels of the image that the network is given, after crops"
        for n in off.any(1).nonzero()[:, 0].tolist()
    ]
    raise_all(problems, PromptError, f"{case}: nothing is left of boxes in an image of {width} x {height} pixels")
    return clipped


def inscribed(boxes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Float32 (H, W), 1 where a pixel's centre is in the ellipse inscribed in one of the boxes (N, 4 ...), else 0."""
    y = torch.arange(size[0])[:, None] + 0.5
    x = torch.arange(size[1])[None, :] + 0.5
    inside = torch.zeros(tuple(size), dtype=torch.bool)
    for x0, y0, x1, y1 in boxes[:, :4].cpu().tolist():  # NaN, no box, compares false everywhere
        inside |= ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return inside.to(torch.float32)
