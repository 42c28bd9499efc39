"""How data sets lie in folders: their cases found by names, tables and ``dataset.json`` alone, no image read.

- Two folders, ``imagesTr`` and ``labelsTr`` or ``images`` and ``labels``: equal names; the Decathlon's (Antonelli et
  al., Nature Communications 2022), whose ``dataset.json`` lists its cases and may name the channels of a fourth axis;
  or nnU-Net's raw data (its ``documentation/dataset_format.md``), one file ``<case>_0000`` for each channel.
- One folder for each case, with equal names in all, which may begin with the folder's: ``P01/t1.nii.gz``,
  ``P01/seg.nii.gz``, ``P02/P02_t1.nii.gz``.
- A CSV table with a column for the label and one for each scan.
- DICOM as an archive exports it (``files.pacs``), where a person names the scans; labels lie in the folder of a case,
  or are called like it in ``labels`` or ``labelsTr``.

In place of any image there may be a folder with one DICOM series. Names are compared in Unicode's composed form (NFC):
macOS writes umlauts as two characters, others as one.
"""

from __future__ import annotations

import csv
import io
import os.path
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.data.datalists.checks import CaseCheck
from samseg_monai.data.datalists.label_maps import VALUE
from samseg_monai.data.datalists.owners import alike, few, owners_of, top_folders
from samseg_monai.data.files.case_list import CaseList
from samseg_monai.data.files.dicom import holds_series
from samseg_monai.data.files.pacs import FOLDER, Sorter, rules_of
from samseg_monai.data.files.volumes import SUFFIXES, image_stem, stem_of
from samseg_monai.errors import ConfigError, DataError, raise_all
from samseg_monai.files import read_json

PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))
LABEL_NAMES = ("seg", "label", "labels", "mask", "gtv", "gt", "segm", "segmentation", "groundtruth", "truth")
LABEL, IMAGE = "label", "image"
PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject", "subject_id", "group")
_CHANNEL = re.compile(r"(.+)_(\d{4})$")


@dataclass
class Layout:
    """What lies in a folder.

    Attributes:
        kind: how a person calls the layout.
        scans: names of the scans of a case.
        cases: by name, sorted; their ``files`` are called by scan, and ``label``.
        one_file: the one file of a case holds all scans on a fourth axis.
        name, modality, labels: what ``dataset.json`` says; ``labels`` is None where nobody says it.
        patients: case -> patient, where a table tells.
        notes: what was seen and is not used.
    """

    kind: str
    scans: tuple[str, ...]
    cases: dict[str, CaseCheck]
    one_file: bool = False
    name: str = ""
    modality: str = ""
    labels: dict[str, str] | None = None
    patients: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def find_layout(
    src: Path, table: Path | None = None, *, named: bool = False, scans: Mapping[str, str] | None = None
) -> Layout:
    """Find the cases in ``src``.

    Args:
        src: folder in one of the layouts, or the folder that the paths in ``table`` are relative to.
        table: CSV with the columns ``case`` and ``patient`` for what lies in ``src``; with ``label`` and columns of
            images it lists the cases itself.
        named: somebody else says what the labels mean; what ``dataset.json`` says is not read.
        scans: scan -> text in the SeriesDescription of its DICOM series, or "" where known words tell it: ``src`` is an
            archive's export.

    Raises:
        ConfigError: ``scans`` beside a table of images.
        DataError: no such folder, none of the layouts, no case in it, a ``dataset.json`` or table that cannot be read.
    """
    if not src.is_dir():
        raise DataError(f"{src}: {'is no folder' if src.exists() else 'no such folder'}; give the folder of the data")
    rows, title = ([], "") if table is None else (read_csv(table), table.name)
    if rows and scans and any(name in rows[0] for name in LABEL_NAMES):
        raise ConfigError(f"--scan finds the images by their tags, but {title} lists them; give one of them")
    if scans:
        found = _of_export(src, scans, told=bool(rows))
    elif rows and any(name in rows[0] for name in LABEL_NAMES):
        found = _of_table(rows, src, title)
    elif (pair := _pair_in(src)) is not None:
        found = _of_pair(src, pair, named)
    else:
        found = _of_case_folders(src)
    if rows and found.patients is None and not found.kind.startswith("table"):
        found.patients = patients_in(rows, found.cases, title)
    if rows:
        found.notes += alike((found.patients or {}).values())
    found.cases = dict(sorted(found.cases.items()))
    found.name = found.name or src.resolve().name
    return found


