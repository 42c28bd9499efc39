"""Draw the experiment's figures as PNG files from the committed results.

``python experiments/meningioma_t1c/figures.py`` writes ``docs/figures/*.png``: training loss of the ranks (figure 7 of
the honours paper), training and validation loss of one long run (figure 8), Dice of every slice per row (figure 9), and
what the boxes do. With ``--data DIR --predictions DIR [DIR ...]`` also the best, the median and the worst slices of the
row that validation chose, with their boxes; the folders hold the predicted PNG files of all folds.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plan as plans
import records
import table
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from samseg_monai.errors import DataError, raise_all
from samseg_monai.metrics import dice_of

FOLDER = plans.HERE.parents[1] / "docs" / "figures"
# hues of Okabe and Ito (2008), which people with a colour-vision deficiency can tell apart
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#00805e", "#a84f86", "#4a4a4a"
OF_ROLE = {"zero-shot": BLUE, "fine-tuned": VERMILION, "later": PURPLE, "without SAM": GREEN}
MARKS = {"tight": ("o", BLUE), "loose": ("s", VERMILION), "unseen": ("^", GREEN)}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold"}  # fmt: skip
CREDIT = "Images: J. Cheng, brain tumour data set, figshare 1512427, CC BY 4.0"
Curve = Mapping[str, float]


def save(figure: Figure, name: str, folder: Path) -> Path:
    """Write one figure as a PNG without date or program, so that equal results give equal files."""
    FigureCanvasAgg(figure)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=110, metadata={"Software": None})
    return folder / name


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs that every curve has, and the mean of the curves there."""
    epochs = sorted(set.intersection(*(set(map(int, curve)) for curve in curves)))
    return np.array(epochs), np.array([np.mean([curve[str(epoch)] for curve in curves]) for epoch in epochs])


