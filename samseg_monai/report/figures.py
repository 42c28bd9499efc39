"""Figures of the report: training curves and per-case Dice as inline SVG, a learning-rate range test as PNG.

Drawn with matplotlib's Figure objects (no pyplot, so nothing global and no display). Hues are those of Okabe and Ito
(2008, "Color universal design"), which people with a colour-vision deficiency can tell apart; each was darkened or
lightened until it has a contrast of at least 3 : 1 on the page (WCAG 2.2, 1.4.11). Strategies also differ in marker and
dash, so that nothing hangs on colour alone. SVG figures follow the page's colour scheme.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from samseg_monai.choices import PICKED
from samseg_monai.files import StrPath, write_whole
from samseg_monai.report.runs import Curves, RunResult
from samseg_monai.report.tables import dice_of_cases

# Text and lines of a figure are drawn in these stand-ins, which `to_svg` turns into the page's CSS variables.
INK, MUTED, GRID, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "samseg",  # ids do not change from run to run
    "font.family": "sans-serif", "font.size": 11, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.facecolor": "none", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": GRID, "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 10,
}  # fmt: skip
MOST_DRAWN = 500  # cases as points of their own: more would hide each other, and make the page slow
_JITTER = 0.09  # half width of the band of points, in units of the distance between two boxes
VALIDATION_LOSS = "val_loss"
_CURVES = {"train_loss": "train loss", VALIDATION_LOSS: "validation loss"}
_KEY_CURVES = ("val_dice", "val_mean_dice")  # names of the validation's key value


class Look(NamedTuple):
    """How a strategy is drawn: colours on the ``light`` and ``dark`` page and over a grey image, marker, dash."""

    light: str
    dark: str
    overlay: str
    marker: str
    dash: str | tuple[int, tuple[float, ...]]


_KNOWN = {
    "zero_shot": Look("#0072b2", "#56b4e9", "#56b4e9", "o", (0, (5, 2))),
    "lora": Look("#d55e00", "#ff8433", "#ff8433", "s", "solid"),
    "box_ellipse": Look("#7d6b00", "#f0e442", "#f0e442", "^", (0, (1, 1.4))),
}
_OTHERS = (
    Look("#a84f86", "#dd94bd", "#dd94bd", "D", (0, (6, 2, 1, 2))),
    Look("#00805e", "#25c795", "#25c795", "v", (0, (3, 1))),
)
_LAST = Look("#4a4a4a", "#c9c9c9", "#ffffff", "P", (0, (8, 2)))  # its outline is as white as that of the reference


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One look per strategy; the three of the demo always keep theirs, others take the rest in turn."""
    order = [*_OTHERS, *(look for name, look in _KNOWN.items() if name not in names), _LAST]
    unknown = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN[name] if name in _KNOWN else order[unknown.index(name) % len(order)] for name in names}


def css_variables(names: Sequence[str], scheme: str) -> str:
    """CSS declarations ``--c0: ...`` with the colour of each strategy, in the order of ``names``."""
    return " ".join(f"--c{index}: {getattr(look, scheme)};" for index, look in enumerate(looks(names).values()))


def curves_svg(runs: Sequence[RunResult]) -> list[str]:
    """Losses of training and validation, and validation Dice, over epochs; empty when no run recorded a curve.

    Every curve with ``loss`` in its name is a loss; that of the validation has markers. The Dice is the validation's
    key value (see `_dice_curve`).
    """
    trained = [run for run in runs if run.history]
    if not trained:
        return []
    both = any(VALIDATION_LOSS in run.history for run in trained)  # older trainings recorded none
    losses = "Training and validation loss" if both else "Training loss"
    return [
        _curve_figure(runs, trained, "loss", losses, "loss (no unit)"),
        _curve_figure(runs, trained, "dice", "Validation Dice", "mean Dice of cases (no unit)"),
    ]


