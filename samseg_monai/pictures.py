"""One way to draw a slice, for page, TensorBoard and montage: grey image, outlines, boxes, words; plain arrays.

Blue and orange are those of Okabe and Ito (2008, "Color universal design"), which people with a colour-vision
deficiency can tell apart. The view is the radiological one: front of the patient up, the patient's right on the
viewer's left; of slices that are not axial: head up, and the front on the left where they are sagittal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, maximum_filter, minimum_filter

Colour = tuple[int, int, int]

REFERENCE, PREDICTION, BOTH = (86, 180, 233), (230, 159, 0), (255, 255, 255)
BOX = (185, 196, 255)
SIDE = 384  # pixels of a picture's longer side at least; a slice with more pixels keeps them
_BRIGHTEST = 230  # of 255: white is for outlines
_FONT, _MARGIN, _DASH = 13, 6, 5
_EDGES = ((0.0, 0.5, "lm"), (1.0, 0.5, "rm"), (0.5, 0.0, "mt"), (0.5, 1.0, "mb"))  # left, right, top, bottom
_SIDES = ("RL", "AP", "SI")  # of the patient, as seen from left to right or from top to bottom
BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


def axial_axis(affine: np.ndarray) -> int:
    """Axis of an array with this affine (4, 4) that runs, more or less, from the feet to the head."""
    return int(np.flatnonzero(io_orientation(affine)[:, 0] == 2)[0])


def as_seen(plane: np.ndarray, affine: np.ndarray | None = None, axis: int | None = None) -> np.ndarray:
    """(H, W) slice across ``axis`` (None: ``axial_axis``) of an array with this affine (None: axes are x, y of RAS), to
    rows and columns of the picture; of an axial one they run from front to back and from right to left."""
    affine = np.eye(4) if affine is None else affine
    orientation = np.delete(io_orientation(affine), axial_axis(affine) if axis is None else axis, axis=0)
    turned = np.flip(plane, tuple(axis for axis, direction in enumerate(orientation[:, 1]) if direction > 0))
    return turned if orientation[0, 0] > orientation[1, 0] else turned.T


def aspect_of(affine: np.ndarray, axis: int | None = None) -> float:
    """Height of a pixel of such a picture by its width."""
    across, down = _seen_sides(affine, axis)
    sides = dict(zip(io_orientation(affine)[:, 0].tolist(), voxel_sizes(affine).tolist(), strict=True))
    return sides[down] / sides[across]


def width_of(affine: np.ndarray, shape: Sequence[int], axis: int | None = None) -> float:
    """How many mm such a picture of an array of this shape is wide."""
    own = io_orientation(affine)[:, 0].tolist().index(_seen_sides(affine, axis)[0])
    return float(voxel_sizes(affine)[own] * shape[own])


def letters_of(affine: np.ndarray, axis: int | None = None) -> str:
    """The patient's sides at the left, right, upper and lower edge of such a picture."""
    return "".join(_SIDES[side] for side in _seen_sides(affine, axis))


