"""Overlay montage: an image slice in grey with reference, prediction and box, as one inline SVG per panel.

Display convention: arrays come in RAS order, axis 0 = x growing from the patient's left to the right, axis 1 = y
growing from back to front. Panels show the radiological view: front of the patient up, the patient's right on the
viewer's left. That is the transpose (y becomes rows) with both directions reversed. Pixels keep their aspect in mm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from samseg_monai.errors import DataError, raise_all
from samseg_monai.report.palette import figure_style, looks, to_svg
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import dice_of_cases

REFERENCE_COLOUR = "#ffffff"
BOX_COLOUR = "#b9c4ff"
_HALO = "#000000"
_PANEL_INCHES = 3.0
_MARGIN = 0.35  # of the longer side of everything drawn, around it, in a close-up
_LEAST_MM = 32.0  # a close-up shows at least this much, or a tiny tumour would be a few huge pixels


@dataclass(frozen=True)
class OverlayCase:
    """One slice of one case to be shown.

    Args:
        case: its name.
        image: (H, W) intensities of one scan; axis 0 = x (left to right), axis 1 = y (back to front), RAS.
        reference: (H, W), foreground above 0; each value there is a class with an outline of its own.
        predictions: strategy -> (H, W), likewise; the keys are the names of the runs.
        box: x0 y0 x1 y1 in pixels as `samseg_monai.transforms.boxes_of` gives it (x along axis 1, y along axis 0,
            x1 and y1 exclusive), or None.
        dice: strategy -> Dice of the whole volume of the case.
        spacing_mm: size of a pixel along axis 0 and axis 1.
        slice_index: index of the slice in its volume, for the caption.
        role: why it is shown, e.g. ``"best"``; taken from `pick_cases` by ``write_report`` when empty.

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
    role: str = ""

    def __post_init__(self) -> None:
        shape = np.shape(self.image)
        arrays = {"reference": self.reference, **{f"prediction of {k}": v for k, v in self.predictions.items()}}
        problems = [f"image: shape {shape}, expected (H, W)"] if len(shape) != 2 else []
        problems += [
            f"{k}: shape {np.shape(v)}, the image has {shape}" for k, v in arrays.items() if np.shape(v) != shape
        ]
        raise_all(problems, DataError, f"{self.case}: overlay cannot be drawn")


def display(array: np.ndarray) -> np.ndarray:
    """(H, W) array with axes (x, y) in RAS to the (rows, columns) of a radiological picture; see the module's text."""
    return np.asarray(array).T[::-1, ::-1]


def display_box(box: Sequence[float], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """Box x0 y0 x1 y1 (x along axis 1) of an array of ``shape``: left, top, right, bottom edge in its picture."""
    x0, y0, x1, y1 = box
    height, width = shape
    return height - y1, width - x1, height - y0, width - x0


def pick_cases(run: RunResult) -> dict[str, str]:
    """Cases with the best, the median (the lower one of an even number) and the worst Dice of a run.

    Returns: ``{"best": case, "median": case, "worst": case}``; ties are broken by name. Empty when no case counts.
    """
    ranked = sorted(dice_of_cases(run).items(), key=lambda item: (item[1], item[0]))
    if not ranked:
        return {}
    return {"best": ranked[-1][0], "median": ranked[(len(ranked) - 1) // 2][0], "worst": ranked[0][0]}


def slice_svg(case: OverlayCase, prefix: str) -> str:
    """The whole slice with the reference, the box and a frame around what the close-ups show."""
    window = _window(case)
    with figure_style():
        figure, axes = _panel(case, None)
        _outline(axes, case.reference, REFERENCE_COLOUR, "solid", 1.2)
        _draw_box(axes, case)
        top, bottom, left, right = window
        for colour, width in ((_HALO, 2.2), ("#e3e6ea", 0.9)):
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=width))
        for text, x, y in (("R", 0.03, 0.5), ("L", 0.97, 0.5), ("A", 0.5, 0.96), ("P", 0.5, 0.04)):
            axes.text(x, y, text, transform=axes.transAxes, ha="center", va="center", color="#d5d9dd", fontsize=10)
        return to_svg(figure, prefix, title=f"{case.case}: whole slice with reference outline and box")


def overlay_svg(case: OverlayCase, strategy: str, prefix: str, *, names: Sequence[str]) -> str:
    """Close-up of the lesion: reference in white, the prediction of one strategy in its colour, the box dashed."""
    look = looks(names)[strategy]
    with figure_style():
        figure, axes = _panel(case, _window(case))
        _draw_box(axes, case)
        _outline(axes, case.reference, REFERENCE_COLOUR, "solid", 1.6)
        _outline(axes, case.predictions[strategy], look.overlay, "solid", 2.2)
        if not np.any(np.asarray(case.predictions[strategy]) > 0):
            back: dict[str, Any] = {"facecolor": _HALO, "edgecolor": "none", "alpha": 0.8}
            place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "fontsize": 13}
            axes.text(0.5, 0.05, "empty prediction", color=look.overlay, bbox=back, **place)
        return to_svg(figure, prefix, title=f"{case.case}: outline of {strategy} over the reference")


