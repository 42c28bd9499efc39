"""A picture of one slice: grey image, outlines of reference and prediction, a caption; plain arrays, drawn in no time.

Blue and orange are those of Okabe and Ito (2008, "Color universal design"), which people with a colour-vision
deficiency can tell apart; where both outlines of a class meet they are white. The view is the radiological one: front
of the patient up, the patient's right on the viewer's left.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation
from PIL import Image, ImageDraw, ImageFont

REFERENCE, PREDICTION, BOTH = (86, 180, 233), (230, 159, 0), (255, 255, 255)
SIDE = 384  # pixels of a picture's longer side at least; a slice with more pixels keeps them
_WIDTH = 2  # pixels of an outline
_BRIGHTEST = 230  # of 255: white is for outlines
_FONT, _MARGIN = 13, 6


def axial_axis(affine: np.ndarray) -> int:
    """Axis of an array with this affine (4, 4) that runs, more or less, from the feet to the head."""
    return int(np.flatnonzero(io_orientation(affine)[:, 0] == 2)[0])


def as_seen(plane: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(H, W) slice across ``axial_axis`` of an array with this affine, to rows and columns of the picture."""
    orientation = np.delete(io_orientation(affine), axial_axis(affine), axis=0)
    # the picture's columns run from right to left, its rows from front to back
    turned = np.flip(plane, tuple(axis for axis, direction in enumerate(orientation[:, 1]) if direction > 0))
    return turned if orientation[0, 0] == 1 else turned.T


def aspect_of(affine: np.ndarray) -> float:
    """Height of a pixel of such a picture by its width."""
    sides = dict(zip(io_orientation(affine)[:, 0].tolist(), voxel_sizes(affine).tolist(), strict=True))
    return sides[1] / sides[0]


def sampled(
    volume: torch.Tensor, source: np.ndarray, target: np.ndarray, size: tuple[int, ...], axis: int, index: int
) -> np.ndarray:
    """Nearest values of ``volume`` (H, W, D; affine ``source``) at slice ``index`` across ``axis`` of another grid.

    Args:
        target, size: affine and shape of that grid.
    Returns: (h, w) float32 array; NaN outside of the volume.
    """
    shape = [1 if number == axis else length for number, length in enumerate(size)]
    voxels = np.indices(shape).reshape(3, -1)
    voxels[axis] = index
    matrix = np.linalg.inv(source) @ target
    found = np.rint(matrix[:3, :3] @ voxels + matrix[:3, 3:]).astype(np.int64)
    inside = ((found >= 0) & (found < np.reshape(volume.shape, (3, 1)))).all(axis=0)
    i, j, k = (torch.from_numpy(row).to(volume.device) for row in found * inside)
    values = volume[i, j, k].float().cpu().numpy()
    return np.where(inside, values, np.nan).reshape([length for number, length in enumerate(size) if number != axis])


def draw(
    image: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    caption: str,
    *,
    aspect: float = 1.0,
    sides: bool = True,
) -> np.ndarray:
    """The picture.

    Args:
        image: (H, W) intensities, rows and columns as seen; NaN is black.
        reference, prediction: (H, W) whole numbers, 0 is background; each class has its outline.
        caption: first line below the picture; shortened where it is too long.
        aspect: height of a pixel by its width, in mm.
        sides: name the patient's right and left at the edges, which are known of volumes.
    Returns: (H, W, 3) uint8.
    """
    height, width = image.shape[0] * aspect, float(image.shape[1])
    scale = max(SIDE / max(height, width), 1.0, image.shape[0] / height)
    rows = _places(image.shape[0], round(height * scale))
    columns = _places(image.shape[1], round(width * scale))
    grey, first, second = (array[rows][:, columns] for array in (_grey(image), reference, prediction))
    picture = np.repeat(grey[..., None], 3, axis=2)
    lines = _outline(first), _outline(second)
    picture[_near(lines[0] | lines[1])] //= 3  # a dark rim: outlines show on bright tissue, too
    agree = lines[0] & lines[1] & (first == second)  # organs that were exchanged have the same outlines, too
    for where, colour in ((lines[0], REFERENCE), (lines[1], PREDICTION), (agree, BOTH)):
        picture[where] = colour
    return np.concatenate([_sides_named(picture) if sides else picture, _legend(caption, picture.shape[1])])


def _places(size: int, wanted: int) -> np.ndarray:
    """Index of the source pixel for each of ``wanted`` pixels."""
    return ((np.arange(wanted) + 0.5) * size / wanted).astype(np.int64)


def _grey(image: np.ndarray) -> np.ndarray:
    """Black and white at the 1st and 99.5th percentile, the background left out: a value that a tenth of it has.

    The network's images have it anywhere: a z-score over the brain leaves it in the middle of the greys.
    """
    known = image[np.isfinite(image)]
    values, counts = np.unique(known, return_counts=True)
    common = values[counts.argmax()] if counts.size and counts.max() > 0.1 * known.size else np.nan
    inside = known[known != common]
    low, high = np.percentile(inside, (1, 99.5)) if inside.size else (0.0, 1.0)
    if high <= low:
        low = high - 1
    level = (np.where(np.isfinite(image) & (image != common), image, low) - low) / (high - low)
    return (_BRIGHTEST * np.clip(level, 0, 1)).astype(np.uint8)


def _shifted(array: np.ndarray, distance: int) -> list[np.ndarray]:
    """The array moved up, down, left and right, with 0 (False) from outside."""
    height, width = array.shape
    padded = np.pad(array, distance)
    corners = ((2 * distance, distance), (0, distance), (distance, 2 * distance), (distance, 0))
    return [padded[top : top + height, left : left + width] for top, left in corners]


def _outline(labels: np.ndarray) -> np.ndarray:
    """Pixels of a class that have another one within ``_WIDTH`` pixels up, down, left or right."""
    moved = [array for distance in range(1, _WIDTH + 1) for array in _shifted(labels, distance)]
    return np.any([array != labels for array in moved], axis=0) & (labels > 0)


def _near(lines: np.ndarray) -> np.ndarray:
    return np.any(_shifted(lines, 1), axis=0) & ~lines


def _sides_named(picture: np.ndarray) -> np.ndarray:
    """R and L of the patient at the picture's edges."""
    canvas = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(canvas), _font()
    for x, anchor, letter in ((_MARGIN, "lm", "R"), (canvas.width - _MARGIN, "rm", "L")):
        pen.text((x, canvas.height // 2), letter, fill=BOTH, font=font, anchor=anchor)
    return np.asarray(canvas)


def _legend(caption: str, width: int) -> np.ndarray:
    """Two lines of text on black: the caption, and what the colours mean."""
    strip = Image.new("RGB", (width, 2 * (_FONT + _MARGIN) + _MARGIN))
    pen, font = ImageDraw.Draw(strip), _font()
    while len(caption) > 1 and pen.textlength(caption, font) > width - 2 * _MARGIN:
        caption = caption.removesuffix("…")[:-1] + "…"
    pen.text((_MARGIN, _MARGIN // 2), caption, fill=BOTH, font=font)
    x = float(_MARGIN)
    for word, colour in (("reference", REFERENCE), ("prediction", PREDICTION), ("both", BOTH)):
        pen.text((x, _FONT + _MARGIN + _MARGIN // 2), word, fill=colour, font=font)
        x += pen.textlength(word, font) + 2 * _MARGIN
    return np.asarray(strip)


def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), _FONT)
