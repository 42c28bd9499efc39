"""Shapes of the phantoms: smooth random fields, a skull-stripped brain with its tissues, and a lobulated meningioma.

All shapes are implicit functions in millimetres, so any grid gets an anatomy of the same size. Sizes follow an adult
brain (about 140 x 165 x 125 mm); meningiomas are extra-axial, so nine in ten are seeded on the brain's surface (90.3 %
of the BraTS 2023 meningioma cases touch the skull-strip edge: LaBella et al., arXiv:2405.09787).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

CSF, GREY, WHITE = 1, 2, 3
CORE, OEDEMA, RIM = 1, 2, 3
SURFACE_FRACTION = 0.9
_HALF_AXES_MM = (68.0, 79.0, 63.0)


@dataclass(frozen=True)
class Grid:
    """Voxel centres in mm, relative to the middle of the field; ``x, y, z`` broadcast to ``shape``."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @property
    def axes(self) -> list[np.ndarray]:
        """Three 1-D float32 arrays of coordinates in mm."""
        return [
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32)
            for n, step in zip(self.shape, self.spacing_mm, strict=True)
        ]

    @property
    def mesh(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Open mesh of ``axes``: shapes (X,1,1), (1,Y,1), (1,1,Z)."""
        x, y, z = self.axes
        return x[:, None, None], y[None, :, None], z[None, None, :]


def smooth_field(grid: Grid, rng: np.random.Generator, *, length_mm: float) -> np.ndarray:
    """Gaussian random field of about zero mean and unit variance that varies over ``length_mm``: (X, Y, Z) float32.

    Random values on a coarse grid, interpolated axis by axis with cubic B-spline weights: three small matrix products
    instead of a convolution, so that a 240 x 240 x 155 field takes a fraction of a second.
    """
    matrices = [_spline_weights(n, step, length_mm) for n, step in zip(grid.shape, grid.spacing_mm, strict=True)]
    field = rng.standard_normal([m.shape[1] for m in matrices], dtype=np.float32)
    for matrix in matrices:
        # (a, b, c) -> (b, c, X): each product consumes the first axis and appends the fine one
        field = np.tensordot(field, matrix, axes=(0, 1))
    return field


def _spline_weights(count: int, step_mm: float, length_mm: float) -> np.ndarray:
    """(count, knots) weights of a cubic B-spline with rows of unit length, so that white knots give unit variance."""
    # Fields finer than the grid would alias into voxel noise, which is added separately.
    position = np.arange(count) * step_mm / max(length_mm, 1.5 * step_mm) + 1.5
    knots = np.arange(int(position[-1]) + 3)
    t = np.abs(position[:, None] - knots[None, :])
    weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0.0))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Brain:
    """``tissue`` (X,Y,Z) uint8 with 0 outside; ``depth`` float32, 0 at the surface and 1 at the centre, < 0 outside."""

    tissue: np.ndarray
    depth: np.ndarray
    half_axes_mm: tuple[float, float, float]


def make_brain(grid: Grid, rng: np.random.Generator) -> Brain:
    """Draw a brain: wavy ellipsoid with a flat base, folded cortex, sulci and two lateral ventricles."""
    a, b, c = (axis * rng.uniform(0.94, 1.03) for axis in _HALF_AXES_MM)
    x, y, z = grid.mesh
    # The base is flatter than the vertex, and the front narrower than the back.
    width = a * (1 - 0.12 * np.clip(y / b, 0, 1) ** 2)
    height = np.where(z < 0, 0.86 * c, c)
    radius = (np.abs(x / width) ** 2.3 + np.abs(y / b) ** 2.3 + np.abs(z / height) ** 2.3) ** np.float32(1 / 2.3)
    depth = 1 - radius + 0.025 * smooth_field(grid, rng, length_mm=22)

    fold = smooth_field(grid, rng, length_mm=9)
    white = depth > 0.13 + 0.055 * fold
    sulcus = (depth < 0.17) & (fold > 1.35)
    # The gap between the hemispheres, kept clear of the ventricles.
    sulcus |= (np.abs(x) < 1.6 + 0.5 * fold) & (depth < 0.38) & (z > -0.3 * c)
    ganglia = (((np.abs(x) - 24) / 11) ** 2 + ((y - 6) / 20) ** 2 + ((z + 4) / 15) ** 2 + 0.12 * fold) < 1
    ventricle = _ventricles(grid, rng, wave=0.15 * fold)

    tissue = np.where(white, np.uint8(WHITE), np.uint8(GREY))
    tissue[ganglia] = GREY
    tissue[sulcus | ventricle] = CSF
    tissue[depth <= 0] = 0
    return Brain(tissue, depth.astype(np.float32), (a, b, c))


def _ventricles(grid: Grid, rng: np.random.Generator, *, wave: np.ndarray) -> np.ndarray:
    x, y, z = grid.mesh
    size = rng.uniform(0.8, 1.35)
    ventricle = np.zeros(grid.shape, dtype=bool)
    for side in (-1, 1):
        lean = size * rng.uniform(0.9, 1.1)
        # Bodies bend outwards towards the back.
        centre = side * (10 + 0.0035 * (y - 15) ** 2)
        body = ((x - centre) / 6.5) ** 2 + (y / 31) ** 2 + ((z - 8) / 9) ** 2
        ventricle |= body / lean**2 + wave < 1
    return ventricle


def make_tumour(grid: Grid, brain: Brain, rng: np.random.Generator) -> np.ndarray:
    """Draw one lobulated tumour in the brain: (X, Y, Z) uint8 of 0, ``CORE``, ``OEDEMA``, ``RIM``.

    A union of ellipsoid lobes around a seed point, roughened by a random field; the core lies inside, the rim encloses
    it (meningiomas often enhance nearly as a whole), and oedema spreads unevenly into the white matter on one side.
    """
    radius = rng.uniform(12, 20)
    centre, inward = _seed_point(brain, rng, radius=radius)
    x, y, z = grid.mesh
    rough = smooth_field(grid, rng, length_mm=11)
    lobes = _lobes(grid, rng, centre=centre, radius=radius) - 0.16 * rough

    # Oedema: the lobes grown by an amount that varies with direction, drawn out along `inward`.
    reach_mm = rng.uniform(5, 17)
    shifted = centre + inward * rng.uniform(0.3, 0.7) * radius
    distance = np.sqrt((x - shifted[0]) ** 2 + (y - shifted[1]) ** 2 + (z - shifted[2]) ** 2)
    fingers = smooth_field(grid, rng, length_mm=13)
    towards = (x - centre[0]) * inward[0] + (y - centre[1]) * inward[1] + (z - centre[2]) * inward[2]
    spread = 0.75 * radius + reach_mm * (0.3 + 0.6 * fingers + 0.3 * np.clip(towards / radius, -1, 1))
    oedema = (distance < spread) & (brain.tissue != CSF)

    solid = lobes > 0
    tumour = np.zeros(grid.shape, dtype=np.uint8)
    tumour[oedema] = OEDEMA
    tumour[solid] = RIM
    tumour[lobes > rng.uniform(0.28, 0.5) + 0.12 * fingers] = CORE
    tumour[brain.tissue == 0] = 0
    return _largest_piece(tumour)


def _seed_point(brain: Brain, rng: np.random.Generator, *, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the tumour in mm and the unit vector from it into the brain."""
    direction = rng.standard_normal(3)
    direction[2] = abs(direction[2]) * 0.7 - 0.25  # convexity and falx more often than skull base
    direction /= np.linalg.norm(direction)
    axes = np.array(brain.half_axes_mm)
    surface_mm = 1 / np.linalg.norm(direction / axes)
    on_surface = rng.random() < SURFACE_FRACTION
    buried_mm = rng.uniform(0.2, 0.75) * radius if on_surface else rng.uniform(1.7, 2.2) * radius
    return direction * (surface_mm - buried_mm), -direction


def _lobes(grid: Grid, rng: np.random.Generator, *, centre: np.ndarray, radius: float) -> np.ndarray:
    """Implicit union of three to five ellipsoids; positive inside, at most 1."""
    x, y, z = grid.mesh
    best = np.full(grid.shape, -9.0, dtype=np.float32)
    for number in range(int(rng.integers(3, 6))):
        offset = rng.standard_normal(3)
        offset *= radius * (0.2 if number == 0 else rng.uniform(0.55, 0.95)) / np.linalg.norm(offset)
        half = radius * rng.uniform(0.55, 0.9, size=3)
        p = centre + offset
        inside = 1 - np.sqrt(((x - p[0]) / half[0]) ** 2 + ((y - p[1]) / half[1]) ** 2 + ((z - p[2]) / half[2]) ** 2)
        np.maximum(best, inside, out=best)
    return best


def _largest_piece(tumour: np.ndarray) -> np.ndarray:
    """Drop satellites: crumbs of oedema far from the tumour would stretch every simulated box."""
    pieces, count = ndimage.label(tumour > 0, structure=np.ones((3, 3, 3)))
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        tumour[pieces != sizes.argmax()] = 0
    return tumour
