"""Unlabelled cases for prediction: found, read to the last byte, and matched with the prompts a person gave.

Cases are volumes (a folder of case folders, one case folder, a folder of files, or a list of them; a folder that holds
DICOM slices is one image, and its path stands for it wherever else a file's path would) or 2-D images, one file each.
Every entry of a source is a case, is passed over by name with the reason, or is an error: nothing vanishes. A run must
finish what can be finished: bad cases are set aside with a reason, the good ones go through the network, one that fails
there is set aside as well, and ``CaseList.finish`` then fails the run, so that its exit code tells what its log says.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from samseg_monai.data import BRATS_OLD, BRATS_SCANS, IMAGES
from samseg_monai.data.files.boxes import (
    IMAGE_BOXES,
    VOLUME_BOXES,
    as_floats,
    box_problems,
    by_case,
    clicked,
    read_table,
    volume_prompts,
)
from samseg_monai.data.files.case_list import SHOWN, CaseList, noted
from samseg_monai.data.files.coarse_masks import CoarseMasks
from samseg_monai.data.files.dicom import holds_series, is_dicom, read_any
from samseg_monai.data.files.images import GREY, case_of, read_image
from samseg_monai.data.files.pacs import Rules, Sorter, rules_of
from samseg_monai.data.files.volumes import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    Volume,
    grid_difference,
    is_dead_link,
    modality_doubt,
    modality_problem,
    stem_of,
    value_problem,
)
from samseg_monai.errors import ConfigError, DataError, PromptError, raise_all, reason_of

VOLUMES = "volumes"
NO_PROMPTS = (
    "this bundle was trained with a box around each object and got none, so that it could find anything: give boxes "
    "(--boxes FILE), coarse masks (--prompts FOLDER) or another bundle that finds it (--prompts-from BUNDLE), or take "
    "the whole slice as the prompt on purpose (samseg predict --whole-slice, monai.bundle --prompt::source image, "
    "whole_slice=True in Python)"
)
MASK_ENDINGS = ("_mask", "-mask", "_seg", "-seg")
# ends of names that every reader takes for a mask: P01.seg.nrrd, P01-label.nrrd, P01_GTV2.nii.gz, labelsTr
MASK_NAME = re.compile(
    r"(^|[-_. ])(segs?|segmentations?|masks?|labels?|labelmaps?|labels?t[rs]|gts?|[gcp]tv)([-_. ]?\d+)?$", re.IGNORECASE
)
# volumes that this package does not read: their owner takes them for cases
_OTHER_VOLUMES = (
    ".hdr", ".mhd", ".nhdr", ".mgz", ".mgh", ".mnc", ".gipl", ".gipl.gz", ".vtk", ".vti", ".nii.zip", ".nii.bz2",
    ".nii.xz", ".nii.zst", ".mha.gz",
)  # fmt: skip
LOG = logging.getLogger(__name__)
_AT_ONCE = 2  # cases read at the same time
_LEFTOVERS = ("thumbs.db", "desktop.ini")  # of file managers; names with a dot in front are passed over, too


def find_cases(
    source: str | Path | Sequence[str | Path],
    *,
    scans: Sequence[str] = BRATS_SCANS,
    boxes: str | Path | None = None,
    prompts: str | Path | None = None,
    prompt_values: Sequence[int] | None = None,
    prompts_from: str | None = None,
    kind: str = VOLUMES,
    modality: str = "",
    allow_modality: bool = False,
    series: Mapping[str, Any] | None = None,
    clicks: bool = True,
) -> CaseList:
    """Find and check the cases of ``source``.

    Args:
        source: folder of case folders, one case folder, folder of single NIfTI/MHA/NRRD files, a file, DICOM series in
            folders as ``pacs`` finds them, or in a ZIP file, or a list of these.
        scans: names of the scans in the order the network wants them. With one scan any file or DICOM series is a
            case; with several, files are ``<case>-<scan>``, or ``<case>/<scan>``, as are folders of DICOM series, or
            hold that many channels on a fourth axis. BraTS's names of 2012 to 2022 (t1, t1ce, t2, flair) do, too.
        boxes: JSON file as of ``boxes``, which also says what voxel indices are in a DICOM series.
        prompts, prompt_values: coarse masks on the image's grid, and their values that count; see ``CoarseMasks``.
        prompts_from: bundle that has predicted the prompts: where it found nothing, nothing is looked for.
        kind: ``volumes``, or ``images``: each 2-D image file is a case (but masks and overlays), boxes are those of
            ``boxes.read_boxes``, and no masks are prompts.
        modality: of the images that the network was trained on (CT, MR ...); empty where nobody knows. Cases whose
            DICOM files state another one, or whose values do not look like it (``volumes.modality_doubt``), are bad.
        allow_modality: take them all the same, with a warning.
        series: how DICOM series become cases; see ``pacs.rules_of``.
        clicks: whether the network knows clicks; False warns of those in ``boxes``: it has learnt from boxes alone.

    Raises:
        DataError: nothing found, or no case at all is good.
        ConfigError: unknown kind; ``series`` ask for what there is not.
        PromptError: both kinds of prompts given, masks for images, or their file or folder cannot be read.
    """
    _check_arguments(boxes, prompts, kind)
    table = None if boxes is None else read_table(boxes, IMAGE_BOXES if kind == IMAGES else VOLUME_BOXES)
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    masks = None if prompts is None else Path(prompts)
    rules = rules_of(series, scans, modality=modality, allow_modality=allow_modality)
    cases = _group_images(sources) if kind == IMAGES else _group_files(sources, rules, masks)
    fits = partial(_check_modality, kind=kind, modality=modality, allowed=allow_modality)
    coarse = None if masks is None else CoarseMasks(masks, values=prompt_values, made_by=prompts_from)

    def check(case: str) -> dict[str, Any] | str:
        if kind == IMAGES:
            return _checked(
                cases, case, partial(_check_image, case, cases.files[case][0], scans, table, fits, prompts_from)
            )
        return _checked(cases, case, partial(_check_volumes, case, cases.files[case], scans, table, coarse, fits))

    table = None if table is None else by_case(table, {*cases.files, *cases.bad})
    _warn_of(table or {}, {*cases.files, *cases.bad}, clicks=clicks)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        cases.sort(dict(zip(names := sorted(cases.files), pool.map(check, names), strict=True)))
    return cases


def _warn_of(table: Mapping[str, Any], cases: set[str], *, clicks: bool) -> None:
    for case in sorted(set(table) - cases):
        LOG.warning("boxes are given for %s, but there is no such case", case)
    if names := [case for case, entries in table.items() if not clicks and clicked(entries)]:
        LOG.warning("clicks are given (%s) to a bundle that has learnt from boxes alone", ", ".join(names[:SHOWN]))


def _checked(cases: CaseList, case: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What a check gives, or why the case is bad; its warnings are noted."""
    with noted(case) as notes:
        try:
            return check()
        except (DataError, PromptError) as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  whatever is wrong with one case must not cost the others
            return reason_of(error)
        finally:
            cases.note(case, notes)