def losses_of_ranks(facts: Sequence[records.Row]) -> Figure:
    """Training loss by epoch of ranks 4, 16, 64: mean of the folds, first seed there is, each fold faintly."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for rank, colour, dash in ((4, BLUE, "-"), (16, VERMILION, "--"), (64, GREEN, ":")):
        of_rank = [one for one in facts if one["row"] == f"lora_r{rank}"]
        first = min((one["seed"] for one in of_rank), default=None)
        curves = [one["history"]["train_loss"] for one in of_rank if one["seed"] == first]
        if not curves:
            continue
        for curve in curves:
            axes.plot(*mean_curve([curve]), color=colour, lw=0.7, alpha=0.35)
        label = f"rank {rank} ({len(curves)} fold{'s' * (len(curves) > 1)})"
        axes.plot(*mean_curve(curves), color=colour, ls=dash, lw=2.2, marker="o", ms=3.5, label=label)
    _finish(figure, axes, "Training loss of LoRA: mean of folds, each fold faintly")
    return figure


def losses_of_long_run(facts: Sequence[records.Row], name: str = "lora_r64_long") -> Figure:
    """Training and validation loss of one run by epoch; the epoch that validation Dice chose is marked."""
    run = next(one for one in facts if one["row"] == name)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for key, label, colour, dash in (
        ("train_loss", "training", BLUE, "-"),
        ("val_loss", "validation", VERMILION, "--"),
    ):
        if key in run["history"]:
            axes.plot(*mean_curve([run["history"][key]]), color=colour, ls=dash, lw=1.8, label=label)
    best = (run.get("best") or {}).get("epoch")
    if best:
        axes.axvline(best, color=GREY, lw=1, ls=":", label=f"best validation Dice, epoch {best}")
    _finish(figure, axes, f"LoRA rank 64 over {run['epochs']} epochs, fold {run['fold']}")
    return figure


def dice_of_rows(results: table.Results) -> Figure:
    """Box plot of the Dice of all slices per row, loose boxes; every slice is a point, the mean a black diamond."""
    rows = _shown(results)
    values = [results.slices(row["name"], "loose").tolist() for row in rows]
    figure = Figure(figsize=(7.6, 1.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    spread = np.random.default_rng(0)
    for place, (row, dice) in enumerate(zip(rows, values, strict=True)):
        colour = OF_ROLE[row["role"]]
        line = {"color": colour, "lw": 1.4}
        axes.scatter(dice, place + spread.uniform(-0.22, 0.22, len(dice)), s=7, color=colour, alpha=0.35, linewidths=0)
        axes.boxplot([dice], positions=[place], widths=0.55, showfliers=False, orientation="horizontal",
                     boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "lw": 2.4},
                     manage_ticks=False)  # fmt: skip
        axes.plot(np.mean(dice), place, "D", color="black", ms=4, zorder=4)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="Dice of a slice (no unit)", title="Loose boxes: Dice of every slice")
    axes.set_xlim(right=1.005)
    axes.grid(axis="x", lw=0.6, alpha=0.5)
    handles = [Line2D([], [], color=colour, lw=2, label=role) for role, colour in OF_ROLE.items()]
    handles.append(Line2D([], [], color="black", marker="D", ms=4, ls="none", label="mean"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def dice_by_boxes(results: table.Results) -> Figure:
    """Mean Dice per row for tight, loose and unseen boxes, joined by a line: what a worse box costs."""
    rows = _shown(results)
    figure = Figure(figsize=(7.6, 1.3 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        laws = MARKS if row.get("boxes", True) else {"loose": ("x", GREY)}
        means = {law: float(results.slices(row["name"], law).mean()) for law in laws}
        axes.hlines(place, min(means.values()), max(means.values()), color=GREY, lw=1, alpha=0.5)
        for step, (law, (marker, colour)) in enumerate(laws.items()):
            beside = 0.2 * (step - 1) if len(laws) > 1 else 0.0  # else equal means would hide each other
            axes.plot(means[law], place + beside, marker, color=colour, ms=5.5)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="both", lw=0.6, alpha=0.4)
    axes.set(xlabel="mean Dice of the slices (no unit)", title="What the box does")
    handles = [Line2D([], [], color=c, marker=m, ls="none", label=f"{law} box") for law, (m, c) in MARKS.items()]
    handles.append(Line2D([], [], color=GREY, marker="x", ls="none", label="no box"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def pick(dice: Mapping[str, float]) -> dict[str, str]:
    """Six cases to show, in this order: the two best, the two in the middle and the two worst; case -> role."""
    ordered = sorted(dice, key=lambda case: (-dice[case], case))
    middle = (len(ordered) - 1) // 2
    chosen = {"best": ordered[:2], "median": ordered[middle : middle + 2], "worst": ordered[-2:]}
    return {case: role for role, cases in chosen.items() for case in cases}


def overlays(
    data: Path,
    predictions: Mapping[str, Path],
    boxes: Mapping[str, Sequence],
    title: str,
    before: Mapping[str, Path] | None = None,
) -> Figure:
    """Best, median and worst slices around the tumour: reference, prediction and box, with the credit below.

    Args:
        data: folder with images/ and labels/.
        predictions: case -> PNG file; their Dice decides which six are shown.
        boxes: case -> boxes, as in the committed files.
        title: line above.
        before: the same of SAM without fine-tuning, drawn beside it.
    """
    dice = {case: _dice(_pixels(path), _pixels(data / "labels" / f"{case}.png")) for case, path in predictions.items()}
    picked = pick(dice)
    figure = Figure(figsize=(8.4, 6.6), layout="constrained")
    for axes, (case, role) in zip(figure.subplots(2, 3).T.ravel(), picked.items(), strict=True):
        image, reference = (_pixels(data / kind / f"{case}.png") for kind in ("images", "labels"))
        prediction = _pixels(predictions[case])
        axes.imshow(image, cmap="gray")
        axes.contour(reference > 0, [0.5], colors="white", linewidths=1.6)
        axes.contour(prediction > 0, [0.5], colors="#ff8433", linewidths=1.4)
        told = f"{role}: {dice[case]:.3f}"
        if before:
            earlier = _pixels(before[case])
            axes.contour(earlier > 0, [0.5], colors="#f0e442", linewidths=1.2, linestyles=":")
            told += f" (zero-shot {_dice(earlier, reference):.3f})"
        for x0, y0, x1, y1 in boxes[case]:  # edges: the first pixel's centre is 0 for imshow, its edge -0.5
            place = (x0 - 0.5, y0 - 0.5)
            axes.add_patch(Rectangle(place, x1 - x0, y1 - y0, fill=False, ec="#56b4e9", lw=1.2, ls="--"))
        x0, y0, x1, y1 = np.mean(boxes[case], axis=0)
        half = max(x1 - x0, y1 - y0) * 0.8 + 20
        axes.set_xlim((x0 + x1) / 2 - half, (x0 + x1) / 2 + half)
        axes.set_ylim((y0 + y1) / 2 + half, (y0 + y1) / 2 - half)
        axes.set_facecolor("black")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{told}\n{case.replace('_', ' ')}", fontsize=9.5, fontweight="normal")
    figure.suptitle(textwrap.fill(title, 80), fontsize=11, fontweight="bold")
    shown = [("reference (white)", "#9a9a9a", "-"), ("fine-tuned", "#ff8433", "-"), ("box", "#56b4e9", "--")]
    shown += [("zero-shot (yellow)", "#b8ab00", ":")] if before else []
    handles = [Line2D([], [], color=colour, ls=dash, lw=2, label=name) for name, colour, dash in shown]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=4,
        frameon=False,
        title=CREDIT,
        title_fontsize=8.5,
        alignment="left",
    )
    return figure


def predictions_in(folders: Sequence[Path], cases: Sequence[str]) -> dict[str, Path]:
    """Case -> its PNG file, ``<case>_seg.png`` or ``<case>.png``, in one of the folders.

    Raises:
        DataError: cases with no file, or with several; all at once.
    """
    found = {
        case: [path for folder in folders for end in ("_seg", "") if (path := folder / f"{case}{end}.png").is_file()]
        for case in cases
    }
    problems = [f"{case}: {len(paths)} files" for case, paths in found.items() if len(paths) != 1]
    raise_all(problems, DataError, "predictions: expected one PNG file per slice in the folders given")
    return {case: paths[0] for case, paths in found.items()}


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return dice_of(*(torch.from_numpy(picture > 0) for picture in (first, second)))


def _shown(results: table.Results) -> list[Mapping]:
    """Complete rows, those of one role together."""
    return [
        row for row in table.by_role(results.plan["rows"]) if row["role"] in OF_ROLE and results.complete(row["name"])
    ]


def _finish(figure: Figure, axes: object, title: str) -> None:
    axes.set(title=title, xlabel="epoch", ylabel="Dice + cross-entropy, half each (no unit)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", lw=0.6, alpha=0.5)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def main(arguments: list[str] | None = None) -> None:
    """Draw what the results suffice for, and say where each file is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=plans.RESULTS)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--data", type=Path, help="folder with images/ and labels/, for the overlays")
    parser.add_argument("--predictions", type=Path, nargs="+", help="folders of predicted PNG files, loose boxes")
    parser.add_argument("--before", type=Path, nargs="+", help="the same of zero-shot, to be drawn beside them")
    options = parser.parse_args(arguments)
    plan = plans.read("plan.json")
    facts = [one for one in records.read_facts(options.results) if one["fold"] != "all"]
    results = table.Results(records.read(options.results), facts, plan)
    there = {one["row"] for one in facts}
    with rc_context(STYLE):
        drawn = {}
        if there & {"lora_r4", "lora_r16", "lora_r64"}:
            drawn["loss_of_ranks.png"] = losses_of_ranks(facts)
        if "lora_r64_long" in there:
            drawn["loss_rank_64.png"] = losses_of_long_run(facts)
        if _shown(results):
            drawn |= {"dice_of_rows.png": dice_of_rows(results), "dice_by_boxes.png": dice_by_boxes(results)}
        compared = table.comparisons(results)
        if options.predictions and "chosen" in compared:
            title = next(row["title"] for row in plan["rows"] if row["name"] == compared["chosen"])
            title += ", loose boxes, one seed (tables: mean of seeds)"
            predictions = predictions_in(options.predictions, list(results.blocks))
            before = predictions_in(options.before, list(results.blocks)) if options.before else None
            drawn["overlays.png"] = overlays(options.data, predictions, plans.read("boxes/loose.json"), title, before)
        for name, figure in drawn.items():
            print(save(figure, name, options.output))


if __name__ == "__main__":
    main()
