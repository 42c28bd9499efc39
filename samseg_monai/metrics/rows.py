"""Tables of a run: rows (one case, one class) to means that do not depend on order, CSV files, paired comparison.

A row is a plain dict: ``case``, ``class``, scores, ``excluded``, ``empty_prediction``, ``empty_reference``,
``prediction_ml``, ``reference_ml`` (``_px`` where distances are in pixels), and lesion-wise scores and counts where
they were asked for. Every table of this project can be recomputed from such rows. They are those of one run: cases are
what varies in every interval, and a case that comes twice (say, of two training seeds) is refused, never counted twice.

Intervals are Student's t over cases with one degree of freedom fewer than n - 1, which Dice needs: it is skewed, and
few cases show too little of its long tail. Coverage of 95 % intervals in 400,000 draws (a test repeats it with 20,000):

=============================== ===== ====== ======
cases                           6     13     40
=============================== ===== ====== ======
normal                          0.961 0.951  0.950
Beta(8, 2)                      0.943 0.941  0.946
Beta(12, 1.5)                   0.930 0.931  0.942
10 % of the cases fail (Dice 0) 0.659 0.754  0.916
=============================== ===== ====== ======

With failures no interval made of so few cases holds what it promises: most samples hold none of them.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from samseg_monai.choices import is_label
from samseg_monai.errors import DataError, raise_all
from samseg_monai.files import StrPath, append_bytes, write_bytes
from samseg_monai.metrics.case import score_columns
from samseg_monai.metrics.lesions import LESION_COUNTS, LESION_SCORES

Row = Mapping[str, Any]
Curves = dict[tuple[int, str], tuple[int, float]]  # epoch and name of a value -> iteration, value

LABELS = ("case", "class")
FLAGS = ("excluded", "empty_prediction", "empty_reference")
VOLUMES = ("prediction_ml", "reference_ml")
NO_SCORES = {*LABELS, *FLAGS, *VOLUMES, "prediction_px", "reference_px", "ignored_ml", *LESION_COUNTS}
HISTORY_FILE = "history.csv"
# Even if all n differences point the same way, a sign test reaches p < 0.05 only from n = 6 (2 * 0.5**6 = 0.031).
MIN_CASES = 6
NOT_DISTINGUISHABLE, TOO_FEW = "not distinguishable", "too few cases"
# What spreadsheets take for the beginning of a formula (also in full width), and the mark that keeps them from it.
_FORMULA, _MARK = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"), "'"
_SPELT = re.compile(r"\\(?:[\\tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


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


class Interval(NamedTuple):
    """Mean of n values, its two-sided 95 % interval and the p-value of a mean of 0; NaN of too few values."""

    n: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def told(self) -> bool:
        """Whether the mean is told from 0: the interval does not hold 0."""
        return self.p < 0.05


def t_interval(values: Sequence[float], *, margin: int = 1, least: int = MIN_CASES) -> Interval:
    """Student's t interval (95 %) of a mean over independent values; nothing is drawn, so it needs no memory.

    Args:
        values: one per case.
        margin: degrees of freedom fewer than n - 1; 0 is Student's own. See the top of this file.
        least: fewer values, or fewer than ``margin + 2``, get no interval and no p-value.
    """
    array = np.asarray(values, dtype=float)
    n, mean = len(array), float(array.mean()) if len(array) else math.nan
    if n < max(least, margin + 2):
        return Interval(n, mean, math.nan, math.nan, math.nan)
    freedom, error = n - 1 - margin, float(array.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error != 0 else float(mean == 0)
    return Interval(n, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979), in the order given; they keep the family-wise error rate.

    A comparison that was not made (NaN) stays NaN and counts for nothing.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(order), 0, -1) * p[order]))
    return adjusted.tolist()


def paired_difference(rows_a: Sequence[Row], rows_b: Sequence[Row], *, value: str = "dice") -> dict[str, Any]:
    """Mean difference a - b of one score over the same cases, with its 95 % interval (``t_interval``).

    A case and class counts where neither side excludes it (lesion-wise scores: always); differences are averaged over
    classes, then over cases.

    Returns:
        ``difference``, ``ci_low``, ``ci_high`` (unit of the score), ``p`` of no difference, ``n`` cases, ``n_excluded``
        pairs of rows left out, and ``verdict``: "a higher", "b higher", "not distinguishable" when the interval
        holds 0, or "too few cases" (below 6; interval and p are NaN then). It is that of one comparison alone: who
        makes several corrects ``p`` with ``holm``.

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
    found = t_interval(per_case)
    verdict = ("a higher" if found.mean > 0 else "b higher") if found.told else NOT_DISTINGUISHABLE
    return {
        "difference": mean_of(per_case),
        "ci_low": found.low,
        "ci_high": found.high,
        "p": found.p,
        "n": float(found.n),
        "n_excluded": float(len(left_out)),
        "verdict": TOO_FEW if found.n < MIN_CASES else verdict,
    }


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
    without = {"ignored_ml": 0.0} if "ignored_ml" in fields else {}  # which only rows of cases with such voxels have
    return write_table([{**without, **row} for row in rows], path, fields)


