"""Tables of a run: rows (one case, one class) to means that do not depend on order, CSV files, paired comparison.

A row is a plain dict: ``case``, ``class``, scores, ``excluded``, ``empty_prediction``, ``empty_reference``,
``prediction_ml``, ``reference_ml`` (``_px`` where distances are in pixels), and lesion-wise scores and counts where
they were asked for. Every table of this project can be recomputed from such rows.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from samseg_monai.choices import is_label
from samseg_monai.errors import DataError, raise_all
from samseg_monai.files import StrPath
from samseg_monai.metrics.case import score_columns
from samseg_monai.metrics.lesions import LESION_COUNTS, LESION_SCORES

Row = Mapping[str, Any]
Curves = dict[tuple[int, str], tuple[int, float]]  # epoch and name of a value -> iteration, value

LABELS = ("case", "class")
FLAGS = ("excluded", "empty_prediction", "empty_reference")
VOLUMES = ("prediction_ml", "reference_ml")
NO_SCORES = {*LABELS, *FLAGS, *VOLUMES, "prediction_px", "reference_px", *LESION_COUNTS}
HISTORY_FILE = "history.csv"
BOOTSTRAP_DRAWS = 10_000
# Even if all n differences point the same way, a sign test reaches p < 0.05 only from n = 6 (2 * 0.5**6 = 0.031).
MIN_PAIRED_CASES = 6


def aggregate(rows: Sequence[Row], *, columns: Sequence[str] | None = None, prefix: str = "") -> dict[str, float]:
    """Summary of rows; the result does not depend on their order.

    Each score is averaged over a case's classes, then over cases; excluded rows count for lesion-wise scores alone.

    Args:
        rows: rows of any number of cases and classes.
        columns: scores to summarise; None takes all that the rows have (``score_columns()`` where there are no rows).
        prefix: put before every name.

    Returns:
        Floats. ``<score>_mean``, ``_std`` (population) and ``_median`` over cases; ``n`` cases that count;
        ``n_excluded`` excluded rows and ``n_empty_prediction`` counted rows without prediction. With lesion-wise scores
        also ``n_lesion_cases`` and the sums ``n_lesion_tp``, ``n_lesion_fn``, ``n_lesion_fp``. With several classes
        also ``<class>_<score>_mean`` and ``<class>_n...``. NaN, never 0, where no case counts.

    Raises:
        DataError: a row lacks one of the columns, or a case and class come twice (rows of two runs mixed up).
    """
    columns = _score_names(rows) if columns is None else columns
    summary: dict[str, float] = {}
    for column in columns:
        values = list(case_means(rows, column).values())
        mean = mean_of(values)
        spread = math.sqrt(mean_of([(value - mean) ** 2 for value in values]))
        median = float(statistics.median(values)) if values else math.nan
        summary |= {f"{column}_mean": mean, f"{column}_std": spread, f"{column}_median": median}
    counted = [row for row in rows if not row["excluded"]]
    summary["n"] = float(len({row["case"] for row in counted}))
    summary["n_excluded"] = float(len(rows) - len(counted))
    summary["n_empty_prediction"] = float(sum(bool(row["empty_prediction"]) for row in counted))
    if rows and all(name in row for row in rows for name in LESION_COUNTS):
        summary |= {f"n_{name}": math.fsum(float(row[name]) for row in rows) for name in LESION_COUNTS}
        summary["n_lesion_cases"] = float(len({row["case"] for row in rows}))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    for name in classes if len(classes) > 1 else ():
        of_class = aggregate([row for row in rows if row["class"] == name], columns=columns)
        summary |= {f"{name}_{k}": v for k, v in of_class.items() if not k.endswith(("_std", "_median"))}
    return {prefix + key: value for key, value in summary.items()}


def case_means(rows: Sequence[Row], column: str) -> dict[str, float]:
    """Mean of ``column`` over the classes of each case that counts, sorted by case (lesion-wise: of every case).

    Raises:
        DataError: a row lacks the column, or a case and class come twice.
    """
    by_case: dict[str, list[float]] = {}
    for (case, _), row in _indexed(rows, column).items():
        if not _left_out(row, column):
            by_case.setdefault(case, []).append(float(row[column]))
    return {case: mean_of(by_case[case]) for case in sorted(by_case)}


def paired_difference(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, value: str = "dice", seed: int = 0
) -> dict[str, Any]:
    """Mean difference a - b of one score over the same cases, with a bootstrap 95 % interval.

    A case and class counts where neither side excludes it (lesion-wise scores: always); differences are averaged over
    classes, then over cases.

    Returns:
        ``difference``, ``ci_low``, ``ci_high`` (unit of the score; NaN without cases), ``n`` cases, ``n_excluded``
        pairs of rows left out, and ``verdict``: "a higher", "b higher", or "not distinguishable" when the interval
        holds 0 or there are fewer than 6 cases (too few for any 95 % statement).

    Raises:
        DataError: the two do not hold the same cases and classes, or lack the score.
    """
    a, b = _indexed(rows_a, value), _indexed(rows_b, value)
    problems = [f"only in a: {case}, {name}" for case, name in sorted(a.keys() - b.keys())]
    problems += [f"only in b: {case}, {name}" for case, name in sorted(b.keys() - a.keys())]
    raise_all(problems, DataError, "a paired comparison needs the same cases and classes on both sides")
    left_out = {key for key in a if _left_out(a[key], value) or _left_out(b[key], value)}
    pairs = [
        {"case": case, "class": name, "excluded": key in left_out, value: float(a[key][value]) - float(b[key][value])}
        for key in a for case, name in [key]
    ]  # fmt: skip
    per_case = list(case_means(pairs, value).values())
    low, high = bootstrap_interval(per_case, seed=seed)
    told = len(per_case) >= MIN_PAIRED_CASES and not low <= 0.0 <= high
    return {
        "difference": mean_of(per_case),
        "ci_low": low,
        "ci_high": high,
        "n": float(len(per_case)),
        "n_excluded": float(len(left_out)),
        "verdict": ("a higher" if low > 0.0 else "b higher") if told else "not distinguishable",
    }


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean over cases (Efron 1979); NaN of nothing, the value itself of one."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (math.nan, math.nan)
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=BOOTSTRAP_DRAWS, method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def mean_of(values: Sequence[float]) -> float:
    """Mean, rounded once: the same whatever the order of cases or the number of processes; NaN of nothing."""
    return math.fsum(values) / len(values) if len(values) else math.nan


def write_rows(rows: Sequence[Row], path: StrPath) -> Path:
    """Write rows as CSV (numbers exactly, so that ``read_rows`` gives the same tables back).

    Raises:
        DataError: a text is a file path: such a table would tell strangers where and who.
    """
    fields = list(dict.fromkeys(key for row in rows for key in row)) or [*LABELS, *score_columns(), *FLAGS, *VOLUMES]
    problems = [
        f"{key} = {value!r}"
        for row in rows
        for key, value in row.items()
        if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value))
        if not (key == "class" and is_label(str(value)))  # BraTS's NCR/NET
    ]
    raise_all(problems, DataError, "per-case tables hold names, not paths; put the case's name under 'case'")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: StrPath) -> list[dict[str, Any]]:
    """Rows of a CSV file of ``write_rows``: names as str, flags as bool, everything else as float.

    Raises:
        DataError: the file is not there, lacks a column or holds something that is not a number; all lines at once.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no per-case table at {path}; run evaluate first, or give the path of its CSV file")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (*LABELS, *FLAGS) if name not in (reader.fieldnames or [])]
        raise_all([f"no column {name!r}" for name in missing], DataError, f"{path} is not a per-case table")
        rows, problems = [], []
        for line in reader:
            try:
                rows.append({key: _parsed(key, text) for key, text in line.items()})
            except (TypeError, ValueError) as error:  # TypeError: a line with too few or too many cells
                problems.append(f"line {reader.line_num}: {error}")
    raise_all(problems, DataError, f"{path} cannot be read")
    return rows


