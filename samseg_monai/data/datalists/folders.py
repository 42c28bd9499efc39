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
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists.checks import (
    CaseCheck,
    Summary,
    case_notes,
    check_all,
    check_files,
    duplicates,
    split_off_bad,
    write_checked,
)  # fmt: skip
from samseg_monai.data.datalists.label_maps import (
    BACKGROUND,
    OWN_CODING,
    absent_labels,
    implausible_sizes,
    labels_in,
)  # fmt: skip
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
    skip_bad: bool = False,
    num_threads: int = 2,
    progress: bool = True,
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
        skip_bad, num_threads, progress: as of ``brats.prepare_brats_men``.

    Raises:
        ConfigError: nobody says what the labels mean, or two say it; unknown label coding.
        DataError: no such layout, all defects of all cases at once (unless ``skip_bad``), or a split that does not fit
            the number of cases.
    """
    src = Path(src)
    folder = _read_folder(src)
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
    header = {"name": name or folder.name, "modality": folder.modality, "scans": ["image"], "labels": table}
    header |= {"label_coding": label_coding or OWN_CODING, "split": made_by}
    return write_checked(output, src, sections, header=header, patient=None, warnings=warnings, left_out=problems)


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


def _check_case(case: str, folder: _Folder, values: Mapping[int, str]) -> CaseCheck:
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


@dataclass
class _Folder:
    """What a folder holds and says, by names and ``dataset.json`` alone.

    ``files``: case -> ``image`` and ``label``, those of them that are named; ``problems``: case -> what is wrong with
    its names; ``labels``: value -> name, None where nobody says; ``notes``: what was seen and not used.
    """

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    name: str = ""
    modality: str = ""
    labels: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def _read_folder(src: str | Path) -> _Folder:
    """Find the cases of a Decathlon folder (those of its ``training`` list, if it has one) or of two plain folders.

    Raises:
        DataError: no such layout, no volume in it, or a ``dataset.json`` that cannot be read.
    """
    src = Path(src)
    pair = _pair_of(src)
    if pair is None:
        raise DataError(f"{src} holds no folders imagesTr and labelsTr, nor images and labels{_hint(src)}")
    path = src / "dataset.json"
    table = read_json(path, DataError, "dataset") if path.is_file() else {}
    folder = _Folder(name=str(table.get("name") or src.resolve().name))
    modality = table.get("modality") or table.get("channel_names") or ""
    folder.modality = ", ".join(map(str, modality.values())) if isinstance(modality, dict) else str(modality)
    if table.get("labels"):
        folder.labels = _labels(table["labels"], path)
    listed = table.get("training")
    present = {kind: _files_by_stem(src / sub, folder) for kind, sub in zip(("image", "label"), pair, strict=True)}
    if isinstance(listed, list) and listed:
        _take_listed(listed, src, folder)
        unlisted = sorted(set(present["image"]) - set(folder.files))
        if unlisted:
            shown = ", ".join(unlisted[:5]) + (" ..." if len(unlisted) > 5 else "")
            folder.notes.append(f"{len(unlisted)} images are not in the training list of dataset.json: {shown}")
    else:
        for case in sorted({*present["image"], *present["label"]}):
            folder.files[case] = {kind: files[case] for kind, files in present.items() if case in files}
            lacking = [sub for sub, files in zip(pair, present.values(), strict=True) if case not in files]
            folder.problems.setdefault(case, []).extend(f"no file of this name in {sub}" for sub in lacking)
    unlabelled = [path for path in _images(src / "imagesTs") if stem_of(path)]
    if unlabelled:
        folder.notes.append(f"{len(unlabelled)} images in imagesTs have no label: 'samseg predict' takes them")
    if not folder.files:
        raise DataError(f"{src}: no volume in {pair[0]} (expected files such as {pair[0]}/case_001.nii.gz)")
    folder.files = dict(sorted(folder.files.items()))
    folder.problems = {case: texts for case, texts in folder.problems.items() if texts and case in folder.files}
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


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _files_by_stem(folder: Path, found: _Folder) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _images(folder):
        stem = stem_of(path)
        if stem in files:
            found.problems.setdefault(stem, []).append(f"{files[stem].name} and {path.name} in {folder.name}: keep one")
        elif stem:
            files[stem] = path
    return files


def _take_listed(listed: list[Any], src: Path, folder: _Folder) -> None:
    for number, entry in enumerate(listed):
        names = {kind: entry.get(kind) if isinstance(entry, dict) else None for kind in ("image", "label")}
        case = stem_of(str(names.get("image") or "")) or f"training[{number}]"
        if case in folder.files:
            folder.problems.setdefault(case, []).append("is listed twice in dataset.json")
        folder.files[case] = {}
        for kind, name in names.items():
            inside = os.path.normpath(str(name or ""))
            if not isinstance(name, str) or os.path.isabs(inside) or inside.startswith(".."):
                folder.problems.setdefault(case, []).append(
                    f"its {kind} in dataset.json is no file below {src}: {name!r}"
                )
            else:
                folder.files[case][kind] = src / inside
