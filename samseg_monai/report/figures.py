"""Figures of the report, drawn by matplotlib's Figure objects (no pyplot, so nothing global and no display).

Hues are those of Okabe and Ito (2008, "Color universal design"), which people with a colour-vision deficiency can tell
apart; each was darkened or lightened until it has a contrast of at least 3 : 1 on the page (WCAG 2.2, 1.4.11). Rows
also differ in marker and dash, so that nothing hangs on colour alone. On the page figures are SVG that follow its
colour scheme, and a point's tooltip names its case; as files they are SVG and PNG in the colours of the light page.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from samseg_monai.choices import PICKED
from samseg_monai.files import StrPath, write_text, write_whole
from samseg_monai.metrics.rows import mean_of
from samseg_monai.report.runs import Curves, RunResult
from samseg_monai.report.tables import dice_of_cases, mean_dice, sizes_of_cases, table_lines

# Colours of the light page; `Drawn.svg` turns them into the page's CSS variables.
INK, MUTED, GRID, SURFACE = "#1b1f24", "#59626c", "#dfe3e8", "#ffffff"
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
_LABEL = 52  # characters of a line of a legend: longer ones would be cut
VALIDATION_LOSS = "val_loss"
_CURVES = {"train_loss": "train loss", VALIDATION_LOSS: "validation loss"}
Points = dict[str, Sequence[str]]  # id of a group of points -> text of each
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
_MORE = ("X", "<", ">", "p", "h", "d", "*", "8")  # markers of rows that have the hue of another


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One look per strategy; the three of the demo always keep theirs, others take the rest in turn. From the seventh
    on hues come again, with another marker and dash."""
    order = [*_OTHERS, *(look for name, look in _KNOWN.items() if name not in names), _LAST]
    found: dict[str, Look] = {}
    for place, name in enumerate(name for name in names if name not in _KNOWN):
        again, look = divmod(place, len(order))
        more = _MORE[(place - len(order)) % len(_MORE)]
        found[name] = order[look]._replace(marker=more, dash=(0, (2 + again, 1, 1, 1))) if again else order[look]
    return {name: _KNOWN.get(name) or found[name] for name in names}


def css_variables(names: Sequence[str], scheme: str) -> str:
    """CSS declarations ``--c0: ...`` with the colour of each strategy, in the order of ``names``."""
    return " ".join(f"--c{index}: {getattr(look, scheme)};" for index, look in enumerate(looks(names).values()))


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Args:
        name: of its files, and before every id on the page.
        title: text alternative.
        figure: drawn in the colours of the light page.
        caption: what a reader has to know to read it.
        points: id of a group of points -> text of each.
        names: strategies, whose colours become the CSS variables of `css_variables`.
    """

    name: str
    title: str
    figure: Figure
    caption: str
    names: Sequence[str]
    points: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def svg(self) -> str:
        """One ``<svg>`` element for a page: scales with its column, no namespace, no address, ids of its own, and no
        style of its own, which the page's policy would refuse."""
        text = self._plain(transparent=True)
        text = text[text.index("<svg") :].strip()
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        text = re.sub(r'style="([^"]*)"', lambda m: _attributes(m[1]), text)
        for group, texts in self.points.items():
            text = _with_titles(text, f"{self.name}-{group}", texts)
        colours = _PAGE | {look.light: f"var(--c{index})" for index, look in enumerate(looks(self.names).values())}
        for colour, variable in colours.items():
            text = text.replace(f'"{colour}"', f'"{variable}"')
        label = escape(self.title, quote=False)
        head = r'<svg [^>]*?viewBox="([^"]*)"[^>]*>'
        return re.sub(head, lambda m: f'<svg viewBox="{m[1]}" role="img"><title>{label}</title>', text, count=1)

    def write(self, folder: Path) -> None:
        """``NAME.svg`` and ``NAME.png`` (200 dots per inch)."""
        write_text(folder / f"{self.name}.svg", self._plain())
        with matplotlib.rc_context(_STYLE):
            write_whole(folder / f"{self.name}.png", lambda to: self.figure.savefig(to, format="png", dpi=200))

    def _plain(self, **how: Any) -> str:
        buffer = io.StringIO()
        no_facts = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(buffer, format="svg", metadata=no_facts, **how)
        return buffer.getvalue()


