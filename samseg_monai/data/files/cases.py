"""Unlabelled cases for prediction: found, read to the last byte, and matched with the prompts a person gave.

Cases are volumes (a folder of case folders, one case folder, a folder of files, or a list of them; a folder that holds
DICOM slices is one image, and its path stands for it wherever else a file's path would) or 2-D images, one file each.
A run must finish what can be finished: bad cases are set aside with a reason, the good ones go through the network, and
``CaseList.finish`` then fails the run, so that its exit code tells what its log says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.data import BRATS_SCANS, IMAGES
from samseg_monai.data.files.boxes import IMAGE_BOXES, VOLUME_BOXES, as_floats, box_problems, read_table, volume_boxes
from samseg_monai.data.files.dicom import holds_series, is_dicom, read_any
from samseg_monai.data.files.images import GREY, case_of, read_image
from samseg_monai.data.files.volumes import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    Volume,
    grid_difference,
    read_volume,
    stem_of,
    value_problem,
)
from samseg_monai.errors import ConfigError, DataError, PromptError, raise_all
from samseg_monai.files import file_name

VOLUMES = "volumes"
MASK_ENDINGS = ("_mask", "-mask", "_seg", "-seg")
LOG = logging.getLogger(__name__)
_AT_ONCE = 2  # cases read at the same time
_LEFTOVERS = ("thumbs.db", "desktop.ini")  # of file managers; names with a dot in front are passed over, too


@dataclass
class CaseList:
    """Cases of one prediction run.

    Attributes:
        good: items ``{"case", "image": path or [one path per scan]}``, with ``"boxes"`` (list) or ``"prompt"`` (file)
            when prompts were given; sorted by case. A path is a file, or the folder of a DICOM series.
        bad: case -> why it cannot be predicted.
        files: case -> one path per scan, or the single path that holds them all.
    """

    good: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, case: str, paths: list[Path]) -> None:
        """Add a case; a second one of the same name would overwrite the first one's result, so it is refused."""
        case = file_name(case)
        if case in self.files:
            name = f"{paths[0].parent.name}/{case}"
            self.bad[name] = f"another case is called {case} too ({self.files[case][0]}); rename one"
        else:
            self.files[case] = paths

    def sort(self, results: Mapping[str, dict[str, Any] | str]) -> None:
        """Take what the check of each case gave, an item or a reason; DataError if no case is good."""
        self.good = [result for result in results.values() if not isinstance(result, str)]
        self.bad |= {case: result for case, result in results.items() if isinstance(result, str)}
        for case, reason in sorted(self.bad.items()):
            LOG.error("%s will be skipped: %s", case, reason)
        if not self.good:
            self.refuse("no case can be predicted")

    def finish(self) -> None:
        """Raise DataError naming every bad case; to be called last, when the good ones are done."""
        total = len(self.good) + len(self.bad)
        self.refuse(f"{len(self.bad)} of {total} cases were not predicted, the others are done")

    def refuse(self, heading: str) -> None:
        """Raise DataError naming every bad case, if there is one."""
        raise_all([f"{case}: {reason}" for case, reason in sorted(self.bad.items())], DataError, heading)


