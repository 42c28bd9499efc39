"""DICOM as archives export it: series found by their tags in any folders, and mapped to the scans that a network wants.

A folder PATIENT/STUDY/SERIES, a DICOM CD, or one folder with all files of an exam: what belongs together is told by
StudyInstanceUID and SeriesInstanceUID, what a series is by its SeriesDescription, which people type as they like. Words
are therefore taken only where they leave no doubt; else a person says it (``--scan t1c=TEXT``). Every series is used,
passed over with the reason, or part of an error. Names of patients are read nowhere: cases are called like folders, or
like the series.

The tag ContrastBolusAgent (0018,0010) counts as a word for contrast.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom

from samseg_monai.data.files.case_list import CaseList, case_name
from samseg_monai.data.files.dicom import is_dicom, without_image
from samseg_monai.data.files.series_words import kind_of
from samseg_monai.data.files.volumes import is_dead_link, modality_problem, stem_of
from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.files import file_name
from samseg_monai.zips import unpack

LOG = logging.getLogger(__name__)
FOLDER, SERIES = "folder", "series"
_TAGS = [
    *("SOPClassUID", "Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber"),
    *("SeriesDescription", "ImageType", "ContrastBolusAgent", "NumberOfFrames", "Rows"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
]
_NO_IMAGES = ("no images", "pictures")
_LOCALIZER = re.compile(r"\b(locali[sz]ers?|scouts?|survey|topogramm?|surview|3[- ]?plane( loc)?|loc)\b")


@dataclass
class Series:
    """One DICOM series.

    Attributes:
        files: of it, sorted; all DICOM files of their folder, or some.
        folders: that they lie in, sorted.
        tags: of the first file (attributes of ``_TAGS``).
        derived: no file is an original.
        contrast: an agent is named.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    tags: pydicom.Dataset = field(default_factory=pydicom.Dataset)
    derived: bool = True
    contrast: bool = False

    @property
    def description(self) -> str:
        """SeriesDescription with single blanks."""
        return " ".join(_text(self.tags, "SeriesDescription").split())

    def told(self) -> str:
        """Folder, description, number, and whether it is derived, for messages."""
        number = _text(self.tags, "SeriesNumber")
        more = f", series {number}" if number else ""
        return f'{self.folders[0].name} ("{self.description}"{more}{", DERIVED" if self.derived else ""})'


@dataclass(frozen=True)
class Rules:
    """How series become cases.

    Attributes:
        scans: that the network wants, in order.
        texts: scan -> text in the SeriesDescription of its series.
        name_by: ``folder`` or ``series``: what a case is called after.
        modality, allow_modality: see ``cases.find_cases``.
        asked: a person gave texts or ``name_by``, so that all DICOM files are sorted by tags.
    """

    scans: tuple[str, ...]
    texts: Mapping[str, str]
    name_by: str = FOLDER
    modality: str = ""
    allow_modality: bool = False
    asked: bool = False


def rules_of(series: Mapping[str, Any] | None, scans: Sequence[str], **modality: Any) -> Rules:
    """Rules out of ``{"texts": {scan: text}, "name_by": "folder" | "series"}``, of which any may be absent.

    ``texts`` are parts of the SeriesDescription of each scan, ``name_by`` tells what cases are called after. Where
    something is given, all DICOM files are sorted by their tags, wherever they lie; else only what folders do not tell
    apart.

    Raises:
        ConfigError: unknown keys or values, a scan that the network does not have; all at once.
    """
    given = {key: value for key, value in dict(series or {}).items() if value}
    texts, name_by = given.pop("texts", {}), given.pop("name_by", None)
    problems = [f"unknown key {key}" for key in given]
    if name_by not in (None, FOLDER, SERIES):
        problems.append(f"name_by: expected {FOLDER} or {SERIES}, got {name_by!r}")
    if not isinstance(texts, Mapping):
        problems.append(f"texts: expected {{scan: text}}, got {texts!r}")
        texts = {}
    for scan, text in texts.items():
        if scan not in scans:
            problems.append(f"scan {scan!r}: the network has {', '.join(scans)}")
        if not isinstance(text, str) or not text.strip():
            problems.append(f"scan {scan}: expected a text of its SeriesDescription, got {text!r}")
    raise_all(problems, ConfigError, "series cannot be sorted as asked (--scan, --name-by)")
    return Rules(tuple(scans), dict(texts), name_by or FOLDER, asked=bool(texts or name_by), **modality)