def _attributes(style: str) -> str:
    """Declarations of a style as attributes of SVG; the font is the page's."""
    pairs = [part.split(":", 1) for part in style.split(";") if ":" in part]
    return " ".join(f'{key.strip()}="{value.strip()}"' for key, value in pairs if key.strip() != "font-family")


def _with_titles(text: str, group: str, titles: Sequence[str]) -> str:
    """The points of a group, each with its tooltip."""
    start = text.index(f'<g id="{group}">')
    end = text.find("<g id=", start + 1)
    end = len(text) if end < 0 else end
    left = iter(titles)
    told = re.sub(r"(<use [^>]*?)/>", lambda m: f"{m[1]}><title>{escape(next(left))}</title></use>", text[start:end])
    return text[:start] + told + text[end:]


def all_figures(runs: Sequence[RunResult], shares: Mapping[str, Sequence[float]] | None = None) -> list[Drawn]:
    """Every figure that there is something to draw for, in the order of the page.

    Args:
        runs: rows, each with its own name.
        shares: name of a row -> share of the draws of a bootstrap at each rank.
    """
    with matplotlib.rc_context(_STYLE):
        ranked = [_ranks(runs, shares)] if shares and len(runs) > 1 else []
        return [_cases(runs), *ranked, *_few_shot(runs), *_by_size(runs), *_agreement(runs), *curves(runs)]


def curves(runs: Sequence[RunResult]) -> list[Drawn]:
    """Losses of training and validation, and validation Dice, over epochs; empty when no run recorded a curve.

    Every curve with ``loss`` in its name is a loss; that of the validation has markers. The Dice is the validation's
    key value (see `_dice_curve`).
    """
    trained = [run for run in runs if run.history]
    if not trained:
        return []
    both = any(VALIDATION_LOSS in run.history for run in trained)  # older trainings recorded none
    losses = "Training and validation loss" if both else "Training loss"
    with matplotlib.rc_context(_STYLE):
        return [
            _curve_figure(runs, trained, "loss", losses, "loss (no unit)"),
            _curve_figure(runs, trained, "dice", "Validation Dice", "mean Dice of validation cases (no unit)"),
        ]


def _curve_figure(runs: Sequence[RunResult], trained: Sequence[RunResult], key: str, title: str, unit: str) -> Drawn:
    names = [run.name for run in runs]
    figure = Figure(figsize=(5.2, 3.4 + _room([run.title for run in trained])), layout="constrained")
    axes = figure.subplots()
    for run in trained:
        look, best = looks(names)[run.name], _dice_curve(run.history)
        if key == "loss":
            _draw_losses(axes, run.history, look, "" if len(trained) == 1 else run.title, chosen_epoch(run))
        elif best:
            called = f"{run.title}, picked slices" if best.startswith(PICKED) else run.title
            _draw_dice(axes, run.history[best], look, called, chosen_epoch(run))
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.set_xlim(left=0)
        _legend(figure)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
    dots = "; where lines have markers, validation" if key == "loss" and VALIDATION_LOSS in trained[0].history else ""
    caption = f"Line: training{dots}. Ring: the epoch whose weights are kept." if key == "loss" else (
        "Ring: the epoch whose weights are kept, chosen on the validation cases."
    )  # fmt: skip
    return Drawn(key, f"{title} by epoch", figure, caption, names)


def _room(labels: Iterable[str]) -> float:
    """Height of the legend's lines in inches; what a curve's label adds to its name is counted as more of a line."""
    return sum(0.19 * math.ceil((len(label) + 18) / _LABEL) + 0.04 for label in labels)


def _legend(figure: Figure) -> None:
    """Below the axes, where it hides nothing; long names run on in a second line."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, [textwrap.fill(text, _LABEL) for text in labels], loc="outside lower left")


def chosen_epoch(run: RunResult) -> int | None:
    """The epoch whose weights are kept: as the training's card says, else that with the best validation Dice."""
    best = run.training.get("best")
    if isinstance(best, Mapping) and isinstance(best.get("epoch"), int):
        return int(best["epoch"])
    name = _dice_curve(run.history)
    curve = run.history[name] if name else {}
    return max(curve, key=lambda epoch: curve[epoch], default=None)