def check_prompts(source: str, *, boxes: str | Path | None, prompts: str | Path | None) -> None:
    """Raise PromptError where a prediction gets no file of the prompts that it was told to take.

    Args:
        source: "json" needs ``boxes``, "mask" needs ``prompts``; any other (image, none) nothing.
    """
    if (source == "json" and boxes is None) or (source == "mask" and prompts is None):
        raise PromptError(NO_PROMPTS)


def _check_arguments(boxes: str | Path | None, prompts: str | Path | None, kind: str) -> None:
    if boxes is not None and prompts is not None:
        raise PromptError("got boxes and prompts (masks): give one of them")
    if kind not in (VOLUMES, IMAGES):
        raise ConfigError(f"unknown kind of cases {kind!r}; choose one of {VOLUMES}, {IMAGES}")
    if kind == IMAGES and prompts is not None:
        raise PromptError("masks as prompts are for volumes; of 2-D images give boxes in pixels")
    if prompts is not None and not Path(prompts).exists():
        raise PromptError(f"prompts {prompts}: no such file or folder")


def _check_modality(volume: Volume, name: str, *, kind: str, modality: str, allowed: bool) -> None:
    doubt = modality_problem(volume.modality, modality)
    if kind == VOLUMES:  # pictures of a CT are grey values
        doubt = doubt or modality_doubt(volume.array, modality)
    if doubt and not allowed:
        raise DataError(f"{name}: {doubt}; if it is right all the same, allow it (--allow-modality)")
    if doubt:
        LOG.warning("%s: %s", name, doubt)


