"""From a folder of volumes to a datalist: the layout of the Medical Segmentation Decathlon, or two plain folders.

Decathlon (Antonelli et al., Nature Communications 2022): ``imagesTr``, ``labelsTr`` and ``dataset.json`` with the
tables ``labels`` and ``modality`` and the list ``training``; ``imagesTs`` has no labels and is left to ``samseg
predict``. Plain: ``images`` and ``labels`` with equal names. Neither tells which volumes share a subject, so each is
its own patient and the datalist says that it was split by volume.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists.checks import CaseCheck, Summary, check_files, duplicates, read_all, write_checked
from samseg_monai.data.datalists.label_maps import BACKGROUND, OWN_CODING, absent_labels, implausible_sizes, labels_in
from samseg_monai.data.datalists.splits import DEFAULT_FRACTIONS, section_counts, split_by_patient, split_in_order
from samseg_monai.data.files.volumes import stem_of
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.files import read_json

_PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))


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
    **reading: Any,
) -> Summary:
    """Check every pair of image and label completely and write a datalist with paths relative to ``src``.

    Args:
        src: folder in one of the two layouts.
        output: datalist to write; a case is called like its files.
        labels: value -> name for all values in the labels; the background may be left out. Default: ``dataset.json``.
        label_coding: a known coding instead of ``labels``, by name (``label_maps.CODINGS``).
        name: of the data set; default that of ``dataset.json``, or of the folder.
        counts: volumes for training, validation and testing, taken in the order of their names.
        fractions: of the volumes, without ``counts``; see ``by_name``.
        by_name: take them in the order of their names, not in one drawn with ``seed``.
        seed: of the drawn order.
        reading: ``skip_bad``, ``num_threads``, ``progress``, see ``checks.read_all``.

    Raises:
        ConfigError: nobody says what the labels mean, or two say it; unknown label coding.
        DataError: no such layout, all defects of all cases at once (unless ``skip_bad``), or a split that does not fit
            the number of cases.
    """
    src = Path(src)
    folder = _read_folder(src)
    table = _table_of(labels, label_coding, folder)
    values = {int(value): text for value, text in table.items()}
    if not reading.get("skip_bad"):  # a split that cannot be made is told before the reading
        _split(list(folder.cases), counts, fractions, by_name=by_name, seed=seed)
    hint = "; name every value with --labels, or is the mask stored as grey values"
    read = partial(check_files, label="label", legal=values, hint=lambda check, strange: hint, modality=folder.modality)
    checks = list(folder.cases.values())
    good, problems = read_all(checks, read, src, **reading)
    split, made_by = _split([check.case for check in good], counts, fractions, by_name=by_name, seed=seed)
    voxels = [check.voxels_per_label for check in good]
    warnings = [*folder.notes, *duplicates(good), *absent_labels(voxels, values)]
    warnings += implausible_sizes(voxels, label_coding) if label_coding else []
    header = {"name": name or folder.name, "modality": folder.modality, "scans": ["image"], "labels": table}
    header |= {"label_coding": label_coding or OWN_CODING, "split": made_by}
    return write_checked(output, src, good, split, header=header, patient=None, warnings=warnings, left_out=problems)


def _table_of(labels: Mapping[str, str] | None, label_coding: str | None, folder: _Folder) -> dict[str, str]:
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


@dataclass
class _Folder:
    """What a folder holds and says, by names and ``dataset.json`` alone.

    ``cases`` by name, sorted; ``labels``: value -> name, None where nobody says; ``notes``: what was seen and not used.
    """

    name: str
    modality: str
    labels: dict[str, str] | None
    cases: dict[str, CaseCheck]
    notes: list[str] = field(default_factory=list)


def _read_folder(src: Path) -> _Folder:
    """Find the cases of a Decathlon folder (those of its ``training`` list, if it has one) or of two plain folders.

    Raises:
        DataError: no such layout, no volume in it, or a ``dataset.json`` that cannot be read.
    """
    pair = _pair_of(src)
    if pair is None:
        raise DataError(f"{src} holds no folders imagesTr and labelsTr, nor images and labels{_hint(src)}")
    path = src / "dataset.json"
    table = read_json(path, DataError, "dataset") if path.is_file() else {}
    present = {kind: _files_by_stem(src / sub) for kind, sub in zip(("image", "label"), pair, strict=True)}
    listed = table.get("training")
    if not isinstance(listed, list) or not listed:
        listed = None
    cases = _paired(present, pair) if listed is None else _listed(listed, src)
    for files, sub in zip(present.values(), pair, strict=True):
        for case, paths in files.items():
            if case in cases and len(paths) > 1:
                cases[case].problems.append(f"{' and '.join(path.name for path in paths)} in {sub}: keep one")
    if not cases:
        raise DataError(f"{src}: no volume in {pair[0]} (expected files such as {pair[0]}/case_001.nii.gz)")
    modality = table.get("modality") or table.get("channel_names") or ""
    folder = _Folder(
        name=str(table.get("name") or src.resolve().name),
        modality=", ".join(map(str, modality.values())) if isinstance(modality, dict) else str(modality),
        labels=_labels(table["labels"], path) if table.get("labels") else None,
        cases=dict(sorted(cases.items())),
    )
    if unlisted := sorted(set(present["image"]) - set(cases)) if listed else []:
        shown = ", ".join(unlisted[:5]) + (" ..." if len(unlisted) > 5 else "")
        folder.notes.append(f"{len(unlisted)} images are not in the training list of dataset.json: {shown}")
    if unlabelled := sum(map(len, _files_by_stem(src / "imagesTs").values())):
        folder.notes.append(f"{unlabelled} images in imagesTs have no label: 'samseg predict' takes them")
    return folder


def _pair_of(src: Path) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all((src / sub).is_dir() for sub in pair)), None)


def _hint(src: Path) -> str:
    if not src.is_dir():
        return ": it is not a folder"
    if src.name in {sub for pair in _PAIRS for sub in pair}:
        return f"; give its parent {src.resolve().parent}"
    deeper = [sub for sub in sorted(src.iterdir()) if sub.is_dir() and _pair_of(sub)]
    return f"; did you mean {deeper[0]}?" if deeper else ""


def _labels(stored: Any, path: Path) -> dict[str, str]:
    """``{"0": "background", ...}`` of the Decathlon; nnU-Net writes the same table the other way round."""
    labels = dict(stored) if isinstance(stored, Mapping) else {}
    if labels and all(type(value) is int for value in labels.values()):
        labels = {str(value): name for name, value in labels.items()}
    try:
        return {str(int(value)): str(name) for value, name in labels.items()}
    except ValueError as error:
        raise DataError(f'{path}: labels must be {{"0": "background", "1": "<name>", ...}}, got {stored!r}') from error


def _files_by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() and (stem := stem_of(path)):
            files.setdefault(stem, []).append(path)
    return files


def _paired(present: Mapping[str, Mapping[str, list[Path]]], pair: tuple[str, str]) -> dict[str, CaseCheck]:
    cases = {case: CaseCheck(case) for files in present.values() for case in files}
    for (kind, files), sub in zip(present.items(), pair, strict=True):
        for case, check in cases.items():
            if case in files:
                check.files[kind] = files[case][0]
            else:
                check.problems.append(f"no file of this name in {sub}")
    return cases


def _listed(listed: Sequence[Any], src: Path) -> dict[str, CaseCheck]:
    cases: dict[str, CaseCheck] = {}
    for number, entry in enumerate(listed):
        names = {kind: entry.get(kind) if isinstance(entry, dict) else None for kind in ("image", "label")}
        case = stem_of(str(names["image"] or "")) or f"training[{number}]"
        if case in cases:
            cases[case].problems.append("is listed twice in dataset.json")
        check = cases.setdefault(case, CaseCheck(case))
        for kind, name in names.items():
            inside = os.path.normpath(str(name or ""))
            if not isinstance(name, str) or os.path.isabs(inside) or inside.startswith(".."):
                check.problems.append(f"its {kind} in dataset.json is no file below {src}: {name!r}")
            else:
                check.files[kind] = src / inside
    return cases
