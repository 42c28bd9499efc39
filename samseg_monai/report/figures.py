"""Figures of the report: training curves and per-case Dice, as inline SVG.

Drawn with matplotlib's Figure objects (no pyplot, so nothing global and no display); colours are those of
`samseg_monai.report.palette`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from samseg_monai.report.labels import CURVES, VALIDATION_LOSS
from samseg_monai.report.palette import INK, MUTED, SURFACE, Look, figure_style, looks, to_svg
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import dice_of_cases

_JITTER = 0.09  # half width of the band of points, in units of the distance between two boxes
# Names under which the validation of a training records its key value.
_KEY_CURVES = ("val_dice", "val_mean_dice")
_Curve = Sequence[tuple[float, float, float]]


def curves_svg(runs: Sequence[RunResult]) -> list[str]:
    """Losses of training and validation, and validation Dice, over epochs; empty when no run recorded a curve.

    Every curve with ``loss`` in its name is a loss; that of the validation has markers. The Dice is the validation's
    key value (see `_dice_curve`).
    """
    trained = [run for run in runs if run.history]
    if not trained:
        return []
    names = [run.name for run in runs]
    chosen = looks(names)
    figures = []
    both = any(VALIDATION_LOSS in run.history for run in trained)  # older trainings recorded none
    for key, title, ylabel in (
        ("loss", "Training and validation loss" if both else "Training loss", "loss (no unit)"),
        ("dice", "Validation Dice", "mean Dice of cases (no unit)"),
    ):
        with figure_style():
            figure = Figure(figsize=(4.8, 3.4 + 0.22 * len(trained)), layout="constrained")
            axes = figure.subplots()
            for run in trained:
                per_epoch = _iterations_per_epoch(run.history)
                for name in _loss_curves(run.history) if key == "loss" else ():
                    words = CURVES.get(name, name.replace("_", " "))
                    label = words if len(trained) == 1 else f"{run.title}: {words}"
                    marked = name == VALIDATION_LOSS
                    _draw_loss(axes, run.history[name], per_epoch, chosen[run.name], label, marked=marked)
                best = _dice_curve(run.history) if key == "dice" else None
                if best is not None:
                    _draw_dice(axes, run.history[best], per_epoch, chosen[run.name], run.title)
            axes.set(title=title, xlabel="epoch", ylabel=ylabel)
            axes.grid(axis="y", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.lines:
                axes.set_xlim(left=0)
                figure.legend(frameon=False, fontsize=10, loc="outside lower left")  # inside it would hide curves
            else:
                axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
            figures.append(to_svg(figure, key, title=f"{title} by epoch", names=names))
    return figures


def dice_svg(runs: Sequence[RunResult]) -> str:
    """Per-case Dice: a box (quartiles, median, whiskers to 1.5 times their distance) and every case as a point;
    grey lines join the same case in neighbouring strategies."""
    names = [run.name for run in runs]
    chosen = looks(names)
    values = [dice_of_cases(run) for run in runs]
    offsets = _offsets(values)
    with figure_style():
        figure = Figure(figsize=(max(6.4, (2.2 if len(runs) < 5 else 1.5) * len(runs)), 4.6), layout="constrained")
        axes = figure.subplots()
        for here, (first, second) in enumerate(pairwise(values)):
            for case in first.keys() & second.keys():
                axes.plot(
                    [here + offsets[case], here + 1 + offsets[case]],
                    [first[case], second[case]],
                    color=MUTED,
                    alpha=0.3,
                    lw=0.8,
                )
        for index, (name, cases) in enumerate(zip(names, values, strict=True)):
            _draw_box(axes, index, cases, offsets, chosen[name])
        every = [value for cases in values for value in cases.values()]
        low = math.floor(10 * min(every, default=0.0)) / 10
        axes.set(
            ylabel="Dice of the volume (no unit)", ylim=(max(0.0, low) - 0.02, 1.02), xlim=(-0.55, len(runs) - 0.45)
        )
        axes.set_xticks(range(len(runs)), [_tick(run, len(cases)) for run, cases in zip(runs, values, strict=True)])
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        return to_svg(figure, "cases", title="Dice of every case for each strategy", names=names)


def _loss_curves(history: Mapping[str, _Curve]) -> list[str]:
    return [name for name in history if "loss" in name.lower()]


def _dice_curve(history: Mapping[str, _Curve]) -> str | None:
    """Name of the curve of mean validation Dice: the key metric if there, else the shortest name with ``dice`` that is
    neither a spread nor a median nor a loss."""
    others = ("loss", "std", "median")
    found = [n for n in history if "dice" in n.lower() and not any(word in n.lower() for word in others)]
    return min(found, key=lambda name: (name not in _KEY_CURVES, len(name), name), default=None)


def _draw_loss(axes: Axes, points: _Curve, per_epoch: float, look: Look, label: str, *, marked: bool = False) -> None:
    """Every recorded value faintly, the mean of each epoch on top; log scale when the loss spans two decades."""
    x, y = _xy(points, per_epoch)
    dense = len(y) > 2 * len({point[0] for point in points})
    if dense:
        axes.plot(x, y, color=look.light, alpha=0.3, lw=0.8)
        epochs: dict[float, list[float]] = {}
        for epoch, _, value in points:
            epochs.setdefault(epoch, []).append(value)
        x, y = np.array(list(epochs)), np.array([float(np.mean(v)) for v in epochs.values()])
        label = f"{label}, mean of each epoch"
    marks: dict[str, Any] = {"marker": look.marker, "ms": 4, "mfc": SURFACE, "lw": 1.2} if marked else {"lw": 2}
    axes.plot(x, y, color=look.light, ls=look.dash, label=label, **marks)
    positive = y[y > 0]
    if len(positive) == len(y) and positive.max() > 100 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_dice(axes: Axes, points: _Curve, per_epoch: float, look: Look, label: str) -> None:
    """A curve with a point per validation; the best is named, since its weights are the ones that are kept."""
    x, y = _xy(points, per_epoch)
    best = int(np.argmax(y))
    label = f"{label}: best {y[best]:.3f}, epoch {x[best]:.0f}"
    axes.plot(x, y, color=look.light, lw=2, ls=look.dash, marker=look.marker, ms=4, label=label)
    axes.plot(x[best], y[best], color=INK, marker=look.marker, ms=9, mfc="none", mew=1.5, ls="none")


def _draw_box(axes: Axes, index: int, cases: Mapping[str, float], offsets: Mapping[str, float], look: Look) -> None:
    """One box of quartiles with its points in front."""
    if not cases:
        return
    line = {"color": look.light, "linewidth": 1.8}
    axes.boxplot(
        [list(cases.values())],
        positions=[index],
        widths=0.42,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "none", "edgecolor": look.light, "linewidth": 1.8},
        whiskerprops=line,
        capprops=line,
        medianprops={"color": look.light, "linewidth": 3.2},
        manage_ticks=False,
    )
    x = [index + offsets[case] for case in cases]
    axes.scatter(
        x, list(cases.values()), s=26, c=look.light, marker=look.marker, edgecolors=SURFACE, linewidths=0.7, zorder=3
    )


def _offsets(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sideways place of each case, the same in every strategy: a case that does not change has a level line."""
    cases = sorted({case for one in values for case in one})
    spread = np.linspace(-_JITTER, _JITTER, max(len(cases), 2))
    order = np.random.default_rng(0).permutation(len(cases))
    return {case: float(spread[order[i]]) for i, case in enumerate(cases)}


def _tick(run: RunResult, count: int) -> str:
    """Label under a box: title without its bracket, number of cases on a line of its own."""
    return textwrap.fill(run.title.split(" (")[0], 18) + f"\nn = {count}"


def _iterations_per_epoch(history: Mapping[str, _Curve]) -> float:
    """How many iterations an epoch has, from the curve that was recorded most densely; 0 when unknown."""
    points = [point for curve in history.values() for point in curve if point[0] > 0 and point[1] > 0]
    return max((iteration / epoch for epoch, iteration, _ in points), default=0.0)


def _xy(points: _Curve, per_epoch: float) -> tuple[np.ndarray, np.ndarray]:
    """Abscissa in epochs: the recorded one, or iterations by ``per_epoch`` where several values share an epoch."""
    epochs = np.array([point[0] for point in points])
    iterations = np.array([point[1] for point in points])
    values = np.array([point[2] for point in points])
    shared = len(np.unique(epochs)) < len(epochs) or not np.isfinite(epochs).all()
    if shared and per_epoch > 0 and np.isfinite(iterations).all():
        return iterations / per_epoch, values
    return (iterations if shared else epochs), values