def find_cases(
    source: str | Path | Sequence[str | Path],
    *,
    scans: Sequence[str] = BRATS_SCANS,
    boxes: str | Path | None = None,
    prompts: str | Path | None = None,
    kind: str = VOLUMES,
) -> CaseList:
    """Find and check the cases of ``source``.

    Args:
        source: folder of case folders, one case folder, folder of single NIfTI/MHA/NRRD files, a file, folder of the
            slices of one DICOM series, folder of such folders, or a list. Files of a series may have any name.
        scans: names of the scans in the order the network wants them. With one scan a file of any name, or a folder
            with a DICOM series, is a case; with several, files are named ``<case>-<scan>`` or hold that many channels
            on a fourth axis, and DICOM series lie in folders ``<case>/<scan>``.
        boxes: JSON file ``{case: [{"slice": k | "slices": [k0, k1], "box": [i0, j0, i1, j1]}]}``: inclusive voxel
            indices of the stored array. Of a DICOM series, which stores none, it is the array as loaded: i is the
            column and j the row of a slice's picture, k counts the slices from 0 in the order of their positions
            (for the usual axial slices from the feet upwards), whatever their instance numbers.
        prompts: coarse masks on the image's grid: one file (for one case), or a folder with ``<case>.nii.gz`` or
            ``<case>_seg.nii.gz``, also in a sub-folder ``<case>/``.
        kind: ``volumes``, or ``images``: each 2-D image file is a case (but masks and overlays), boxes are
            those of ``boxes.read_boxes``, and there are no masks as prompts.

    Raises:
        DataError: nothing found, or no case at all is good.
        PromptError: both kinds of prompts given, masks for images, or their file or folder cannot be read.
    """
    if boxes is not None and prompts is not None:
        raise PromptError("got boxes and prompts (masks): give one of them")
    if kind not in (VOLUMES, IMAGES):
        raise ConfigError(f"unknown kind of cases {kind!r}; choose one of {VOLUMES}, {IMAGES}")
    if kind == IMAGES and prompts is not None:
        raise PromptError("masks as prompts are for volumes; of 2-D images give boxes in pixels")
    table = None if boxes is None else read_table(boxes, IMAGE_BOXES if kind == IMAGES else VOLUME_BOXES)
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    cases = _group_images(sources) if kind == IMAGES else _group_files(sources, scans)
    if prompts is not None and not Path(prompts).exists():
        raise PromptError(f"prompts {prompts}: no such file or folder")
    if prompts is not None and Path(prompts).is_file() and len(cases.files) > 1:
        raise PromptError(f"prompts {prompts} is one file for {len(cases.files)} cases; give a folder of <case>.nii.gz")

    def check(case: str) -> dict[str, Any] | str:
        try:
            if kind == IMAGES:
                return _check_image(case, cases.files[case][0], scans, table)
            return _check_volumes(case, cases.files[case], scans, table, None if prompts is None else Path(prompts))
        except (DataError, PromptError) as error:
            return str(error)

    for case in sorted(set(table or {}) - set(cases.files) - set(cases.bad)):
        LOG.warning("boxes are given for %s, but there is no such case", case)
    names = sorted(cases.files)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        cases.sort(dict(zip(names, pool.map(check, names), strict=True)))
    return cases


def _check_volumes(
    case: str, paths: list[Path], scans: Sequence[str], boxes: Mapping[str, Any] | None, prompts: Path | None
) -> dict[str, Any]:
    """Item of a case, its files read one at a time: four scans of many cases side by side would fill the memory."""
    first = read_any(paths[0])
    shape = first.array.shape
    channels = 1 if len(shape) == 3 else shape[3]
    if len(paths) == len(scans) and channels != 1:
        raise DataError(f"{paths[0].name}: has {channels} channels or time points {shape}, expected one volume")
    if len(paths) == 1 and channels != len(scans):
        raise DataError(
            f"{paths[0].name}: {channels} scan for a network that wants {len(scans)} ({', '.join(scans)}); give a "
            f"folder with files <case>-<scan>.nii.gz, or one file with {len(scans)} channels"
        )
    for number, path in enumerate(paths):
        volume = first if number == 0 else read_any(path)
        for note in volume.notes:
            LOG.warning("%s: %s", case, note)
        if difference := grid_difference(volume, first):
            raise DataError(f"{path.name}: {difference} of {paths[0].name}")
        if problem := value_problem(volume.array):
            raise DataError(f"{path.name}: {problem}")
    files = [str(path.resolve()) for path in paths]
    item: dict[str, Any] = {"case": case, "image": files[0] if len(files) == 1 else files}
    if boxes is not None:
        item["boxes"] = boxes.get(case)
        if not isinstance(item["boxes"], list) or not item["boxes"]:
            raise PromptError("no boxes are given for this case; add a list of them under its name")
        volume_boxes(item["boxes"], shape[:3], f"bad boxes for a volume of {tuple(shape[:3])} voxels")
    if prompts is not None:
        item["prompt"] = str(_mask_of(prompts, case, first).resolve())
    return item


def _mask_of(prompts: Path, case: str, image: Volume) -> Path:
    """File of the coarse mask, on the image's grid and not empty."""
    path: Path | None = prompts
    if prompts.is_dir():
        wanted = {case, f"{case}_seg", f"{case}-seg"}
        folders = [folder for folder in (prompts, prompts / case) if folder.is_dir()]
        matches = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file() and stem_of(p) in wanted]
        path = matches[0] if matches else None
    if path is None:
        names = f"{case}{SUFFIXES[0]} or {case}_seg{SUFFIXES[0]}"
        raise PromptError(f"no coarse mask in {prompts}; expected {names}")
    mask = read_volume(path)
    first_scan = Volume(image.array[..., 0] if image.array.ndim == 4 else image.array, image.affine, image.sha256)
    if difference := grid_difference(mask, first_scan):
        raise PromptError(f"prompt {path.name}: {difference} of the image; resample it to the image's grid")
    if not (mask.array > 0).any():
        raise PromptError(f"prompt {path.name}: the mask is empty, so there is nothing to look for")
    return path