def _dice_curve(history: Curves) -> str | None:
    """Name of the curve of mean validation Dice: the key metric if there, else the shortest name with ``dice`` that is
    neither a spread nor a median nor a loss; of a training that validated picked slices theirs."""
    others = ("loss", "std", "median")
    if f"{PICKED}val_dice" in history:  # a point per validation; of whole volumes there is the best epoch's only
        return f"{PICKED}val_dice"
    found = [n for n in history if "dice" in n.lower() and not any(word in n.lower() for word in others)]
    return min(found, key=lambda name: (name not in _KEY_CURVES, len(name), name), default=None)


def _draw_losses(axes: Axes, history: Curves, look: Look, title: str, chosen: int | None) -> None:
    """Every curve with ``loss`` in its name; log scale when one spans two decades."""
    for name in (name for name in history if "loss" in name.lower()):
        label = title or _CURVES.get(name, name.replace("_", " "))
        validation = name == VALIDATION_LOSS
        marks: dict[str, Any] = {"marker": look.marker, "ms": 4, "mfc": SURFACE, "lw": 1.2} if validation else {"lw": 2}
        marks["label"] = "_" if title and validation else label  # one entry for each run
        values = list(history[name].values())
        axes.plot(list(history[name]), values, color=look.light, ls=look.dash, **marks)
        if chosen in history[name]:
            _ring(axes, chosen, history[name][chosen], look)
        if min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_dice(axes: Axes, curve: dict[int, float], look: Look, label: str, chosen: int | None) -> None:
    """A curve with a point per validation; the epoch that was chosen is named."""
    style: dict[str, Any] = {"lw": 2, "ls": look.dash, "marker": look.marker, "ms": 4}
    told = f"{label}: {curve[chosen]:.3f} at epoch {chosen}" if chosen in curve else label
    axes.plot(list(curve), list(curve.values()), color=look.light, label=told, **style)
    if chosen in curve:
        _ring(axes, chosen, curve[chosen], look)


def _ring(axes: Axes, x: float, y: float, look: Look) -> None:
    axes.plot(x, y, color=INK, marker=look.marker, ms=9, mfc="none", mew=1.5, ls="none", label="_")


def _cases(runs: Sequence[RunResult]) -> Drawn:
    """Per-case Dice: a box (quartiles, median, whiskers to 1.5 times their distance) and every case as a point, but no
    more than those of `drawn_cases`; grey lines join the same case in neighbouring strategies."""
    names, values = [run.name for run in runs], [dice_of_cases(run) for run in runs]
    cases = drawn_cases(values)
    shown = [{case: dice[case] for case in cases if case in dice} for dice in values]
    # the same sideways place in every strategy: a case that does not change has a level line
    places = np.linspace(-_JITTER, _JITTER, max(len(cases), 2))[np.random.default_rng(0).permutation(len(cases))]
    aside = dict(zip(cases, places.tolist(), strict=True))
    figure = Figure(figsize=(max(6.4, (2.2 if len(runs) < 5 else 1.5) * len(runs)), 4.6), layout="constrained")
    axes = figure.subplots()
    points: Points = {}
    for here, (first, second) in enumerate(pairwise(shown)):
        for case in sorted(first.keys() & second.keys()):
            x, y = [here + aside[case], here + 1 + aside[case]], [first[case], second[case]]
            axes.plot(x, y, color=MUTED, alpha=0.3, lw=0.8)
    for index, (run, look) in enumerate(zip(runs, looks(names).values(), strict=True)):
        if values[index]:
            _draw_box(axes, index, list(values[index].values()), look)
            at = {case: (index + aside[case], value) for case, value in shown[index].items()}
            texts = [f"{case}: Dice {value:.3f}" for case, value in shown[index].items()]
            points |= _scatter(axes, f"points{index}", at, look, [f"{text}, {run.title}" for text in texts])
    low = math.floor(10 * min((value for dice in values for value in dice.values()), default=0.0)) / 10
    axes.set(ylabel="Dice of the case (no unit)", ylim=(max(0.0, low) - 0.02, 1.02))
    axes.set_xlim(-0.55, len(runs) - 0.45)
    titles = [textwrap.fill(run.short_title, 18 if len(runs) < 5 else 15) for run in runs]
    axes.set_xticks(range(len(runs)), [f"{t}\nn = {len(dice)}" for t, dice in zip(titles, values, strict=True)])
    axes.grid(axis="y")
    caption = (
        "A point is a case: point at it, and it is named; a line joins the same case in two rows. Boxes: quartiles "
    )
    caption += "and median; whiskers: furthest case within 1.5 box heights."
    return Drawn("cases", "Dice of every case for each row", figure, caption, names, points)


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


