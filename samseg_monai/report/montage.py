"""Slices of some cases for the page's viewer: grey images, outlines of the reference and of every row, boxes.

Arrays are as radiologists see them, as `samseg_monai.pictures.as_seen` turns them. Pixels keep their aspect in mm.
Outlines are traced along the edges of pixels and drawn as SVG, so that they stay sharp in any size, follow the page's
colours and can be switched off one by one.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contourpy
import nibabel as nib
import numpy as np
import torch
from PIL import Image

from samseg_monai import pictures
from samseg_monai.choices import IGNORE
from samseg_monai.data.datalists import labels_of, load_datalist, read_datalist
from samseg_monai.data.files.dicom import read_any
from samseg_monai.data.files.images import read_image
from samseg_monai.errors import DataError, SamsegError, raise_all
from samseg_monai.files import file_name, hash_file
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import dice_of_cases, mean_dice
from samseg_monai.transforms import RecodeLabeld, boxes_of

_SIDE = 320  # pixels of a slice's longer side on the page at most
_SLICES = 24  # of a case at most: a page is a file that people send
_BEYOND = 2  # slices shown beyond the object
_QUALITY = 85  # of JPEG
_MARGIN = 0.35  # of the longer side of everything drawn, around it, in a close-up
_LEAST_MM = 32.0  # a close-up shows at least this much, or a tiny tumour would be a few huge pixels
_VOLUME = (".nii", ".nii.gz")
_SCAN = "t1c"  # of an exam with several scans that with contrast agent
_CT = (-160.0, 240.0)  # Hounsfield units: soft tissue


@dataclass(frozen=True)
class OverlayCase:
    """Slices of one case to be shown.

    Args:
        case: its name.
        image: (S, H, W) intensities of one scan, rows and columns as seen.
        reference: (S, H, W), foreground above 0; each value there is a class with an outline of its own.
        predictions: name of a run -> (S, H, W), likewise.
        boxes: for each slice left, top, right, bottom edges in pixels of its boxes.
        dice: name of a run -> Dice of the whole case.
        window: intensities shown as black and as white.
        spacing_mm: width and height of a pixel; None where nobody knows.
        letters: sides of the patient at the left, right, upper and lower edge; empty where nobody knows.
        slices: index of each slice in its volume; empty of an image.
        shown: which of them is seen first.
        role: why this case is shown.

    Raises:
        DataError: shapes differ or are not three-dimensional.
    """

    case: str
    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, np.ndarray]
    boxes: Sequence[Sequence[Sequence[float]]]
    dice: Mapping[str, float]
    window: tuple[float, float]
    spacing_mm: tuple[float, float] | None = (1.0, 1.0)
    letters: str = "RLAP"
    slices: Sequence[int] = ()
    shown: int = 0
    role: str = ""

    def __post_init__(self) -> None:
        shape = np.shape(self.image)
        arrays = {"reference": self.reference, **{f"prediction of {k}": v for k, v in self.predictions.items()}}
        problems = [f"image: shape {shape}, expected (S, H, W)"] if len(shape) != 3 else []
        problems += [
            f"{k}: shape {np.shape(v)}, the image has {shape}" for k, v in arrays.items() if np.shape(v) != shape
        ]
        raise_all(problems, DataError, f"{self.case}: overlay cannot be drawn")

    def for_page(self) -> dict[str, Any]:
        """What the viewer shows, as JSON values.

        ``size`` is width and height in half pixels, the unit of every path; ``images`` are addresses of JPEG files,
        ``reference``, ``boxes`` and each of ``predictions`` a path for each slice (empty where there is nothing),
        ``close`` the part around everything drawn (left, top, width, height), ``bar`` mm and half pixels of a scale
        bar, None without a known pixel size, ``aspect`` the height of a pixel by its width.
        """
        count, height, width = self.image.shape
        across, down = self.spacing_mm or (1.0, 1.0)
        bar = max((mm for mm in pictures.BARS_MM if mm / across <= width / 4), default=pictures.BARS_MM[0])
        return {
            "case": self.case,
            "size": [2 * width, 2 * height],
            "aspect": down / across,
            "window": list(self.window),
            "letters": self.letters,
            "bar": None if self.spacing_mm is None else [bar, 2 * bar / across],
            "close": self._close_up(),
            "slices": list(self.slices) if self.slices else [None] * count,
            "shown": self.shown,
            "images": [self._address(plane) for plane in self.image],
            "reference": [outline(plane) for plane in self.reference],
            "boxes": [_rectangles(boxes) for boxes in self.boxes],
            "predictions": {name: [outline(plane) for plane in its] for name, its in self.predictions.items()},
        }

    def _address(self, plane: np.ndarray) -> str:
        low, high = self.window
        grey = np.clip((plane - low) / max(high - low, 1e-12), 0, 1)
        picture = Image.fromarray(np.nan_to_num(255 * grey).round().astype(np.uint8))
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"

    def _close_up(self) -> list[int]:
        """Square (in mm) part of the slices around everything drawn: left, top, width, height in half pixels."""
        _, height, width = self.image.shape
        marked = np.any([mask > 0 for mask in (self.reference, *self.predictions.values())], axis=(0, 1))
        rows, columns = np.nonzero(marked)
        edges: list[Any] = [(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)] if len(rows) else []
        edges += [box for boxes in self.boxes for box in boxes]
        if not edges:
            return [0, 0, 2 * width, 2 * height]
        (left, top, _, _), (_, _, right, bottom) = np.min(edges, axis=0), np.max(edges, axis=0)
        across, down = self.spacing_mm or (1.0, 1.0)
        side = max((right - left) * across, (bottom - top) * down) * (1 + 2 * _MARGIN)
        side = max(side, _LEAST_MM)
        (x, w), (y, h) = _stretch(left, right, side / across, width), _stretch(top, bottom, side / down, height)
        return [2 * x, 2 * y, 2 * w, 2 * h]


def _stretch(start: float, stop: float, length: float, limit: int) -> tuple[int, int]:
    """Whole-number interval (first, size) of ``length`` around the middle of start..stop, moved and cut to 0..limit."""
    size = min(round(length), limit)
    return min(max(round((start + stop) / 2 - size / 2), 0), limit - size), size


def outline(labels: np.ndarray) -> str:
    """Path of SVG around every class of (H, W) label maps, in half pixels."""
    parts = []
    for value in np.unique(labels[labels > 0]):
        padded = np.pad(labels == value, 1).astype(float)
        for line in contourpy.contour_generator(z=padded).lines(0.5):
            points = np.rint(2 * np.asarray(line) - 1).astype(int)  # centres of pixels are odd
            turns = np.any(np.diff(points, axis=0)[1:] != np.diff(points, axis=0)[:-1], axis=1)
            points = points[[True, *turns, True]]
            steps = np.diff(points, axis=0)[:-1]  # Z goes back to the first
            parts.append(f"M{points[0, 0]} {points[0, 1]}l" + " ".join(f"{x} {y}" for x, y in steps) + "z")
    return "".join(parts)


def _rectangles(boxes: Iterable[Sequence[float]]) -> str:
    """Path of SVG along left, top, right, bottom edges, in half pixels."""
    return "".join(
        f"M{2 * left:g} {2 * top:g}H{2 * right:g}V{2 * bottom:g}H{2 * left:g}z" for left, top, right, bottom in boxes
    )


def pick_cases(run: RunResult) -> dict[str, str]:
    """Cases with the best, the median (the lower one of an even number) and the worst Dice of a run.

    Returns: ``{"best": case, "median": case, "worst": case}``; ties are broken by name. Empty when no case counts.
    """
    ranked = sorted(dice_of_cases(run).items(), key=lambda item: (item[1], item[0]))
    if not ranked:
        return {}
    return {"best": ranked[-1][0], "median": ranked[(len(ranked) - 1) // 2][0], "worst": ranked[0][0]}


def cases_of_data(
    runs: Sequence[RunResult], datalists: Sequence[Path], dataset_dir: Path, *, boxes: str | Path | None = None
) -> tuple[list[OverlayCase], dict[str, str]]:
    """Best, median and worst case of the run with the best mean Dice among those whose predictions were saved.

    Args:
        runs: rows of a page.
        datalists: of the evaluated cases, one for each fold.
        dataset_dir: folder that their paths are relative to.
        boxes: file of the boxes that were given; of 2-D images they are shown.

    Returns:
        The cases; or none, and a note for the page that says why.
    """
    saved = [run for run in runs if (own := pick_cases(run)) and all(predicted(run, case) for case in own.values())]
    if not saved:
        return _not_shown(
            "predictions were not saved; evaluate with --save_predictions True to have slices on this page"
        )
    chosen = max(saved, key=mean_dice)
    known = {run.fact("data_hash") for run in saved if len(datalists) == 1}
    try:
        hashes = {hash_file(path) for path in datalists}
        if known - {None} - hashes:
            return _not_shown(f"{datalists[0].name} of {dataset_dir.name} is not the datalist that was evaluated")
        listed = read_datalist(datalists[0])
        section = chosen.fact("settings.section") or "testing"
        items = [item for path in datalists for item in load_datalist(path, dataset_dir, section, boxes=boxes)]
        labels, classes = labels_of(datalists[0], needed=False), chosen.fact("settings.classes") or chosen.classes
        scans = listed.get("scans") or []
        cases = overlay_cases(
            chosen,
            saved,
            items,
            scan=scans.index(_SCAN) if _SCAN in scans and listed.get("kind") != "images" else 0,
            labels=labels if set(classes) <= set(labels.values()) else None,  # else all above 0 is one class
            classes=classes,
            window=_CT if listed.get("modality") == "CT" else None,
            spacing=listed.get("spacing_mm") if listed.get("kind") == "images" else None,
        )
    except (SamsegError, OSError) as error:
        return _not_shown(f"the data cannot be read here ({str(error).splitlines()[0]})")
    return cases, {}


def _not_shown(why: str) -> tuple[list[OverlayCase], dict[str, str]]:
    return [], {"Slices": f"Not shown: {why}."}


def overlay_cases(
    chosen: RunResult,
    runs: Sequence[RunResult],
    items: Sequence[Mapping[str, Any]],
    *,
    scan: int = 0,
    labels: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    window: tuple[float, float] | None = None,
    spacing: float | None = None,
) -> list[OverlayCase]:
    """Read the best, median and worst case of ``chosen``: slices with something to see, opened where most classes of
    the reference are, and of those where there is most of it.

    Args:
        chosen: run whose cases are picked.
        runs: runs whose outlines are shown where ``predictions`` of one of their folders has the case (``<case>_seg``);
            beside it lie the boxes, where there were some (``<case>_prompt.nii.gz``).
        items: test items with ``case``, ``image`` (file or list of files) and ``label``, perhaps ``boxes``.
        scan: which of the image files to show.
        labels: what the values of the label files mean (``datalists.labels_of``); None: all above 0 is one class.
        classes: names of the values 1, 2, ... of the predictions, with ``labels``.
        window: intensities shown as black and white; None leaves that to the picture.
        spacing: mm of a pixel of 2-D images.

    Raises:
        ConfigError, DataError: labels and classes do not fit each other, or a label file has other values.
    """
    by_case = {item["case"]: item for item in items}
    scores = {run.name: dice_of_cases(run) for run in runs}
    recode = None if labels is None else RecodeLabeld("label", labels, classes)
    picked = pick_cases(chosen)
    first = [chosen, *(run for run in runs if run.name != chosen.name)]  # its outlines are seen without being asked for
    found = []
    for case in dict.fromkeys(picked.values()):
        files = by_case[case]["image"]
        image, sides, letters = _seen(files if isinstance(files, str) else files[scan], spacing)
        reference = _classed(case, _seen(by_case[case]["label"])[0], recode)
        paths = {run.name: path for run in first if (path := predicted(run, case))}
        predictions = {name: _prediction(case, path, recode) for name, path in paths.items()}
        most = max(range(len(reference)), key=lambda k: (len(np.unique(reference[k])), np.count_nonzero(reference[k])))
        kept = _kept(np.any([mask.any(axis=(1, 2)) for mask in (reference, *predictions.values())], axis=0), most)
        found.append(
            OverlayCase(
                case=case,
                image=image[kept],
                reference=reference[kept],
                predictions={name: volume[kept] for name, volume in predictions.items()},
                boxes=_boxes(by_case[case], runs, kept),
                dice={name: of_case[case] for name, of_case in scores.items() if case in of_case},
                window=window or pictures.window_of(image),
                spacing_mm=sides,
                letters=letters,
                slices=kept if len(image) > 1 else (),
                shown=kept.index(most),
                role=f"{' and '.join(role for role, name in picked.items() if name == case)} of {chosen.title}",
            )
        )
    return found


def _prediction(case: str, path: Path, recode: RecodeLabeld | None) -> np.ndarray:
    """Classes 1, 2, ...: volumes hold these, images the values of the data's labels."""
    stored = _seen(path)[0]
    return stored if path.name.endswith(_VOLUME) else _classed(case, stored, recode)


