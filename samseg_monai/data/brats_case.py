"""Find and check single cases in the layout of BraTS 2023."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from samseg_monai.data.checks import CaseCheck, check_files
from samseg_monai.data.codings import BRATS, labels_in
from samseg_monai.data.volumes import stem_of
from samseg_monai.errors import DataError

SCANS = ("t1n", "t1c", "t2w", "t2f")
LABELS = {coding: labels_in(coding) for coding in BRATS}
_CASE_NAME = re.compile(r".+-\d{3,}-\d{3}$")
LOG = logging.getLogger(__name__)


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
    legal = [int(label) for label in LABELS[label_coding]]
    check_files(check, label="seg", legal=legal, hint=lambda strange: _coding_hint(strange, label_coding))
    return check


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