def _scatter(
    axes: Axes, group: str, at: Mapping[str, tuple[float, float]], look: Look, texts: Sequence[str], label: str = ""
) -> Points:
    """Draw case -> place as points and return the group and their texts."""
    xy = np.array(list(at.values())).reshape(-1, 2)
    points = axes.scatter(
        xy[:, 0], xy[:, 1], s=26, c=look.light, marker=look.marker, edgecolors=SURFACE, linewidths=0.7, zorder=3,
        label=label or "_",
    )  # fmt: skip
    points.set_gid(group)
    return {group: texts}


def _by_size(runs: Sequence[RunResult]) -> Iterator[Drawn]:
    """Dice over the size of the reference, on a logarithmic scale."""
    names, points = [run.name for run in runs], Points()
    figure = Figure(figsize=(7.2, 3.8 + _room([run.title for run in runs])), layout="constrained")
    axes = figure.subplots()
    kept = {*drawn_cases([dice_of_cases(run) for run in runs])}
    unit = sizes_of_cases(runs[0])[0]
    for index, (run, look) in enumerate(zip(runs, looks(names).values(), strict=True)):
        its, sizes = sizes_of_cases(run)
        sizes = {case: size for case, size in sizes.items() if its == unit and case in kept and size[1] > 0}
        at = {case: (sizes[case][1], dice) for case, dice in dice_of_cases(run).items() if case in sizes}
        texts = [f"{case}: Dice {y:.3f}, {x:.4g} {unit}" for case, (x, y) in at.items()]
        if at:
            points |= _scatter(axes, f"points{index}", at, look, texts, label=run.title)
    if not points:
        return
    axes.set(xlabel=f"size of the reference ({unit})", ylabel="Dice of the case (no unit)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid()
    _legend(figure)
    caption = "A point is a case with something in its reference. The same error at the edge costs small objects more."
    yield Drawn("size", "Dice against size", figure, caption, names, points)


def _agreement(runs: Sequence[RunResult]) -> Iterator[Drawn]:
    """Bland and Altman (1986): difference of predicted and true size over their mean, a panel for each run."""
    names, points = [run.name for run in runs], Points()
    unit = sizes_of_cases(runs[0])[0]
    found = [(run, *sizes_of_cases(run)) for run in runs]
    found = [one for one in found if one[1] == unit and len(one[2]) > 1]
    if not found:
        return
    across = min(len(found), 3 if len(found) < 7 else 5)
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(10.5, (2.9 if across < 5 else 2.5) * down + 0.3), layout="constrained")
    panels = np.ravel(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False))
    kept = {*drawn_cases([dice_of_cases(run) for run in runs])}
    for number, (axes, (run, _, sizes)) in enumerate(zip(panels, found, strict=False)):
        gaps = [ours - true for ours, true in sizes.values()]
        bias, spread = mean_of(gaps), 1.96 * float(np.std(gaps, ddof=1))
        places = 0 if spread >= 100 else 2
        for height, dash in ((bias, "solid"), (bias - spread, (0, (4, 2))), (bias + spread, (0, (4, 2)))):
            axes.axhline(height, color=INK, lw=1, ls=dash)
        at = {case: ((ours + true) / 2, ours - true) for case, (ours, true) in sizes.items() if case in kept}
        texts = [f"{case}: {x:.4g} {unit}, difference {y:+.3g} {unit}" for case, (x, y) in at.items()]
        points |= _scatter(axes, f"points{number}", at, looks(names)[run.name], texts)
        title = "\n".join(textwrap.wrap(run.short_title, 84 // across, max_lines=2, placeholder=" ..."))
        told = f"{title}\nbias {bias:+,.{places}f}, limits \u00b1 {spread:,.{places}f}"
        axes.set_title(told, fontsize=10 if across < 5 else 8, weight="normal")
        axes.grid()
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    what = "volume" if unit == "mL" else "area"
    figure.supxlabel(f"mean of predicted and true {what} ({unit})", fontsize=11)
    figure.supylabel(f"predicted minus true ({unit})", fontsize=11)
    caption = (
        f"{what.capitalize()}s by Bland and Altman: solid, mean difference (bias); dashed, 1.96 standard deviations "
    )
    caption += "around it, where 95 % of the differences lie if they are normal."
    yield Drawn("agreement", f"Predicted against true {what}", figure, caption, names, points)


def _ranks(runs: Sequence[RunResult], shares: Mapping[str, Sequence[float]]) -> Drawn:
    """How often each row has each rank: a bar for each row, the first rank darkest."""
    rows = [run for run in runs if run.name in shares]
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [run.name for run in runs]
    for place, run in enumerate(rows):
        left = 0.0
        for rank, share in enumerate(shares[run.name]):
            if share > 0:
                strength = 1 - 0.85 * rank / max(1, len(rows) - 1)
                axes.barh(place, share, left=left, color=looks(names)[run.name].light, alpha=strength, ec=SURFACE)
                if share > 0.06:
                    axes.text(left + share / 2, place, str(rank + 1), ha="center", va="center", fontsize=9,
                              color=SURFACE if strength > 0.6 else INK)  # fmt: skip
                left += share
    axes.set_yticks(range(len(rows)), [textwrap.fill(run.title, 40) for run in rows])
    axes.set(xlim=(0, 1), xlabel="share of the draws with this rank (1: best mean Dice)")
    axes.invert_yaxis()
    caption = "How sure the order is: ranks by mean Dice when cases and seeds are drawn again, with replacement."
    return Drawn("ranks", "Stability of ranks", figure, caption, names)


def _few_shot(runs: Sequence[RunResult]) -> Iterator[Drawn]:
    """Mean Dice over the number of training cases, where a strategy was trained with several."""
    means = {line.run.name: line for line in reversed(table_lines(runs))}  # the first line of a run is its mean
    kinds: dict[str, dict[int, RunResult]] = {}
    several = len({run.variant for run in runs if run.fact("sam_variant")}) > 1
    for run in runs:
        if run.training_cases:
            kind = replace(run, name=run.kind, label=None).title  # by its card, however the row is called
            kind += f" [{run.variant}]" if several and run.fact("sam_variant") else ""
            # rows that differ in nothing of a title, such as in the learning rate, are lines of their own
            alike = (kind, *(f"{kind} ({n})" for n in range(2, len(runs) + 1)))
            own = next(name for name in alike if run.training_cases not in kinds.get(name, {}))
            kinds.setdefault(own, {})[run.training_cases] = run
    if not any(len(its) > 1 for its in kinds.values()):
        return
    names = [run.name for run in runs]
    figure = Figure(figsize=(7.2, 3.8 + _room(kinds)), layout="constrained")
    axes = figure.subplots()
    for kind, its in kinds.items():
        counts = sorted(its)
        look = looks(names)[its[counts[-1]].name]
        lines = [means[its[count].name] for count in counts]
        middle = [mean_dice(its[count]) for count in counts]
        if len(counts) > 1:
            axes.fill_between(
                counts, [one.low for one in lines], [one.high for one in lines], color=look.light, alpha=0.15
            )
        axes.plot(counts, middle, color=look.light, ls=look.dash, marker=look.marker, lw=2, label=kind)
    axes.set(xscale="log", xlabel="training cases", ylabel="mean Dice (no unit)")
    ticks = sorted({count for its in kinds.values() for count in its})
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    _legend(figure)
    yield Drawn("few_shot", "Dice by the number of training cases", figure, "Bands: 95 % intervals over cases.", names)


def write_lr_curve(
    path: StrPath, rates: Sequence[float], losses: Sequence[float], *, suggested: float | None, configured: float
) -> Path:
    """Write a PNG of the smoothed loss over the learning rate (rising, above 0), with two rates marked: ``configured``,
    and ``suggested``, where the loss falls most steeply, if there is such a one."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot(rates, losses, color=_KNOWN["lora"].light, lw=2)
        axes.axvline(configured, color=MUTED, lw=1.2, ls=(0, (2, 2)), label=f"config: lr {configured:.2g}")
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
        axes.grid(axis="y")
        figure.legend(loc="outside lower left")
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return Path(path)