def parts_of(folder: Path) -> dict[str, list[Path]]:
    """Images in the folder of a case by what they are called there, without the folder's name in front.

    A DICOM series in ``folder`` itself is called ``image``, one in a sub-folder like that.
    """
    own = composed(folder.name)
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem = (path.name if holds_series(path) else None) if path.is_dir() else stem_of(path)
        if stem is None or stem.startswith("."):
            continue
        part = composed(stem)
        if part.startswith(own) and part[len(own) :][:1] in ("", "-", "_", "."):
            part = part[len(own) + 1 :] or IMAGE
        parts.setdefault(part, []).append(path)
    if holds_series(folder):
        parts.setdefault(IMAGE, []).append(folder)
    return parts


def case_folders(src: Path) -> list[Path]:
    """Sub-folders of ``src``, sorted; hidden ones are none."""
    return sorted(path for path in src.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def composed(name: str) -> str:
    """``name`` in Unicode's composed form (NFC), in which two names that look the same are the same."""
    return unicodedata.normalize("NFC", name)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file (comma, semicolon or tab; with or without a byte order mark) by lower-case column names.

    Raises:
        DataError: it cannot be read, has no rows, a column without or with the same name, or a row of another length.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = (text.splitlines() or [""])[0]
        delimiter = max(",;\t", key=first.count)
        lines = [
            line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(line)
        ]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"table {path}: cannot be read ({reason}); save it as CSV in UTF-8") from error
    header = [name.strip().lower() for name in lines[0]] if lines else []
    problems = [f"column {name!r}: {count} times" for name, count in Counter(header).items() if count > 1 or not name]
    problems += [
        f"row {n}: {len(line)} cells for {len(header)} columns"
        for n, line in enumerate(lines, 1)
        if len(line) != len(header)
    ]
    raise_all(problems, DataError, f"table {path}: is no table")
    if len(lines) < 2:
        raise DataError(f"table {path}: has no rows; expected a line of column names and one for each case")
    return [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]


def patients_in(rows: Sequence[Mapping[str, str]], cases: Iterable[str], name: str) -> dict[str, str]:
    """Case -> patient of the rows of a table, for all ``cases``; rows of other cases are passed over.

    Raises:
        DataError: no column for the case or the patient, cases without a row or a patient, or with two.
    """
    key = next((column for column in ("case", IMAGE, "name", "file") if column in rows[0]), None)
    owner = next((column for column in PATIENT_COLUMNS if column in rows[0]), None)
    if key is None or owner is None:
        raise DataError(
            f"table {name}: needs the columns case and patient, has {', '.join(rows[0])}; case is the name of a case's "
            "file or folder"
        )
    found: dict[str, set[str]] = {}
    for row in rows:
        file = composed(row[key].replace("\\", "/").rpartition("/")[2])
        found.setdefault(stem_of(file) or image_stem(file) or file, set()).add(composed(row[owner]))
    problems = []
    for case in cases:
        owners = found.get(case, set())
        if len(owners) != 1 or "" in owners:
            problems.append(f"{case}: {'several patients' if len(owners) > 1 else 'no patient'} in it")
    raise_all(problems, DataError, f"table {name}: does not tell the patient of every case")
    return {case: next(iter(found[case])) for case in cases}


def _pair_in(src: Path) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if all((src / sub).is_dir() for sub in pair)), None)


def _of_pair(src: Path, pair: tuple[str, str], named: bool) -> Layout:
    path = src / "dataset.json"
    said = read_json(path, DataError, "dataset") if path.is_file() else {}
    notes: list[str] = []
    images, labels = (_by_stem(src / sub, notes) for sub in pair)
    listed = said.get("training")
    channels = _channels(said, path)
    if isinstance(listed, list) and listed:
        found = Layout("Decathlon (dataset.json lists the cases)", channels or (IMAGE,), _listed(listed, src))
        found.one_file = len(found.scans) > 1
    elif _is_nnunet(images, labels):
        found = _nnunet(images, labels, channels)
    else:
        found = Layout(f"{pair[0]} and {pair[1]} with equal names", channels or (IMAGE,), _paired(images, labels, pair))
        found.one_file = len(found.scans) > 1
    if not found.cases:
        raise DataError(f"{src}: no volume in {pair[0]} (expected files such as {pair[0]}/case_001.nii.gz)")
    for files, sub in ((images, pair[0]), (labels, pair[1])):
        for stem, paths in files.items():
            if stem in found.cases and len(paths) > 1:
                found.cases[stem].problems.append(f"{' and '.join(file.name for file in paths)} in {sub}: keep one")
    found.name = str(said.get("name") or "")
    modality = said.get("modality") or said.get("channel_names") or ""
    found.modality = ", ".join(map(str, modality.values())) if isinstance(modality, dict) else str(modality)
    found.labels = _labels(said["labels"], path) if said.get("labels") and not named else None
    if unlisted := sorted(set(images) - set(found.cases)) if listed else []:
        notes.append(f"{len(unlisted)} images are not in the training list of dataset.json: {few(unlisted)}")
    if unlabelled := sum(map(len, _by_stem(src / "imagesTs", []).values())):
        notes.append(f"{unlabelled} images in imagesTs have no label: 'samseg predict' takes them")
    found.notes += notes
    return found