def _seen_sides(affine: np.ndarray, axis: int | None) -> list[int]:
    """Which of right to left (0), front to back (1) and top to bottom (2) run across and down the picture."""
    axis = axial_axis(affine) if axis is None else axis
    return sorted(np.delete(io_orientation(affine)[:, 0], axis).astype(int).tolist())


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
    outlines: Sequence[tuple[np.ndarray, Colour | Sequence[Colour]]],
    *,
    both: Colour | None = None,
    aspect: float = 1.0,
    side: int = SIDE,
    line: int = 2,
    boxes: Sequence[Sequence[float]] = (),
    clicks: Sequence[tuple[float, float, bool]] = (),
) -> np.ndarray:
    """The picture, without words.

    Args:
        image: (H, W) intensities, rows and columns as seen; NaN is black.
        outlines: label maps (H, W), 0 is background and each class has its outline, and their colour, or those of the
            classes 1, 2, ... (and again from the first); the last is on top.
        both: colour where the first two outlines of a class meet.
        aspect: height of a pixel by its width, in mm.
        side: pixels of the picture's longer side at least.
        line: pixels of an outline's width.
        boxes: left, top, right, bottom edge of each, drawn dashed.
        clicks: distance from the left and upper edge of each, and whether it is inside of an object.
    Returns: (H, W, 3) uint8.
    """
    height, width = image.shape[0] * aspect, float(image.shape[1])
    scale = max(side / max(height, width), 1.0, image.shape[0] / height)
    rows, columns = _places(image.shape[0], round(height * scale)), _places(image.shape[1], round(width * scale))
    picture = np.repeat(_grey(image)[rows][:, columns, None], 3, axis=2)
    shown = [labels[rows][:, columns] for labels, _ in outlines]
    lines = [outline_of(labels, line) for labels in shown]
    if lines:
        every = np.any(lines, axis=0)
        picture[binary_dilation(every) & ~every] //= 3  # a dark rim: outlines show on bright tissue, too
    for where, labels, (_, colour) in zip(lines, shown, outlines, strict=True):
        colours = np.atleast_2d(np.array(colour, dtype=np.uint8))
        picture[where] = colours[(labels[where].astype(np.int64) - 1) % len(colours)]
    if both is not None:  # organs that were exchanged have the same outlines, too
        picture[lines[0] & lines[1] & (shown[0] == shown[1])] = both
    for x0, y0, x1, y1 in boxes:
        x0, x1 = (round(x * scale) for x in (x0, x1))
        y0, y1 = (round(y * aspect * scale) for y in (y0, y1))
        _rectangle(picture, (x0, y0, x1, y1))
    if not clicks:
        return picture
    canvas = Image.fromarray(picture)
    for x, y, inside in clicks:
        mark(ImageDraw.Draw(canvas), (int(x * scale), int(y * aspect * scale)), BOX, inside=inside, width=line)
    return np.asarray(canvas)


def mark(pen: ImageDraw.ImageDraw, place: tuple[int, int], colour: Colour, *, inside: bool, width: int) -> None:
    """Draw a click at ``place`` (x, y): a disc inside of an object, a cross of lines of ``width`` outside."""
    (x, y), size = place, 2 * width
    if inside:
        pen.ellipse([x - size, y - size, x + size, y + size], fill=colour)
    else:
        for turn in (-size, size):
            pen.line([x - size, y - turn, x + size, y + turn], fill=colour, width=width)


def named(picture: np.ndarray, letters: str = "RL") -> np.ndarray:
    """The picture with the patient's sides (R, L, A, P, S, I) at its left, right, upper and lower edge."""
    canvas = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(canvas), _font(round(max(picture.shape) / 30))
    for letter, (x, y, anchor) in zip(letters, _EDGES, strict=False):
        place = (_MARGIN + x * (canvas.width - 2 * _MARGIN), _MARGIN + y * (canvas.height - 2 * _MARGIN))
        pen.text(place, letter, fill=BOTH, font=font, anchor=anchor)
    return np.asarray(canvas)