def _classed(case: str, label: np.ndarray, recode: RecodeLabeld | None) -> np.ndarray:
    """Values of label files as 0 and 1, 2, ... of the classes; what nobody has judged is 0."""
    if recode is None:
        return (label > 0).astype(np.uint8)
    found = np.asarray(recode({"case": case, "label": torch.from_numpy(label)})["label"], dtype=np.uint8)
    return found * (found != IGNORE)


def predicted(run: RunResult, case: str) -> Path | None:
    """File of a case's prediction in one of the run's folders; the box ellipse has none of its own."""
    if not run.has_network:
        return None
    names = [file_name(case, end) for end in ("_seg.nii.gz", "_seg.png")]
    places = (folder / "predictions" / name for folder in run.folders for name in names)
    return next((path for path in places if path.is_file()), None)


def _kept(marked: np.ndarray, most: int) -> list[int]:
    """Slices that are shown: those with something in them and a few beyond, evenly thinned, and the fullest."""
    filled = [*np.flatnonzero(marked).tolist(), most]
    near = range(max(0, min(filled) - _BEYOND), min(len(marked), max(filled) + _BEYOND + 1))
    thinned = near if len(near) <= _SLICES else [near[n * len(near) // _SLICES] for n in range(_SLICES)]
    return sorted({*thinned, most})


def _boxes(item: Mapping[str, Any], runs: Sequence[RunResult], kept: Sequence[int]) -> list[list[list[float]]]:
    """Boxes in each of the slices: the item's own, else those saved beside a prediction."""
    if item.get("boxes") and not isinstance(item["boxes"][0], Mapping):
        return [[list(box[:4]) for box in item["boxes"] if box[0] == box[0]] for _ in kept]  # NaN: clicks alone
    paths = [
        folder / "predictions" / file_name(item["case"], "_prompt.nii.gz") for run in runs for folder in run.folders
    ]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return [[] for _ in kept]
    found = [boxes_of(torch.from_numpy(plane.copy())).reshape(-1, 4) for plane in _seen(path)[0][kept]]
    return [boxes[~boxes.isnan().any(dim=1)].tolist() for boxes in found]


def _seen(path: str | Path, spacing: float | None = None) -> tuple[np.ndarray, tuple[float, float] | None, str]:
    """A file as slices (S, H, W) as seen, width and height of a pixel in mm, letters at its edges."""
    if not str(path).endswith(_VOLUME) and Path(path).is_file():
        picture = read_image(path, spacing)
        array = picture.array.mean(axis=3) if picture.array.ndim == 4 else picture.array
        own = picture.own_spacing_mm
        known = (spacing, spacing) if spacing else None if own is None else (own[1], own[0])
        return np.moveaxis(array.astype(np.float32), 2, 0), known, ""
    volume = read_any(Path(path))
    array = volume.array if volume.array.ndim == 3 else volume.array[..., 0]
    image = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(array, dtype=np.float32), volume.affine))
    zooms = image.header.get_zooms()
    array = np.asarray(image.dataobj)
    seen = np.stack([pictures.as_seen(plane) for plane in np.moveaxis(array, 2, 0)])
    return seen, (float(zooms[0]), float(zooms[1])), pictures.letters_of(np.eye(4))
