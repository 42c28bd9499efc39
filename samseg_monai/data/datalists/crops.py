"""The smallest in-plane centre crop that holds every training brain: the honours paper's way to 138 x 202, measured.

Axes are those of the volume turned to RAS (axis 0 left to right, axis 1 back to front), where a centre crop is taken as
MONAI's ``CenterSpatialCrop`` does it: from ``size // 2 - crop // 2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import CenterSpatialCrop
from nibabel.orientations import apply_orientation, io_orientation
from tqdm import tqdm

from samseg_monai.data.datalists import load_datalist
from samseg_monai.data.files.dicom import read_any
from samseg_monai.errors import DataError, raise_all

PAPER_CROP = (138, 202)


@dataclass(frozen=True)
class CropReport:
    """Sizes in voxels of axes 0 and 1 (RAS) over ``cases`` training cases.

    ``centre_crop`` is the smallest centre crop that holds every brain, ``decided_by`` the case that forces each of its
    sides, ``tight_box`` (i0, j0, i1, j1; inclusive) the smallest box, wherever it lies. What ``asked_crop`` loses is
    counted per case, only where a case loses any; ``tumour_voxels`` is of all cases.
    """

    cases: int
    centre_crop: tuple[int, int]
    decided_by: tuple[str, str]
    tight_box: tuple[int, int, int, int]
    asked_crop: tuple[int, int]
    brain_voxels_lost: dict[str, int]
    tumour_voxels_lost: dict[str, int]
    tumour_voxels: int

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        i0, j0, i1, j1 = self.tight_box
        lost, brain = sum(self.tumour_voxels_lost.values()), sum(self.brain_voxels_lost.values())
        asked = "x".join(map(str, self.asked_crop))
        share = 100 * lost / self.tumour_voxels if self.tumour_voxels else 0.0
        return [
            f"measured {self.cases} training cases (voxels; axis 0 left-right, axis 1 back-front)",
            f"smallest centre crop that holds every brain: {self.centre_crop[0]}x{self.centre_crop[1]} "
            f"(decided by {self.decided_by[0]} and {self.decided_by[1]})",
            f"tight box around all brains: {i0}..{i1} x {j0}..{j1}, that is {i1 - i0 + 1}x{j1 - j0 + 1}",
            f"a centre crop of {asked} loses {lost} of {self.tumour_voxels} tumour voxels ({share:.3f} %) "
            f"in {len(self.tumour_voxels_lost)} cases, and {brain} brain voxels in {len(self.brain_voxels_lost)} cases",
            *(f"  {case}: {count} tumour voxels outside {asked}" for case, count in self.tumour_voxels_lost.items()),
        ]


@dataclass(frozen=True)
class _Extent:
    """Of one brain, along both axes: ends (inclusive) and the side of the centre crop that holds it; voxel counts."""

    case: str
    low: np.ndarray
    high: np.ndarray
    sides: np.ndarray
    tumour: int
    brain_lost: int
    tumour_lost: int


def smallest_crop(
    datalist: str | Path,
    dataset_dir: str | Path,
    *,
    crop: Sequence[int] = PAPER_CROP,
    num_threads: int = 4,
    progress: bool = False,
) -> CropReport:
    """Measure the training section; brain is where any scan differs from 0, tumour where the label is above 0.

    Args:
        crop: in-plane centre crop (axis 0, axis 1) whose losses are counted.

    Raises:
        DataError: as ``load_datalist``; unreadable files, empty brains or unequal shapes in a case, all at once.
    """
    items = load_datalist(datalist, dataset_dir, "training")
    asked = (int(crop[0]), int(crop[1]))

    def attempt(item: dict[str, Any]) -> _Extent | str:
        try:
            return _measure(item, asked)
        except DataError as error:
            return f"{item['case']}: {error}"

    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        measured = list(tqdm(pool.map(attempt, items), "measuring brains", len(items), disable=not progress))
    bad = [m for m in measured if isinstance(m, str)]
    raise_all(bad, DataError, f"{datalist}: training cases cannot be measured", cases=len(items))
    rows = [m for m in measured if not isinstance(m, str)]
    sides = np.array([row.sides for row in rows])
    first, second = (rows[index].case for index in sides.argmax(axis=0))
    low, high = np.min([row.low for row in rows], 0).tolist(), np.max([row.high for row in rows], 0).tolist()
    return CropReport(
        cases=len(rows),
        centre_crop=(int(sides[:, 0].max()), int(sides[:, 1].max())),
        decided_by=(first, second),
        tight_box=(*low, *high),
        asked_crop=asked,
        brain_voxels_lost={row.case: row.brain_lost for row in rows if row.brain_lost},
        tumour_voxels_lost={row.case: row.tumour_lost for row in rows if row.tumour_lost},
        tumour_voxels=sum(row.tumour for row in rows),
    )


def _measure(item: dict[str, Any], crop: tuple[int, int]) -> _Extent:
    scans = [_in_ras(file) != 0 for file in ([item["image"]] if isinstance(item["image"], str) else item["image"])]
    scans = [scan.any(axis=3) if scan.ndim == 4 else scan for scan in scans]
    if len({scan.shape for scan in scans}) > 1:
        raise DataError(f"scans of unequal shape {' and '.join(str(scan.shape) for scan in scans)}")
    brain = np.any(scans, axis=0)
    if not brain.any():
        raise DataError("every voxel of every scan is 0")
    tumour = _in_ras(item["label"]) > 0 if item.get("label") else np.zeros_like(brain)
    if tumour.shape != brain.shape:
        raise DataError(f"label has shape {tumour.shape}, scans have {brain.shape}")
    plane, size = brain.any(axis=2), np.array(brain.shape[:2])
    low, high = np.array([np.flatnonzero(plane.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)]).T
    # a side s begins at size // 2 - s // 2, which must not lie behind low, and ends behind high
    sides = np.clip(np.maximum(2 * (size // 2 - low), 2 * (high - size // 2) + 1), 1, size)
    kept = CenterSpatialCrop((*crop, -1)).compute_slices(brain.shape)
    return _Extent(
        case=item["case"],
        low=low,
        high=high,
        sides=sides,
        tumour=int(tumour.sum()),
        brain_lost=int(brain.sum() - brain[kept].sum()),
        tumour_lost=int(tumour.sum() - tumour[kept].sum()),
    )


def _in_ras(file: str) -> np.ndarray:
    volume = read_any(Path(file))
    return apply_orientation(volume.array, io_orientation(volume.affine))