def _curve_figure(runs: Sequence[RunResult], trained: Sequence[RunResult], key: str, title: str, unit: str) -> str:
    names = [run.name for run in runs]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.4 + 0.22 * len(trained)), layout="constrained")
        axes = figure.subplots()
        for run in trained:
            look = looks(names)[run.name]
            if key == "loss":
                _draw_losses(axes, run.history, look, "" if len(trained) == 1 else f"{run.title}: ")
            elif best := _dice_curve(run.history):
                called = f"{run.title}, picked slices" if best.startswith(PICKED) else run.title
                _draw_dice(axes, run.history[best], look, called)
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.set_xlim(left=0)
            figure.legend(loc="outside lower left")  # inside it would hide curves
        else:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
        return to_svg(figure, key, title=f"{title} by epoch", names=names)


def _dice_curve(history: Curves) -> str | None:
    """Name of the curve of mean validation Dice: the key metric if there, else the shortest name with ``dice`` that is
    neither a spread nor a median nor a loss; of a training that validated picked slices theirs."""
    others = ("loss", "std", "median")
    if f"{PICKED}val_dice" in history:  # a point per validation; of whole volumes there is the best epoch's only
        return f"{PICKED}val_dice"
    found = [n for n in history if "dice" in n.lower() and not any(word in n.lower() for word in others)]
    return min(found, key=lambda name: (name not in _KEY_CURVES, len(name), name), default=None)


def _draw_losses(axes: Axes, history: Curves, look: Look, prefix: str) -> None:
    """Every curve with ``loss`` in its name; log scale when one spans two decades."""
    for name in (name for name in history if "loss" in name.lower()):
        label = prefix + _CURVES.get(name, name.replace("_", " "))
        marks: dict[str, Any] = {"marker": look.marker, "ms": 4, "mfc": SURFACE, "lw": 1.2}
        marks = marks if name == VALIDATION_LOSS else {"lw": 2}
        values = list(history[name].values())
        axes.plot(list(history[name]), values, color=look.light, ls=look.dash, label=label, **marks)
        if min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_dice(axes: Axes, curve: dict[int, float], look: Look, label: str) -> None:
    """A curve with a point per validation; the best is named, since its weights are the ones that are kept."""
    best = max(curve, key=lambda epoch: curve[epoch])
    label = f"{label}: best {curve[best]:.3f}, epoch {best}"
    style: dict[str, Any] = {"lw": 2, "ls": look.dash, "marker": look.marker, "ms": 4}
    axes.plot(list(curve), list(curve.values()), color=look.light, label=label, **style)
    axes.plot(best, curve[best], color=INK, marker=look.marker, ms=9, mfc="none", mew=1.5, ls="none")


def dice_svg(runs: Sequence[RunResult]) -> str:
    """Per-case Dice: a box (quartiles, median, whiskers to 1.5 times their distance) and every case as a point, but no
    more than those of `drawn_cases`; grey lines join the same case in neighbouring strategies."""
    names = [run.name for run in runs]
    values = [dice_of_cases(run) for run in runs]
    cases = drawn_cases(values)
    points = [{case: dice[case] for case in cases if case in dice} for dice in values]
    # the same sideways place in every strategy: a case that does not change has a level line
    places = np.linspace(-_JITTER, _JITTER, max(len(cases), 2))[np.random.default_rng(0).permutation(len(cases))]
    aside = dict(zip(cases, places.tolist(), strict=True))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.4, (2.2 if len(runs) < 5 else 1.5) * len(runs)), 4.6), layout="constrained")
        axes = figure.subplots()
        for here, (first, second) in enumerate(pairwise(points)):
            for case in sorted(first.keys() & second.keys()):
                x, y = [here + aside[case], here + 1 + aside[case]], [first[case], second[case]]
                axes.plot(x, y, color=MUTED, alpha=0.3, lw=0.8)
        for index, (look, dice, drawn) in enumerate(zip(looks(names).values(), values, points, strict=True)):
            if dice:
                x = [index + aside[case] for case in drawn]
                _draw_box(axes, index, list(dice.values()), look)
                axes.scatter(x, list(drawn.values()), s=26, c=look.light, marker=look.marker, edgecolors=SURFACE,
                             linewidths=0.7, zorder=3)  # fmt: skip
        low = math.floor(10 * min((value for dice in values for value in dice.values()), default=0.0)) / 10
        axes.set(ylabel="Dice of the volume (no unit)", ylim=(max(0.0, low) - 0.02, 1.02))
        axes.set_xlim(-0.55, len(runs) - 0.45)
        titles = [textwrap.fill(run.title.split(" (")[0], 18) for run in runs]
        axes.set_xticks(range(len(runs)), [f"{t}\nn = {len(dice)}" for t, dice in zip(titles, values, strict=True)])
        axes.grid(axis="y")
        return to_svg(figure, "cases", title="Dice of every case for each strategy", names=names)


