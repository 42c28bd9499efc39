"""The table of runs: a line per run and class, differences against zero-shot; as data, as JSON, as text for a terminal.

Every number is computed from the rows of the cases' CSV by `samseg_monai.metrics`; nothing is typed and nothing is
taken from a log. Mean, SD (population) and median are over cases, the 95 % interval of the mean is Student's t over
cases (`metrics.rows.t_interval`), differences are paired by case and made only between runs that differ in their method
alone (`comparing.what_differs`). Excluded cases (empty in reference and prediction under the honest policy) are counted
and left out. Nothing here tells how much another training seed would change.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samseg_monai.errors import BundleError
from samseg_monai.files import StrPath, write_json
from samseg_monai.metrics import aggregate, case_means, paired_difference
from samseg_monai.metrics.rows import (
    MIN_CASES,
    NOT_DISTINGUISHABLE,
    TOO_FEW,
    holm,
    mean_of,
    spelt_out,
    t_interval,
    write_table,
)
from samseg_monai.report.comparing import unequal
from samseg_monai.report.names import NOT_RECORDED, ZERO_SHOT, gate_text
from samseg_monai.report.runs import RunResult, check_runs

SIZES = (("prediction_ml", "reference_ml"), ("prediction_px", "reference_px"))  # columns of the CSV of cases
MEAN_OF_CLASSES = "mean of classes"
WIDTH = 130  # of a table for a terminal
OVER_CASES, ONE_SEED, SEEDS = "Student t over cases", "one training seed", "means over training seeds"
# Column of the CSV -> (heading, whether more is better). Names with transunet come from that policy alone.
MEASURES = {
    "dice": ("Dice", True),
    "dice_transunet": ("Dice (TransUNet rules)", True),
    "hd95_mm": ("HD95 mm", False),
    "hd95_px": ("HD95 px", False),
    "hd95_transunet_voxel": ("HD95 voxel", False),
    "nsd_1mm": ("NSD 1 mm", True),
    "nsd_2mm": ("NSD 2 mm", True),
    "nsd_1px": ("NSD 1 px", True),
    "nsd_2px": ("NSD 2 px", True),
    "lesion_dice": ("Lesion Dice", True),
    "lesion_hd95_mm": ("Lesion HD95 mm", False),
    "ece": ("ECE", False),
    "brier": ("Brier", False),
}


@dataclass(frozen=True)
class Line:
    """One row of the table: a run, or one class of it.

    ``numbers`` are those of `metrics.aggregate` over its measures; ``low`` and ``high`` the 95 % interval of the mean
    Dice.
    """

    run: RunResult
    klass: str
    numbers: Mapping[str, float]
    low: float
    high: float

    def dice(self, statistic: str = "mean") -> str:
        """Mean, std or median of the run's Dice, as text."""
        return fixed(self.numbers[f"{dice_column(self.run)}_{statistic}"])

    def interval(self) -> str:
        """The 95 % interval of the mean Dice as text, or why there is none."""
        return interval(self.low, self.high) if self.n >= MIN_CASES else TOO_FEW

    def mean(self, measure: str) -> str:
        """Mean of a measure as text, with 2 decimals for distances, 3 for scores; a dash where the run has none."""
        return fixed(self.numbers.get(f"{measure}_mean", math.nan), digits(measure))

    @property
    def n(self) -> int:
        return int(self.numbers["n"])

    @property
    def excluded(self) -> int:
        return int(self.numbers["n_excluded"])


@dataclass(frozen=True)
class Difference:
    """Run minus baseline over the cases both have, for one measure.

    ``p`` is that of no difference after Holm's correction over the rows of this measure; ``low`` and ``high`` are of
    this comparison alone. ``verdict`` is ``better``, ``worse`` (p below 0.05), ``not distinguishable``, or ``too few
    cases`` (below 6, without interval and p).
    """

    run: RunResult
    measure: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    verdict: str

    def text(self) -> str:
        return fixed(self.mean, digits(self.measure), "+").replace("-", "\u2212")

    def interval(self) -> str:
        return interval(self.low, self.high, digits(self.measure), "+").replace("-", "\u2212")


def intervals(runs: Sequence[RunResult]) -> str:
    """What the intervals of a table of these runs are of; a row that several seeds make has a list of them as seed."""
    several = any("," in str(run.fact("seed")) for run in runs)
    return f"{OVER_CASES}, {SEEDS if several else ONE_SEED}"


def measures(runs: Sequence[RunResult]) -> list[str]:
    """Measures that at least one run has a column for, in the order of the table."""
    columns = {column for run in runs for column in run.rows[0]}
    return [name for name in MEASURES if name in columns]


