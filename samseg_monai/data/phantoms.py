"""Seeded phantoms in the layout of BraTS 2023: for demos and tests, never for clinical use.

Each case has four scans (t1n, t1c, t2w, t2f) and a segmentation in the BraTS 2023 coding (1 core, 2 oedema,
3 enhancing rim). Tissue contrasts follow the textbook order of each scan; the tumour's contrast is drawn per case and
overlaps grey matter, white matter lesions and vessels, so that no threshold finds it, while its outline stays visible.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from samseg_monai.data.phantom_anatomy import (
    CORE,
    CSF,
    GREY,
    OEDEMA,
    RIM,
    WHITE,
    Brain,
    Grid,
    make_brain,
    make_tumour,
    smooth_field,
)
from samseg_monai.errors import DataError

SCANS = ("t1n", "t1c", "t2w", "t2f")
DEMO_SHAPE = (64, 72, 24)
FIELD_MM = (160.0, 180.0, 144.0)
MARK = b"samseg-monai phantom"
LOG = logging.getLogger(__name__)

# Mean intensity by scan, relative to the scan's own gain; tumour entries are (low, high), drawn per case.
_TISSUE = {
    "t1n": {CSF: 0.28, GREY: 0.62, WHITE: 0.80},
    "t1c": {CSF: 0.28, GREY: 0.64, WHITE: 0.80},
    "t2w": {CSF: 1.15, GREY: 0.68, WHITE: 0.52},
    "t2f": {CSF: 0.22, GREY: 0.70, WHITE: 0.56},
}
_TUMOUR = {
    "t1n": {CORE: (0.38, 0.58), OEDEMA: (0.48, 0.62), RIM: (0.50, 0.66)},
    "t1c": {CORE: (0.50, 0.80), OEDEMA: (0.48, 0.62), RIM: (0.92, 1.25)},
    "t2w": {CORE: (0.75, 1.05), OEDEMA: (0.78, 1.00), RIM: (0.62, 0.90)},
    "t2f": {CORE: (0.60, 0.95), OEDEMA: (0.82, 1.08), RIM: (0.68, 0.95)},
}


def default_spacing_mm(shape: Sequence[int]) -> tuple[float, float, float]:
    """Spacing at which a grid of ``shape`` holds a whole head: 1 mm for 240 x 240 x 155, coarser for smaller grids."""
    x, y, z = (max(1.0, round(field / n, 3)) for field, n in zip(FIELD_MM, shape, strict=True))
    return x, y, z


def make_case(
    seed: int | Sequence[int],
    shape: Sequence[int] = DEMO_SHAPE,
    spacing_mm: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """Draw one case.

    Args:
        seed: everything is drawn from it; the same seed, shape and spacing give the same bytes.
        shape: voxels along the three axes, at least 16 x 16 x 8.
        spacing_mm: voxel size; default ``default_spacing_mm(shape)``.

    Returns:
        ``t1n t1c t2w t2f``: (X, Y, Z) int16, 0 outside the brain and positive inside;
        ``seg``: (X, Y, Z) uint8 of 0 to 3; ``affine``: (4, 4) float64, to RAS mm, as BraTS stores it (axes L, P, S).

    Raises:
        DataError: the shape is too small, or the spacing is not positive.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape[:2]) < 16 or shape[2] < 8:
        raise DataError(f"phantom shape must be at least 16 x 16 x 8, got {shape}")
    spacing = tuple(float(s) for s in (spacing_mm or default_spacing_mm(shape)))
    if len(spacing) != 3 or min(spacing) <= 0:
        raise DataError(f"phantom spacing must be three positive numbers in mm, got {spacing}")
    rng = np.random.default_rng(seed)
    inner, window = _head_window(shape, spacing)
    brain = make_brain(inner, rng)
    tumour = make_tumour(inner, brain, rng)

    case: dict[str, np.ndarray] = {"affine": brats_affine(shape, spacing)}
    for name, values in {**_scans(inner, brain, tumour, rng), "seg": tumour}.items():
        case[name] = np.zeros(shape, dtype=values.dtype)
        case[name][window] = values
    return case


def is_phantom(path: str | Path) -> bool:
    """Tell whether a NIfTI file was written by ``write_brats_cases``; reads its header only."""
    header: Any = nib.load(path).header
    return "descrip" in header and bytes(header["descrip"].item()).startswith(MARK)


