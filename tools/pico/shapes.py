"""Procedurally drawn shapes: images, masks and boxes from nothing but a seed.

They teach pico SAM what a box prompt means (``tools.pico``). An image is a textured background on which two
to eight objects of many kinds are painted over each other; an object's mask is the part of it that stays visible.
Images are z-scored as the medical pipeline's are, so ``input_scale="zscore"`` is what the network has seen.

A shape is a field ``d(x, y)``: about the distance to its outline in pixels, positive inside. Softness, rims and
occlusion follow from the field, and only a window around an object is computed: one image takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from samseg_monai.errors import ConfigError

MIN_DIAMETER, MAX_DIAMETER = 12.0, 150.0  # pixels of a 256-pixel image
MIN_VISIBLE_PIXELS, MIN_VISIBLE_SIDE, MIN_VISIBLE_SHARE = 40, 8, 0.35  # below these an object is no fair question

Array = NDArray[np.float32]
Field = Callable[[np.random.Generator, Array, Array, float], Array]


@lru_cache(maxsize=256)
def spline_matrix(size: int, cells: int) -> Array:
    """(size, cells + 3): the uniform cubic B-splines on ``cells`` cells, sampled at the centres of ``size`` pixels."""
    t = (np.arange(size) + 0.5) * cells / size
    first = np.minimum(t.astype(int), cells - 1)
    f = t - first
    weights = [(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3]
    matrix = np.zeros((size, cells + 3), np.float32)
    for k, weight in enumerate(weights):
        matrix[np.arange(size), first + k] = weight / 6
    return matrix


@lru_cache(maxsize=256)
def pooling_matrix(size: int, cells: int) -> Array:
    """(cells + 3, size): means of neighbouring pixels, one row per spline of ``spline_matrix``, summing to one."""
    matrix = spline_matrix(size, cells).T
    return np.ascontiguousarray(matrix / matrix.sum(1, keepdims=True))


def smooth_noise(rng: np.random.Generator, size: int, cells: int, rows: slice, cols: slice) -> Array:
    """Smooth noise of standard deviation about one, with ``cells`` bumps along the canvas, in a window of it."""
    basis = spline_matrix(size, cells)
    rows_basis, cols_basis = basis[rows], basis[cols]
    # Only the coefficients that the window touches are drawn: a fine grain on a small object stays cheap.
    r0, r1 = rows.start * cells // size, min((rows.stop - 1) * cells // size + 4, cells + 3)
    c0, c1 = cols.start * cells // size, min((cols.stop - 1) * cells // size + 4, cells + 3)
    coefficients = rng.standard_normal((r1 - r0, c1 - c0), dtype=np.float32)
    # 0.479 = integral of the squared cubic B-spline: the deviation that interpolation in two axes leaves.
    return rows_basis[:, r0:r1] @ coefficients @ cols_basis[:, c0:c1].T / np.float32(0.479)


def ellipse(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """Ellipse with its long axis along x."""
    minor = radius * rng.uniform(0.45, 1)
    return ((1 - np.hypot(x / radius, y / minor)) * minor).astype(np.float32)


def _contour(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """Outline given by a few Fourier terms of the angle."""
    y = y / rng.uniform(0.6, 1)
    theta = np.arctan2(y, x)
    outline = np.full_like(x, 0.8)
    strength = rng.uniform(0.1, 0.4)
    for order in range(2, int(rng.integers(4, 8))):
        outline += rng.normal(0, strength / order) * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    return (radius * np.maximum(outline, 0.25) - np.hypot(x, y)).astype(np.float32)


def _polygon(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """Star-shaped polygon of 3 to 9 corners: the distance to the edge that a pixel's angle meets."""
    corners = int(rng.integers(3, 10))
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners - np.pi
    lengths = radius * rng.uniform(rng.uniform(0.4, 0.95), 1, corners)
    px, py = lengths * np.cos(angles), lengths * np.sin(angles)
    edge = np.searchsorted(np.sort(angles), np.arctan2(y, x)) - 1  # -1 is the edge that closes the polygon
    ex, ey = np.roll(px, -1) - px, np.roll(py, -1) - py
    length = np.hypot(ex, ey)
    return ((ex / length)[edge] * (y - py[edge]) - (ey / length)[edge] * (x - px[edge])).astype(np.float32)