def _by_stem(folder: Path, notes: list[str]) -> dict[str, list[Path]]:
    """Volumes and folders of DICOM series in ``folder``; other names are noted."""
    files: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem = (path.name if holds_series(path) else None) if path.is_dir() else stem_of(path)
        if stem is not None:
            files.setdefault(composed(stem), []).append(path)
        elif not path.name.startswith(".") and path.name.lower() not in ("thumbs.db", "desktop.ini"):
            others.append(path.name)
    if others:
        notes.append(f"{len(others)} entries of {folder.name} are no volumes ({', '.join(SUFFIXES)}): {few(others)}")
    return files


def _channels(said: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Names of the channels, if ``dataset.json`` has several: ``modality`` of the Decathlon, nnU-Net's
    ``channel_names``."""
    stored = said.get("channel_names") or said.get("modality")
    if not isinstance(stored, Mapping) or len(stored) < 2:
        return ()
    if sorted(stored) != sorted(map(str, range(len(stored)))) or len({*map(str, stored.values())}) < len(stored):
        raise DataError(f'{path}: channels must be {{"0": "FLAIR", "1": "T1w", ...}}, each name once, got {stored!r}')
    return tuple(_scan_name(str(stored[str(n)])) for n in range(len(stored)))


def _scan_name(text: str) -> str:
    """A text as settings name scans."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.-") or IMAGE


def _is_nnunet(images: Iterable[str], labels: Iterable[str]) -> bool:
    stems = set(images)
    return bool(stems) and all(_CHANNEL.match(stem) for stem in stems) and not stems & set(labels)


def _nnunet(images: Mapping[str, list[Path]], labels: Mapping[str, list[Path]], names: tuple[str, ...]) -> Layout:
    numbers = sorted({match[2] for stem in images if (match := _CHANNEL.match(stem))})
    named = dict(zip(numbers, names if len(names) == len(numbers) else _unnamed(numbers), strict=True))
    cases: dict[str, CaseCheck] = {}
    for stem, paths in images.items():
        match = _CHANNEL.match(stem)
        check = cases.setdefault(match[1], CaseCheck(match[1])) if match else CaseCheck(stem)
        several = f"{' and '.join(path.name for path in paths)}: keep one"
        check.take(named[match[2]] if match else stem, paths, absent="", several=several)
    for case, check in cases.items():
        check.problems += [
            f"no file {case}_{number} for {scan}" for number, scan in named.items() if scan not in check.files
        ]
    for stem, paths in labels.items():
        cases.setdefault(stem, CaseCheck(stem, problems=["no file of this name with _0000 in imagesTr"]))
        cases[stem].files[LABEL] = paths[0]
    notes = [] if not names or len(names) == len(numbers) else [f"dataset.json names {len(names)} channels"]
    return Layout("nnU-Net raw data (<case>_0000)", tuple(named.values()), cases, notes=notes)


def _unnamed(numbers: Sequence[str]) -> list[str]:
    return [IMAGE] if len(numbers) == 1 else [f"channel_{int(number)}" for number in numbers]


def _paired(
    images: Mapping[str, list[Path]], labels: Mapping[str, list[Path]], pair: tuple[str, str]
) -> dict[str, CaseCheck]:
    """Cases of equal names; an image alone is one without a label, which is no defect."""
    cases = {case: CaseCheck(case, {IMAGE: paths[0]}) for case, paths in images.items()}
    for case, paths in labels.items():
        cases.setdefault(case, CaseCheck(case, problems=[f"no file of this name in {pair[0]}"]))
        cases[case].files[LABEL] = paths[0]
    return cases


