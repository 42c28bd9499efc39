"""Numbers of the report: one line per strategy, differences against zero-shot, as data and JSON.

Every number is computed from the rows of the cases' CSV by `samseg_monai.metrics`; nothing is typed and nothing is
taken from a log. Mean, SD (population) and median are over cases, the 95 % interval of the mean is a percentile
bootstrap over cases (Efron 1979), differences are paired by case. Excluded cases (empty in
reference and prediction under the honest policy) are counted and left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samseg_monai.errors import BundleError
from samseg_monai.metrics import aggregate, case_means, paired_difference
from samseg_monai.report.labels import NOT_RECORDED, ZERO_SHOT
from samseg_monai.report.runs import RunResult, check_runs

SEED = 0
MEAN_OF_CLASSES = "mean of classes"
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
}


@dataclass(frozen=True)
class Summary:
    """Statistics over the cases that count; NaN where there is none."""

    n: int
    mean: float
    sd: float
    median: float


@dataclass(frozen=True)
class Line:
    """One row of the table: a run, or one class of it. ``values`` holds a Summary per measure present in the CSV,
    ``low`` and ``high`` the 95 % bootstrap interval of the mean Dice."""

    run: RunResult
    klass: str
    values: Mapping[str, Summary]
    low: float
    high: float
    excluded: int

    @property
    def dice(self) -> Summary:
        """Summary of the run's Dice."""
        return self.values[dice_column(self.run)]


@dataclass(frozen=True)
class Difference:
    """Run minus baseline over the cases both have, for one measure; ``verdict`` is ``better``, ``worse`` or ``not
    distinguishable`` (the interval holds 0, or there are fewer cases than `metrics.paired_difference` asks for)."""

    run: RunResult
    measure: str
    n: int
    mean: float
    low: float
    high: float
    verdict: str


def measures(runs: Sequence[RunResult]) -> list[str]:
    """Measures that at least one run has a column for, in the order of the table."""
    columns = {column for run in runs for column in run.rows[0]}
    return [name for name in MEASURES if name in columns]


def dice_column(run: RunResult) -> str:
    """The column that holds the run's Dice, which its policy names.

    Raises:
        BundleError: there is none.
    """
    for name in ("dice", "dice_transunet"):
        if name in run.rows[0]:
            return name
    raise BundleError(
        f"{run.folder}: the CSV of cases has no column dice, it has {', '.join(run.rows[0])}; evaluate again"
    )


def dice_of_cases(run: RunResult) -> dict[str, float]:
    """Case -> Dice, the mean over its classes; excluded cases are not there."""
    return case_means(run.rows, dice_column(run))


def table_lines(runs: Sequence[RunResult]) -> list[Line]:
    """Lines of the table in the order of ``runs``; a run of several classes gives their mean, then each class."""
    check_runs(runs)
    lines = []
    for run in runs:
        several = len(run.classes) > 1
        for klass in [MEAN_OF_CLASSES, *run.classes] if several else run.classes:
            rows = [row for row in run.rows if klass in (MEAN_OF_CLASSES, row["class"])]
            values = {name: _summary(rows, name) for name in measures([run])}
            column = dice_column(run)
            # The interval of a mean is that of its difference to 0: one bootstrap serves both.
            ci = paired_difference(rows, [dict(row) | {column: 0.0} for row in rows], value=column, seed=SEED)
            excluded = sum(bool(row["excluded"]) for row in rows)
            lines.append(Line(run, klass, values, float(ci["ci_low"]), float(ci["ci_high"]), excluded))
    return lines


def differences(runs: Sequence[RunResult], *, only: str | None = None, baseline: str = ZERO_SHOT) -> list[Difference]:
    """Every other run minus the run named ``baseline``, paired by case; empty when there is no such run.

    Args:
        runs: with or without the baseline.
        only: the one measure wanted; all when None.
        baseline: name of the run that the others are compared with.

    Raises:
        DataError: two runs were not evaluated on the same cases and classes.
    """
    check_runs(runs)
    base = next((run for run in runs if run.name == baseline), None)
    if base is None:
        return []
    others = [run for run in runs if run is not base]
    wanted = measures([base]) if only is None else [only]
    return [_difference(run, base, name) for run in others for name in wanted if name in run.rows[0]]