def _check_volumes(
    case: str,
    paths: list[Path],
    scans: Sequence[str],
    boxes: Mapping[str, Any] | None,
    coarse: CoarseMasks | None,
    fits: Callable[[Volume, str], None],
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
        if difference := _same_grid(volume, first, f"{case}: {path.name}"):
            raise DataError(f"{path.name}: {difference} of {paths[0].name}")
        if problem := value_problem(volume.array):
            raise DataError(f"{path.name}: {problem}")
        fits(volume, path.name)
    # not resolved: a link's own name tells the format, that of what it leads to may not
    files = [os.path.abspath(path) for path in paths]
    item: dict[str, Any] = {"case": case, "image": files[0] if len(files) == 1 else files}
    if boxes is not None:
        item["boxes"] = volume_prompts(boxes.get(case, []), shape)
    if coarse is not None:
        item["prompt"] = os.path.abspath(coarse.checked(case, first))
    return item


def _same_grid(volume: Volume, image: Volume, what: str) -> str:
    """Why ``volume`` is not on the grid of ``image``, or ""; a note of a difference that does not matter is logged."""
    difference, note = grid_difference(volume, image)
    if note:
        LOG.warning("%s: %s", what, note)
    return difference


def _group_files(sources: Sequence[Path], rules: Rules, prompts: Path | None) -> CaseList:
    """Volumes by their names, and by the first bytes of files whose names do not tell what they are.

    Files named ``<case>-<scan>`` or ``<case>_<scan>`` belong together, others are cases of their own. Files and folders
    named like masks are none, and neither is the folder of ``prompts``.
    """
    found, scans = CaseList(), rules.scans
    sorter = Sorter(rules, found)
    loose = []
    for path in sources:
        if path.is_dir():
            _group_folder(path, sorter, found, prompts)
        elif path.is_file() and path.suffix.lower() == ".zip":
            _group_folder(sorter.unpacked(path), sorter, found, prompts)
        elif path.is_file() or is_dead_link(path):
            loose.append(path)
        else:
            found.bad[path.name] = f"no file or folder {path}"
    _group_named(loose, scans, found, listed=True)
    if not found.files and not found.bad:
        also = "".join(f"; passed over, {why}: {', '.join(names[:SHOWN])}" for why, names in found.passed.items())
        raise DataError(
            f"no image in {', '.join(map(str, sources)) or 'an empty list'}: expected case folders with "
            f"<case>-{scans[0]}.nii.gz, files ending in {', '.join(SUFFIXES)}, or folders of DICOM slices{also}"
        )
    if prompts is not None and prompts.is_file() and len(found.files) > 1:
        raise PromptError(f"prompts {prompts} is one file for {len(found.files)} cases; give a folder of <case>.nii.gz")
    return found


def _group_folder(folder: Path, sorter: Sorter, found: CaseList, prompts: Path | None) -> None:
    """Images of ``folder`` itself, and those of each of its sub-folders."""
    scans, subs, own = sorter.rules.scans, [], ""
    if not sorter.rules.asked and sorter.named_like_scans(folder):
        own = _group_one(folder, scans, found)
    if own == "scans":
        return
    for sub in _folders(folder):
        if prompts is not None and prompts.is_dir() and sub.samefile(prompts):
            found.pass_over("the folder of the prompts", [sub.name])
        elif MASK_NAME.search(sub.name) and not holds_series(sub):
            found.pass_over("named like masks", [f"{sub.name}/"])
        else:
            subs.append(sub)
    sorted_out = sorter.take(folder, subs)
    own = own or _group_one(folder, scans, found, dicom=folder not in sorted_out)
    for sub in subs:
        if _group_one(sub, scans, found, dicom=sub not in sorted_out):
            continue
        if deeper := next(_images_below(sub), None):
            found.bad[sub.name] = f"its images lie too deep ({deeper.relative_to(sub)}); give their folder"
        elif sub not in sorted_out:
            found.pass_over("folders without an image", [f"{sub.name}/"])


def _images_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not MASK_NAME.search(name))
        for path in (Path(root, name) for name in sorted(files)):
            if (stem := stem_of(path)) is not None and not MASK_NAME.search(stem):
                yield path