def dicom_files(folder: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """DICOM files, and links that lead nowhere, in ``folder`` and below it; a ring of links is entered once."""
    seen |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__MACOSX":
            continue
        if path.is_dir():
            yield from dicom_files(path, seen) if path.resolve() not in seen else ()
        elif is_dicom(path) or is_dead_link(path):
            yield path


def series_of(files: Iterable[Path]) -> list[Series]:
    """Series that files belong to, by their tags; files without a SeriesInstanceUID are one for each folder.

    A damaged file belongs to the only series of its folder, whose reader then names it; else it is one without tags.
    """
    found: dict[tuple[str, ...], Series] = {}
    damaged: list[Path] = []
    for path in files:
        tags = _tags_of(path)
        if not any(name in tags for name in ("SOPClassUID", "SeriesInstanceUID", "Modality", "Rows")):
            damaged.append(path)
            continue
        uid = _text(tags, "SeriesInstanceUID")
        key = (uid or f"in {path.parent}", _text(tags, "StudyInstanceUID"), _text(tags, "PatientID"))
        series = found.setdefault(key, Series(tags=tags))
        series.files.append(path)
        series.derived &= "DERIVED" in _image_type(tags)
        series.contrast |= _text(tags, "ContrastBolusAgent").casefold() not in ("", "no", "none", "n")
    homes: dict[Path, dict[int, Series]] = {}  # folder -> the series that have files in it
    for one in found.values() if damaged else ():
        for path in one.files:
            homes.setdefault(path.parent, {})[id(one)] = one
    for path in damaged:
        beside = [one for one in homes.get(path.parent, {}).values() if len(one.tags)]
        (beside[0] if len(beside) == 1 else found.setdefault((str(path),), Series(derived=False))).files.append(path)
    for series in found.values():
        series.files.sort()
        series.folders = sorted({path.parent for path in series.files})
    return list(found.values())


def _meaning(series: Series) -> str:
    return kind_of(series.description, contrast=series.contrast)


def reason_against(series: Series, rules: Rules) -> str:
    """Why a series is no scan of a patient that the network could want; empty for one that may be."""
    tags = series.tags
    if kind := without_image(_text(tags, "SOPClassUID")):
        return f"{_NO_IMAGES[0]} ({kind})"
    frames = _text(tags, "NumberOfFrames") not in ("", "0", "1")
    placed = "ImagePositionPatient" in tags and "ImageOrientationPatient" in tags
    if "Rows" not in tags:
        return _NO_IMAGES[0]
    if not placed and not frames:
        return f"{_NO_IMAGES[1]} without a place in the patient, such as secondary captures"
    if "LOCALIZER" in _image_type(tags) or _LOCALIZER.search(series.description.casefold().replace("_", " ")):
        return "localizers"
    if not rules.allow_modality and modality_problem(_text(tags, "Modality"), rules.modality):
        return f"of another modality ({_text(tags, 'Modality')})"
    return "single images" if len(series.files) == 1 and not frames and placed else ""


class Sorter:
    """Puts series into the cases of one prediction, and holds the folders made for those that share theirs.

    Args:
        rules: of the prediction.
        found: where cases, bad ones and what is passed over go. Folders of links, and what a ZIP held, are removed when
            it goes, or when Python ends.
        links: make folders of links for series that share theirs; else these are bad.

    Attributes:
        patients: case -> its top folder and PatientID.
    """

    def __init__(self, rules: Rules, found: CaseList, *, links: bool = True) -> None:
        self.rules, self._found, self._links = rules, found, links
        self._place: Path | None = None
        self._last: tuple[Path | None, set[Path]] = (None, set())  # a folder, and the DICOM files in it
        self.patients: dict[str, tuple[str, str]] = {}

    def folder(self, *parts: str) -> Path:
        """A new folder in a temporary one: what lies there is given back at the end."""
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="samseg-"))
            weakref.finalize(self._found, _remove, self._place, os.getpid())
        path = Path(tempfile.mkdtemp(dir=self._place), *parts)  # two may be called alike
        path.mkdir(parents=True)
        return path

    def sort(self, root: Path, series: Sequence[Series]) -> None:
        """Make a case of each exam among ``series``, which lie in or below ``root``; or say why there is none."""
        for one in (one for one in series if not len(one.tags)):
            [path] = one.files
            dead = "is a link that leads nowhere" if is_dead_link(path) else "is a damaged DICOM file"
            self._found.bad[str(path.relative_to(root))] = f"{dead}, of a series that nobody knows; copy it again"
        exams = self._exams(root, [one for one in series if len(one.tags)])
        against = {id(one): reason_against(one, self.rules) for one in series}
        usable = {key: [one for one in members if not against[id(one)]] for key, members in exams.items()}
        done = {key[:2] for key, members in usable.items() if members}
        cases = {}
        for key, members in exams.items():
            for one in members:
                if reason := against[id(one)]:
                    self._found.pass_over(f"series: {reason}", [one.told()])
            # of a patient without any scan an exam is told; beside the one that was meant it is not missed
            images = any(not against[id(one)].startswith(_NO_IMAGES) for one in members)
            if usable[key] or (images and key[:2] not in done):
                cases[key] = members
        for (key, members), name in zip(cases.items(), self._names(root, cases), strict=True):
            if usable[key]:
                self._add(name, usable[key], key[:2], alone=len(cases) == 1)
            else:
                listed = "; ".join(f"{one.told()}: {against[id(one)]}" for one in members)
                self._found.bad[case_name(name)] = f"none of its series is one for the network: {listed}"

    def unpacked(self, path: Path) -> Path:
        """A temporary folder with what a ZIP holds. Raises DataError as ``zips.unpack``."""
        folder = self.folder(file_name(path.stem))
        unpack(path, folder)
        return folder

    def take(self, folder: Path, subs: Sequence[Path]) -> set[Path]:
        """Sort by tags what folders do not sort: series that lie deeper or share a folder, scans of folders that are
        not called like them, or with ``Rules.asked`` all.

        Args:
            folder: of cases, or of one.
            subs: its sub-folders that may hold cases.
        Returns: those of the folders whose DICOM files are dealt with.
        """
        inside = {place: _dicom_in(place) for place in (folder, *subs)}
        if self.rules.asked:
            below = {sub: list(dicom_files(sub)) for sub in subs}
            # ids that all were replaced by one do not join what lies deeper in one folder and in another
            near = [path for sub, files in below.items() for path in files if path.parent == sub]
            groups = [[path for path in files if path.parent != sub] for sub, files in below.items()]
            series = [one for files in ([*inside[folder], *near], *groups) for one in series_of(files)]
            self.sort(folder, series)
            return {folder, *subs} if series else set()
        several = len(self.rules.scans) > 1
        held = {place: series_of(files) for place, files in inside.items() if files}
        taken = {place for place, found in held.items() if len(found) > 1 or several}
        if folder in taken:
            self.sort(folder, held[folder])
        flat = [sub for sub in subs if sub in taken]
        if several:  # its scans may lie side by side
            self.sort(folder, series_of(path for sub in flat for path in inside[sub]))
        else:
            for sub in flat:
                self.sort(folder, held[sub])
            alone = {sub: held[sub][0] for sub in subs if sub in held and sub not in taken}
            beside = self._beside(list(alone.values()))
            taken |= {sub for sub, one in alone.items() if id(one) in beside}
        for sub in subs:
            deep = [] if inside[sub] or self.named_like_scans(sub) else list(dicom_files(sub))
            if any(is_dicom(path) for path in deep):
                self.sort(folder, series_of(deep))
                taken.add(sub)
        return taken

    def named_like_scans(self, folder: Path) -> bool:
        """Whether ``folder`` holds a folder of DICOM files for a scan, called like it."""
        held = [path.name for path in folder.iterdir() if path.is_dir() and any(map(is_dicom, path.iterdir()))]
        return any(scan in held for scan in self.rules.scans) and (len(self.rules.scans) > 1 or len(held) == 1)

    def _beside(self, series: Sequence[Series]) -> set[int]:
        """Which (by ``id``) of some series, each alone in its folder, are passed over beside others of their study, as
        no scan of the network.

        Folders of one series each are cases of a person's own making: one without others is what a person wants.
        """
        passed, wanted = set(), kind_of(self.rules.scans[0])
        study_of = {id(one): _text(one.tags, "StudyInstanceUID") for one in series}
        uids: dict[str, set[str]] = {}
        for one in series:
            uids.setdefault(study_of[id(one)], set()).add(_text(one.tags, "SeriesInstanceUID"))
        clear = {study_of[id(one)] for one in series if _meaning(one) == wanted}
        for one in series:
            study, meant = study_of[id(one)], _meaning(one)
            if not study or len(uids[study]) < 2:
                continue
            reason = reason_against(one, self.rules)
            if not reason and wanted and meant != wanted and (meant or study in clear):
                reason = f"{meant or 'none of the scans'} by their description, not {self.rules.scans[0]}"
            if reason:
                self._found.pass_over(f"series: {reason}", [one.told()])
                passed.add(id(one))
        return passed

    def _add(self, name: str, usable: Sequence[Series], patient: tuple[str, str], *, alone: bool) -> None:
        """Add the case of one exam, whose series may all be scans."""
        chosen: dict[str, Series] = {}
        problems, missing = [], []
        for scan in self.rules.scans:
            matching = self._matching(scan, usable)
            if len(matching) == 1:
                chosen[scan] = matching[0]
            elif matching:
                both = " and ".join(one.told() for one in matching)
                problems.append(f"{both} may each be {scan}; choose by a text of the description: --scan {scan}=TEXT")
            else:
                missing.append(scan)
        if missing:
            listed, first = ", ".join(one.told() for one in usable), missing[0]
            how = f"choose by a text of it, --scan {first}=TEXT, or call its folder {first}"
            problems.append(f"no series is {' or '.join(missing)} by its description, among {listed}; {how}")
        if not problems and len({id(one) for one in chosen.values()}) < len(chosen):
            problems.append("one series is taken for several scans; give --scan texts that tell them apart")
        if not self._links:
            problems += [
                f"{one.told()} shares its folder with other files, or has several; put it into one of its own"
                for one in chosen.values()
                if not self._has_folder(one)
            ]
        used = {id(one) for one in chosen.values()}
        if problems:
            self._found.bad[case_name(name)] = "; ".join(problems)
            return
        if rest := [one.told() for one in usable if id(one) not in used]:
            self._found.pass_over("series that are none of the scans", rest)
        if self.rules.name_by == SERIES:
            name = _by_series(chosen[self.rules.scans[0]], name, alone=alone)
        case = case_name(name)
        self.patients[case] = patient
        for scan, one in chosen.items():
            if one.derived and scan not in self.rules.texts:
                note = f"{one.told()} is taken for {scan}, as no original is; --scan {scan}=TEXT chooses another"
                LOG.warning("%s: %s", case, note)
                self._found.note(case, [note])
        self._found.add(case, [self._path(one, case, scan) for scan, one in chosen.items()])

    def _matching(self, scan: str, usable: Sequence[Series]) -> list[Series]:
        """Series that may be ``scan``: originals, or derived ones where there is none."""
        text, kind = self.rules.texts.get(scan), kind_of(scan)
        if text is not None:
            wanted = " ".join(text.casefold().split())
            matching = [one for one in usable if wanted in one.description.casefold()]
        elif called := [one for one in usable if all(folder.name == scan for folder in one.folders)]:
            matching = called
        elif kind:
            matching = [one for one in usable if _meaning(one) == kind]
        elif len(self.rules.scans) == 1:
            matching = list(usable)
        else:
            word = re.compile(rf"(?<![a-z0-9]){re.escape(scan.casefold())}(?![a-z0-9])")
            matching = [one for one in usable if word.search(one.description.casefold().replace("_", " "))]
        return [one for one in matching if not one.derived] or matching

    def _exams(self, root: Path, series: Sequence[Series]) -> dict[tuple[str, str, str], list[Series]]:
        """Series by top folder, patient's id and study, in the order of their folders.

        The top folder counts where series lie deeper: ids that all were replaced by one must not join patients. Without
        an id of the study, a folder of series is one, and so is a single series for a network of one scan.
        """
        found: dict[tuple[str, str, str], list[Series]] = {}
        for one in sorted(series, key=lambda one: (one.folders, one.files)):
            folder = one.folders[0]
            parts = folder.relative_to(root).parts
            own = folder if len(parts) < 2 and len(self.rules.scans) == 1 else folder.parent if parts else root
            study = _text(one.tags, "StudyInstanceUID") or f"in {own}"
            key = (parts[0] if len(parts) > 1 else "", _text(one.tags, "PatientID"), study)
            found.setdefault(key, []).append(one)
        return found

    def _names(self, root: Path, exams: Mapping[tuple[str, str, str], Sequence[Series]]) -> list[str]:
        """A name for each exam: the first folders below ``root`` that tell it from all others, or else a number."""
        places = []
        for members in exams.values():
            common = Path(os.path.commonpath([folder for one in members for folder in one.folders]))
            parts = common.relative_to(root).parts if common != root else ()
            places.append(parts[1:] if len(parts) > 1 and parts[0].casefold() == "dicom" else parts)
        begins = Counter(parts[:depth] for parts in places for depth in range(1, len(parts) + 1))
        names = []
        for parts in places:
            depth = next((d for d in range(1, len(parts) + 1) if begins[parts[:d]] == 1), len(parts))
            names.append("_".join(parts[:depth]) or Path(os.path.abspath(root)).name)
        counts, met, numbered = Counter(names), Counter[str](), []
        for name in names:
            met[name] += 1
            numbered.append(f"{name}_{met[name]}" if counts[name] > 1 else name)
        return numbered

    def _has_folder(self, series: Series) -> bool:
        """Whether a series has a folder of its own: all of its files, and no others of DICOM."""
        if len(series.folders) != 1:
            return False
        [folder] = series.folders
        if folder != self._last[0]:  # series come by their folders, of which one may hold all
            self._last = folder, {path for path in folder.iterdir() if is_dicom(path) or is_dead_link(path)}
        return self._last[1] == set(series.files)

    def _path(self, series: Series, case: str, scan: str) -> Path:
        """The folder of a series; of one that shares it, or has several, a folder of links to its files."""
        if self._has_folder(series):
            return series.folders[0]
        place = self.folder(file_name(case), file_name(scan))
        for number, path in enumerate(series.files):
            link(path, place / f"{number:05d}_{path.name}")
        return place