def dice_column(run: RunResult) -> str:
    """The column that holds the run's Dice, which its policy names.

    Raises:
        BundleError: there is none.
    """
    found = [name for name in ("dice", "dice_transunet") if name in run.rows[0]]
    if not found:
        there = ", ".join(run.rows[0])
        raise BundleError(f"{run.folder}: the CSV of cases has no column dice, it has {there}; evaluate again")
    return found[0]


def dice_of_cases(run: RunResult) -> dict[str, float]:
    """Case -> Dice, the mean over its classes; excluded cases are not there."""
    return case_means(run.rows, dice_column(run))


def mean_dice(run: RunResult) -> float:
    """Mean of `dice_of_cases`; NaN where no case counts."""
    return mean_of([*dice_of_cases(run).values()])


def sizes_of_cases(run: RunResult) -> tuple[str, dict[str, tuple[float, float]]]:
    """Unit (mL, mm² or px), and case -> predicted and true size, sums over its classes; excluded cases are left out.

    A 2-D image with a known pixel size is scored as a slice of 1 mm: its mL are 1,000 mm².
    """
    columns = next((pair for pair in SIZES if pair[0] in run.rows[0]), None)
    sizes: dict[str, tuple[float, float]] = {}
    if columns is None:
        return "", sizes
    areas = run.is_image and columns[0].endswith("_ml")
    scale, unit = (1000.0, "mm²") if areas else (1.0, "mL" if columns[0].endswith("_ml") else "px")
    for row in run.rows:
        if not row["excluded"]:
            before = sizes.get(str(row["case"]), (0.0, 0.0))
            sizes[str(row["case"])] = (before[0] + scale * row[columns[0]], before[1] + scale * row[columns[1]])
    return unit, sizes


def table_lines(runs: Sequence[RunResult]) -> list[Line]:
    """Lines of the table in the order of ``runs``; a run of several classes gives their mean, then each class."""
    check_runs(runs)
    lines = []
    for run in runs:
        for klass in [MEAN_OF_CLASSES, *run.classes] if len(run.classes) > 1 else run.classes:
            rows = [row for row in run.rows if klass in (MEAN_OF_CLASSES, row["class"])]
            found = t_interval(list(case_means(rows, dice_column(run)).values()))
            # a mean of values from 0 to 1 is such a value, too; NaN stays what it is
            low, high = (min(max(end, 0.0), 1.0) if math.isfinite(end) else math.nan for end in (found.low, found.high))
            lines.append(Line(run, klass, aggregate(rows, columns=measures([run])), low, high))
    return lines


def differences(runs: Sequence[RunResult], *, only: str | None = None, base: str = ZERO_SHOT) -> list[Difference]:
    """Every other run minus that called ``base``, paired by case, in one measure or all; Holm over the rows.

    Empty when there is none of that name. Runs that differ in more than their method are left out: `comparing.unequal`
    names them.
    """
    check_runs(runs)
    of_base = next((run for run in runs if run.name == base), None)
    if of_base is None:
        return []
    apart = [of_base, *(one.run for one in unequal(runs, base))]
    rows = [run for run in runs if not any(run is one for one in apart)]
    found: dict[str, list[Difference]] = {}
    for measure in measures([of_base]) if only is None else [only]:
        having = [run for run in rows if measure in run.rows[0] and measure in of_base.rows[0]]
        pairs = [paired_difference(run.rows, of_base.rows, value=measure) for run in having]
        for run, one, p in zip(having, pairs, holm([pair["p"] for pair in pairs]), strict=True):
            numbers = (one["difference"], one["ci_low"], one["ci_high"], p)
            verdict = TOO_FEW if one["n"] < MIN_CASES else NOT_DISTINGUISHABLE
            if p < 0.05:
                verdict = "better" if (one["difference"] > 0) == MEASURES[measure][1] else "worse"
            found.setdefault(run.name, []).append(Difference(run, measure, int(one["n"]), *numbers, verdict))
    return [one for its in found.values() for one in its]


def warnings(runs: Sequence[RunResult], base: str) -> list[str]:
    """What the runs themselves warn of, and why some are not compared with that called ``base``."""
    return [*(line for run in runs for line in run.warnings), *(one.text for one in unequal(runs, base))]


def gates(runs: Sequence[RunResult]) -> list[str]:
    """A line for each run that mixes SAM with another network by a gate."""
    return [f"{run.title}: {gate_text(run.gate)}" for run in runs if run.gate is not None]


