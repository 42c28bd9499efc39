"""From a folder in the layout of BraTS 2023 to a datalist, with every defect of the data named at once.

Layout and label coding: LaBella et al., arXiv:2405.09787 (``<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``; 1 core,
2 oedema, 3 enhancing). BraTS 2017 to 2022 coded enhancing tumour as 4, which is legal only when asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samseg_monai.data.brats_case import LABELS, SCANS, check_case, find_case_folders
from samseg_monai.data.checks import CaseCheck, Summary, are_phantoms, check_all, split_off_bad, summarise
from samseg_monai.data.datalists import patient_of, write_datalist
from samseg_monai.data.splits import read_split, split_by_patient
from samseg_monai.errors import ConfigError

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)


def prepare_brats_men(
    src: str | Path,
    output: str | Path,
    *,
    scans: Sequence[str] = SCANS,
    label_coding: str = "2023",
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    split_file: str | Path | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    num_threads: int = 4,
    progress: bool = True,
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
        skip_bad: leave bad cases out and list them, instead of stopping.
        num_threads: cases read at the same time (each needs about 0.2 GB at the size of BraTS).
        progress: show a bar.

    Raises:
        ConfigError: unknown label coding.
        DataError: no case at all, all defects of all cases at once (unless ``skip_bad``), or a split that names
            unknown cases or puts a patient into two sections.
    """
    if label_coding not in LABELS:
        raise ConfigError(f"unknown label coding {label_coding!r}; choose one of {', '.join(LABELS)}")
    src = Path(src)

    def check(folder: Path) -> CaseCheck:
        return check_case(folder, scans, label_coding=label_coding)

    checks = check_all(check, find_case_folders(src), num_threads=num_threads, progress=progress)
    good, problems = split_off_bad(checks, src, skip_bad=skip_bad)
    warnings = [f"{check.case}: {warning}" for check in good for warning in check.warnings]
    if split_file is None:
        split = split_by_patient({check.case: patient_of(check.case) for check in good}, fractions, seed=seed)
        made_by: dict[str, Any] = {"by": "patient", "seed": seed, "fractions": list(fractions)}
    else:
        split, unused = read_split(Path(split_file), {check.case: patient_of(check.case) for check in checks})
        warnings += [f"{case}: not named by the split file, not used" for case in unused]
        made_by = {"by": "file", "file": Path(split_file).name}
    used = {check.case: check for check in good}
    sections = {section: [used[case] for case in cases if case in used] for section, cases in split.items()}
    header = {"scans": list(scans), "labels": LABELS[label_coding], "label_coding": label_coding, "split": made_by}
    write_datalist(_datalist(header, sections, src), output)
    patients = len({patient_of(check.case) for members in sections.values() for check in members})
    labels = LABELS[label_coding]
    return summarise(Path(output), sections, patients=patients, labels=labels, warnings=warnings, left_out=problems)


def _datalist(header: dict[str, Any], sections: dict[str, list[CaseCheck]], src: Path) -> dict[str, Any]:
    return {
        "name": "BraTS-MEN",
        "modality": "MRI",
        "phantoms": are_phantoms(check.files["seg"] for members in sections.values() for check in members),
        **header,
        **{section: [_item(check, src) for check in members] for section, members in sections.items()},
        "hashes": {check.case: check.sha256 for members in sections.values() for check in members},
    }


def _item(check: CaseCheck, src: Path) -> dict[str, Any]:
    files = {name: path.relative_to(src).as_posix() for name, path in check.files.items()}
    label = files.pop("seg")
    return {
        "case": check.case,
        "patient": patient_of(check.case),
        "image": list(files.values()),
        "label": label,
        "reference": label,
    }
