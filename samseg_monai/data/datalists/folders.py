"""From a folder of volumes, in any of the layouts of ``layouts``, to a datalist.

No layout but a table tells which volumes share a subject, so each is its own patient and the datalist says that it was
split by volume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists.checks import (
    CaseCheck,
    Summary,
    check_files,
    duplicates,
    labelled,
    read_all,
    write_checked,
)
from samseg_monai.data.datalists.label_maps import (
    BACKGROUND,
    OWN_CODING,
    absent_labels,
    check_names,
    implausible_sizes,
    labels_in,
)  # fmt: skip
from samseg_monai.data.datalists.layouts import LABEL, Layout, find_layout
from samseg_monai.data.datalists.splits import (
    DEFAULT_FRACTIONS,
    Split,
    check_one_split,
    choose_splits,
    section_counts,
    split_in_order,
)  # fmt: skip
from samseg_monai.errors import ConfigError


def prepare_folders(
    src: str | Path,
    output: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    label_coding: str | None = None,
    table: str | Path | None = None,
    name: str | None = None,
    counts: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    folds: int | None = None,
    split_file: str | Path | None = None,
    by_name: bool = False,
    seed: int = 0,
    **reading: Any,
) -> Summary:
    """Check every pair of image and label completely and write a datalist with paths relative to ``src``.

    Args:
        src: folder in one of the layouts of ``layouts``.
        output: datalist to write; a case is called like its files or its folder.
        labels: value -> name for all values in the labels; the background may be left out. Default: ``dataset.json``.
        label_coding: a known coding instead of ``labels``, by name (``label_maps.CODINGS``).
        table: CSV with the patient of each case, or with the cases themselves; see ``layouts.find_layout``.
        name: of the data set; default that of ``dataset.json``, or of the folder.
        counts: volumes for training, validation and testing, taken in the order of their names.
        fractions, folds, split_file, seed: instead of ``counts``, see ``splits.choose_splits``.
        by_name: take fractions in the order of names, not in one drawn with ``seed``.
        reading: ``skip_bad``, ``num_threads``, ``progress``, see ``checks.read_all``.

    Raises:
        ConfigError: nobody says what the labels mean, or two say it; an unknown label coding, names that no class can
            have, several ways to split.
        DataError: no such layout, no case with a label, all defects of all cases at once (unless ``skip_bad``), or a
            split that does not fit the number of cases.
    """
    src = Path(src)
    ways: dict[str, Any] = {"fractions": fractions, "folds": folds, "split_file": split_file}
    check_one_split(split=counts, **ways)
    check_one_split(by_name=by_name or None, folds=folds, split_file=split_file)
    found = find_layout(src, None if table is None else Path(table), named=bool(labels or label_coding))
    names = _table_of(labels, label_coding, found)

    def divide(cases: Sequence[str]) -> tuple[list[Split], list[str]]:
        return _splits(found, cases, counts=counts, by_name=by_name, seed=seed, **ways)

    good, warnings, problems = _read(src, found, names, divide, **reading)
    splits, unused = divide([check.case for check in good])
    warnings += unused
    if label_coding:
        warnings += implausible_sizes([check.voxels_per_label for check in good], label_coding)
    header = {"name": name or found.name, "modality": found.modality, "scans": list(found.scans), "labels": names}
    header |= {"label_coding": label_coding or OWN_CODING}
    patient = None if found.patients is None else found.patients.__getitem__
    extra = [f"layout: {found.kind}"]
    return write_checked(
        output, src, good, splits, header=header, patient=patient, warnings=warnings, left_out=problems, extra=extra
    )


def _read(
    src: Path, found: Layout, names: Mapping[str, str], divide: Callable[[Sequence[str]], Any], **reading: Any
) -> tuple[list[CaseCheck], list[str], list[str]]:
    """Good cases, warnings, and problems of the bad ones; ``divide`` raises where a number of cases has no split."""
    values = {int(value): text for value, text in names.items()}
    checks, alone = labelled(list(found.cases.values()), LABEL, src)
    if not reading.get("skip_bad"):  # a split that cannot be made is told before the reading
        divide([check.case for check in checks])
    hint = "; name every value with --labels, or is the mask stored as grey values"
    channels = len(found.scans) if found.one_file else 1
    read = partial(
        check_files,
        label=LABEL,
        legal=values,
        hint=lambda check, strange: hint,
        channels=channels,
        modality=found.modality,
    )
    good, problems = read_all(checks, read, src, **reading)
    missing = absent_labels([check.voxels_per_label for check in good], values)
    return good, [*alone, *found.notes, *duplicates(good), *missing], problems


def _table_of(labels: Mapping[str, str] | None, label_coding: str | None, found: Layout) -> dict[str, str]:
    if labels and label_coding:
        raise ConfigError("got labels and a label coding: give one of them")
    if label_coding:
        return labels_in(label_coding)
    table = labels or found.labels
    if not table:
        raise ConfigError(
            "nobody says what the numbers in the labels mean: give --labels '1=anterior,2=posterior', a known "
            "--label-coding, or a dataset.json with labels"
        )
    check_names(table)
    return {"0": BACKGROUND, **table}


def _splits(
    found: Layout,
    cases: Sequence[str],
    *,
    counts: Sequence[int] | None,
    by_name: bool,
    fractions: Sequence[float] | None,
    **ways: Any,
) -> tuple[list[Split], list[str]]:
    """The splits of ``cases``, which are sorted, and the cases that a split file does not name."""
    everyone = found.patients or {case: case for case in found.cases}
    what = "volume" if found.patients is None else "patient"
    if counts is None and not by_name:
        splits, unused = choose_splits(
            {case: everyone[case] for case in cases}, everyone, fractions=fractions, what=what, **ways
        )
        drawn = {} if ways["split_file"] is not None else {"order": "hash"}
        return [Split(split.sections, {**split.made_by, **drawn}) for split in splits], unused
    made_by: dict[str, Any] = {"by": what, "order": "name"}
    if counts is None:
        fractions = DEFAULT_FRACTIONS if fractions is None else fractions
        counts, made_by["fractions"] = section_counts(len(cases), fractions), list(fractions)
    else:
        made_by["counts"] = list(counts)
    return [Split(split_in_order(cases, counts), made_by)], []
