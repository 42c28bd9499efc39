"""Synapse's eight organs as the papers tabulate them: every run under the published rules and under honest ones.

Published rules (Chen et al. 2021, arXiv:2102.04306): Dice and HD95 of medpy on whole volumes, in voxels; an organ that
only the prediction has scores Dice 1 and HD95 0, one that the prediction lacks Dice 0 and HD95 0; every case counts.
Honest rules: mm; an organ that neither has is excluded; one that only one of the two has scores Dice 0 and the image's
diagonal. Either way a mean is over the cases of an organ first, then over organs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samseg_monai.errors import BundleError, raise_all
from samseg_monai.metrics import read_rows
from samseg_monai.report.published import ORGANS, PUBLISHED, Quoted
from samseg_monai.report.runs import RunResult, check_runs

TRANSUNET_CASES = "transunet_cases.csv"
QUOTED = "quoted from the paper, not measured here"


@dataclass(frozen=True)
class Rules:
    """How a line was scored: columns of the CSV of cases, unit of its HD95, what tables call it."""

    key: str
    short: str
    label: str
    dice: str
    hd95: str
    unit: str


PUBLISHED_RULES = Rules(
    "published",
    "published rules (voxels)",
    "published rules (voxels, TransUNet's special cases)",
    "dice_transunet",
    "hd95_transunet_voxel",
    "voxel",
)
HONEST_RULES = Rules("honest", "honest rules (mm)", "honest rules (mm)", "dice", "hd95_mm", "mm")


@dataclass(frozen=True)
class Organ:
    """Means over the ``n`` cases that count: Dice in %, HD95 in the line's unit; NaN where no case counts."""

    dice: float
    hd95: float
    n: int


@dataclass(frozen=True)
class OrganLine:
    """One run under one set of rules; ``organs`` in the papers' order, ``cases`` in the CSV."""

    run: RunResult
    rules: Rules
    organs: Mapping[str, Organ]
    cases: int

    @property
    def dice(self) -> float:
        """Mean over organs of their mean Dice, in %; over those where a case counts."""
        return _mean(organ.dice for organ in self.organs.values())

    @property
    def hd95(self) -> float:
        """Mean over organs of their mean HD95, in the unit of the rules; likewise."""
        return _mean(organ.hd95 for organ in self.organs.values())

    @property
    def remark(self) -> str:
        """Which organs not every case counts for; empty when all count."""
        fewer = {name: organ.n for name, organ in self.organs.items() if organ.n < self.cases}
        if not fewer:
            return ""
        text = f"{self.rules.short}: " + ", ".join(f"{name} n = {n}" for name, n in fewer.items())
        none = sum(n == 0 for n in fewer.values())
        text += f" of {self.cases}, the others do not count"
        return text + (f"; mean over the other {len(self.organs) - none} organs" if none else "")


@dataclass(frozen=True)
class OrganTable:
    """Lines of the runs, two for each, and rows quoted from papers."""

    lines: Sequence[OrganLine]
    quoted: Sequence[Quoted]

    @property
    def runs(self) -> list[RunResult]:
        """Runs in the order of the table."""
        return [line.run for line in self.lines if line.rules is HONEST_RULES]

    def of(self, run: RunResult) -> list[OrganLine]:
        """Lines of one run: published rules, then honest ones."""
        return [line for line in self.lines if line.run is run]


def organ_table(runs: Sequence[RunResult], *, quoted: Sequence[Quoted] = PUBLISHED) -> OrganTable:
    """Table of runs whose folders hold ``cases.csv`` (policy honest) and ``transunet_cases.csv`` (policy transunet).

    Args:
        runs: evaluated under both policies on the same cases, with all of ``ORGANS`` among their classes.
        quoted: rows to stand below them.

    Raises:
        BundleError: no run, or two of one name; every file, column, organ or case that is missing.
        DataError: a CSV is none, or has two rows of one case and organ.
    """
    check_runs(runs)
    problems: list[str] = []
    rows = {run.name: _published_rows(run, problems) for run in runs}
    for run in runs:
        problems += _problems(run, rows[run.name])
    raise_all(problems, BundleError, "runs cannot be tabulated by organ")
    lines = []
    for run in runs:
        lines += [_line(run, PUBLISHED_RULES, rows[run.name]), _line(run, HONEST_RULES, run.rows)]
    return OrganTable(lines, tuple(quoted))


