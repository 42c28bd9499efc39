"""Organs as implicit functions in millimetres, and a grid on which they grow to given volumes.

A shape joins ellipsoids and a tube with a smooth minimum; its value is about the distance to its surface. A grown organ
takes the free voxels with the lowest values until its volume is reached: organs cannot overlap, keep their volumes on
any grid and dent each other. Coordinates are mm to the patient's right, front and head, from the middle of the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from samseg_monai.data.phantom_anatomy import Grid

Mesh = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """Ellipsoids (centre, half axes, rotation) and one tube (points, radii), joined, less the ``cuts``; all in mm."""

    ellipsoids: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    radii: Sequence[float] = ()
    cuts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    waves: tuple[np.ndarray, np.ndarray] | None = None

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners in mm of a box that holds the shape with room to grow."""
        lows = [c - 1.15 * h.max() for c, h, _ in self.ellipsoids] + [p - r for p, r in self._knots()]
        highs = [c + 1.15 * h.max() for c, h, _ in self.ellipsoids] + [p + r for p, r in self._knots()]
        return np.min(lows, axis=0) - 12, np.max(highs, axis=0) + 12

    def distance(self, mesh: Mesh) -> np.ndarray:
        """About the distance to the surface in mm, negative inside: (X, Y, Z) float32 on an open ``mesh``."""
        parts = [_ellipsoid(mesh, *e) for e in self.ellipsoids]
        for (p, rp), (q, rq) in zip(self._knots()[:-1], self._knots()[1:], strict=True):
            parts.append(_capsule(mesh, p, q, rp, rq))
        value = parts[0]
        for other in parts[1:]:
            value = _smooth_minimum(value, other, reach_mm=8.0)
        for cut in self.cuts:
            # Steep, so that a shape which must grow does so elsewhere.
            value = np.maximum(value, -3 * _ellipsoid(mesh, *cut))
        if self.waves is not None:
            for wave, phase in zip(*self.waves, strict=True):
                value += 1.3 * np.sin(sum(k * m for k, m in zip(wave.astype(np.float32), mesh, strict=True)) + phase)
        return value

    def _knots(self) -> list[tuple[np.ndarray, float]]:
        return list(zip(self.points, self.radii, strict=True))


class Canvas:
    """A grid on which organs grow: ``tissue`` (X,Y,Z) uint8 and ``free`` bool, where an organ may still go."""

    def __init__(self, grid: Grid, free: np.ndarray) -> None:
        x, y, z = grid.mesh
        self.mesh: Mesh = (-x, y, z)
        self.axes = (-grid.axes[0], *grid.axes[1:])
        self.voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
        self.spacing_mm = grid.spacing_mm
        self.free = free
        self.tissue = np.zeros(grid.shape, dtype=np.uint8)

    def grow(self, code: int, shape: Shape, volume_ml: float, *, side: int = 1) -> tuple[tuple[slice, ...], np.ndarray]:
        """Give ``code`` the ``volume_ml`` of free voxels that lie deepest in ``shape``, mirrored when ``side`` is -1.

        Returns:
            The window that holds the shape and, in it, the depth under the grown surface in mm (negative outside).
        """
        window = self._window(shape, side)
        r, a, s = (m[tuple(w if n > 1 else slice(None) for w, n in zip(window, m.shape, strict=True))]
                   for m in self.mesh)  # fmt: skip
        distance = shape.distance((side * r, a, s))
        open_voxels = np.flatnonzero(self.free[window])
        count = min(max(1, round(volume_ml / self.voxel_ml)), open_voxels.size)
        values = distance.ravel()[open_voxels]
        order = np.argpartition(values, count - 1)[:count]
        taken = np.zeros(distance.shape, dtype=bool)
        taken.flat[open_voxels[order]] = True
        self.tissue[window][taken] = code
        self.free[window][taken] = False
        return window, values[order].max() - distance

    def _window(self, shape: Shape, side: int) -> tuple[slice, ...]:
        low, high = shape.bounds()
        if side < 0:
            low, high = low * (-1, 1, 1), high * (-1, 1, 1)
            low, high = np.minimum(low, high), np.maximum(low, high)
        found = [np.flatnonzero((axis >= a) & (axis <= b)) for axis, a, b in zip(self.axes, low, high, strict=True)]
        return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found)


def _ellipsoid(mesh: Mesh, centre: np.ndarray, half: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """(|p| - 1) in units of the half axes, times their geometric mean: about mm near the surface."""
    d = [m - np.float32(c) for m, c in zip(mesh, centre, strict=True)]
    form = ((turn / half**2) @ turn.T).astype(np.float32)
    square = form[0, 0] * d[0] ** 2 + form[1, 1] * d[1] ** 2 + 2 * form[0, 1] * d[0] * d[1]
    square = square + form[2, 2] * d[2] ** 2 + 2 * (form[0, 2] * d[0] + form[1, 2] * d[1]) * d[2]
    return (np.sqrt(np.maximum(square, 0)) - 1) * np.float32(np.prod(half) ** (1 / 3))


def _capsule(mesh: Mesh, p: np.ndarray, q: np.ndarray, rp: float, rq: float) -> np.ndarray:
    """Distance in mm to a stretch of tube from ``p`` to ``q``, whose radius goes from ``rp`` to ``rq``."""
    d = [m - np.float32(c) for m, c in zip(mesh, p, strict=True)]
    axis = (q - p).astype(np.float32)
    length = float(axis @ axis)
    along = np.clip((d[0] * axis[0] + d[1] * axis[1] + d[2] * axis[2]) / length, 0, 1)
    square = sum((di - along * ai) ** 2 for di, ai in zip(d, axis, strict=True))
    return np.sqrt(square) - (np.float32(rp) + np.float32(rq - rp) * along)


def _smooth_minimum(a: np.ndarray, b: np.ndarray, *, reach_mm: float) -> np.ndarray:
    blend = np.maximum(reach_mm - np.abs(a - b), 0) / reach_mm
    return np.minimum(a, b) - blend**2 * np.float32(reach_mm / 4)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Turn about the three axes in radians, first about x."""
    turns = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        one = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        turns = one @ turns
    return turns


def random_waves(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three plane waves of 45 to 100 mm that roughen a surface: wave vectors (3, 3) and phases."""
    direction = rng.standard_normal((3, 3))
    direction *= 2 * np.pi / rng.uniform(45, 100, (3, 1)) / np.linalg.norm(direction, axis=1, keepdims=True)
    return direction, rng.uniform(0, 2 * np.pi, 3).astype(np.float32)


def cut_normal(rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    return np.clip(rng.standard_normal(shape), -1.8, 1.8)