def side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one size in rows of three, or of two where that leaves no gap."""
    across = 2 if len(panels) == 4 else min(len(panels), 3)
    framed = [np.pad(panel, ((1, 1), (1, 1), (0, 0))) for panel in panels]
    filled = [*framed, *[np.zeros_like(framed[0])] * (-len(panels) % across)]
    return np.concatenate([np.concatenate(filled[n : n + across], axis=1) for n in range(0, len(filled), across)])


def noted(picture: np.ndarray, text: str, colour: Colour, *, corner: bool = False) -> np.ndarray:
    """The picture with a few words on black above its lower edge, or small in its upper left corner."""
    canvas = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(canvas), _font(_FONT if corner else 20)
    place = (_MARGIN, _MARGIN) if corner else (canvas.width / 2, canvas.height - 2 * _MARGIN)
    anchor = "lt" if corner else "mb"
    pen.rectangle(pen.textbbox(place, text, font, anchor=anchor), fill=0, outline=0, width=_MARGIN)
    pen.text(place, text, fill=colour, font=font, anchor=anchor)
    return np.asarray(canvas)


def measured(picture: np.ndarray, width_mm: float) -> np.ndarray:
    """The picture, which is ``width_mm`` wide, with a bar of a round length in its lower left corner."""
    canvas = Image.fromarray(picture)
    per_mm = canvas.width / width_mm
    length = max((bar for bar in BARS_MM if bar * per_mm <= canvas.width / 4), default=BARS_MM[0])
    pen, font, low = ImageDraw.Draw(canvas), _font(), canvas.height - _MARGIN
    pen.rectangle((_MARGIN - 1, low - 4, _MARGIN + round(length * per_mm) + 1, low + 1), fill=BOTH, outline=0)
    pen.text((_MARGIN, low - _MARGIN), f"{length} mm", fill=BOTH, font=font, anchor="lb", stroke_width=1, stroke_fill=0)
    return np.asarray(canvas)


_TWO = (("reference", REFERENCE), ("prediction", PREDICTION), ("both", BOTH))


def legend(caption: str, width: int, words: Sequence[tuple[str, Colour]] = _TWO) -> np.ndarray:
    """Text on black: the caption, shortened where it is too long, and the words in their colours, on as many lines as
    they need."""
    strip = Image.new("RGB", (width, _FONT + _MARGIN + _MARGIN // 2))
    pen, font = ImageDraw.Draw(strip), _font()
    while len(caption) > 1 and pen.textlength(caption, font) > width - 2 * _MARGIN:
        caption = caption.removesuffix("…")[:-1] + "…"
    pen.text((_MARGIN, _MARGIN // 2), caption, fill=BOTH, font=font)
    lines, x = [strip], float(width)
    for word, colour in words:
        if x + pen.textlength(word, font) > width - _MARGIN:
            lines.append(Image.new("RGB", (width, _FONT + _MARGIN)))
            pen, x = ImageDraw.Draw(lines[-1]), float(_MARGIN)
        pen.text((x, _MARGIN // 2), word, fill=colour, font=font)
        x += pen.textlength(word, font) + 2 * _MARGIN
    return np.concatenate([np.asarray(line) for line in lines])


def outline_of(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels (H, W) of a class that have another one, or the image's end, within ``width`` up, down, left or right."""
    cross = np.zeros((2 * width + 1, 2 * width + 1), dtype=bool)
    cross[width], cross[:, width] = True, True
    lowest, highest = (f(labels, footprint=cross, mode="constant") for f in (minimum_filter, maximum_filter))
    return (lowest != highest) & (labels > 0)


def _places(count: int, wanted: int) -> np.ndarray:
    """Index of the source pixel, of ``count``, for each of ``wanted`` pixels."""
    return ((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)


def window_of(image: np.ndarray) -> tuple[float, float]:
    """Intensities to be shown as black and as white: the 1st and 99.5th percentile, the background left out, which is a
    value that a tenth of the image has.

    The network's images have it anywhere: a z-score over the brain leaves it in the middle of the greys.
    """
    inside = image[np.isfinite(image) & (image != _background(image))]
    low, high = (float(end) for end in np.percentile(inside, (1, 99.5))) if inside.size else (0.0, 1.0)
    return (low, high) if high > low else (high - 1, high)


def _background(image: np.ndarray) -> float:
    known = image[np.isfinite(image)]
    values, counts = np.unique(known, return_counts=True)
    return float(values[counts.argmax()]) if counts.size and counts.max() > 0.1 * known.size else np.nan


def _grey(image: np.ndarray) -> np.ndarray:
    """Black and white as `window_of` says; the background is black."""
    low, high = window_of(image)
    level = (np.where(np.isfinite(image) & (image != _background(image)), image, low) - low) / (high - low)
    return (_BRIGHTEST * np.clip(level, 0, 1)).astype(np.uint8)


def _rectangle(picture: np.ndarray, edges: tuple[int, int, int, int]) -> None:
    """Draw a box into the picture: a dashed line of two pixels inside of left, top, right, bottom, with a dark rim."""
    ring = np.zeros(picture.shape[:2], dtype=bool)
    left, top, right, bottom = (max(edge, 0) for edge in edges)
    ring[top:bottom, left:right] = True
    ring[top + 2 : max(bottom - 2, 0), left + 2 : max(right - 2, 0)] = False
    picture[binary_dilation(ring) & ~ring] //= 2
    rows, columns = np.nonzero(ring)
    drawn = (rows + columns) // _DASH % 3 > 0
    picture[rows, columns] //= 2
    picture[rows[drawn], columns[drawn]] = BOX


def _font(size: int = _FONT) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings a font

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