def results_json(runs: Sequence[RunResult]) -> dict[str, dict[str, Any]]:
    """The table as JSON: run name -> numbers of the mean over classes (``classes`` holds each when there are several).

    Numbers that do not exist are None, so that the file is valid JSON. Nothing is rounded.
    """
    result: dict[str, dict[str, Any]] = {}
    for line in table_lines(runs):
        entry: dict[str, Any] = {}
        for measure, summary in line.values.items():
            entry |= {f"{measure}_mean": _or_none(summary.mean), f"{measure}_std": _or_none(summary.sd)}
            entry |= {f"{measure}_median": _or_none(summary.median)}
        entry |= {f"{dice_column(line.run)}_ci95": [_or_none(line.low), _or_none(line.high)]}
        entry |= {"n": line.dice.n, "excluded": line.excluded}
        if line.run.name in result:
            result[line.run.name].setdefault("classes", {})[line.klass] = entry
            continue
        run = line.run
        entry |= {"sam": run.sam, "prompt_source": run.prompt_source}
        entry |= {"trainable_parameters": run.trainable, "phantoms": run.is_phantom}
        entry |= {"seconds": run.seconds, "seconds_training": run.training_seconds}
        entry |= {} if run.gate is None else {"gate": run.gate}
        result[run.name] = entry
    for one in differences(runs):
        entry = {"mean": _or_none(one.mean), "ci95": [_or_none(one.low), _or_none(one.high)]}
        entry |= {"n": one.n, "verdict": one.verdict}
        result[one.run.name].setdefault("minus_zero_shot", {})[one.measure] = entry
    return result


def fixed(value: float, digits: int = 3) -> str:
    """Number with a fixed count of decimals, a dash when there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def signed(value: float, digits: int = 3) -> str:
    """Difference with its sign; a true minus sign is not used, terminals and spreadsheets read this too."""
    return f"{value:+.{digits}f}" if math.isfinite(value) else "-"


def interval(low: float, high: float) -> str:
    """``low to high`` of a 95 % interval, a dash when there is none."""
    return f"{fixed(low)} to {fixed(high)}" if math.isfinite(low) else "-"


def count_text(count: int | None) -> str:
    """Number of parameters with thousands separators."""
    return NOT_RECORDED if count is None else f"{count:,}"


def seconds_text(seconds: float | None) -> str:
    """Seconds to one decimal below 100, a dash when not recorded."""
    return "-" if seconds is None else f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}"


def mean(values: Iterable[float]) -> float:
    """Mean, NaN of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def digits(measure: str) -> int:
    """Decimals shown: 2 for distances, 3 for scores from 0 to 1."""
    return 2 if "hd95" in measure else 3


def named(run: RunResult) -> str:
    """Short title of a run with its SAM, for a row or column of its own."""
    short = run.title.split(" (")[0]
    return short if run.variant in short else f"{short} [{run.variant}]"


def classes_of(runs: Sequence[RunResult]) -> list[str]:
    """Classes of all runs, in the order of their CSVs."""
    return list(dict.fromkeys(name for run in runs for name in run.classes))


def other_measures(runs: Sequence[RunResult]) -> list[str]:
    """Measures of the table but Dice."""
    return [name for name in measures(runs) if not name.startswith("dice")]


def _summary(rows: Sequence[Mapping[str, Any]], measure: str) -> Summary:
    one = aggregate(rows, columns=[measure])
    return Summary(int(one["n"]), one[f"{measure}_mean"], one[f"{measure}_std"], one[f"{measure}_median"])


def _difference(run: RunResult, base: RunResult, measure: str) -> Difference:
    one = paired_difference(run.rows, base.rows, value=measure, seed=SEED)
    verdict = str(one["verdict"])
    if verdict in ("a higher", "b higher"):
        verdict = "better" if (verdict == "a higher") == MEASURES[measure][1] else "worse"
    mean, low, high = (float(one[key]) for key in ("difference", "ci_low", "ci_high"))
    return Difference(run, measure, int(one["n"]), mean, low, high, verdict)


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
