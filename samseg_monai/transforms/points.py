"""Clicks inside and outside of an object, as a person would give them, drawn from its label.

A prompt is a row of 4 + 3 P numbers: a box x0 y0 x1 y1, then x, y and 1 (inside) or 0 (outside) of each click, all in
pixel edges, where the middle of pixel a is a + 0.5. NaN stands for a box or a click that is not there.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from samseg_monai.data.files.boxes import Rectangle, components, rectangles

Random = np.random.RandomState | np.random.Generator
INSIDE, OUTSIDE = 1.0, 0.0
_NEAR = 0.25  # of the box's sides: how far from it clicks outside of the object are
_LEAST = 3  # pixels: so far at least


def prompted(rows: torch.Tensor) -> torch.Tensor:
    """Bool (...): which of the prompts (..., 4 + 3 P) have a whole box, or a click."""
    clicks = rows[..., 4:].unflatten(-1, (-1, 3)) if rows.shape[-1] > 4 else rows.new_empty((*rows.shape[:-1], 0, 3))
    return ~rows[..., :4].isnan().any(-1) | (~clicks.isnan().any(-1)).any(-1)


def objects(mask: np.ndarray, *, per_component: bool) -> list[tuple[Rectangle, np.ndarray]]:
    """The tight rectangle and the pixels (H, W) of all of a mask, or of each 8-connected component, largest first."""
    if not per_component:
        return [(found, mask) for found in rectangles(mask)]
    numbers, parts = components(mask)
    return [(rectangle, numbers == number) for number, rectangle in parts]


def draw_clicks(
    pixels: np.ndarray, rectangle: Rectangle, mask: np.ndarray, inside: int, outside: int, random: Random
) -> list[float]:
    """Clicks x, y, label of one object, one after the other.

    The first is the pixel of its largest 4-connected component that is farthest from what lies beside it, the image's
    border included; the others are any of its pixels. Those outside are not in ``mask``, and in the object's box grown
    by a quarter of its sides, 3 pixels at least; NaN where there is no such pixel.

    Args:
        pixels: (H, W) bool, the object.
        rectangle: around it.
        mask: (H, W) bool, all objects.
        inside, outside: how many of each; ``inside`` is at least 1.
        random: each click after the first takes one draw, whatever the object is.
    """
    draws = random.uniform(size=inside - 1 + outside)
    x0, y0, x1, y1 = rectangle
    parts, count = ndimage.label(np.pad(pixels[y0:y1, x0:x1], 1))
    largest = np.bincount(parts.ravel())[1:].argmax() + 1 if count > 1 else 1
    depth = ndimage.distance_transform_edt(parts == largest)
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    found = [x0 + column - 0.5, y0 + row - 0.5, INSIDE]
    x, y = (max(_LEAST, int(np.ceil(_NEAR * side))) for side in (x1 - x0, y1 - y0))
    left, top = max(0, x0 - x), max(0, y0 - y)
    for label, plane, own in (
        (INSIDE, pixels, draws[: inside - 1]),
        (OUTSIDE, ~mask[top : y1 + y, left : x1 + x], draws[inside - 1 :]),
    ):
        places = np.argwhere(plane) + ([top, left] if label == OUTSIDE else [0, 0])
        for draw in own:
            if len(places):
                row, column = places[int(draw * len(places))]
                found += [column + 0.5, row + 0.5, label]
            else:
                found += [np.nan] * 3
    return [float(value) for value in found]