def _listed(listed: Sequence[Any], src: Path) -> dict[str, CaseCheck]:
    cases: dict[str, CaseCheck] = {}
    for number, entry in enumerate(listed):
        names = {kind: entry.get(kind) if isinstance(entry, dict) else None for kind in (IMAGE, LABEL)}
        file = str(names[IMAGE] or "").replace("\\", "/")
        case = composed(stem_of(file) or f"training[{number}]")
        if case in cases:
            cases[case].problems.append("is listed twice in dataset.json")
        check = cases.setdefault(case, CaseCheck(case))
        for kind, name in names.items():
            if kind == LABEL and isinstance(entry, dict) and name is None:
                continue
            found = _inside(name, src)
            if found is None:
                check.problems.append(f"its {kind} in dataset.json is no file below {src}: {name!r}")
            else:
                check.files[kind] = found
    return cases


def _inside(name: Any, src: Path) -> Path | None:
    """The file below ``src`` that a text names: slashes of either kind, umlauts in the form that the disk has."""
    if not isinstance(name, str) or not name or re.search("[\x00-\x1f\ud800-\udfff]", name) or len(name) > 4096:
        return None
    inside = os.path.normpath(name)
    if "\\" in name and not os.path.lexists(src / inside):
        inside = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(inside) or re.match(r"[A-Za-z]:", inside) or inside.startswith(".."):
        return None
    forms = (unicodedata.normalize(form, inside) for form in ("NFC", "NFD"))
    return next((src / form for form in (inside, *forms) if os.path.lexists(src / form)), src / inside)


def _labels(stored: Any, path: Path) -> dict[str, str]:
    """``{"0": "background", ...}`` of the Decathlon; nnU-Net writes the same table the other way round."""
    table = dict(stored) if isinstance(stored, Mapping) else {}
    if regions := sorted(str(name) for name, value in table.items() if isinstance(value, list)):
        raise DataError(
            f"{path}: its labels are regions of several values ({', '.join(regions)}), which are no classes of their "
            "own; name each value with --labels '1=...,2=...'"
        )
    if table and all(type(value) is int for value in table.values()) and len({*table.values()}) == len(table):
        table = {str(value): name for name, value in table.items()}
    if not table or not all(VALUE.fullmatch(value) and isinstance(name, str) for value, name in table.items()):
        raise DataError(f'{path}: labels must be {{"0": "background", "1": "<name>", ...}}, got {stored!r}')
    return {str(int(value)): name for value, name in table.items()}


def _of_case_folders(src: Path) -> Layout:
    folders = {composed(folder.name): (folder, parts_of(folder)) for folder in case_folders(src)}
    found = {case: parts for case, (_, parts) in folders.items() if parts}
    named = [case for case, parts in found.items() if _label_parts(parts)]
    if not named:
        raise DataError(
            f"{src} holds no folders imagesTr and labelsTr, nor images and labels, nor one folder for each case with "
            f"an image and a label ({', '.join(LABEL_NAMES[:4])} ...){_hint(src)}"
        )
    counts = Counter(part for parts in found.values() for part in parts if part.lower() not in LABEL_NAMES)
    used = sorted(part for part, count in counts.items() if 2 * count > len(named))
    notes = [f"{part}: not used, {n} of {len(found)} cases have it" for part, n in counts.items() if part not in used]
    if not used:
        raise DataError(f"{src}: no name of an image is in most of its folders ({few(counts)}); list them in a --table")
    names = dict(zip(used, map(_scan_name, used), strict=True))
    scans = tuple(names.values() if len(set(names.values())) == len(used) else used)
    cases = {}
    for case, parts in found.items():
        check = cases[case] = CaseCheck(case)
        for part, scan in zip(used, scans, strict=True):
            several = f"{' and '.join(path.name for path in parts.get(part, ()))}: keep one"
            check.take(scan, parts.get(part, []), absent=f"no {part} in its folder", several=several)
        labels = [path for part in _label_parts(parts) for path in parts[part]]
        if len(labels) > 1:
            which = " and ".join(path.name for path in labels)
            check.problems.append(f"{which}: which is the label? Keep one, or list the files in a --table")
        elif labels:
            check.files[LABEL] = labels[0]
    if empty := [case for case, (_, parts) in folders.items() if not parts]:
        notes.append(f"{len(empty)} folders hold no image: {few(empty)}")
    return Layout(f"one folder for each case, with {', '.join(scans)}", scans, cases, notes=notes)