def read_history(path: StrPath) -> tuple[Curves, list[str]]:
    """Points of a training's ``history.csv`` in their order, and one line for each row of the file that is none."""
    points: Curves = {}
    problems = []
    with open(path, newline="", encoding="utf-8") as stream:
        for line, row in enumerate(csv.DictReader(stream), start=2):
            try:
                points[int(row["epoch"]), row["name"]] = (int(row["iteration"]), float(row["value"]))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"line {line}: {type(error).__name__} {error}")
    return points, problems


def _indexed(rows: Sequence[Row], column: str) -> dict[tuple[str, str], Row]:
    """Rows by case and class, each sure to have ``column``."""
    problems, indexed = [], {}
    for row in rows:
        key = (row["case"], row["class"])
        if column not in row:
            problems.append(f"case {key[0]}, class {key[1]}: no score {column!r}, there are {_score_names([row])}")
        if key in indexed:
            problems.append(f"case {key[0]}, class {key[1]}: two rows")
        indexed[key] = row
    raise_all(problems, DataError, "rows cannot be summarised; give the rows of one run, and a score they have")
    return indexed


def _left_out(row: Row, column: str) -> bool:
    return bool(row["excluded"]) and column not in LESION_SCORES


def _score_names(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(key for row in rows for key in row if key not in NO_SCORES)
    return list(names) if rows else list(score_columns())


def _parsed(key: str, text: str) -> Any:
    if key in LABELS:
        return text
    if key in FLAGS:
        if text not in ("True", "False"):
            raise ValueError(f"{key} must be True or False, got {text!r}")
        return text == "True"
    return float(text)
