"""Find and check single cases in the layout of BraTS 2023."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samseg_monai.data.volumes import Volume, grid_difference, read_volume, stem_of, value_problem
from samseg_monai.errors import DataError

SCANS = ("t1n", "t1c", "t2w", "t2f")
LABELS = {
    "2023": {"0": "background", "1": "non-enhancing core", "2": "oedema", "3": "enhancing tumour"},
    "2021": {"0": "background", "1": "non-enhancing core", "2": "oedema", "4": "enhancing tumour"},
}
_CASE_NAME = re.compile(r".+-\d{3,}-\d{3}$")
LOG = logging.getLogger(__name__)


@dataclass
class CaseCheck:
    """Result of ``check_case``; ``problems`` forbid the use of the case, ``warnings`` do not.

    ``files`` maps scan (and ``seg``) to path, ``sha256`` is that of the lines ``<name> <sha256 of the file>``.
    """

    case: str
    files: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    voxels_per_label: dict[int, int] = field(default_factory=dict)
    sha256: str = ""


def find_case_folders(src: str | Path) -> list[Path]:
    """Sub-folders of ``src`` that look like cases, sorted; others are named in the log and left alone.

    Raises:
        DataError: ``src`` is no folder or holds no case; when a sub-folder does, it is named.
    """
    src = Path(src)
    if not src.is_dir():
        raise DataError(f"{src} is not a folder; give the folder that holds the case folders")
    folders = sorted(path for path in src.iterdir() if path.is_dir() and not path.name.startswith("."))
    cases = [folder for folder in folders if _looks_like_case(folder)]
    if not cases:
        deeper = [f for f in folders if any(_looks_like_case(sub) for sub in f.iterdir() if sub.is_dir())]
        hint = f"; did you mean {deeper[0]}?" if deeper else ""
        if _looks_like_case(src):
            hint = f"; it is one case itself: give its parent {src.resolve().parent}"
        raise DataError(f"{src} holds no case folders such as BraTS-MEN-00004-000/BraTS-MEN-00004-000-t1c.nii.gz{hint}")
    for folder in sorted(set(folders) - set(cases)):
        LOG.info("ignored %s: no files named %s-<scan>.nii.gz in it", folder, folder.name)
    return cases


def scan_file(folder: Path, name: str) -> Path | None:
    """``<case>-<name>.nii.gz`` of a case folder, or the unpacked ``.nii``; None when there is neither."""
    for suffix in (".nii.gz", ".nii"):
        path = folder / f"{folder.name}-{name}{suffix}"
        if path.is_file():
            return path
    return None


def check_case(folder: Path, scans: Sequence[str] = SCANS, *, label_coding: str = "2023") -> CaseCheck:
    """Read all files of a case to the last byte and collect everything that is wrong with them."""
    check = CaseCheck(folder.name)
    names = (*scans, "seg")
    found = {name: scan_file(folder, name) for name in names}
    missing = [name for name in names if found[name] is None]
    if missing:
        check.problems.append(f"no file for {', '.join(missing)} (expected {folder.name}-{missing[0]}.nii.gz)")
    check.files = {name: path for name, path in found.items() if path is not None}
    hashes = []
    first: Volume | None = None
    for name, path in check.files.items():
        try:
            volume = read_volume(path)
        except DataError as error:
            check.problems.append(str(error))
            continue
        hashes.append(f"{name} {volume.sha256}\n")
        check.warnings += volume.notes
        if volume.array.ndim != 3:
            check.problems.append(f"{path.name}: has shape {volume.array.shape}, expected three axes")
            continue
        if first is None:
            first, first_name = volume, path.name
            check.shape, check.spacing_mm = volume.array.shape, volume.spacing_mm
        elif difference := grid_difference(volume, first):
            check.problems.append(f"{path.name}: {difference} of {first_name}")
        if name == "seg":
            _check_label(volume.array, path.name, check, label_coding=label_coding)
        elif problem := value_problem(volume.array):
            check.problems.append(f"{path.name}: {problem}")
    check.sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return check


def _check_label(array: np.ndarray, name: str, check: CaseCheck, *, label_coding: str) -> None:
    if not np.isfinite(array).all():
        check.problems.append(f"{name}: labels are NaN or infinite")
        return
    values, counts = np.unique(array, return_counts=True)
    fractional = [value for value in values if value != np.rint(value)]
    if fractional:
        shown = ", ".join(f"{value:g}" for value in fractional[:4])
        check.problems.append(f"{name}: labels are not whole numbers ({shown}): resampled without nearest neighbour?")
        return
    check.voxels_per_label = {int(v): int(n) for v, n in zip(values, counts, strict=True)}
    legal = sorted(int(label) for label in LABELS[label_coding])
    strange = sorted(set(check.voxels_per_label) - set(legal))
    if strange:
        check.problems.append(f"{name}: labels {strange} are outside {legal}{_coding_hint(strange, label_coding)}")
    elif list(check.voxels_per_label) == [0]:
        check.warnings.append(f"{name}: the mask is empty: no training slice, and no Dice in an evaluation")


def _coding_hint(strange: list[int], label_coding: str) -> str:
    if strange == [4] and label_coding == "2023":
        return "; 4 is the enhancing tumour of BraTS 2017 to 2022: pass --label-coding 2021"
    if strange == [3] and label_coding == "2021":
        return "; 3 is the enhancing tumour of BraTS 2023: pass --label-coding 2023"
    return ""


def _looks_like_case(folder: Path) -> bool:
    prefix = f"{folder.name}-"
    return bool(_CASE_NAME.match(folder.name)) or any(
        (stem_of(path) or "").startswith(prefix) for path in folder.iterdir() if path.is_file()
    )
