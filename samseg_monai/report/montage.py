"""Montage: slices of some cases, read from NIfTI files, with reference, box and the prediction of each strategy.

Arrays are as radiologists see them, as `samseg_monai.pictures.as_seen` turns them. Pixels keep their aspect in mm.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image, ImageColor

from samseg_monai import pictures
from samseg_monai.choices import IGNORE
from samseg_monai.errors import DataError, raise_all
from samseg_monai.report.figures import looks
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import dice_of_cases
from samseg_monai.transforms import RecodeLabeld, boxes_of

_SIDE = 480  # pixels of a panel
_MARGIN = 0.35  # of the longer side of everything drawn, around it, in a close-up
_LEAST_MM = 32.0  # a close-up shows at least this much, or a tiny tumour would be a few huge pixels


@dataclass(frozen=True)
class OverlayCase:
    """One slice of one case to be shown.

    Args:
        case: its name.
        image: (H, W) intensities of one scan, rows and columns as seen.
        reference: (H, W), foreground above 0; each value there is a class with an outline of its own.
        predictions: strategy -> (H, W), likewise; the keys are the names of the runs.
        box: left, top, right, bottom edge in pixels, or None.
        dice: strategy -> Dice of the whole volume of the case.
        spacing_mm: width and height of a pixel.
        slice_index: index of the slice in its volume, for the caption.

    Raises:
        DataError: shapes differ or are not two-dimensional.
    """

    case: str
    image: np.ndarray
    reference: np.ndarray
    predictions: Mapping[str, np.ndarray]
    box: Sequence[float] | None
    dice: Mapping[str, float]
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    slice_index: int | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.image)
        arrays = {"reference": self.reference, **{f"prediction of {k}": v for k, v in self.predictions.items()}}
        problems = [f"image: shape {shape}, expected (H, W)"] if len(shape) != 2 else []
        problems += [
            f"{k}: shape {np.shape(v)}, the image has {shape}" for k, v in arrays.items() if np.shape(v) != shape
        ]
        raise_all(problems, DataError, f"{self.case}: overlay cannot be drawn")

    def picture(self, strategy: str | None = None, *, names: Sequence[str] = ()) -> np.ndarray:
        """(480, 480, 3) uint8: the whole slice with reference, box and a frame around what close-ups show; or, of one
        of the strategies ``names``, the close-up with its prediction in its colour over the reference."""
        outlines = [(self.reference, pictures.BOTH)]
        how: dict[str, Any] = {"aspect": self.spacing_mm[1] / self.spacing_mm[0], "side": _SIDE, "line": 4}
        how["frame" if strategy is None else "window"] = self._window()
        if strategy is not None:
            outlines.append((self.predictions[strategy], ImageColor.getrgb(looks(names)[strategy].overlay)[:3]))
        drawn = pictures.draw(self.image, outlines, boxes=[] if self.box is None else [self.box], **how)
        # a black square with the picture in its middle: panels side by side line up whatever the shape of the slice
        down, across = (max(drawn.shape) - length for length in drawn.shape[:2])
        square = np.pad(drawn, ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0)))
        if strategy is None:
            return pictures.named(square, "RLAP")
        _, (prediction, colour) = outlines
        return square if prediction.any() else pictures.noted(square, "empty prediction", colour)

    def _window(self) -> pictures.Window:
        """Square (in mm) part of the slice around everything drawn: top, bottom, left, right, in pixels."""
        height, width = self.image.shape
        rows, columns = np.nonzero(np.any([mask > 0 for mask in (self.reference, *self.predictions.values())], axis=0))
        edges: list[Any] = [(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)] if len(rows) else []
        edges += [] if self.box is None else [self.box]
        if not edges:
            return 0, height, 0, width
        (left, top, _, _), (_, _, right, bottom) = np.min(edges, axis=0), np.max(edges, axis=0)
        across_mm, down_mm = self.spacing_mm
        side = max((right - left) * across_mm, (bottom - top) * down_mm) * (1 + 2 * _MARGIN)
        side = max(side, _LEAST_MM)
        return (*_stretch(top, bottom, side / down_mm, height), *_stretch(left, right, side / across_mm, width))


def _stretch(start: float, stop: float, length: float, limit: int) -> tuple[int, int]:
    """Whole-number interval of ``length`` around the middle of start..stop, moved and cut to 0..limit."""
    size = min(round(length), limit)
    first = min(max(round((start + stop) / 2 - size / 2), 0), limit - size)
    return first, first + size


def image_tag(picture: np.ndarray, alt: str) -> dict[str, str]:
    """Address (the PNG itself) and text alternative of a picture for the page."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return {"src": f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}", "alt": alt}


