"""From a folder in the layout of BraTS 2023 to a datalist, with every defect of the data named at once.

Layout and label coding: LaBella et al., arXiv:2405.09787 (``<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``; 1 core,
2 oedema, 3 enhancing). BraTS 2017 to 2022 coded enhancing tumour as 4, which is legal only when asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from samseg_monai.data import BRATS_SCANS
from samseg_monai.data.datalists import patient_of
from samseg_monai.data.datalists.checks import CaseCheck, Summary, check_files, read_all, write_checked
from samseg_monai.data.datalists.label_maps import BRATS, labels_in
from samseg_monai.data.datalists.splits import DEFAULT_FRACTIONS, choose_split
from samseg_monai.data.files.volumes import is_dead_link, stem_of
from samseg_monai.errors import DataError

LOG = logging.getLogger(__name__)
_CASE_NAME = re.compile(r".+-\d{3,}-\d{3}$")
# what a value that is not legal looks like, by the coding that was named
_HINTS = {
    ("2023", 4): "; 4 is the enhancing tumour of BraTS 2017 to 2022: pass --label-coding 2021",
    ("2021", 3): "; 3 is the enhancing tumour of BraTS 2023: pass --label-coding 2023",
}


def prepare_brats_men(
    src: str | Path,
    output: str | Path,
    *,
    scans: Sequence[str] = BRATS_SCANS,
    label_coding: str = "2023",
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    split_file: str | Path | None = None,
    seed: int = 0,
    **reading: Any,
) -> Summary:
    """Check every case below ``src`` completely and write a datalist with paths relative to ``src``.

    Args:
        src: folder of case folders.
        output: datalist to write.
        scans: scans to use, in the order in which the network gets them.
        label_coding: ``"2023"`` (0 1 2 3) or ``"2021"`` (0 1 2 4); recorded in the datalist.
        fractions: of patients for training, validation, testing; ignored with a split file.
        split_file: JSON with lists of case or patient ids under the section names; another datalist works too.
        seed: of the split.
        reading: ``skip_bad``, ``num_threads``, ``progress``, see ``checks.read_all``; a case needs about 0.2 GB.

    Raises:
        ConfigError: unknown label coding.
        DataError: no case at all, all defects of all cases at once (unless ``skip_bad``), or a split that names
            unknown cases or puts a patient into two sections.
    """
    labels, src = labels_in(label_coding, BRATS), Path(src)
    checks = [_find_files(folder, scans) for folder in _case_folders(src)]
    read = partial(
        check_files, label="seg", legal={0, *BRATS[label_coding]}, hint=partial(_hint, label_coding), modality="MR"
    )
    good, problems = read_all(checks, read, src, **reading)
    patients = {check.case: patient_of(check.case) for check in checks}
    usable = {check.case: patients[check.case] for check in good}
    split, unused, made_by = choose_split(usable, patients, split_file, fractions, seed)
    header = {"name": "BraTS-MEN", "modality": "MRI", "scans": list(scans), "labels": labels}
    header |= {"label_coding": label_coding, "split": made_by}
    return write_checked(
        output, src, good, split, header=header, label="seg", patient=patient_of, warnings=unused, left_out=problems
    )


def _case_folders(src: Path) -> list[Path]:
    """Sub-folders of ``src`` that look like cases, sorted; others are named in the log and left alone.

    Raises:
        DataError: ``src`` is no folder or holds no case; when a sub-folder does, it is named.
    """
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


def _find_files(folder: Path, scans: Sequence[str]) -> CaseCheck:
    check = CaseCheck(folder.name)
    for name in (*scans, "seg"):
        paths = [folder / f"{folder.name}-{name}{suffix}" for suffix in (".nii.gz", ".nii")]
        if found := next((path for path in paths if path.is_file() or is_dead_link(path)), None):
            check.files[name] = found
    if missing := [name for name in (*scans, "seg") if name not in check.files]:
        check.problems.append(f"no file for {', '.join(missing)} (expected {folder.name}-{missing[0]}.nii.gz)")
    return check


def _hint(label_coding: str, check: CaseCheck, strange: list[int]) -> str:
    return _HINTS.get((label_coding, strange[0]), "") if len(strange) == 1 else ""


def _looks_like_case(folder: Path) -> bool:
    files = (stem_of(path) or "" for path in folder.iterdir() if not path.is_dir())
    return bool(_CASE_NAME.match(folder.name)) or any(stem.startswith(f"{folder.name}-") for stem in files)