def _group_files(sources: Sequence[Path], scans: Sequence[str]) -> CaseList:
    """Volumes by their names, and by the first bytes of files whose names do not tell what they are.

    Files named ``<case>-<scan>`` or ``<case>_<scan>`` belong together. Where no file is named so, each file is a case
    of its own (one scan, or as many channels as there are scans). Files ending in ``seg`` are masks, not images.
    """
    found = CaseList()
    loose = []
    for path in sources:
        if path.is_dir():
            _group_folder(path, scans, found)
        elif path.is_file():
            loose.append(path)
        else:
            found.bad[path.name] = f"no file or folder {path}"
    _group_named(loose, scans, found, listed=True)
    if not found.files and not found.bad:
        raise DataError(
            f"no image in {', '.join(map(str, sources)) or 'an empty list'}: expected case folders with "
            f"<case>-{scans[0]}.nii.gz, files ending in {', '.join(SUFFIXES)}, or folders of DICOM slices"
        )
    return found


def _group_folder(folder: Path, scans: Sequence[str], found: CaseList) -> None:
    """Images of ``folder`` if it has any, else those of its sub-folders."""
    for sub in [] if _group_one(folder, scans, found) else _folders(folder):
        if _group_one(sub, scans, found):
            continue
        if nested := [path.name for path in _folders(sub) if holds_series(path)]:
            found.bad[sub.name] = (
                f"its DICOM series lie one folder too deep ({', '.join(nested)}); give {sub} as the folder of cases, "
                f"or name the series' folders after the scans ({', '.join(scans)})"
            )
        else:
            LOG.warning("ignored %s: no image in it", sub)


