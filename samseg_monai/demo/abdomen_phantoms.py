"""Seeded abdominal CT phantoms in the layout of BTCV: for demos and tests, never for clinical use.

Each case is a portal-venous CT in Hounsfield units with the thirteen organs of BTCV in their raw coding (``BTCV`` of
``data.datalists.label_maps``). Intensities are typical values of contrast-enhanced abdominal CT, not measurements; they
vary between cases, and organs share theirs with bowel, vessels, muscle and heart, so that no threshold finds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from samseg_monai.data.datalists.label_maps import BTCV_TESTING, BTCV_TRAINING
from samseg_monai.demo import abdomen_anatomy as anatomy
from samseg_monai.demo.abdomen_anatomy import Abdomen, make_abdomen
from samseg_monai.demo.drawing import Grid, checked_shape, save, smooth_field
from samseg_monai.errors import DataError, raise_all

DEMO_SHAPE = (96, 80, 40)
SMALLEST_SHAPE = (40, 32, 16)
FIELD_MM = (360.0, 300.0, 200.0)
FIRST_UNLABELLED = 41

# HU: (mean, spread between cases). Both kidneys share one draw.
_HU = {
    anatomy.AIR: (-1000, 0), anatomy.SPLEEN: (120, 8), anatomy.RIGHT_KIDNEY: (180, 13), anatomy.GALLBLADDER: (10, 5),
    anatomy.OESOPHAGUS: (62, 7), anatomy.LIVER: (110, 9), anatomy.STOMACH: (88, 9), anatomy.AORTA: (170, 13),
    anatomy.VENA_CAVA: (150, 12), anatomy.PORTAL_VEIN: (165, 12), anatomy.PANCREAS: (100, 9),
    anatomy.RIGHT_ADRENAL: (78, 8), anatomy.FAT: (-100, 5), anatomy.MUSCLE: (60, 5), anatomy.BONE: (550, 70),
    anatomy.MARROW: (310, 40), anatomy.LUNG: (-840, 25), anatomy.HEART: (145, 12), anatomy.BOWEL: (98, 9),
    anatomy.CONTENT: (25, 12), anatomy.STOMACH_CONTENT: (35, 15), anatomy.GAS: (-920, 15),
}  # fmt: skip
_TWINS = {anatomy.LEFT_KIDNEY: anatomy.RIGHT_KIDNEY, anatomy.LEFT_ADRENAL: anatomy.RIGHT_ADRENAL}
_NOISE_HU = (15.0, 25.0)


def case_order() -> list[str]:
    """The 30 published ids, training and test interleaved: every beginning holds them nearly 18 to 12."""
    placed = [((n + 0.5) / len(part), case) for part in (BTCV_TRAINING, BTCV_TESTING) for n, case in enumerate(part)]
    return [case for _, case in sorted(placed)]


def default_spacing_mm(shape: Sequence[int]) -> tuple[float, float, float]:
    """Spacing at which ``shape`` holds the 360 x 300 x 200 mm of an abdomen; equal along the two axes of a slice."""
    plane = round(max(FIELD_MM[0] / shape[0], FIELD_MM[1] / shape[1]), 4)
    return plane, plane, round(FIELD_MM[2] / shape[2], 4)


def make_case(seed: int | Sequence[int], shape: Sequence[int] = DEMO_SHAPE) -> dict[str, np.ndarray]:
    """Draw one case of ``shape``, at least 40 x 32 x 16 voxels (else DataError); the same seed gives the same bytes.

    The anatomy follows from the seed alone: another grid samples the same organs, to about a voxel.

    Returns:
        ``img``: (X, Y, Z) int16 HU; ``label``: (X, Y, Z) uint8 of 0 to 13, every organ present;
        ``affine``: (4, 4) float64 to RAS mm, axes L, A, S, with the middle of the field at the origin.
    """
    shape = checked_shape(shape, SMALLEST_SHAPE)
    spacing = default_spacing_mm(shape)
    grid = Grid(shape, spacing)
    rng = np.random.default_rng(seed)
    abdomen = make_abdomen(grid, rng)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return {"img": _image(grid, abdomen, rng), "label": abdomen.labels, "affine": affine}


def write_btcv_cases(
    output: str | Path,
    cases: int = 30,
    *,
    shape: Sequence[int] = DEMO_SHAPE,
    seed: int = 0,
    unlabelled: int = 0,
    progress: bool = False,
) -> list[str]:
    """Write ``output/img/imgXXXX.nii.gz`` and ``output/label/labelXXXX.nii.gz``, as in BTCV's RawData/Training.

    The ids are the first ``cases`` of ``case_order()``, so that the published split applies. Unlabelled cases go to
    ``output/unlabelled/img0041.nii.gz`` onwards. A case depends only on (seed, id) and the grid. Returns the ids of the
    labelled cases, such as "0005". Raises DataError for counts or seeds out of range, and as ``make_case``.
    """
    problems = []
    order = case_order()
    if not 0 <= cases <= len(order):
        problems.append(f"cases must be 0 to {len(order)}, as many as the published ids, got {cases}")
    if not 0 <= unlabelled < 10000 - FIRST_UNLABELLED:
        problems.append(f"unlabelled must be 0 to {9999 - FIRST_UNLABELLED}, got {unlabelled}")
    if seed < 0:
        problems.append(f"seed must not be negative, got {seed}")
    raise_all(problems, DataError, "BTCV phantoms cannot be written")
    checked_shape(shape, SMALLEST_SHAPE)
    output = Path(output)
    ids = order[:cases] + [f"{FIRST_UNLABELLED + number:04d}" for number in range(unlabelled)]
    for number, case_id in enumerate(tqdm(ids, desc="phantoms", disable=not progress)):
        case = make_case([seed, int(case_id)], shape)
        if number < cases:
            save(case["img"], case["affine"], output / "img" / f"img{case_id}.nii.gz")
            save(case["label"], case["affine"], output / "label" / f"label{case_id}.nii.gz")
        else:
            save(case["img"], case["affine"], output / "unlabelled" / f"img{case_id}.nii.gz")
    return ids[:cases]


def _image(grid: Grid, abdomen: Abdomen, rng: np.random.Generator) -> np.ndarray:
    """HU on ``grid``: tissue with its texture, vessels and bowel, blurred by partial volume, with noise; int16."""
    tissue = abdomen.tissue
    table = np.zeros(int(max(_HU)) + 1, dtype=np.float32)
    for code, (mean, spread) in _HU.items():
        table[code] = mean + spread * np.clip(rng.standard_normal(), -2, 2)
    for twin, code in _TWINS.items():
        table[twin] = table[code]
    if rng.random() < 0.3:
        table[anatomy.STOMACH_CONTENT] = rng.uniform(120, 260)  # oral contrast
    image = table[tissue]
    fine = smooth_field(grid, rng, length_mm=12)
    coarse = smooth_field(grid, rng, length_mm=28)
    # Curves where two fields vanish together branch like vessels: bright in the liver, in fat and in the lungs.
    vessel = np.hypot(coarse, smooth_field(grid, rng, length_mm=28)) < 0.22
    image[vessel & (tissue == anatomy.LIVER)] += rng.uniform(30, 50)
    image[vessel & (tissue == anatomy.LUNG)] = 40
    loops = abdomen.loops & (fine > -0.35)
    image[loops] = np.where(fine[loops] > 0.55, table[anatomy.CONTENT], table[anatomy.BOWEL])
    image[vessel & abdomen.loops & ~loops] = table[anatomy.PORTAL_VEIN]
    soft = image > -200
    image += np.where(soft, 5 * fine + 4 * coarse, 12 * fine) * (tissue != anatomy.AIR)
    image += np.where(np.isin(tissue, (anatomy.CONTENT, anatomy.STOMACH_CONTENT)), 18 * fine, 0)  # food
    image = ndimage.gaussian_filter(image, 0.5, truncate=2.0)  # partial volume
    image += rng.uniform(*_NOISE_HU) * rng.standard_normal(grid.shape, dtype=np.float32)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)