def write_table(rows: Iterable[Row], path: StrPath, fields: Sequence[str] = ()) -> Path:
    """Write a CSV whose texts no spreadsheet runs and no terminal obeys; ``read_cell`` gives each text back.

    Its columns are ``fields``; without any, all keys of the rows in the order in which they come. Texts that
    begin as formulas do (``= + - @``, tab, end of line) get an apostrophe before them, and one more where they have one
    already; control characters are spelt out (``\\x1b``). Numbers stay numbers, negative ones too. Source: OWASP, "CSV
    Injection". The file is there whole or not at all (``write_bytes``).
    """
    rows = list(rows)
    fields = fields or list(dict.fromkeys(key for row in rows for key in row))
    write_bytes(path, _lines([{name: name for name in fields}, *rows], fields))
    return Path(path)


def add_to_table(row: Row, path: StrPath, fields: Sequence[str]) -> None:
    """Put a row behind those of a table that ``write_table`` has written with the same ``fields``.

    Raises:
        OSError: as ``files.append_bytes``; the table is as it was.
    """
    append_bytes(path, _lines([row], fields))


def _lines(rows: Iterable[Row], fields: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([write_cell(row.get(name, "")) for name in fields] for row in rows)
    return text.getvalue().encode("utf-8")


def spelt_out(text: str, *, keep: str = "") -> str:
    """``text`` with every character that a terminal would obey or nobody could see as its escape (``\\x1b``).

    Names of cases and classes come from outside: an escape sequence in one must not move a cursor, a right-to-left
    override not turn letters around. Controls, formats and separators of lines are meant, but for those in ``keep``.
    """
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(
        c if c in keep or unicodedata.category(c) not in hidden else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def write_cell(value: Any) -> Any:
    """A cell for ``csv``: see ``write_table``."""
    if not isinstance(value, str):
        return value
    mark = _MARK if value.lstrip(_MARK)[:1] in _FORMULA else ""
    return mark + spelt_out(value.replace("\\", "\\\\"))


def read_cell(text: str) -> str:
    """The text that ``write_cell`` was given."""
    text = _SPELT.sub(lambda match: match[0].encode("ascii").decode("unicode_escape"), text)
    return text[1:] if text[:1] == _MARK and text.lstrip(_MARK)[:1] in _FORMULA else text


def read_lines(path: StrPath) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names of a CSV file, and each line with its number; a byte order mark, as spreadsheets write, is no text.

    Raises:
        DataError: the file is not text, or two of its columns have one name.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [read_cell(name) for name in reader.fieldnames or []]
            reader.fieldnames = names
            lines = [(reader.line_num, line) for line in reader]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: is not a table in text (CSV, UTF-8): {error}; write it again") from error
    doubled = [f"{name!r}: {names.count(name)} columns" for name in dict.fromkeys(names) if names.count(name) > 1]
    raise_all(doubled, DataError, f"{path}: columns of one name hide each other")
    return names, lines


def read_rows(path: StrPath) -> list[dict[str, Any]]:
    """Rows of a CSV file of ``write_rows``: names as str, flags as bool, everything else as float.

    Raises:
        DataError: the file is not there, lacks a column or holds something that is not a number; all lines at once.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no per-case table at {path}; run evaluate first, or give the path of its CSV file")
    names, lines = read_lines(path)
    missing = [name for name in (*LABELS, *FLAGS) if name not in names]
    raise_all([f"no column {name!r}" for name in missing], DataError, f"{path} is not a per-case table")
    rows, problems = [], []
    lines.reverse()
    while lines:  # a line goes as its row comes: of many cases both would be twice the memory
        number, line = lines.pop()
        try:
            _check_cells(line)
            rows.append({key: _parsed(key, text) for key, text in line.items()})
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    raise_all(problems, DataError, f"{path} cannot be read")
    return rows


def read_history(path: StrPath) -> tuple[Curves, list[str]]:
    """Points of a training's ``history.csv`` in their order, and one line for each row of the file that is none, or for
    a file that is no table."""
    points: Curves = {}
    problems = []
    try:
        lines = read_lines(path)[1]
    except DataError as error:
        return {}, [str(error)]
    for number, row in lines:
        try:
            _check_cells(row)
            place = (int(_digits(row["epoch"])), read_cell(row["name"]))
            points[place] = (int(_digits(row["iteration"])), float(_digits(row["value"])))
        except (KeyError, ValueError) as error:
            problems.append(f"line {number}: {type(error).__name__} {error}")
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
        return sys.intern(read_cell(text))  # rows of all classes and runs share the names of their cases
    if key in FLAGS:
        if text not in ("True", "False"):
            raise ValueError(f"{key} must be True or False, got {text!r}")
        return text == "True"
    return float(_digits(text))


def _check_cells(line: Mapping[str, str]) -> None:
    if None in line or None in line.values():  # what csv puts in place of a name, or of a cell
        raise ValueError("another number of cells than there are columns")


def _digits(text: str) -> str:
    """``text`` unless Python alone takes it for a number (``1_0``, digits of other scripts); ValueError then."""
    if "_" in text or not text.isascii():
        raise ValueError(f"could not convert string to float: {text!r}")
    return text
