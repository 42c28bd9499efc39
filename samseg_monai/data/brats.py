"""From a folder in the layout of BraTS 2023 to a datalist, with every defect of the data named at once.

Layout and label coding: LaBella et al., arXiv:2405.09787 (``<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz``; 1 core,
2 oedema, 3 enhancing). BraTS 2017 to 2022 coded enhancing tumour as 4, which is legal only when asked for.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from samseg_monai.data.brats_case import LABELS, SCANS, CaseCheck, check_case, find_case_folders
from samseg_monai.data.datalists import SECTIONS, patient_of, split_by_patient, write_datalist
from samseg_monai.data.phantoms import is_phantom
from samseg_monai.errors import ConfigError, DataError, raise_all

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
LOG = logging.getLogger(__name__)


@dataclass
class Summary:
    """What ``prepare_brats_men`` found and wrote; counts are of cases unless named otherwise."""

    datalist: Path
    sections: dict[str, int]
    patients: int
    shapes: dict[str, int]
    spacings_mm: dict[str, int]
    voxels_per_label: dict[str, int]
    cases_per_label: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The summary as text, one fact a line."""
        total = sum(self.sections.values())
        voxels = sum(self.voxels_per_label.values()) or 1
        return [
            f"{total} cases of {self.patients} patients: " + ", ".join(f"{n} {s}" for s, n in self.sections.items()),
            "shapes: " + ", ".join(f"{shape} ({n})" for shape, n in self.shapes.items()),
            "spacings in mm: " + ", ".join(f"{spacing} ({n})" for spacing, n in self.spacings_mm.items()),
            *(
                f"label {label}: {n} voxels ({100 * n / voxels:.3f} %), in {self.cases_per_label[label]} cases"
                for label, n in self.voxels_per_label.items()
            ),
            *(f"warning: {text}" for text in self.warnings),
            *(f"left out: {text}" for text in self.left_out),
            f"wrote {self.datalist}",
        ]


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
    checks = _check_all(find_case_folders(src), scans, label_coding, num_threads=num_threads, progress=progress)
    good = [check for check in checks if not check.problems]
    problems = [f"{check.case}: {problem}" for check in checks for problem in check.problems]
    if not skip_bad or not good:
        fix = "" if not good else "; mend them, or leave these cases out with --skip-bad"
        raise_all(problems, DataError, f"{len(checks) - len(good)} of {len(checks)} cases in {src} cannot be used{fix}")
    warnings = [f"{check.case}: {warning}" for check in good for warning in check.warnings]
    if split_file is None:
        split = split_by_patient({check.case: patient_of(check.case) for check in good}, fractions, seed=seed)
        made_by: dict[str, Any] = {"by": "patient", "seed": seed, "fractions": list(fractions)}
    else:
        split, unused = _read_split(Path(split_file), [check.case for check in checks])
        warnings += [f"{case}: not named by the split file, not used" for case in unused]
        made_by = {"by": "file", "file": Path(split_file).name}
    used = {check.case: check for check in good}
    sections = {section: [used[case] for case in cases if case in used] for section, cases in split.items()}
    header = {"scans": list(scans), "labels": LABELS[label_coding], "label_coding": label_coding, "split": made_by}
    write_datalist(_datalist(header, sections, src), output)
    return _summarise(Path(output), sections, warnings=warnings, left_out=problems)


def _check_all(
    folders: Sequence[Path], scans: Sequence[str], label_coding: str, *, num_threads: int, progress: bool
) -> list[CaseCheck]:
    # Unpacking and hashing release the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        jobs = pool.map(lambda folder: check_case(folder, scans, label_coding=label_coding), folders)
        return list(tqdm(jobs, total=len(folders), desc="checking cases", disable=not progress))


def _datalist(header: dict[str, Any], sections: dict[str, list[CaseCheck]], src: Path) -> dict[str, Any]:
    return {
        "name": "BraTS-MEN",
        "modality": "MRI",
        "phantoms": all(is_phantom(check.files["seg"]) for members in sections.values() for check in members),
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


def _read_split(path: Path, cases: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Section -> cases of a split file, and the cases it does not name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"split file {path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not any(section in content for section in SECTIONS):
        raise DataError(f"split file {path}: expected a JSON object with lists under {', '.join(SECTIONS)}")
    by_patient: dict[str, list[str]] = {}
    for case in cases:
        by_patient.setdefault(patient_of(case), []).append(case)
    split: dict[str, list[str]] = {section: [] for section in SECTIONS}
    homes: dict[str, set[str]] = {}
    problems = []
    for section in SECTIONS:
        for entry in content.get(section, []):
            name = str(entry.get("case", entry) if isinstance(entry, dict) else entry)
            members = [name] if name in cases else by_patient.get(name, [])
            if not members:
                problems.append(f"{section}: unknown case or patient {name}")
            split[section] += [case for case in members if case not in split[section]]
            homes.setdefault(patient_of(members[0]) if members else name, set()).add(section)
    problems += [
        f"patient {patient} is in {' and '.join(s for s in SECTIONS if s in sections)}"
        for patient, sections in homes.items()
        if len(sections) > 1
    ]
    raise_all(problems, DataError, f"split file {path} does not fit the cases")
    named = {case for members in split.values() for case in members}
    return split, [case for case in cases if case not in named]


def _summarise(
    output: Path, sections: dict[str, list[CaseCheck]], *, warnings: list[str], left_out: list[str]
) -> Summary:
    checks = [check for members in sections.values() for check in members]
    voxels: Counter[int] = Counter()
    for check in checks:
        voxels.update(check.voxels_per_label)
    for text in warnings:
        LOG.warning("%s", text)
    return Summary(
        datalist=output,
        sections={section: len(members) for section, members in sections.items()},
        patients=len({patient_of(check.case) for check in checks}),
        shapes=dict(Counter("x".join(map(str, check.shape)) for check in checks).most_common()),
        spacings_mm=dict(Counter("x".join(f"{s:g}" for s in check.spacing_mm) for check in checks).most_common()),
        voxels_per_label={str(label): voxels[label] for label in sorted(voxels)},
        cases_per_label={str(label): sum(label in c.voxels_per_label for c in checks) for label in sorted(voxels)},
        warnings=warnings,
        left_out=left_out,
    )
