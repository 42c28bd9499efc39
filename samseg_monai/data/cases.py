"""Unlabelled cases for prediction: found, read to the last byte, and matched with the prompts a person gave.

A run must finish what can be finished: bad cases are set aside with a reason, the good ones go through the network, and
``CaseList.finish`` then fails the run, so that its exit code tells what its log says.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.data.boxes import read_table
from samseg_monai.data.case_files import Found, group_files
from samseg_monai.data.datalists import IMAGES
from samseg_monai.data.dicom import read_series
from samseg_monai.data.image_cases import check_image, group_images
from samseg_monai.data.volumes import SUFFIXES, Volume, grid_difference, read_volume, stem_of, value_problem
from samseg_monai.errors import ConfigError, DataError, PromptError, raise_all

VOLUMES = "volumes"
SCANS = ("t1n", "t1c", "t2w", "t2f")
LOG = logging.getLogger(__name__)


@dataclass
class CaseList:
    """Cases of one prediction run.

    Attributes:
        good: items ``{"case", "image": path or [one path per scan]}``, with ``"boxes"`` (list) or ``"prompt"`` (file)
            when prompts were given; sorted by case. A path is a file, or the folder of a DICOM series.
        bad: case -> why it cannot be predicted.
    """

    good: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def finish(self) -> None:
        """Raise DataError naming every bad case; to be called last, when the good ones are done."""
        problems = [f"{case}: {reason}" for case, reason in sorted(self.bad.items())]
        total = len(self.good) + len(self.bad)
        raise_all(problems, DataError, f"{len(self.bad)} of {total} cases were not predicted, the others are done")


def find_cases(
    source: str | Path | Sequence[str | Path],
    *,
    scans: Sequence[str] = SCANS,
    boxes: str | Path | None = None,
    prompts: str | Path | None = None,
    kind: str = VOLUMES,
    num_threads: int = 2,
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
        kind: ``volumes``, or ``images``: each 2-D image file is a case (see ``image_cases.group_images``), boxes are
            those of ``boxes.read_boxes``, and there are no masks as prompts.
        num_threads: cases read at the same time.

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
    read = read_table if kind == IMAGES else _read_boxes
    box_table = None if boxes is None else read(Path(boxes))
    found = group_images(source) if kind == IMAGES else group_files(source, scans)
    if prompts is not None and not Path(prompts).exists():
        raise PromptError(f"prompts {prompts}: no such file or folder")
    if prompts is not None and Path(prompts).is_file() and len(found.files) > 1:
        raise PromptError(f"prompts {prompts} is one file for {len(found.files)} cases; give a folder of <case>.nii.gz")

    def check(entry: tuple[str, list[Path]]) -> dict[str, Any] | str:
        try:
            if kind == IMAGES:
                return check_image(entry[0], entry[1][0], scans=scans, boxes=box_table)
            return _check(*entry, scans=scans, boxes=box_table, prompts=None if prompts is None else Path(prompts))
        except (DataError, PromptError) as error:
            return str(error)

    entries = sorted(found.files.items())
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        results = list(pool.map(check, entries))
    return _listed(found, dict(zip([case for case, _ in entries], results, strict=True)), box_table)


def _listed(found: Found, results: Mapping[str, dict[str, Any] | str], boxes: Mapping[str, Any] | None) -> CaseList:
    """Good and bad cases from what each one's check gave, an item or a reason; the bad ones are logged."""
    cases = CaseList(bad=dict(found.bad))
    for case, result in results.items():
        if isinstance(result, str):
            cases.bad[case] = result
        else:
            cases.good.append(result)
    for case, reason in sorted(cases.bad.items()):
        LOG.error("%s will be skipped: %s", case, reason)
    for case in sorted(set(boxes or {}) - set(results) - set(found.bad)):
        LOG.warning("boxes are given for %s, but there is no such case", case)
    if not cases.good:
        problems = [f"{case}: {reason}" for case, reason in sorted(cases.bad.items())]
        raise_all(problems, DataError, "no case can be predicted")
    return cases