def organs_json(table: OrganTable) -> dict[str, Any]:
    """The table as JSON: ``runs`` by name with both rules, ``quoted`` rows marked so; None where there is no number.

    Nothing that was measured is rounded; quoted figures have the decimals they were printed with.
    """
    runs = {}
    for run in table.runs:
        entry: dict[str, Any] = {"title": run.title, "sam": run.sam, "phantoms": run.is_phantom, "split": run.split}
        entry |= {"prompt_source": run.prompt_source, "gate": run.gate}
        runs[run.name] = entry | {line.rules.key: _line_json(line) for line in table.of(run)}
    return {"organs": list(ORGANS), "runs": runs, "quoted": [_quoted_json(row) for row in table.quoted]}


def _line_json(line: OrganLine) -> dict[str, Any]:
    hd95 = f"hd95_{line.rules.unit}"
    organs = {
        name: {"dsc_percent": _finite(organ.dice), hd95: _finite(organ.hd95), "n": organ.n}
        for name, organ in line.organs.items()
    }
    means = {"dsc_percent": _finite(line.dice), hd95: _finite(line.hd95)}
    return {"rules": line.rules.label, "cases": line.cases, **means, "organs": organs}


def _quoted_json(row: Quoted) -> dict[str, Any]:
    return {
        "method": row.method,
        "quoted": QUOTED,
        "source": row.source,
        "second_hand": row.second_hand,
        "dsc_percent": float(row.dsc),
        "hd95_voxel": None if row.hd95 is None else float(row.hd95),
        "organs": {name: float(row.organs[name]) if name in row.organs else None for name in ORGANS},
    }


def _published_rows(run: RunResult, problems: list[str]) -> list[Mapping[str, Any]]:
    if not run.has_network:
        problems.append(f"{run.name}: has no scores under the published rules; leave it out of this table")
        return []
    path = run.folder / TRANSUNET_CASES
    if not path.is_file():
        problems.append(
            f"{run.name}: no {path} (scores under policy 'transunet'); evaluate again with a bundle built by this "
            "version, which scores under both policies"
        )
        return []
    return list(read_rows(path))


def _problems(run: RunResult, published: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps a run out of the table, one line each."""
    found = []
    for rows, rules in ((published, PUBLISHED_RULES), (run.rows, HONEST_RULES)):
        columns = [column for column in (rules.dice, rules.hd95) if rows and column not in rows[0]]
        organs = [organ for organ in ORGANS if rows and organ not in {row["class"] for row in rows}]
        if columns:
            found.append(f"{run.name}, {rules.key}: no column {', '.join(columns)}; evaluate again, with surfaces")
        if organs:
            there = ", ".join(dict.fromkeys(str(row["class"]) for row in rows))
            found.append(f"{run.name}, {rules.key}: no class {', '.join(organs)} (there are {there})")
    scored, honest = ({(row["case"], row["class"]) for row in rows} for rows in (published, run.rows))
    if published and scored != honest:
        differ = ", ".join(sorted({str(case) for case, _ in scored ^ honest}))
        found.append(f"{run.name}: cases.csv and {TRANSUNET_CASES} differ in {differ}; evaluate again")
    return found


def _line(run: RunResult, rules: Rules, rows: Sequence[Mapping[str, Any]]) -> OrganLine:
    organs = {}
    for name in ORGANS:
        counted = [row for row in rows if row["class"] == name and not row["excluded"]]
        # a score that is no number must not turn a whole table into dashes: it is left out, and n says so
        counted = [row for row in counted if math.isfinite(row[rules.dice]) and math.isfinite(row[rules.hd95])]
        dice, hd95 = (_mean(float(row[column]) for row in counted) for column in (rules.dice, rules.hd95))
        organs[name] = Organ(100 * dice, hd95, len(counted))
    return OrganLine(run, rules, organs, len({row["case"] for row in rows}))


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers, NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