def drawn_cases(values: Sequence[Mapping[str, float]]) -> list[str]:
    """Cases (sorted) that are drawn as points, out of the Dice of each strategy: all, or the ``MOST_DRAWN`` whose
    lowest one is the worst."""
    lowest: dict[str, float] = {}
    for dice in values:
        for case, value in dice.items():
            lowest[case] = min(value, lowest.get(case, value))
    return sorted(sorted(lowest, key=lambda case: (lowest[case], case))[:MOST_DRAWN])


def _draw_box(axes: Axes, place: int, values: list[float], look: Look) -> None:
    line = {"color": look.light, "linewidth": 1.8}
    axes.boxplot(
        [values], positions=[place], widths=0.42, showfliers=False, patch_artist=True, manage_ticks=False,
        boxprops={"facecolor": "none", "edgecolor": look.light, "linewidth": 1.8},
        whiskerprops=line, capprops=line, medianprops={**line, "linewidth": 3.2},
    )  # fmt: skip


def write_lr_curve(
    path: StrPath, rates: Sequence[float], losses: Sequence[float], *, suggested: float | None, configured: float
) -> Path:
    """Write a PNG of the smoothed loss over the learning rate (rising, above 0), with two rates marked: ``configured``,
    and ``suggested``, where the loss falls most steeply, if there is such a one."""
    muted, grid = "#59626c", "#dfe3e8"  # of the light page: a PNG cannot follow the reader's scheme
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=150)
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot(rates, losses, color=_KNOWN["lora"].light, lw=2)
        axes.axvline(configured, color=muted, lw=1.2, ls=(0, (2, 2)), label=f"config: lr {configured:.2g}")
        if suggested is not None:
            at = min(range(len(rates)), key=lambda i: abs(rates[i] - suggested))
            label = f"suggested: lr {suggested:.2g}, where the loss falls fastest"
            axes.plot(suggested, losses[at], color=INK, marker="o", ms=9, mfc="none", mew=1.8, ls="none", label=label)
        axes.set(title="Learning-rate range test", xlabel="learning rate", ylabel="smoothed loss (no unit)")
        # a last step that diverged must not flatten what came before
        low, high = min(losses), max(losses[: max(1, int(0.9 * len(losses)))])
        room = max(high - low, 1e-6)
        axes.set_ylim(low - 0.1 * room, max(high + 0.15 * room, min(max(losses), high + 0.5 * room)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=grid)
        figure.legend(loc="outside lower left")
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))
    return Path(path)


def to_svg(figure: Figure, prefix: str, *, title: str, names: Sequence[str] = ()) -> str:
    """A figure as one ``<svg>`` element for a page: scales with its column, no namespace, no address, ids of its own.

    Args:
        figure: drawn in the figures' style, strategies in their light colours.
        prefix: put before every id; two figures of a page need two prefixes.
        title: text alternative.
        names: strategies, whose light colours become the CSS variables of `css_variables`.
    """
    buffer = io.StringIO()
    no_facts = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_facts)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    colours = _PAGE | {look.light: f"var(--c{index})" for index, look in enumerate(looks(names).values())}
    for colour, variable in colours.items():
        text = text.replace(colour, variable)
    label = escape(title, quote=False)
    head = r'<svg [^>]*?viewBox="([^"]*)"[^>]*>'
    return re.sub(head, lambda m: f'<svg viewBox="{m[1]}" role="img"><title>{label}</title>', text, count=1)