def _check(
    case: str, paths: list[Path], *, scans: Sequence[str], boxes: Mapping[str, Any] | None, prompts: Path | None
) -> dict[str, Any]:
    first = _read(paths[0])
    _check_axes(first, paths, scans)
    # One volume at a time: four scans of many cases side by side would fill the memory.
    for number, path in enumerate(paths):
        volume = first if number == 0 else _read(path)
        for note in volume.notes:
            LOG.warning("%s: %s", case, note)
        if difference := grid_difference(volume, first):
            raise DataError(f"{path.name}: {difference} of {paths[0].name}")
        if problem := value_problem(volume.array):
            raise DataError(f"{path.name}: {problem}")
    files = [str(path.resolve()) for path in paths]
    item: dict[str, Any] = {"case": case, "image": files[0] if len(files) == 1 else files}
    if boxes is not None:
        item["boxes"] = _boxes_of(boxes, case, first.array.shape)
    if prompts is not None:
        item["prompt"] = str(_mask_of(prompts, case, first).resolve())
    return item


def _read(path: Path) -> Volume:
    return read_series(path) if path.is_dir() else read_volume(path)


def _check_axes(first: Volume, paths: list[Path], scans: Sequence[str]) -> None:
    shape = first.array.shape
    channels = 1 if len(shape) == 3 else shape[3]
    if len(paths) == len(scans) and channels != 1:
        raise DataError(f"{paths[0].name}: has {channels} channels or time points {shape}, expected one volume")
    if len(paths) == 1 and channels != len(scans):
        raise DataError(
            f"{paths[0].name}: {channels} scan for a network that wants {len(scans)} ({', '.join(scans)}); give a "
            f"folder with files <case>-<scan>.nii.gz, or one file with {len(scans)} channels"
        )


def _read_boxes(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromptError(f"boxes {path}: cannot be read as JSON ({error})") from error
    if not isinstance(table, dict):
        raise PromptError(f'boxes {path}: expected {{"<case>": [{{"slice": 12, "box": [30, 40, 55, 70]}}]}}')
    return table


def _boxes_of(table: Mapping[str, Any], case: str, shape: Sequence[int]) -> list[dict[str, Any]]:
    """Boxes of a case, checked here so that a slip costs one case and not the run."""
    entries = table.get(case)
    if not isinstance(entries, list) or not entries:
        raise PromptError("no boxes are given for this case; add a list of them under its name")
    problems = [f"boxes[{n}] {problem}" for n, entry in enumerate(entries) if (problem := _box_problem(entry, shape))]
    raise_all(problems, PromptError, f"bad boxes for a volume of {tuple(shape[:3])} voxels")
    return entries


def _box_problem(entry: Any, shape: Sequence[int]) -> str:
    if not isinstance(entry, dict) or ("slice" in entry) == ("slices" in entry) or "box" not in entry:
        return f'must have "box" and one of "slice" and "slices", got {entry!r}'
    span = entry["slices"] if "slices" in entry else [entry["slice"], entry["slice"]]
    box = entry["box"]
    lists = ((span, 2), (box, 4))
    if not all(isinstance(v, list) and len(v) == n and all(type(x) is int for x in v) for v, n in lists):
        return f"needs whole numbers: slice k or slices [k0, k1], box [i0, j0, i1, j1]; got {entry!r}"
    if not 0 <= span[0] <= span[1] < shape[2]:
        return f"slices {span} are not within 0 to {shape[2] - 1}, in order"
    if not (0 <= box[0] <= box[2] < shape[0] and 0 <= box[1] <= box[3] < shape[1]):
        return f"box {box} is not [i0, j0, i1, j1] within 0 to {shape[0] - 1} and 0 to {shape[1] - 1}, in order"
    return ""


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