def _blob(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """Thresholded smooth noise on a cone: ragged, sometimes with a satellite."""
    cells = int(rng.integers(4, 9))
    rows, cols = spline_matrix(x.shape[0], cells), spline_matrix(x.shape[1], cells)
    noise = rows @ rng.standard_normal((cells + 3, cells + 3), dtype=np.float32) @ cols.T / np.float32(0.479)
    return radius * (0.8 + rng.uniform(0.1, 0.25) * noise) - np.hypot(x, y)


def _lobes(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """Union of three to six overlapping ellipses."""
    field = np.full_like(x, -np.inf)
    for _ in range(int(rng.integers(3, 7))):
        angle, far = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.2, 0.5)
        field = np.maximum(
            field, ellipse(rng, x - far * np.cos(angle), y - far * np.sin(angle), radius * rng.uniform(0.3, 0.55))
        )
    return field


def _crescent(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """An ellipse with a round bite or, when the bite lies inside, a ring."""
    hole, off = radius * rng.uniform(0.3, 0.6), radius * rng.uniform(0, 0.7)
    return np.minimum(ellipse(rng, x, y, radius), np.hypot(x - off, y) - hole).astype(np.float32)


def _bar(rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """Rectangle with round corners, from a square to a thin rod."""
    width = max(radius * rng.uniform(0.2, 0.85), 3.0)
    corner = width * rng.uniform(0.1, 1)
    qx, qy = np.abs(x) - (radius * 0.85 - corner), np.abs(y) - (width - corner)
    distance = corner - np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) - np.minimum(np.maximum(qx, qy), 0)
    return distance.astype(np.float32)


KINDS: dict[str, tuple[Field, float]] = {  # name: (field, share of the objects)
    "ellipse": (ellipse, 0.22),
    "contour": (_contour, 0.22),
    "blob": (_blob, 0.18),
    "lobes": (_lobes, 0.14),
    "polygon": (_polygon, 0.12),
    "bar": (_bar, 0.06),
    "crescent": (_crescent, 0.06),
}


def draw_field(kind: str, rng: np.random.Generator, x: Array, y: Array, radius: float) -> Array:
    """The field of one shape, turned by a random angle.

    Args:
        kind: a key of ``KINDS``.
        rng: source of the shape's random proportions.
        x, y: (h, w) coordinates in pixels from the shape's centre.
        radius: half of the shape's longest extent, about, in pixels.

    Returns:
        (h, w) float32: positive inside, near the outline about the distance to it in pixels.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown shape {kind!r}; use one of {', '.join(KINDS)}")
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return KINDS[kind][0](rng, c * x + s * y, c * y - s * x, radius).astype(np.float32)


@dataclass(frozen=True)
class ShapeSample:
    """One drawn image and some of its objects.

    Attributes:
        image: (3, S, S) float32, z-scored; the channels are equal except in the few coloured images.
        masks: (K, S, S) bool, the visible part of K objects.
        boxes: (K, 4) float32, x0 y0 x1 y1 in pixels: the tight box (last pixel + 1) with jittered sides.
    """

    image: Array
    masks: NDArray[np.bool_]
    boxes: Array


@dataclass(frozen=True)
class _Window:
    """The part of the canvas on which one object is computed, and its pixels relative to the object's centre."""

    rows: slice
    cols: slice
    x: Array
    y: Array


def _window(size: int, cx: float, cy: float, reach: float) -> _Window:
    rows = slice(max(int(cy - reach), 0), min(int(cy + reach) + 1, size))
    cols = slice(max(int(cx - reach), 0), min(int(cx + reach) + 1, size))
    y, x = np.mgrid[rows, cols].astype(np.float32)
    return _Window(rows, cols, x - np.float32(cx), y - np.float32(cy))


def _texture(rng: np.random.Generator, size: int, window: _Window, mean: float) -> Array:
    """A patch of material: mean, noise at two scales, often a gradient, sometimes stripes or fine grain."""
    rows, cols = window.rows, window.cols
    coarse, fine = int(rng.integers(2, 10)), int(rng.integers(16, 97))
    patch = mean + rng.uniform(0, 0.06) * smooth_noise(rng, size, coarse, rows, cols)
    patch += rng.uniform(0, 0.07) * smooth_noise(rng, size, fine, rows, cols)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * window.x + np.float32(np.sin(angle)) * window.y
    if rng.random() < 0.4:
        patch += rng.uniform(0.02, 0.12) * along / max(float(np.abs(along).max()), 1.0)
    if rng.random() < 0.15:
        patch += rng.uniform(0.02, 0.10) * np.sin(along * np.float32(2 * np.pi / rng.uniform(4, 24)))
    return patch.astype(np.float32)


def _any_kind(rng: np.random.Generator, window: _Window, radius: float) -> Array:
    kind = rng.choice(list(KINDS), p=[share for _, share in KINDS.values()])
    return draw_field(str(kind), rng, window.x, window.y, radius)


def _contrasting(rng: np.random.Generator, mean: float) -> float:
    """A grey level in [0, 1] that differs from ``mean``, often by little."""
    step = 0.07 + 0.5 * rng.beta(1, 2)
    up = rng.random() < 0.5
    if not 0 <= mean + (step if up else -step) <= 1:
        up = not up
    return float(mean + (step if up else -step))


def _paint(rng: np.random.Generator, canvas: Array, labels: NDArray[np.uint8], number: int, place: tuple) -> int:
    """Paint object ``number`` at ``place`` (cx, cy, radius) on canvas and labels; returns how many pixels it covers."""
    cx, cy, radius = place
    window = _window(canvas.shape[0], cx, cy, 1.5 * radius + 6)
    here = (window.rows, window.cols)
    field = _any_kind(rng, window, radius)
    inside = field > 0
    # Contrast is measured against what the object really lies on, else a tenth of the objects would be invisible.
    mean = _contrasting(rng, float(canvas[here][inside].mean()) if inside.any() else 0.5)
    fill = _texture(rng, canvas.shape[0], window, mean)
    if rng.random() < 0.25:  # a core of other material that belongs to the object: a lesion's necrosis, an eye's pupil
        off = rng.uniform(-0.3, 0.3, 2) * radius
        core = ellipse(rng, window.x - off[0], window.y - off[1], radius * rng.uniform(0.25, 0.65))
        fill += np.clip(core / rng.uniform(1, 4) + 0.5, 0, 1) * (_contrasting(rng, mean) - mean)
    if rng.random() < 0.2:  # a rim, as a capsule or an enhancing margin
        fill += rng.uniform(-0.3, 0.3) * np.exp(-((field / rng.uniform(1.5, 5)) ** 2))
    softness = rng.uniform(0.5, min(4.0, max(1.0, radius / 5)))
    alpha = np.clip(field / (2 * softness) + 0.5, 0, 1) * rng.uniform(0.8, 1)
    canvas[here] += alpha * (fill - canvas[here])
    labels[here][inside] = number
    return int(inside.sum())


def _scene(rng: np.random.Generator, size: int) -> tuple[Array, NDArray[np.uint8], list[int], NDArray[np.bool_]]:
    """Background and objects: grey canvas, label map, pixels that each object covered when painted, body mask."""
    whole = _window(size, size / 2, size / 2, size)
    mean = rng.uniform(0.1, 0.9)
    canvas = _texture(rng, size, whole, mean)
    body = np.ones((size, size), bool)
    if rng.random() < 0.35:  # something like a head or an abdomen in air
        kind = "ellipse" if rng.random() < 0.5 else "contour"
        field = draw_field(kind, rng, whole.x, whole.y, size * rng.uniform(0.4, 0.55))
        body = field > 0
        canvas *= np.clip(field / rng.uniform(1, 4) + 0.5, 0, 1)
    labels = np.zeros((size, size), np.uint8)
    covered = []
    spots = np.argwhere(body) if not body.all() else None
    for number in range(1, int(rng.integers(2, 9)) + 1):
        scale = size / 256
        radius = 0.5 * scale * MIN_DIAMETER * (MAX_DIAMETER / MIN_DIAMETER) ** (rng.random() ** 0.75)
        cy, cx = rng.uniform(0, size, 2) if spots is None or not len(spots) else spots[rng.integers(len(spots))]
        covered.append(_paint(rng, canvas, labels, number, (float(cx), float(cy), radius)))
    return canvas, labels, covered, body


def _expose(rng: np.random.Generator, canvas: Array, body: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
    """Camera or scanner: bias field, grain, lost resolution, z-score, padding. Returns the image and its valid part."""
    size = canvas.shape[0]
    full = slice(0, size)
    if rng.random() < 0.5:
        canvas = canvas * np.exp(rng.uniform(0, 0.25) * smooth_noise(rng, size, 2, full, full))
    grain = rng.standard_normal((size, size), dtype=np.float32) * np.float32(0.07 * rng.beta(1, 2))
    canvas = canvas + (grain * body if rng.random() < 0.5 else grain)
    if rng.random() < 0.4:
        cells = int(rng.integers(size // 4, size // 2))
        pool, spline = pooling_matrix(size, cells), spline_matrix(size, cells)
        canvas = spline @ (pool @ canvas @ pool.T) @ spline.T
    valid = np.ones((size, size), bool)
    if rng.random() < 0.2:  # slices that are not square are padded with zeros at the bottom or the right
        cut = int(size * rng.uniform(0.6, 1))
        valid[(slice(cut, None), full) if rng.random() < 0.5 else (full, slice(cut, None))] = False
    counted = valid & body if rng.random() < 0.5 and (valid & body).any() else valid
    values = canvas[counted]
    image = (canvas - values.mean()) / max(float(values.std()), 1e-3)
    if rng.random() < 0.5:
        image = image * np.float32(np.exp(rng.normal(0, 0.15))) + np.float32(rng.normal(0, 0.15))
    if rng.random() < 0.3:
        image = np.where(body, image, 0)  # MONAI's NormalizeIntensity(nonzero=True) leaves air at zero
    return np.where(valid, image, 0).astype(np.float32), valid


def _tint(rng: np.random.Generator, image: Array, labels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> Array:
    """(3, S, S): the grey image three times; one time in ten with a colour per object."""
    if rng.random() >= 0.1:
        return np.repeat(image[None], 3, 0)
    colours = rng.normal(0, 0.3, (int(labels.max()) + 1, 3)).astype(np.float32)
    return (image + colours[labels].transpose(2, 0, 1) * valid).astype(np.float32)


def tight_box(mask: NDArray[np.bool_]) -> Array:
    """(4,) float32 x0 y0 x1 y1 of a non-empty (H, W) mask; x1 and y1 are one past the last pixel."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)


def jittered(box: Array, jitter: float, size: int, rng: np.random.Generator) -> Array:
    """Move each side of a box in or out by a uniform share of up to ``jitter`` of its length; stays in the image."""
    sides = np.tile(box[2:] - box[:2], 2)
    return np.clip(box + sides * rng.uniform(-jitter, jitter, 4), 0, size).astype(np.float32)


def draw_sample(seed: int, index: int, *, size: int = 256, objects: int = 3, jitter: float = 0.05) -> ShapeSample:
    """Draw image ``index`` of the endless stream ``seed``: the same arguments always give the same sample.

    Args:
        seed, index: non-negative; together they name the image.
        size: side S of the square image in pixels, at least 64.
        objects: K, how many objects to ask for; when fewer are visible, some are asked twice with other boxes.
        jitter: largest move of a box side as a share of the box's length on that axis.

    Raises:
        ConfigError: a number out of range.
    """
    if size < 64 or objects < 1 or not 0 <= jitter < 0.5:
        got = f"size {size}, objects {objects}, jitter {jitter}"
        raise ConfigError(f"draw_sample: got {got}; need size >= 64, objects >= 1 and 0 <= jitter < 0.5")
    rng = np.random.default_rng([seed, index])
    while True:
        canvas, labels, covered, body = _scene(rng, size)
        image, valid = _expose(rng, canvas, body)
        labels = labels * valid
        visible = np.bincount(labels.ravel(), minlength=len(covered) + 1)[1:]
        asked = []
        for number, (seen, all_of_it) in enumerate(zip(visible, covered, strict=True), start=1):
            if seen >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * all_of_it):
                box = tight_box(labels == number)
                if min(box[2:] - box[:2]) >= MIN_VISIBLE_SIDE:
                    asked.append((number, box))
        if asked:
            break
    order = [int(i) for i in rng.permutation(len(asked))]
    picked = [asked[order[k % len(order)]] for k in range(objects)]
    masks = np.stack([labels == number for number, _ in picked])
    boxes = np.stack([jittered(box, jitter, size, rng) for _, box in picked])
    return ShapeSample(_tint(rng, image, labels, valid), masks, boxes)
