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
from nibabel.orientations import apply_orientation, io_orientation
from tqdm import tqdm

from samseg_monai.data.datalists import load_datalist
from samseg_monai.data.files.volumes import Volume, read_volume
from samseg_monai.errors import DataError, raise_all

PAPER_CROP = (138, 202)


@dataclass(frozen=True)
class CropReport:
    """Sizes in voxels of axes 0 and 1 (RAS).

    Attributes:
        cases: number of training cases measured.
        centre_crop: smallest centre crop that holds every brain.
        decided_by: the case that forces each side of ``centre_crop``.
        tight_box: (i0, j0, i1, j1), inclusive: smallest box, wherever it lies, that holds every brain.
        asked_crop: the crop that the losses below are for.
        brain_voxels_lost, tumour_voxels_lost: per case, only cases that lose any.
        tumour_voxels: of all cases.
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
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        jobs = pool.map(lambda item: _measure(item, asked), items)
        measured = list(tqdm(jobs, total=len(items), desc="measuring brains", disable=not progress))
    problems = [m for m in measured if isinstance(m, str)]
    raise_all(problems, DataError, f"{datalist}: training cases cannot be measured")
    rows = [m for m in measured if not isinstance(m, str)]
    sides = [[_needed(m.low[axis], m.high[axis], m.shape[axis]) for m in rows] for axis in (0, 1)]
    low, high = np.min([m.low for m in rows], axis=0), np.max([m.high for m in rows], axis=0)
    return CropReport(
        cases=len(rows),
        centre_crop=(max(sides[0]), max(sides[1])),
        decided_by=(rows[int(np.argmax(sides[0]))].case, rows[int(np.argmax(sides[1]))].case),
        tight_box=(int(low[0]), int(low[1]), int(high[0]), int(high[1])),
        asked_crop=asked,
        brain_voxels_lost={m.case: m.brain_lost for m in rows if m.brain_lost},
        tumour_voxels_lost={m.case: m.tumour_lost for m in rows if m.tumour_lost},
        tumour_voxels=sum(m.tumour for m in rows),
    )


@dataclass(frozen=True)
class _Extent:
    case: str
    shape: tuple[int, ...]
    low: tuple[int, int]
    high: tuple[int, int]
    tumour: int
    brain_lost: int
    tumour_lost: int


def _measure(item: dict[str, Any], crop: tuple[int, int]) -> _Extent | str:
    files = [item["image"]] if isinstance(item["image"], str) else item["image"]
    brain: np.ndarray | None = None
    try:
        for file in files:
            scan = _to_ras(read_volume(file)) != 0
            scan = np.any(scan, axis=3) if scan.ndim == 4 else scan
            if brain is not None and scan.shape != brain.shape:
                return f"{item['case']}: scans of unequal shape {scan.shape} and {brain.shape}"
            brain = scan if brain is None else brain | scan
        if brain is None or not brain.any():
            return f"{item['case']}: every voxel of every scan is 0"
        tumour = _to_ras(read_volume(item["label"])) > 0 if item.get("label") else np.zeros_like(brain)
    except DataError as error:
        return f"{item['case']}: {error}"
    if tumour.shape != brain.shape:
        return f"{item['case']}: label has shape {tumour.shape}, scans have {brain.shape}"
    plane: np.ndarray = np.any(brain, axis=2)
    spans = [np.flatnonzero(plane.any(axis=1 - axis)) for axis in (0, 1)]
    kept = tuple(_window(n, side) for n, side in zip(brain.shape, crop, strict=False))
    return _Extent(
        case=item["case"],
        shape=brain.shape,
        low=(int(spans[0][0]), int(spans[1][0])),
        high=(int(spans[0][-1]), int(spans[1][-1])),
        tumour=int(tumour.sum()),
        brain_lost=int(brain.sum() - brain[kept].sum()),
        tumour_lost=int(tumour.sum() - tumour[kept].sum()),
    )


def _to_ras(volume: Volume) -> np.ndarray:
    return apply_orientation(volume.array, io_orientation(volume.affine))


def _window(size: int, side: int) -> slice:
    start = max(0, size // 2 - side // 2)
    return slice(start, start + min(side, size))


def _needed(low: int, high: int, size: int) -> int:
    """Smallest side whose centre window of ``size`` holds ``low..high``."""
    for side in range(1, size):
        window = _window(size, side)
        if window.start <= low and high < window.stop:
            return side
    return size
