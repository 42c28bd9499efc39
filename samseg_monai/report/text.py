"""The runs' table as plain text for a terminal, at most about 130 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from samseg_monai.report.labels import gate_text
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import (
    MEAN_OF_CLASSES,
    MEASURES,
    Line,
    classes_of,
    count_text,
    dice_column,
    differences,
    digits,
    fixed,
    interval,
    named,
    other_measures,
    seconds_text,
    signed,
    table_lines,
)

WIDTH = 130


def table_text(runs: Sequence[RunResult]) -> str:
    """The runs' table: means, then each class where there are several, differences, cost; every row says which SAM."""
    lines = table_lines(runs)
    lesion_wise = [name for name in other_measures(runs) if name.startswith("lesion")]
    shown = [name for name in other_measures(runs) if name not in lesion_wise]
    several = len(classes_of(runs)) > 1
    dice = "Dice mean +- SD"
    head = ["strategy [SAM]", "n", dice, "95 % CI", "median", *(MEASURES[name][0] for name in shown), "excl."]
    means = [line for line in lines if line.klass == MEAN_OF_CLASSES or len(line.run.classes) == 1]
    blocks = [grid(head, [_line_cells(line, shown) for line in means], left=1)]
    if lesion_wise:
        head = ["lesion-wise, all cases", *(MEASURES[name][0] for name in lesion_wise)]
        blocks.append(grid(head, [[named(line.run), *_others(line, lesion_wise)] for line in means], left=1))
    if several:
        blocks += [_by_class(runs, lines, measure) for measure in (dice_column(runs[0]), *shown[:1])]
    gaps = differences(runs, only=dice_column(runs[0]))
    if gaps:
        cells = [
            [named(g.run), str(g.n), signed(g.mean), f"{signed(g.low)} to {signed(g.high)}", g.verdict] for g in gaps
        ]
        blocks.append(grid(["Dice minus zero-shot", "n", "mean", "95 % CI", "verdict"], cells, left=1))
    cost = [
        [named(r), r.prompt_source, count_text(r.trainable), seconds_text(r.training_seconds), seconds_text(r.seconds)]
        for r in runs
    ]
    head = ["strategy [SAM]", "prompt source", "trainable", "s training", "s evaluation"]
    blocks.append(grid(head, cost, left=2))
    gates = [f"{named(run)}: {gate_text(run.gate)}" for run in runs if run.gate is not None]
    return "\n\n".join([*blocks, *(["\n".join(gates)] if gates else [])]) + "\n"


def _line_cells(line: Line, shown: Sequence[str]) -> list[str]:
    dice = line.dice
    spread = f"{fixed(dice.mean)} +- {fixed(dice.sd)}"
    numbers = [str(dice.n), spread, interval(line.low, line.high), fixed(dice.median)]
    return [named(line.run), *numbers, *_others(line, shown), str(line.excluded)]


def _others(line: Line, shown: Sequence[str]) -> list[str]:
    return [fixed(line.values[name].mean, digits(name)) if name in line.values else "-" for name in shown]


def _by_class(runs: Sequence[RunResult], lines: Sequence[Line], measure: str) -> str:
    """Means of one measure by class, a row for each run; as many tables below each other as the width asks for."""
    means = {
        (line.run.name, line.klass): fixed(line.values[measure].mean, digits(measure))
        for line in lines
        if measure in line.values
    }
    title = f"{MEASURES[measure][0]} by class"
    room = WIDTH - max(len(title), *(len(named(run)) for run in runs))
    blocks: list[list[str]] = [[]]
    for name in classes_of(runs):
        if blocks[-1] and sum(len(other) + 2 for other in [*blocks[-1], name]) > room:
            blocks.append([])
        blocks[-1].append(name)
    grids = [
        grid([title, *block], [[named(run), *(means.get((run.name, c), "-") for c in block)] for run in runs], left=1)
        for block in blocks
    ]
    return "\n\n".join(grids)


def grid(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns two spaces apart; the first ``left`` ones are flush left, the others right; a row of one cell runs on."""
    whole = [row for row in [head, *body] if len(row) == len(head)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(head))]
    rows = [list(head), ["-" * width for width in widths], *body]
    aligned = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        )
        for row in rows
    ]
    return "\n".join(row.rstrip() for row in aligned)