def _by_series(series: Series, name: str, *, alone: bool) -> str:
    """What a case is called after a series; of several exams, behind ``name``: protocols give all the same names."""
    number = _text(series.tags, "SeriesNumber")
    own = "_".join([*re.findall(r"[^\W_]+", series.description), *([number] if number else [])])
    return "_".join(filter(None, ("" if alone and own else name, own)))


def _dicom_in(folder: Path) -> list[Path]:
    """DICOM files in ``folder`` itself; beside some, also links that lead nowhere and may be one."""
    listed = sorted(folder.iterdir())
    dead = [path for path in listed if is_dead_link(path) and stem_of(path) is None and not path.name.startswith(".")]
    files = [path for path in listed if is_dicom(path)]
    return files and files + dead


def link(path: Path, target: Path) -> None:
    """Let ``target`` be the file at ``path``: a link, or a copy where the system makes none for this user."""
    try:
        target.symlink_to(os.path.abspath(path))
    except OSError:
        shutil.copyfile(path, target)


def _remove(place: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker that was forked
        shutil.rmtree(place, ignore_errors=True)


def _tags_of(path: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=_TAGS)
    except Exception:  # noqa: BLE001  pydicom has no error of its own for what is no DICOM
        return pydicom.Dataset()


def _text(tags: pydicom.Dataset, name: str) -> str:
    try:
        value = tags.get(name)
        return "" if value is None else str(value).strip()
    except Exception:  # noqa: BLE001  a value that cannot be decoded tells nothing
        return ""


def _image_type(tags: pydicom.Dataset) -> list[str]:
    value = tags.get("ImageType")
    return [str(part).strip().upper() for part in ([value] if isinstance(value, str) else value or [])]