def _of_export(src: Path, scans: Mapping[str, str], *, told: bool) -> Layout:
    """The cases of an export; where a table has ``told`` of patients, neither tags nor folders do."""
    exams = CaseList()
    texts = {scan: text for scan, text in scans.items() if text}
    sorter = Sorter(rules_of({"texts": texts, "name_by": FOLDER}, tuple(scans)), exams, links=False)
    sorter.take(src, case_folders(src))
    if not exams.files and not exams.bad:
        raise DataError(f"{src}: no DICOM series in it or below; --scan is for an export of an archive")
    stored = [_by_stem(src / sub, []) for _, sub in PAIRS if (src / sub).is_dir()]
    homes = {case: Path(os.path.commonpath(paths)) for case, paths in exams.files.items()}
    inside = Counter(place for home in homes.values() for place in (home, *home.parents))  # how many cases lie there
    cases = {case: CaseCheck(case, problems=[reason]) for case, reason in exams.bad.items()}
    for case, paths in exams.files.items():
        check = cases[case] = CaseCheck(case, dict(zip(scans, paths, strict=True)))
        places = [homes[case], *homes[case].parents]
        # where another case lies, too, a label could be either's
        own = [folder for folder in places if src in folder.parents and inside[folder] == 1]
        labels = [path for files in stored for path in files.get(case, [])]
        for folder in own:
            parts = parts_of(folder)
            labels += [path for part in _label_parts(parts) for path in parts[part] if not path.is_dir()]
        if len(labels) > 1:
            check.problems.append(f"{' and '.join(path.name for path in labels)}: which is the label? Keep one")
        elif labels:
            check.files[LABEL] = labels[0]
    notes = [f"passed over, {reason}: {few(names)}" for reason, names in exams.passed.items()]
    found = Layout("export of an archive, series found by their tags", tuple(scans), cases, notes=notes)
    if not told:
        ids = {case: number for case, (_, number) in sorted(sorter.patients.items())}
        found.patients, more = owners_of(ids, top_folders(src, {case: homes[case] for case in ids}))
        found.patients |= {case: case for case in exams.bad}
        found.notes += more
    return found


def _label_parts(parts: Iterable[str]) -> list[str]:
    return [part for part in parts if part.lower() in LABEL_NAMES]


def _hint(src: Path) -> str:
    if src.name in {sub for pair in PAIRS for sub in pair}:
        return f"; give its parent {src.resolve().parent}"
    if _label_parts(parts_of(src)):
        return f"; it is one case itself: give its parent {src.resolve().parent}"
    deeper = [
        sub for sub in case_folders(src) if _pair_in(sub) or any(_label_parts(parts_of(s)) for s in case_folders(sub))
    ]
    return f"; did you mean {deeper[0]}?" if deeper else ""


def _of_table(rows: Sequence[Mapping[str, str]], src: Path, name: str) -> Layout:
    header = list(rows[0])
    (label, *more) = [column for column in header if column in LABEL_NAMES]
    if more:
        raise DataError(f"table {name}: has the columns {label} and {', '.join(more)}; keep the one that is the label")
    others = [column for column in header if column not in ("case", label, *PATIENT_COLUMNS)]
    scans = [column for column in others if _names_images(rows, column)]
    if not scans:
        raise DataError(f"table {name}: no column names images ({', '.join(header)}); call it image, or like the scan")
    cases: dict[str, CaseCheck] = {}
    owners: dict[str, str] = {}
    owner = next((column for column in PATIENT_COLUMNS if column in header), None)
    for number, row in enumerate(rows, 2):
        file = row[scans[0]].replace("\\", "/").rpartition("/")[2]
        case = composed(row.get("case") or stem_of(file) or file or f"row {number}")
        if case in cases:
            cases[case].problems.append(f"two rows in {name}; name the cases in a column 'case'")
            continue
        check = cases[case] = CaseCheck(case)
        owners[case] = composed(row[owner]) if owner else ""
        if owner and not owners[case]:
            check.problems.append(f"no {owner} in {name}")
        for column in (*scans, label):
            path = _inside(row[column], src)
            if path is not None:
                check.files[LABEL if column == label else column] = path
            elif column != label or row[column]:
                check.problems.append(f"its {column} in {name} is no file below {src}: {row[column]!r}")
    unused = [column for column in header if column not in ("case", label, owner, *scans)]
    notes = [f"columns of {name} that are not used: {', '.join(unused)}"] if unused else []
    return Layout(f"table {name}", tuple(scans), cases, patients=owners if owner else None, notes=notes)


def _names_images(rows: Sequence[Mapping[str, str]], column: str) -> bool:
    """Whether a column is called image, or most of its cells look like the files of volumes."""
    looking = sum(stem_of(row[column].replace("\\", "/")) is not None for row in rows)
    return column == IMAGE or 2 * looking > len(rows)