def _panel(case: OverlayCase, window: tuple[int, int, int, int] | None) -> tuple[Figure, Axes]:
    """A figure that is nothing but the picture, cut to ``window`` (top, bottom, left, right), in displayed pixels."""
    picture = display(case.image).astype(float)
    low, high = _grey_range(picture)
    top, bottom, left, right = window or (0, picture.shape[0], 0, picture.shape[1])
    # Displayed rows run along axis 1, columns along axis 0. Every panel is a square of black with the picture in its
    # middle, so that panels side by side line up whatever the shape of the slice.
    aspect = case.spacing_mm[1] / case.spacing_mm[0]
    side = max(right - left, (bottom - top) * aspect)
    figure = Figure(figsize=(_PANEL_INCHES, _PANEL_INCHES))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    extent = (left, right, bottom, top)
    axes.imshow(picture[top:bottom, left:right], cmap="gray", vmin=low, vmax=high, extent=extent, aspect="auto")
    x_middle, y_middle, half_rows = (left + right) / 2, (top + bottom) / 2, side / aspect / 2
    axes.set(xlim=(x_middle - side / 2, x_middle + side / 2), ylim=(y_middle + half_rows, y_middle - half_rows))
    axes.set_axis_off()
    return figure, axes


def _outline(axes: Axes, mask: np.ndarray, colour: str, dash: str, width: float) -> None:
    """Contour of every class of a mask between its pixels, with a dark halo so that it shows on bright tissue too."""
    labels = np.pad(display(mask), 1)
    # Pixel i of the padded picture has its centre at i - 0.5 on the axes, whose edges are whole numbers.
    rows, columns = (np.arange(size) - 0.5 for size in labels.shape)
    for value in np.unique(labels[labels > 0]):
        shown = (labels == value).astype(float)
        lines = axes.contour(columns, rows, shown, levels=[0.5], colors=[colour], linewidths=width, linestyles=dash)
        lines.set_path_effects(
            [patheffects.Stroke(linewidth=width + 1.6, foreground=_HALO, alpha=0.55), patheffects.Normal()]
        )


def _draw_box(axes: Axes, case: OverlayCase) -> None:
    """The prompt's box, dashed; nothing when there is none (None or NaN)."""
    if case.box is None or not np.isfinite(np.asarray(case.box, dtype=float)).all():
        return
    left, top, right, bottom = display_box(case.box, np.shape(case.image))
    for colour, width, dash in ((_HALO, 2.6, "solid"), (BOX_COLOUR, 1.3, (0, (4, 2)))):
        axes.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                ec=colour,
                lw=width,
                ls=dash,
                alpha=0.5 if colour == _HALO else 1,
            )
        )


def _window(case: OverlayCase) -> tuple[int, int, int, int]:
    """Square (in mm) part of the picture around everything drawn: top, bottom, left, right in displayed pixels."""
    drawn = np.zeros(np.shape(case.image), dtype=bool)
    for mask in (case.reference, *case.predictions.values()):
        drawn |= np.asarray(mask) > 0
    rows, columns = np.nonzero(display(drawn))
    edges = [(rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)] if len(rows) else []
    if case.box is not None and np.isfinite(np.asarray(case.box, dtype=float)).all():
        left, top, right, bottom = display_box(case.box, np.shape(case.image))
        edges.append((top, bottom, left, right))
    width, height = np.shape(case.image)  # of the displayed picture: its columns run along axis 0
    if not edges:
        return 0, height, 0, width
    top, bottom = min(e[0] for e in edges), max(e[1] for e in edges)
    left, right = min(e[2] for e in edges), max(e[3] for e in edges)
    across_mm, down_mm = case.spacing_mm
    side = max((right - left) * across_mm, (bottom - top) * down_mm) * (1 + 2 * _MARGIN)
    side = max(side, _LEAST_MM)
    return (*_stretch(top, bottom, side / down_mm, height), *_stretch(left, right, side / across_mm, width))


def _stretch(start: float, stop: float, length: float, limit: int) -> tuple[int, int]:
    """Whole-number interval of ``length`` around the middle of start..stop, moved and cut to 0..limit."""
    size = min(round(length), limit)
    first = round((start + stop) / 2 - size / 2)
    first = min(max(first, 0), limit - size)
    return first, first + size


def _grey_range(picture: np.ndarray) -> tuple[float, float]:
    """Black and white level: 1st and 99.5th percentile of what is not background (the commonest edge value)."""
    finite = picture[np.isfinite(picture)]
    inside = finite[finite != finite.min()] if finite.size else finite
    if not inside.size:
        return 0.0, 1.0
    low, high = np.percentile(inside, (1, 99.5))
    return (float(min(low, finite.min())), float(high)) if high > low else (float(low) - 1, float(high) + 1)