def _group_one(folder: Path, scans: Sequence[str], found: CaseList, *, dicom: bool = True) -> str:
    """Add the files of ``folder`` itself, the DICOM series that they are ("files"), or the series named after the scans
    in its sub-folders ("scans"); empty when there is no image. Without ``dicom`` such files have been dealt with."""
    case = Path(os.path.abspath(folder)).name  # it may have been given as . or ..
    entries = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and p.name.lower() not in _LEFTOVERS]
    below = {path.name: path for path in _folders(folder) if dicom and holds_series(path)}
    series = dicom and holds_series(folder)
    files = []
    for path in (path for path in entries if not path.is_dir()):
        other = path.name.lower().endswith(_OTHER_VOLUMES)
        if stem_of(path) is not None or other or (is_dead_link(path) and dicom and not series):
            files.append(path)
        elif not ((series or not dicom) and (is_dicom(path) or is_dead_link(path))):
            is_zip = path.suffix.lower() == ".zip"
            found.pass_over("ZIP files in a folder (unpack them, or give one)" if is_zip else "no images", [path.name])
    if not files and not series:
        return "scans" if _group_scans(case, below, scans, found) else ""
    _group_named(files, scans, found)
    images = [path.name for path in files if not MASK_NAME.search(stem_of(path) or "")]
    if series and images:
        found.bad[case] = f"holds DICOM files beside {images[0]}; put the DICOM series into a folder of its own"
    elif series:
        found.add(case, [folder])
    return "files"


def _group_scans(case: str, series: Mapping[str, Path], scans: Sequence[str], found: CaseList) -> bool:
    """Add a case whose sub-folders are DICOM ``series`` named after the scans; False when they are not."""
    own = {name: scan for name in series if name not in scans and (scan := _called(name, scans)) not in series}
    series = {own.get(name) or name: path for name, path in series.items()}
    named = [scan for scan in scans if scan in series]
    # A lone scan's name among other folders is a case that happens to be called so.
    if not named or (len(scans) == 1 and len(series) > 1):
        return False
    if missing := [scan for scan in scans if scan not in series]:
        found.bad[case] = f"no folder of DICOM files for {', '.join(missing)} beside {named[0]}"
    else:
        found.add(case, [series[scan] for scan in scans])
    found.pass_over(
        "scans that the network does not use", [f"{case}/{name}" for name in sorted(set(series) - set(scans))]
    )
    return True


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _group_named(paths: Iterable[Path], scans: Sequence[str], found: CaseList, *, listed: bool = False) -> None:
    """Add cases of files; ``listed`` are those that a person named one by one."""
    named: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    single = []
    for path in paths:
        stem = stem_of(path)
        if stem is None:
            expected = f"expected one of {', '.join(SUFFIXES)}, or the folder of a DICOM series"
            what = "is one slice of a DICOM series; give its folder" if is_dicom(path) else f"is no image; {expected}"
            found.bad[path.name] = "is a link that leads nowhere" if is_dead_link(path) else what
        elif (which := _scan_of(path, stem, scans, listed)) is not None:
            case, scan = which
            named.setdefault((path.parent, case), {}).setdefault(scan, []).append(path)
        elif MASK_NAME.search(stem) and not listed:
            found.pass_over("named like masks", [path.name])
        else:
            single.append((path, stem))
    for (_, case), files in sorted(named.items()):
        twice = [path.name for paths in files.values() if len(paths) > 1 for path in paths]
        if missing := [scan for scan in scans if scan not in files]:
            found.bad[case] = f"no file for {', '.join(missing)} beside {next(iter(files.values()))[0].name}"
        elif twice:
            found.bad[case] = f"{' and '.join(twice)} are the same scan; keep one of them"
        else:
            found.add(case, [files[scan][0] for scan in scans])
    # Beside the scans of a case, its other files are scans this network does not use, or derived images.
    others = [scan for scan in BRATS_SCANS if scan not in scans] if set(scans) <= set(BRATS_SCANS) else []
    for path, stem in single:
        other = _scan_of(path, stem, others, listed)
        begins = [stem[: found.start()] for found in re.finditer("[-_. ]", stem)]
        if any((path.parent, case) in named for case in (*begins, *([other[0]] if other else []))):
            found.pass_over("scans that the network does not use", [path.name])
        elif other is not None and not listed:
            found.bad[other[0]] = f"no file for {', '.join(scans)} beside {path.name}"
        else:
            found.add(stem, [path])