def failures(runs: Sequence[RunResult]) -> list[str]:
    """A line for each run with cases whose Dice is 0: what its intervals then are worth."""
    lines = []
    for run in runs:
        column = dice_column(run)
        zero = {row["case"] for row in run.rows if not row["excluded"] and row[column] == 0}
        if zero:
            lines.append(
                f"{run.title}: {len(zero)} of {len(run.cases)} cases hold a Dice of 0. Few cases tell too little of "
                "such failures, and intervals are too narrow: with 10 % of them, one of 95 % covers 66 % at 6 cases, "
                "75 % at 13 and 92 % at 40 (simulated)"
            )
    return lines


def results_json(runs: Sequence[RunResult], *, base: str = ZERO_SHOT) -> dict[str, dict[str, Any]]:
    """The table as JSON: run name -> numbers of the mean over classes (``classes`` holds each when there are several).

    Differences are those from the run called ``base``, under ``minus_<base>``.

    Numbers that do not exist are None, so that the file is valid JSON. Nothing is rounded.
    """
    result: dict[str, dict[str, Any]] = {}
    for line in table_lines(runs):
        run = line.run
        keys = [f"{name}_{kind}" for name in measures([run]) for kind in ("mean", "std", "median")]
        entry: dict[str, Any] = {key: or_none(line.numbers[key]) for key in keys}
        entry |= {f"{dice_column(run)}_ci95": [or_none(line.low), or_none(line.high)], "n": line.n}
        entry |= {"excluded": line.excluded, "interval": intervals([run]) if line.n >= MIN_CASES else TOO_FEW}
        if run.name in result:
            result[run.name].setdefault("classes", {})[line.klass] = entry
            continue
        result[run.name] = {
            **entry,
            **{"sam": run.sam, "prompt_source": run.prompt_source, "trainable_parameters": run.trainable},
            **{"phantoms": run.is_phantom, "seconds": run.seconds, "seconds_training": run.training_seconds},
            **({} if run.gate is None else {"gate": run.gate}),
            **({"alerts": alerts} if (alerts := [*run.warnings, *failures([run])]) else {}),
        }
    for one in differences(runs, base=base):
        interval = [or_none(one.low), or_none(one.high)]
        entry = {"mean": or_none(one.mean), "ci95": interval, "n": one.n, "p_holm": or_none(one.p)}
        result[one.run.name].setdefault(f"minus_{base}", {})[one.measure] = {**entry, "verdict": one.verdict}
    for apart in unequal(runs, base):
        result[apart.run.name]["not_compared"] = {"with": apart.base.name, "differ_in": apart.what}
    return result


def write_results(path: StrPath, runs: Sequence[RunResult]) -> None:
    """Write `results_json` to ``path``, and beside it as a CSV: a line per run, and one for each class where there are
    several; keys of values within values are joined by dots, ends of an interval are ``.low`` and ``.high``."""
    results = results_json(runs)
    write_json(path, results)
    names = {run.name: run.classes[0] for run in runs}
    rows = []
    for name, entry in results.items():
        several = entry.pop("classes", {})
        classes = {MEAN_OF_CLASSES if several else names[name]: entry, **several}
        rows += [{"run": name, "class": klass, **flat(its)} for klass, its in classes.items()]
    write_table(rows, Path(path).with_suffix(".csv"))


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An entry of `results_json` as the cells of a line: see `write_results`; other lists are one text."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and "ci95" in key:
            found |= {f"{prefix}{key}.low": value[0], f"{prefix}{key}.high": value[1]}
        else:
            found[prefix + key] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return found


