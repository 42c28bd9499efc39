"""From case folders as BraTS publishes them to a datalist, with every defect of the data named at once.

BraTS 2023 and later: ``<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``, 1 core, 2 oedema, 3 enhancing (LaBella et al.,
arXiv:2405.09787). BraTS 2017 to 2022: ``<case>/<case>_{t1,t1ce,t2,flair,seg}.nii.gz``, perhaps in ``HGG`` and ``LGG``,
enhancing tumour 4 (Baid et al., arXiv:2107.02314), which is legal only when asked for. BraTS-MEN-RT (radiotherapy
planning; LaBella et al., arXiv:2405.18383): T1c alone in its own spacing, one label ``gtv``.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from samseg_monai.data import BRATS_SCANS
from samseg_monai.data.datalists import patient_of
from samseg_monai.data.datalists.checks import CaseCheck, Summary, check_files, labelled, read_all, write_checked
from samseg_monai.data.datalists.label_maps import BRATS, labels_in
from samseg_monai.data.datalists.layouts import case_folders, few, parts_of
from samseg_monai.data.datalists.splits import choose_splits
from samseg_monai.data.files.volumes import stem_of
from samseg_monai.errors import DataError

LOG = logging.getLogger(__name__)
OLD_NAMES = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}  # of BraTS 2012 to 2022 -> of 2023
SEG, GTV = "seg", "gtv"
_CASE_NAME = re.compile(r".+-\d{3,}-\d{3}$")
_GRADES = {"HGG", "LGG"}  # folders of BraTS 2017 to 2019
# what a value that is not legal looks like, by the coding that was named
_HINTS = {
    ("2023", 4): "; 4 is the enhancing tumour of BraTS 2017 to 2022: pass --label-coding 2021",
    ("2021", 3): "; 3 is the enhancing tumour of BraTS 2023: pass --label-coding 2023",
}


def prepare_brats_men(
    src: str | Path,
    output: str | Path,
    *,
    scans: Sequence[str] | None = None,
    label_coding: str | None = None,
    fractions: Sequence[float] | None = None,
    folds: int | None = None,
    split_file: str | Path | None = None,
    seed: int = 0,
    **reading: Any,
) -> Summary:
    """Check every case below ``src`` completely and write a datalist with paths relative to ``src``.

    Args:
        src: folder of case folders, or of ``HGG`` and ``LGG``.
        output: datalist to write.
        scans: scans to use by their names of 2023, in the order in which the network gets them; None: those of the
            four that any case has.
        label_coding: ``"2023"`` (0 1 2 3), ``"2021"`` (0 1 2 4) or ``"gtv"`` (0 1); recorded in the datalist. None:
            gtv where the label files are called so, else 2023.
        fractions, folds, split_file, seed: see ``splits.choose_splits``.
        reading: ``skip_bad``, ``num_threads``, ``progress``, see ``checks.read_all``; a case needs about 0.2 GB.

    Raises:
        ConfigError: unknown label coding, several ways to split.
        DataError: no case at all, none with a label, all defects of all cases at once (unless ``skip_bad``), or a split
            that names unknown cases or puts a patient into two sections.
    """
    src = Path(src)
    folders = _case_folders(src)
    parts = {folder: _named_of_2023(folder) for folder in folders}
    counts = Counter(name for files in parts.values() for name in files)
    label = GTV if GTV in counts and SEG not in counts else SEG
    label_coding = label_coding or (GTV if label == GTV else "2023")
    labels = labels_in(label_coding, BRATS)
    wanted = tuple(scans or [scan for scan in BRATS_SCANS if counts[scan]] or BRATS_SCANS)
    found = [_check(folder, files, wanted, label) for folder, files in parts.items()]
    checks, alone = labelled(found, label, src)
    legal, hint = {0, *BRATS[label_coding]}, partial(_hint, label_coding)
    read = partial(check_files, label=label, legal=legal, hint=hint, modality="MR")
    good, problems = read_all(checks, read, src, **reading)
    patients = {check.case: patient_of(check.case) for check in found}
    usable = {check.case: patients[check.case] for check in good}
    splits, unused = choose_splits(usable, patients, split_file=split_file, fractions=fractions, folds=folds, seed=seed)
    header: dict[str, Any] = {"name": _name_of(folders[0]) or src.resolve().name, "modality": "MRI"}
    header |= {"scans": list(wanted), "labels": labels, "label_coding": label_coding}
    example = parts[folders[0]].get(wanted[0], [folders[0]])[0].name
    layout = f"layout: one folder for each case, with {', '.join(wanted)} and {label} (such as {example})"
    write = partial(write_checked, output, src, good, splits, header=header, label=label, patient=patient_of)
    return write(warnings=[*alone, *unused], left_out=problems, extra=[layout])


def _case_folders(src: Path) -> list[Path]:
    """Sub-folders of ``src`` (or of HGG and LGG) that look like cases, sorted; others are named in the log.

    Raises:
        DataError: ``src`` is no folder or holds no case; when a sub-folder does, it is named.
    """
    if not src.is_dir():
        raise DataError(f"{src} is not a folder; give the folder that holds the case folders")
    folders = case_folders(src)
    if {folder.name for folder in folders} & _GRADES:
        folders = [sub for folder in folders if folder.name in _GRADES for sub in case_folders(folder)]
    cases = [folder for folder in folders if _looks_like_case(folder)]
    if not cases:
        deeper = [f for f in folders if any(_looks_like_case(sub) for sub in case_folders(f))]
        hint = f"; did you mean {deeper[0]}?" if deeper else ""
        if _looks_like_case(src):
            hint = f"; it is one case itself: give its parent {src.resolve().parent}"
        raise DataError(f"{src} holds no case folders such as BraTS-MEN-00004-000/BraTS-MEN-00004-000-t1c.nii.gz{hint}")
    for folder in sorted(set(folders) - set(cases)):
        LOG.info("ignored %s: no files named %s-<scan>.nii.gz in it", folder, folder.name)
    return cases


def _named_of_2023(folder: Path) -> dict[str, list[Path]]:
    """Images of a case by the names of their scans as of 2023."""
    found: dict[str, list[Path]] = {}
    for part, paths in parts_of(folder).items():
        found.setdefault(OLD_NAMES.get(part.lower(), part.lower()), []).extend(paths)
    return found


def _check(folder: Path, files: dict[str, list[Path]], scans: Sequence[str], label: str) -> CaseCheck:
    check = CaseCheck(folder.name)
    for name in (*scans, label):
        paths = files.get(name, [])
        if len(paths) > 1:
            check.problems.append(f"{' and '.join(path.name for path in paths)}: keep one")
        elif paths:
            check.files[name] = paths[0]
    if missing := [name for name in scans if name not in files]:
        check.problems.append(f"no file for {', '.join(missing)} (expected {folder.name}-{missing[0]}.nii.gz)")
    known = (*BRATS_SCANS, *scans, SEG, GTV)
    strange = [path.name for name, paths in files.items() if name not in known for path in paths]
    if strange and label not in files:  # case 355 of BraTS 2020 has a label of another name
        check.problems.append(f"no file for {label}, but {few(strange)}; rename what is the label")
    return check


def _name_of(folder: Path) -> str:
    """What the names of case folders begin with: ``BraTS-MEN`` of ``BraTS-MEN-00004-000``."""
    begin = re.match(r"(.*?)[-_]?\d", folder.name)
    return begin[1] if begin else ""


def _hint(label_coding: str, check: CaseCheck, strange: list[int]) -> str:
    return _HINTS.get((label_coding, strange[0]), "") if len(strange) == 1 else ""


def _looks_like_case(folder: Path) -> bool:
    files = (stem_of(path) or "" for path in folder.iterdir() if not path.is_dir())
    starts = (f"{folder.name}-", f"{folder.name}_")
    return bool(_CASE_NAME.match(folder.name)) or any(stem.startswith(starts) for stem in files)