def _group_one(folder: Path, scans: Sequence[str], found: CaseList) -> bool:
    """Add the files of ``folder`` itself, the DICOM series that they are, or the series named after the scans in its
    sub-folders; False when there is no image."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and stem_of(path) is not None)
    case = Path(os.path.abspath(folder)).name  # it may have been given as . or ..
    below = {path.name: path for path in _folders(folder) if holds_series(path)}
    series = holds_series(folder)
    if not files and not series:
        return _group_scans(case, below, scans, found)
    _group_named(files, scans, found)
    images = [path.name for path in files if not str(stem_of(path)).endswith(("_seg", "-seg"))]
    if series and images:
        found.bad[case] = f"holds DICOM files beside {images[0]}; put the DICOM series into a folder of its own"
    elif series and len(scans) > 1:
        found.bad[case] = (
            f"holds DICOM files, for a network that wants {len(scans)} scans; put each scan's series into a folder "
            f"of its own: {', '.join(f'{case}/{scan}' for scan in scans)}"
        )
    elif series:
        found.add(case, [folder])
    for path in below.values():
        LOG.warning("ignored %s: a DICOM series below %s, which holds images itself", path, folder)
    return True


def _group_scans(case: str, series: Mapping[str, Path], scans: Sequence[str], found: CaseList) -> bool:
    """Add a case whose sub-folders are DICOM ``series`` named after the scans; False when they are not."""
    named = [scan for scan in scans if scan in series]
    # A lone scan's name among other folders is a case that happens to be called so.
    if not named or (len(scans) == 1 and len(series) > 1):
        return False
    if missing := [scan for scan in scans if scan not in series]:
        found.bad[case] = f"no folder of DICOM files for {', '.join(missing)} beside {named[0]}"
    else:
        found.add(case, [series[scan] for scan in scans])
    if unused := sorted(set(series) - set(scans)):
        LOG.info("ignored in %s: %s, which the network does not use", case, ", ".join(unused))
    return True


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _group_named(paths: Iterable[Path], scans: Sequence[str], found: CaseList, *, listed: bool = False) -> None:
    named: dict[tuple[Path, str], dict[str, Path]] = {}
    single = []
    for path in paths:
        stem = stem_of(path)
        if stem is None:
            expected = f"expected one of {', '.join(SUFFIXES)}, or the folder of a DICOM series"
            what = "is one slice of a DICOM series; give its folder" if is_dicom(path) else f"is no image; {expected}"
            found.bad[path.name] = what
            continue
        if stem.endswith(("_seg", "-seg")) and not listed:
            LOG.info("ignored %s: named like a mask", path)
            continue
        scan = next((s for s in scans if stem.endswith((f"-{s}", f"_{s}"))), None)
        if scan is None:
            single.append(path)
        else:
            named.setdefault((path.parent, stem[: -len(scan) - 1]), {}).setdefault(scan, path)
    for (_, case), files in sorted(named.items()):
        missing = [scan for scan in scans if scan not in files]
        if missing:
            found.bad[case] = f"no file for {', '.join(missing)} beside {next(iter(files.values())).name}"
        else:
            found.add(case, [files[scan] for scan in scans])
    # Beside named scans, other files are scans this network does not use, or derived images.
    for path in single if listed or not named else []:
        found.add(str(stem_of(path)), [path])


def _group_images(sources: Sequence[Path]) -> CaseList:
    """2-D images, each file a case; in folders, masks, overlays, sub-folders and other files are passed over.

    Files of one case, such as ``a.png`` and ``a.jpg``, are all bad: their results would overwrite each other.
    """
    found = CaseList()
    named: dict[str, list[Path]] = {}
    for path in dict.fromkeys(sources):  # one file listed twice is one case
        if path.is_dir():
            for case, file in _in_folder(path):
                named.setdefault(case, []).append(file)
        elif not path.is_file():
            found.bad[path.name] = f"no file or folder {path}"
        elif (case_name := case_of(path)) is None:
            found.bad[path.name] = f"is no 2-D image; expected one of {', '.join(IMAGE_SUFFIXES)}"
        else:
            named.setdefault(case_name, []).append(path)
    for case, paths in named.items():
        if len(paths) == 1:
            found.files[case] = paths
            continue
        same = len({path.name for path in paths}) < len(paths)
        for path in paths:
            others = " and ".join(str(other if same else other.name) for other in paths if other != path)
            found.bad[str(path) if same else path.name] = f"has the same name as {others}; rename or remove all but one"
    if not found.files and not found.bad:
        raise DataError(
            f"no 2-D image in {', '.join(map(str, sources)) or 'an empty list'}: expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}, or DICOM files, in the folder itself"
        )
    return found


def _in_folder(folder: Path) -> list[tuple[str, Path]]:
    images, others, folders = list_images(folder)
    for names, what in ((others, "no images"), (folders, "folders")):
        if names:
            LOG.warning("ignored in %s, as they are %s: %s", folder, what, ", ".join(names[:10]))
    made = [path for case, path in images if case.endswith((*MASK_ENDINGS, "_overlay"))]
    for path in made:
        LOG.info("ignored %s: named like a mask or an overlay", path)
    return [(case, path) for case, path in images if path not in made]


def list_images(folder: Path) -> tuple[list[tuple[str, Path]], list[str], list[str]]:
    """Case and path of every image in ``folder``, by name; names of other files; names of sub-folders.

    Links that lead nowhere are among the images when they are called so: they must be named, not passed over.
    """
    images, others, folders = [], [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LEFTOVERS:
            continue
        if path.is_dir():
            folders.append(path.name)
        elif (case := case_of(path)) is not None:
            images.append((case, path))
        else:
            others.append(path.name)
    return images, others, folders


def _check_image(case: str, path: Path, scans: Sequence[str], boxes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Item of one image; ``scans`` are one for grey, three for RGB, ``boxes`` the content of a box file."""
    picture = read_image(path)
    for note in picture.notes:
        LOG.warning("%s: %s", path.name, note)
    if len(picture.scans) != len(scans):
        kinds = ("in grey", "in RGB") if picture.scans == GREY else ("in RGB", "in grey")
        wants = kinds[1] if len(scans) in (1, 3) else f"of {len(scans)} channels"
        raise DataError(
            f"{path.name}: is {kinds[0]}, but the network was trained on images {wants} ({', '.join(scans)}); "
            f"save it {wants}"
        )
    if problem := value_problem(picture.array, "pixel"):
        raise DataError(f"{path.name}: {problem}")
    item: dict[str, Any] = {"case": case, "image": str(path.resolve())}
    if boxes is None:
        return item
    if case not in boxes:
        raise PromptError(f"no boxes are given for this image; add a list of them under the name {case!r}")
    rows, columns = picture.array.shape[:2]
    heading = f"bad boxes for an image of {columns} columns and {rows} rows"
    raise_all(box_problems(boxes[case], (rows, columns)), PromptError, heading)
    return {**item, "boxes": as_floats(boxes[case])}