def table_text(runs: Sequence[RunResult], *, base: str = ZERO_SHOT) -> str:
    """The runs' table for a terminal: means, then each class where there are several, differences, cost; every row says
    which SAM."""
    lines = table_lines(runs)
    lesion_wise = [name for name in other_measures(runs) if name.startswith("lesion")]
    shown = [name for name in other_measures(runs) if name not in lesion_wise]
    means = [line for line in lines if line.klass == MEAN_OF_CLASSES or len(line.run.classes) == 1]
    head = ["strategy [SAM]", "n", "Dice mean +- SD", "95 % CI", "median", *headings(shown), "excl."]
    body = [
        [named(line.run), str(line.n), f"{line.dice()} +- {line.dice('std')}", line.interval(),
         line.dice("median"), *map(line.mean, shown), str(line.excluded)]
        for line in means
    ]  # fmt: skip
    blocks = [grid(head, body)]
    if lesion_wise:
        body = [[named(line.run), *map(line.mean, lesion_wise)] for line in means]
        blocks.append(grid(["lesion-wise, all cases", *headings(lesion_wise)], body))
    if len(classes_of(runs)) > 1:
        blocks += [_by_class(runs, lines, measure) for measure in (dice_column(runs[0]), *shown[:1])]
    blocks[0] += f"\n95 % CI: {intervals(runs)}; none below {MIN_CASES} cases."
    if gaps := differences(runs, only=dice_column(runs[0]), base=base):
        # no true minus sign: terminals and spreadsheets read this, too
        body = [
            [named(g.run), str(g.n), fixed(g.mean, 3, "+"), interval(g.low, g.high, 3, "+"), p_text(g.p), g.verdict]
            for g in gaps
        ]
        head = [f"Dice minus {base_title(runs, base)}", "n", "mean", "95 % CI", "p (Holm)", "verdict"]
        corrected = f"p and verdict are corrected for the number of rows ({len(gaps)})"
        note = f"95 % CI of each: {intervals(runs)}, paired; {corrected}."
        blocks.append(f"{grid(head, body)}\n{note}")
    cost = [
        [named(r), r.prompt_source, count_text(r.trainable), seconds_text(r.training_seconds), seconds_text(r.seconds)]
        for r in runs
    ]
    head = ["strategy [SAM]", "prompt source", "trainable", "s training", "s evaluation"]
    blocks.append(grid(head, cost, left=2))
    said = [*warnings(runs, base), *failures(runs)]
    alerts = "\n".join(textwrap.fill(f"! {line}.", WIDTH, subsequent_indent="  ") for line in said)
    parts = filter(None, [alerts, *blocks, "\n".join(gates(runs))])
    return spelt_out("\n\n".join(parts), keep="\n") + "\n"


def base_title(runs: Sequence[RunResult], base: str) -> str:
    """How the run that others are compared with is called within a sentence."""
    return next((named(run) for run in runs if run.name == base and base != ZERO_SHOT), "zero-shot")


def _by_class(runs: Sequence[RunResult], lines: Sequence[Line], measure: str) -> str:
    """Means of one measure by class, a row for each run; as many tables below each other as the width asks for."""
    means = {(line.run.name, line.klass): line.mean(measure) for line in lines}
    title = f"{MEASURES[measure][0]} by class"
    room = WIDTH - max(len(title), *(len(named(run)) for run in runs))
    blocks: list[list[str]] = [[]]
    for name in classes_of(runs):
        if blocks[-1] and sum(len(other) + 2 for other in [*blocks[-1], name]) > room:
            blocks.append([])
        blocks[-1].append(name)
    return "\n\n".join(
        grid([title, *block], [[named(run), *(means.get((run.name, c), "-") for c in block)] for run in runs])
        for block in blocks
    )


def grid(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns two spaces apart; the first ``left`` ones are flush left, the others right; a row of one cell runs on.

    Characters that a terminal would obey are spelt out.
    """
    head, body = ([spelt_out(c) for c in head], [[spelt_out(c) for c in row] for row in body])
    whole = [row for row in [head, *body] if len(row) == len(head)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    rows = [head, ["-" * width for width in widths], *body]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    aligned = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=False)) for row in rows]
    return "\n".join(row.rstrip() for row in aligned)


def fixed(value: float | None, digits: int = 3, sign: str = "-") -> str:
    """Number with a fixed count of decimals, with ``sign="+"`` always with its sign; a dash when there is none."""
    return f"{value:{sign}.{digits}f}" if value is not None and math.isfinite(value) else "-"


def interval(low: float, high: float, digits: int = 3, sign: str = "-") -> str:
    """``low to high`` of a 95 % interval, a dash when there is none."""
    return f"{fixed(low, digits, sign)} to {fixed(high, digits, sign)}" if math.isfinite(low) else "-"


def p_text(p: float) -> str:
    """A p-value with two digits, a dash when there is none."""
    return "-" if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def count_text(count: int | None) -> str:
    return NOT_RECORDED if count is None else f"{count:,}"


def seconds_text(seconds: float | None) -> str:
    """Seconds to one decimal below 100, a dash when not recorded."""
    return "-" if seconds is None else f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}"


def digits(measure: str) -> int:
    """Decimals shown: 2 for distances, 3 for scores from 0 to 1."""
    return 2 if "hd95" in measure else 3


def headings(names: Sequence[str]) -> list[str]:
    return [MEASURES[name][0] for name in names]


def named(run: RunResult) -> str:
    """Short title of a run with its SAM, for a row or column of its own."""
    short = run.short_title
    return short if run.variant in short else f"{short} [{run.variant}]"


def classes_of(runs: Sequence[RunResult]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.classes))


def other_measures(runs: Sequence[RunResult]) -> list[str]:
    return [name for name in measures(runs) if not name.startswith("dice")]


def or_none(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None
