"""Seeded phantoms in the layout of BraTS 2023: for demos and tests, never for clinical use.

Each case has four scans (t1n, t1c, t2w, t2f) and a segmentation in the BraTS 2023 coding (1 core, 2 oedema,
3 enhancing rim). Tissue contrasts follow the textbook order of each scan; the tumour's contrast is drawn per case and
overlaps grey matter, white matter lesions and vessels, so that no threshold finds it, while its outline stays visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from samseg_monai.data import BRATS_SCANS
from samseg_monai.demo.drawing import Grid, checked_shape, save, smooth_field
from samseg_monai.errors import DataError

CSF, GREY, WHITE = 1, 2, 3
CORE, OEDEMA, RIM = 1, 2, 3
SURFACE_FRACTION = 0.9
_HALF_AXES_MM = (68.0, 79.0, 63.0)
DEMO_SHAPE = (64, 72, 24)
FIELD_MM = (160.0, 180.0, 144.0)
SMALLEST_SHAPE = (16, 16, 8)

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


def make_case(seed: int | Sequence[int], shape: Sequence[int] = DEMO_SHAPE) -> dict[str, np.ndarray]:
    """Draw one case of ``shape``, at least 16 x 16 x 8 voxels (else DataError); the same seed gives the same bytes.

    Returns:
        ``t1n t1c t2w t2f``: (X, Y, Z) int16, 0 outside the brain and positive inside;
        ``seg``: (X, Y, Z) uint8 of 0 to 3; ``affine``: (4, 4) float64, to RAS mm, as BraTS stores it (axes L, P, S).
    """
    shape = checked_shape(shape, SMALLEST_SHAPE)
    spacing = default_spacing_mm(shape)
    rng = np.random.default_rng(seed)
    inner, window = _head_window(shape, spacing)
    brain = make_brain(inner, rng)
    tumour = make_tumour(inner, brain, rng)

    case: dict[str, np.ndarray] = {"affine": brats_affine(shape, spacing)}
    for name, values in {**_scans(inner, brain, tumour, rng), "seg": tumour}.items():
        case[name] = np.zeros(shape, dtype=values.dtype)
        case[name][window] = values
    return case


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
    seed: int = 0,
    unlabelled: int = 0,
    progress: bool = False,
) -> list[str]:
    """Write ``cases`` labelled cases to ``output/<case>/`` and ``unlabelled`` more to ``output/unlabelled/<case>/``.

    Ids are BraTS-MEN-00000-000 onwards, unlabelled ones continue the count; case ``n`` depends only on (seed, n).
    Files are ``<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``, int16 scans and a uint8 segmentation. Returns the ids of the
    labelled cases. Raises DataError for negative counts, and as ``make_case``.
    """
    if cases < 0 or unlabelled < 0:
        raise DataError(f"numbers of cases must not be negative, got {cases} labelled and {unlabelled} unlabelled")
    output = Path(output)
    ids = [f"BraTS-MEN-{number:05d}-000" for number in range(cases + unlabelled)]
    for number, case_id in enumerate(tqdm(ids, desc="phantoms", disable=not progress)):
        case = make_case([seed, number], shape)
        affine = case.pop("affine")
        if number >= cases:
            del case["seg"]
        folder = (output if number < cases else output / "unlabelled") / case_id
        for name, values in case.items():
            save(values, affine, folder / f"{case_id}-{name}.nii.gz")
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
    for name in BRATS_SCANS:
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
