"""Shapes as fields, and the smooth noise that textures them: numpy only, seeded by the caller.

A shape is a field ``d(x, y)``: about the distance to its outline in pixels, positive inside. Softness, rims and
occlusion follow from the field, and only a window around an object is computed: one image takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from samseg_monai.errors import ConfigError

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
