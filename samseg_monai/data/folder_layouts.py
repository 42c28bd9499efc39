"""Which volumes a folder holds and what it says about them, by names and ``dataset.json`` alone; no volume is read."""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.data.volumes import stem_of
from samseg_monai.errors import DataError

_PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))


@dataclass
class Folder:
    """``read_folder``'s result.

    Attributes:
        files: case -> ``image`` and ``label``, those of them that are named; sorted by case.
        problems: case -> what is wrong with its names.
        name: of the data set; the folder's own where ``dataset.json`` has none.
        modality: such as ``MRI``; empty where nobody says.
        labels: value -> name, or None where nobody says.
        notes: what was seen and not used.
    """

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    name: str = ""
    modality: str = ""
    labels: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def read_folder(src: str | Path) -> Folder:
    """Find the cases of a Decathlon folder (those of its ``training`` list, if it has one) or of two plain folders.

    Raises:
        DataError: no such layout, no volume in it, or a ``dataset.json`` that cannot be read.
    """
    src = Path(src)
    pair = _pair_of(src)
    if pair is None:
        raise DataError(f"{src} holds no folders imagesTr and labelsTr, nor images and labels{_hint(src)}")
    table = _read_table(src / "dataset.json")
    folder = Folder(name=str(table.get("name") or src.resolve().name))
    modality = table.get("modality") or table.get("channel_names") or ""
    folder.modality = ", ".join(map(str, modality.values())) if isinstance(modality, dict) else str(modality)
    if table.get("labels"):
        folder.labels = _labels(table["labels"], src / "dataset.json")
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


def _read_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: expected a JSON object with labels, modality and training")
    return table


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


def _files_by_stem(folder: Path, found: Folder) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _images(folder):
        stem = stem_of(path)
        if stem in files:
            found.problems.setdefault(stem, []).append(f"{files[stem].name} and {path.name} in {folder.name}: keep one")
        elif stem:
            files[stem] = path
    return files


def _take_listed(listed: list[Any], src: Path, folder: Folder) -> None:
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
