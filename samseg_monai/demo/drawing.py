"""What both kinds of phantoms are drawn with: grids in millimetres, smooth random fields, marked NIfTI files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from samseg_monai.data.files.volumes import PHANTOM_MARK
from samseg_monai.errors import DataError

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """Voxel centres in mm, relative to the middle of the field; ``x, y, z`` broadcast to ``shape``."""

    shape: Triple
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


def checked_shape(shape: Sequence[int], smallest: Triple) -> Triple:
    """``shape`` as three whole numbers; DataError where it is below ``smallest``."""
    if len(shape) != 3 or any(n < least for n, least in zip(shape, smallest, strict=True)):
        raise DataError(f"phantom shape must be at least {' x '.join(map(str, smallest))}, got {tuple(shape)}")
    x, y, z = (int(n) for n in shape)
    return x, y, z


def save(values: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write a phantom as NIfTI, marked as one in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.header["descrip"] = PHANTOM_MARK  # survives copying and renaming: results on phantoms must say so
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)