def brats_affine(shape: Sequence[int], spacing_mm: Sequence[float]) -> np.ndarray:
    """Affine of the BraTS files, diag(-1, -1, 1) with origin (0, 239, 0) at 1 mm, scaled to another grid."""
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing_mm[1]
    return affine


def write_brats_cases(
    output: str | Path,
    cases: int,
    *,
    shape: Sequence[int] = DEMO_SHAPE,
    spacing_mm: Sequence[float] | None = None,
    seed: int = 0,
    unlabelled: int = 0,
    progress: bool = False,
) -> list[str]:
    """Write ``cases`` labelled cases to ``output/<case>/`` and ``unlabelled`` more to ``output/unlabelled/<case>/``.

    Ids are BraTS-MEN-00000-000 onwards, unlabelled ones continue the count; case ``n`` depends only on (seed, n).
    Files are ``<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``, int16 scans and a uint8 segmentation.

    Returns:
        The ids of the labelled cases.

    Raises:
        DataError: a count is negative, or as ``make_case``.
    """
    if cases < 0 or unlabelled < 0:
        raise DataError(f"numbers of cases must not be negative, got {cases} labelled and {unlabelled} unlabelled")
    output = Path(output)
    ids = [f"BraTS-MEN-{number:05d}-000" for number in range(cases + unlabelled)]
    for number, case_id in enumerate(tqdm(ids, desc="phantoms", disable=not progress)):
        case = make_case([seed, number], shape, spacing_mm)
        affine = case.pop("affine")
        if number >= cases:
            del case["seg"]
        folder = (output if number < cases else output / "unlabelled") / case_id
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in case.items():
            image = nib.Nifti1Image(values, affine)
            image.header["descrip"] = MARK  # survives copying and renaming: results on phantoms must say so
            image.set_qform(affine, code=1)
            image.set_sform(affine, code=1)
            nib.save(image, folder / f"{case_id}-{name}.nii.gz")
    LOG.info("wrote %d labelled and %d unlabelled phantoms to %s", cases, unlabelled, output)
    return ids[:cases]


def _head_window(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[Grid, tuple[slice, ...]]:
    """Grid of the middle ``FIELD_MM`` and where it lies: computing the empty margin would double the time."""
    sizes = [min(n, int(np.ceil(field / step))) for n, field, step in zip(shape, FIELD_MM, spacing_mm, strict=True)]
    starts = [(n - size) // 2 for n, size in zip(shape, sizes, strict=True)]
    window = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return Grid((sizes[0], sizes[1], sizes[2]), (spacing_mm[0], spacing_mm[1], spacing_mm[2])), window


def _scans(grid: Grid, brain: Brain, tumour: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Intensities of the four scans inside ``grid``: int16, 0 outside the brain."""
    inside = brain.tissue > 0
    texture = smooth_field(grid, rng, length_mm=7)
    # Things that look like parts of a tumour: vessels (t1c) and white matter lesions (t2w, t2f).
    vessels = inside & (brain.depth < 0.16) & (smooth_field(grid, rng, length_mm=8) > 1.5)
    lesions = (brain.tissue == WHITE) & (brain.depth > 0.25) & (smooth_field(grid, rng, length_mm=10) > 1.6)
    classes = np.where(tumour > 0, tumour + WHITE, brain.tissue)
    # The tumour is less uniform than tissue, in patterns of its own.
    mottle = 1 + np.where(tumour > 0, 0.10 * smooth_field(grid, rng, length_mm=6), 0.035 * texture)
    scans = {}
    for name in SCANS:
        table = np.zeros(7, dtype=np.float32)
        for tissue, mean in _TISSUE[name].items():
            table[tissue] = mean * rng.uniform(0.95, 1.05)
        for part, (low, high) in _TUMOUR[name].items():
            table[WHITE + part] = rng.uniform(low, high)
        image = table[classes]
        if name == "t1c":
            image[vessels & (tumour == 0)] = rng.uniform(0.95, 1.2)
        if name in ("t2w", "t2f"):
            image[lesions & (tumour == 0)] *= rng.uniform(1.35, 1.7)
        image *= mottle
        image = ndimage.gaussian_filter(image, 0.6, truncate=2.0)  # partial volume
        image *= 1 + 0.12 * smooth_field(grid, rng, length_mm=90)  # bias field of the coil
        image += rng.uniform(0.03, 0.06) * rng.standard_normal(grid.shape, dtype=np.float32)
        gain = rng.uniform(350, 900)  # arbitrary units differ between scanners
        scans[name] = np.where(inside, np.clip(np.rint(image * gain), 1, 32767), 0).astype(np.int16)
    return scans