def pick_cases(run: RunResult) -> dict[str, str]:
    """Cases with the best, the median (the lower one of an even number) and the worst Dice of a run.

    Returns: ``{"best": case, "median": case, "worst": case}``; ties are broken by name. Empty when no case counts.
    """
    ranked = sorted(dice_of_cases(run).items(), key=lambda item: (item[1], item[0]))
    if not ranked:
        return {}
    return {"best": ranked[-1][0], "median": ranked[(len(ranked) - 1) // 2][0], "worst": ranked[0][0]}


def overlay_cases(
    chosen: RunResult,
    runs: Sequence[RunResult],
    items: list[dict[str, Any]],
    *,
    scan: int = 0,
    labels: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    window: tuple[float, float] | None = None,
) -> list[OverlayCase]:
    """Read the best, median and worst case of ``chosen``, each at the slice that shows most.

    That is the slice with most classes of the reference, and among those the one with most of it.

    Args:
        chosen: run whose cases are picked.
        runs: runs whose outlines are shown. Their folders hold ``predictions`` (``<case>_seg.nii.gz``); that of the
            first one has the boxes, where there were some (``<case>_prompt.nii.gz``).
        items: test items with ``case``, ``image`` (file or list of files) and ``label``.
        scan: which of the image files to show.
        labels: what the values of the label files mean (``datalists.labels_of``); None: all above 0 is one class.
        classes: names of the values 1, 2, ... of the predictions, with ``labels``.
        window: intensities shown as black and white; None leaves that to the picture.

    Raises:
        ConfigError, DataError: labels and classes do not fit each other, or a label file has other values.
    """
    by_case = {item["case"]: item for item in items}
    scores = {run.name: dice_of_cases(run) for run in runs}
    recode = None if labels is None else RecodeLabeld("label", labels, classes)
    found = []
    for case in dict.fromkeys(pick_cases(chosen).values()):
        files = by_case[case]["image"]
        image, spacing = _canonical(files if isinstance(files, str) else files[scan])
        label = _canonical(by_case[case]["label"])[0]
        label = label > 0 if recode is None else recode({"case": case, "label": torch.from_numpy(label)})["label"]
        reference = np.asarray(label, dtype=np.uint8) * (np.asarray(label) != IGNORE)
        fullness = [(len(np.unique(plane[plane > 0])), (plane > 0).sum()) for plane in np.moveaxis(reference, 2, 0)]
        k = fullness.index(max(fullness))
        predictions = {run.name: _canonical(run.folder / "predictions" / f"{case}_seg.nii.gz")[0] for run in runs}
        prompt = runs[0].folder / "predictions" / f"{case}_prompt.nii.gz"
        box = torch.tensor([np.nan])
        if prompt.is_file():
            box = boxes_of(torch.from_numpy(pictures.as_seen(_canonical(prompt)[0][..., k]).copy()))
        found.append(
            OverlayCase(
                case=case,
                image=pictures.as_seen(image[..., k] if window is None else np.clip(image[..., k], *window)),
                reference=pictures.as_seen(reference[..., k]),
                predictions={name: pictures.as_seen(volume[..., k]) for name, volume in predictions.items()},
                box=None if box.isnan().any() else box.tolist(),
                dice={name: of_case.get(case, float("nan")) for name, of_case in scores.items()},
                spacing_mm=spacing,
                slice_index=k,
            )
        )
    return found


def _canonical(path: str | Path) -> tuple[np.ndarray, tuple[float, float]]:
    """The volume in RAS order and the in-plane voxel sides in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    zooms = image.header.get_zooms()
    return np.asarray(image.dataobj, dtype=np.float32), (float(zooms[0]), float(zooms[1]))