def _called(name: str, scans: Sequence[str]) -> str:
    """Which of the scans a name means; empty when none."""
    if name in scans:
        return name
    scan = BRATS_OLD.get(name.lower(), "")
    return scan if scan in scans else ""


def _scan_of(path: Path, stem: str, scans: Sequence[str], listed: bool) -> tuple[str, str] | None:
    """Case and scan of a file ``<case>-<scan>``, or in a folder ``<case>/<scan>``; None for others.

    A lone scan's name without a case may be any word (``image``), so that it has to be one of BraTS's.
    """
    for name in (*scans, *BRATS_OLD):
        begin, end = stem[: -len(name)], stem[-len(name) :]
        if begin.endswith(("-", "_")) and (end == name or name in BRATS_OLD) and (scan := _called(end, scans)):
            return begin[:-1], scan
    scan = "" if listed else _called(stem, scans)
    if scan in BRATS_SCANS or (scan and len(scans) > 1):
        return path.absolute().parent.name, scan
    return None


def _group_images(sources: Sequence[Path]) -> CaseList:
    """2-D images, each file a case; in folders, masks, overlays, sub-folders and other files are passed over. Files of
    one case, such as ``a.png`` and ``a.jpg``, are all bad: their results would overwrite each other."""
    found = CaseList()
    named: dict[str, list[Path]] = {}
    for path in dict.fromkeys(sources):  # one file listed twice is one case
        if path.is_dir():
            for case, file in _in_folder(path, found):
                named.setdefault(case, []).append(file)
        elif not path.is_file():
            found.bad[path.name] = f"no file or folder {path}"
        elif (case_name := case_of(path)) is None:
            found.bad[path.name] = f"is no 2-D image; expected one of {', '.join(IMAGE_SUFFIXES)}"
        else:
            named.setdefault(case_name, []).append(path)
    for case, paths in named.items():
        if len(paths) == 1:
            found.add(case, paths)
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


def _in_folder(folder: Path, found: CaseList) -> list[tuple[str, Path]]:
    images, others, folders = list_images(folder)
    found.pass_over("no images", others)
    found.pass_over("folders", [f"{name}/" for name in folders])
    made = {path.name for case, path in images if MASK_NAME.search(case) or case.endswith("_overlay")}
    found.pass_over("named like masks or overlays", sorted(made))
    return [(case, path) for case, path in images if path.name not in made]


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


def _check_image(
    case: str,
    path: Path,
    scans: Sequence[str],
    boxes: Mapping[str, Any] | None,
    fits: Callable[[Volume, str], None],
    made_by: str | None,
) -> dict[str, Any]:
    """Item of one image; ``scans`` are one for grey, three for RGB, ``boxes`` the content of a box file."""
    picture = read_image(path)
    for note in picture.notes:
        LOG.warning("%s: %s", path.name, note)
    if len(picture.scans) != len(scans):
        kinds = ("in grey", "in RGB") if picture.scans == GREY else ("in RGB", "in grey")
        wants = kinds[1] if len(scans) in (1, 3) else f"of {len(scans)} channels"
        mode = {1: "L", 3: "RGB"}.get(len(scans))
        how = f", in Python by PIL: Image.open(FILE).convert({mode!r}).save('NAME.png')" if mode else ""
        raise DataError(
            f"{path.name}: is {kinds[0]}, but the network was trained on images {wants} ({', '.join(scans)}); "
            f"save it {wants}{how}"
        )
    if problem := value_problem(picture.array, "pixel"):
        raise DataError(f"{path.name}: {problem}")
    fits(picture, path.name)
    item: dict[str, Any] = {"case": case, "image": os.path.abspath(path)}
    if boxes is None:
        return item
    if boxes.get(case) == [] and made_by is not None:
        LOG.warning("%s: %s found nothing, so that there was no box and nothing was looked for", case, made_by)
        return {**item, "boxes": []}
    if case not in boxes and made_by is not None:
        raise PromptError(f"{made_by}, whose boxes are the prompts, did not predict it; why is told above")
    if case not in boxes:
        raise PromptError(f"no boxes are given for this image; add a list of them under the name {case!r}")
    rows, columns = picture.array.shape[:2]
    heading = f"bad boxes for an image of {columns} columns and {rows} rows"
    raise_all(box_problems(boxes[case], (rows, columns)), PromptError, heading)
    return {**item, "boxes": as_floats(boxes[case])}
