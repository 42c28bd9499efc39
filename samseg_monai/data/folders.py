"""From a folder of volumes to a datalist: the layout of the Medical Segmentation Decathlon, or two plain folders.

Decathlon (Antonelli et al., Nature Communications 2022): ``imagesTr``, ``labelsTr`` and ``dataset.json`` with the
tables ``labels`` and ``modality`` and the list ``training``; ``imagesTs`` has no labels and is left to ``samseg
predict``. Plain: ``images`` and ``labels`` with equal names. Neither tells which volumes share a subject, so each is
its own patient and the datalist says that it was split by volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.data.checks import (
    CaseCheck,
    Summary,
    case_notes,
    check_all,
    check_files,
    duplicates,
    split_off_bad,
    write_single_scan_datalist,
)
from samseg_monai.data.codings import BACKGROUND, absent_labels, implausible_sizes, labels_in
from samseg_monai.data.folder_layouts import Folder, read_folder
from samseg_monai.data.splits import section_counts, split_by_patient, split_in_order
from samseg_monai.errors import ConfigError

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
OWN_CODING = "own"


def prepare_folders(
    src: str | Path,
    output: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    label_coding: str | None = None,
    name: str | None = None,
    counts: Sequence[int] | None = None,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    by_name: bool = False,
    seed: int = 0,
    skip_bad: bool = False,
    num_threads: int = 2,
    progress: bool = True,
) -> Summary:
    """Check every pair of image and label completely and write a datalist with paths relative to ``src``.

    Args:
        src: folder in one of the two layouts.
        output: datalist to write; a case is called like its files.
        labels: value -> name for all values in the labels; the background may be left out. Default: ``dataset.json``.
        label_coding: a known coding instead of ``labels``, by name (``codings.CODINGS``).
        name: of the data set; default that of ``dataset.json``, or of the folder.
        counts: volumes for training, validation and testing, taken in the order of their names.
        fractions: of the volumes, without ``counts``; see ``by_name``.
        by_name: take them in the order of their names, not in one drawn with ``seed``.
        seed: of the drawn order.
        skip_bad: leave bad cases out and list them, instead of stopping.
        num_threads: cases read at the same time.
        progress: show a bar.

    Raises:
        ConfigError: nobody says what the labels mean, or two say it; unknown label coding.
        DataError: no such layout, all defects of all cases at once (unless ``skip_bad``), or a split that does not fit
            the number of cases.
    """
    src = Path(src)
    folder = read_folder(src)
    table = _table_of(labels, label_coding, folder)
    values = {int(value): text for value, text in table.items()}
    if not skip_bad:  # a split that cannot be made is told before the reading
        _split(list(folder.files), counts, fractions, by_name=by_name, seed=seed)

    def check(case: str) -> CaseCheck:
        return _check_case(case, folder, values)

    checks = check_all(check, list(folder.files), num_threads=num_threads, progress=progress)
    good, problems = split_off_bad(checks, src, skip_bad=skip_bad)
    of = {check.case: check for check in good}
    split, made_by = _split(list(of), counts, fractions, by_name=by_name, seed=seed)
    sections = {section: [of[case] for case in cases] for section, cases in split.items()}
    warnings = [*case_notes(good), *folder.notes, *duplicates(good)]
    voxels = [check.voxels_per_label for check in good]
    warnings += absent_labels(voxels, values) + (implausible_sizes(voxels, label_coding) if label_coding else [])
    header = {"name": name or folder.name, "modality": folder.modality, "labels": table}
    header |= {"label_coding": label_coding or OWN_CODING, "split": made_by}
    return write_single_scan_datalist(
        output, src, sections, header=header, patients=None, warnings=warnings, left_out=problems
    )


def parse_labels(text: str) -> dict[str, str]:
    """``"1=anterior,2=posterior"`` as a table of labels.

    Raises:
        ConfigError: an entry without ``=``, a value that is no whole number, an empty name, or a value given twice.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    table = {value.strip(): name.strip() for value, _, name in pairs}
    if len(table) != len(pairs) or not all(value.isdecimal() and name for value, name in table.items()):
        raise ConfigError(f"labels are given as '1=anterior,2=posterior', each value once, got {text!r}")
    return {str(int(value)): name for value, name in table.items()}


def _table_of(labels: Mapping[str, str] | None, label_coding: str | None, folder: Folder) -> dict[str, str]:
    if labels and label_coding:
        raise ConfigError("got labels and a label coding: give one of them")
    if label_coding:
        return labels_in(label_coding)
    table = labels or folder.labels
    if not table:
        raise ConfigError(
            "nobody says what the numbers in the labels mean: give --labels '1=anterior,2=posterior', a known "
            "--label-coding, or a dataset.json with labels"
        )
    return {"0": BACKGROUND, **table}


def _check_case(case: str, folder: Folder, values: Mapping[int, str]) -> CaseCheck:
    check = CaseCheck(case, files=dict(folder.files[case]), problems=list(folder.problems.get(case, ())))
    hint = "; name every value with --labels, or is the mask stored as grey values"
    check_files(check, label="label", legal=values, hint=lambda strange: hint)
    return check


def _split(
    names: Sequence[str], counts: Sequence[int] | None, fractions: Sequence[float], *, by_name: bool, seed: int
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Section -> cases, and how they were chosen; ``names`` are sorted."""
    made_by: dict[str, Any] = {"by": "volume", "order": "name"}
    if counts is not None:
        return split_in_order(names, counts), {**made_by, "counts": list(counts)}
    made_by["fractions"] = list(fractions)
    if by_name:
        return split_in_order(names, section_counts(len(names), fractions)), made_by
    split = split_by_patient(dict(zip(names, names, strict=True)), fractions, seed=seed)
    return split, {**made_by, "order": "hash", "seed": seed}
