"""Synapse's eight organs as the papers tabulate them: every run under the published rules and under honest ones.

Published rules (Chen et al. 2021, arXiv:2102.04306): Dice and HD95 of medpy on whole volumes, in voxels; an organ that
only the prediction has scores Dice 1 and HD95 0, one that the prediction lacks Dice 0 and HD95 0; every case counts.
Honest rules: mm; an organ that neither has is excluded; one that only one of the two has scores Dice 0 and the image's
diagonal. The published mean is over the cases of an organ first, then over organs; the honest one over the organs of a
case, then over cases, as everywhere else: a run has one mean Dice.

Quoted rows are of the 18/12 split: DSC in %, HD95 in voxels, as printed. Those marked 3D have metric code of their own.
A figure without a source is left out, and so are rows of another protocol (other classes, unknown split); a dash in a
table means "not known here", not "not published". SAM-LST's table I is quoted whole, also where a row's mean is not
that of its organs: which of the two is right is not known.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samseg_monai.errors import BundleError, raise_all
from samseg_monai.metrics import read_rows
from samseg_monai.metrics.rows import case_means, mean_of
from samseg_monai.report.names import gate_text
from samseg_monai.report.runs import RunResult, check_runs
from samseg_monai.report.tables import WIDTH, fixed, grid, or_none

TRANSUNET_CASES = "transunet_cases.csv"
QUOTED = "quoted from the paper, not measured here"
# in the order of the papers' tables
ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
HEAD = ("DSC %", "HD95", *ORGANS)
RULES_TEXT = (
    "Published rules: medpy's Dice and HD95 of whole volumes, in voxels, with TransUNet's special cases (an organ "
    "missed or wholly absent scores Dice 0 and HD95 0, one found where there is none Dice 1); all cases count. "
    "Honest rules: HD95 in mm (larger of the two directed percentiles); an organ missed, or found where there is "
    "none, scores Dice 0 and the image's diagonal; absent in both, the case is excluded. The mean is over organs of "
    "the mean over cases under the published rules, over cases of the mean over organs under the honest ones, which is "
    "the mean Dice of all other tables. Organs: mean DSC in %."
)
NOT_COMPARABLE = (
    "Numbers of pico or of phantoms cannot be compared with the quoted rows: other weights or other images."
)
SECOND_HAND = (
    "* quoted second-hand: read in another paper's table, in a listing or in an issue, not in the authors' own text."
)


_LST = "Chai et al. 2023, arXiv:2306.12737"
_LST_ABLATION = f"{_LST}, ablations"
_IN_LST = f"as given in {_LST}"
_SAMED = "Zhang and Liu 2023, arXiv:2304.13785: README of github.com/hitachinsk/SAMed at e351840"


@dataclass(frozen=True)
class Quoted:
    """One row of a published table.

    Args:
        method: as the paper calls it.
        dsc: mean DSC in %, as printed.
        hd95: mean HD95 in voxels, as printed; None where not known.
        source: where it was read.
        organs: DSC in % per organ, as printed; empty where not known.
        second_hand: whether it was read elsewhere than in what its authors wrote.
    """

    method: str
    dsc: str
    hd95: str | None
    source: str
    organs: Mapping[str, str] = field(default_factory=dict)
    second_hand: bool = False

    @property
    def cells(self) -> list[str]:
        """What stands under ``HEAD``, as printed; a dash where not known."""
        return [self.dsc, self.hd95 or "-", *(self.organs.get(name, "-") for name in ORGANS)]

    @property
    def agrees(self) -> bool:
        """The mean is that of the organs quoted with it, as far as they are printed."""
        values = [float(value) for value in self.organs.values()]
        return not values or abs(sum(values) / len(values) - float(self.dsc)) < 0.015

    @property
    def mark(self) -> str:
        return "(quoted*)" if self.second_hand else "(quoted)"


def _organs(values: str) -> dict[str, str]:
    return dict(zip(ORGANS, values.split(), strict=True))


def _in_lst(method: str, dsc: str, hd95: str | None, organs: str) -> Quoted:
    """A row that SAM-LST's table I takes over from others."""
    return Quoted(method, dsc, hd95, _IN_LST, _organs(organs), second_hand=True)


PUBLISHED = (
    Quoted("SAM-LST", "79.45", "35.35", _LST, _organs("88.05 66.53 81.45 75.69 94.56 63.08 87.71 78.51")),
    Quoted("SAM-LST, CNN only", "78.05", "29.11", _LST_ABLATION),
    Quoted("SAM-LST, SAM only", "58.97", "101.6", _LST_ABLATION),
    Quoted("SAM-LST, no fine-tuning", "1.73", "260.98", _LST_ABLATION),
    Quoted("SAMed", "81.88", "20.64", _SAMED, _organs("87.77 69.11 80.45 79.95 94.80 72.17 88.72 82.06")),
    Quoted("SAMed_s", "77.78", "31.72", _SAMED),
    Quoted("SAMed_h (ViT-H)", "84.30", "16.02", _SAMED, _organs("87.81 74.72 85.76 81.52 95.76 70.63 90.46 87.77")),
    Quoted(
        "H-SAM (ViT-L)", "86.49", None,
        "Cheng et al. 2024, arXiv:2403.18271: as listed by wizwand.com and quoted in H-SAM issue 23 (users get 84.89)",
        second_hand=True,
    ),
    _in_lst("V-Net", "68.81", None, "75.34 51.87 77.10 80.75 87.84 40.05 80.56 56.98"),
    _in_lst("DARR", "69.77", None, "74.74 53.77 72.31 73.24 94.08 54.18 89.90 45.96"),
    _in_lst("R50 U-Net", "74.68", "36.87", "87.74 63.66 80.60 78.19 93.74 56.90 85.87 74.16"),
    _in_lst("U-Net", "76.85", "39.70", "89.07 69.72 77.77 68.60 93.43 53.98 86.67 75.58"),
    _in_lst("R50 Att-UNet", "75.57", "36.97", "55.92 63.91 79.20 72.71 93.56 49.37 87.19 74.95"),
    _in_lst("R50 ViT", "71.29", "32.87", "73.73 55.13 75.80 72.20 91.51 45.99 81.99 73.95"),
    _in_lst("TransUNet", "77.48", "31.69", "87.23 63.13 81.87 77.02 94.08 55.86 85.08 75.62"),
    _in_lst("MTM", "78.59", "26.56", "87.92 64.99 81.47 77.29 93.06 59.46 87.75 76.81"),
    _in_lst("SwinUNet", "79.12", "21.55", "85.47 66.53 83.28 79.61 94.29 56.58 90.66 76.60"),
    _in_lst("MISSFormer", "81.96", "18.20", "86.99 68.65 85.21 82.00 94.41 65.67 91.92 80.81"),
    Quoted(
        "MERIT", "84.90", "13.22", "as listed by hyper.ai; its code chooses the epoch on the test cases",
        second_hand=True,
    ),
    Quoted("nnFormer (3D)", "86.5", None, "as quoted in NexToU issue 4", second_hand=True),
    Quoted("UNETR++ (3D)", "87.2", None, "Shaker et al. 2022, arXiv:2212.04497, abstract"),
    Quoted("NexToU (3D)", "87.84", None, "as quoted in NexToU issue 4, where a user gets about 83", second_hand=True),
)  # fmt: skip
# what was read there
SOURCES = {row.source: "; ".join(r.method for r in PUBLISHED if r.source == row.source) for row in PUBLISHED}


DISAGREE = (
    f"Of {', '.join(row.method for row in PUBLISHED if not row.agrees)} the mean that is printed is not that of the "
    "organs printed with it; both are quoted."
)


class Rules(NamedTuple):
    """How a line was scored: columns of the CSV of cases, unit of its HD95, what tables call it."""

    key: str
    short: str
    label: str
    dice: str
    hd95: str
    unit: str


PUBLISHED_RULES = Rules(
    "published", "published rules (voxels)", "published rules (voxels, TransUNet's special cases)",
    "dice_transunet", "hd95_transunet_voxel", "voxel",
)  # fmt: skip
HONEST_RULES = Rules("honest", "honest rules (mm)", "honest rules (mm)", "dice", "hd95_mm", "mm")


class Organ(NamedTuple):
    """Means over the ``n`` cases that count: Dice in %, HD95 in the line's unit; NaN where no case counts."""

    dice: float
    hd95: float
    n: int


@dataclass(frozen=True)
class OrganLine:
    """One run under one set of rules; ``organs`` in the papers' order, ``cases`` in the CSV.

    ``dice`` (in %) and ``hd95`` (in the unit of the rules) are means over the organs where a case counts: of cases and
    then organs under the published rules, of organs and then cases under the honest ones.
    """

    run: RunResult
    rules: Rules
    organs: Mapping[str, Organ]
    cases: int
    dice: float
    hd95: float

    @property
    def cells(self) -> list[str]:
        return [fixed(value, 2) for value in (self.dice, self.hd95, *(organ.dice for organ in self.organs.values()))]

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
    """Lines of the runs, two for each (published rules, then honest ones), to stand above those of ``PUBLISHED``."""

    lines: Sequence[OrganLine]

    def groups(self) -> Iterator[tuple[RunResult, str, list[OrganLine], list[str]]]:
        """Run, what it is on one line, its lines, and remarks: its gate, organs that not every case counts for."""
        for published, honest in zip(self.lines[::2], self.lines[1::2], strict=True):
            run = honest.run
            kind, sam = "phantoms" if run.is_phantom else "cases", f" [{run.sam}]" if run.sam not in run.title else ""
            heading = f"{run.title}{sam}, n = {honest.cases} {kind}, split: {run.split}, {run.prompt_source}"
            remarks = [*run.warnings, *([] if run.gate is None else [gate_text(run.gate)])]
            yield run, heading, [published, honest], [*remarks, *filter(None, (published.remark, honest.remark))]

    def caveats(self) -> list[str]:
        """What a reader must know before comparing runs with quoted rows."""
        stand_ins = any(line.run.is_pico or line.run.is_phantom for line in self.lines)
        return [*([NOT_COMPARABLE] if stand_ins else []), SECOND_HAND, DISAGREE]


def organ_table(runs: Sequence[RunResult]) -> OrganTable:
    """Table of runs whose folders hold ``cases.csv`` (policy honest) and ``transunet_cases.csv`` (policy transunet) of
    the same cases, with all of ``ORGANS`` among their classes.

    Raises:
        BundleError: no run, or two of one name; every file, column, organ or case that is missing.
        DataError: a CSV is none.
    """
    check_runs(runs)
    paths = [run.folder / TRANSUNET_CASES for run in runs]
    published = [read_rows(path) if path.is_file() else [] for path in paths]
    problems = [line for run, rows in zip(runs, published, strict=True) for line in _problems(run, rows)]
    raise_all(problems, BundleError, "runs cannot be tabulated by organ")
    lines = []
    for run, rows in zip(runs, published, strict=True):
        lines += [_line(run, PUBLISHED_RULES, rows), _line(run, HONEST_RULES, run.rows)]
    return OrganTable(lines)


def organs_text(table: OrganTable) -> str:
    """The organs' table: two lines for each run, below them the quoted rows, each marked, and where they are from."""
    body: list[Sequence[str]] = []
    for _, heading, lines, remarks in table.groups():
        body += [[heading], *([f"  {line.rules.short}", *line.cells] for line in lines), *([f"  {r}"] for r in remarks)]
    body += [[QUOTED], *([f"  {row.method} {row.mark}", *row.cells] for row in PUBLISHED)]
    sources = [f"  {methods}: {source}" for source, methods in SOURCES.items()]
    below = [RULES_TEXT, *table.caveats(), "Sources of the quoted rows:", *sources]
    wrapped = [textwrap.fill(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False) for text in below]
    return grid(["method", *HEAD], body) + "\n\n" + "\n".join(wrapped) + "\n"


def organs_json(table: OrganTable) -> dict[str, Any]:
    """The table as JSON: ``runs`` by name with both rules, ``quoted`` rows marked so; None where there is no number.

    Nothing that was measured is rounded; quoted figures have the decimals they were printed with.
    """
    runs = {}
    for run, _, lines, _ in table.groups():
        entry: dict[str, Any] = {"title": run.title, "sam": run.sam, "phantoms": run.is_phantom, "split": run.split}
        entry |= {"prompt_source": run.prompt_source, "gate": run.gate}
        for line in lines:
            hd95 = f"hd95_{line.rules.unit}"
            means = {"dsc_percent": or_none(line.dice), hd95: or_none(line.hd95)}
            organs = {
                name: {"dsc_percent": or_none(organ.dice), hd95: or_none(organ.hd95), "n": organ.n}
                for name, organ in line.organs.items()
            }
            entry[line.rules.key] = {"rules": line.rules.label, "cases": line.cases, **means, "organs": organs}
        runs[run.name] = entry
    quoted = [
        {
            "method": row.method,
            "quoted": QUOTED,
            "source": row.source,
            "second_hand": row.second_hand,
            "dsc_percent": float(row.dsc),
            "hd95_voxel": None if row.hd95 is None else float(row.hd95),
            "organs": {name: float(row.organs[name]) if name in row.organs else None for name in ORGANS},
        }
        for row in PUBLISHED
    ]
    return {"organs": list(ORGANS), "runs": runs, "quoted": quoted}


def _problems(run: RunResult, published: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps a run out of the table, one line each."""
    if not run.has_network:
        return [f"{run.name}: has no scores under the published rules; leave it out of this table"]
    found = []
    if not published:
        found.append(
            f"{run.name}: no {run.folder / TRANSUNET_CASES} (scores under policy 'transunet'); evaluate again with a "
            "bundle built by this version, which scores under both policies"
        )
    for rows, rules in ((published, PUBLISHED_RULES), (run.rows, HONEST_RULES)):
        columns = [column for column in (rules.dice, rules.hd95) if rows and column not in rows[0]]
        there = list(dict.fromkeys(str(row["class"]) for row in rows))
        organs = [organ for organ in ORGANS if rows and organ not in there]
        if columns:
            found.append(f"{run.name}, {rules.key}: no column {', '.join(columns)}; evaluate again, with surfaces")
        if organs:
            found.append(f"{run.name}, {rules.key}: no class {', '.join(organs)} (there are {', '.join(there)})")
    scored, honest = ([(row["case"], row["class"]) for row in rows] for rows in (published, run.rows))
    if published and sorted(scored) != sorted(honest):
        differ = ", ".join(sorted({str(case) for case, _ in {*scored} ^ {*honest}})) or "their number of rows"
        found.append(f"{run.name}: cases.csv and {TRANSUNET_CASES} differ in {differ}; evaluate again")
    return found


def _line(run: RunResult, rules: Rules, rows: Sequence[Mapping[str, Any]]) -> OrganLine:
    # a score that is no number must not turn a whole table into dashes: it is left out, and n says so
    counted = [
        row
        for row in rows
        if row["class"] in ORGANS
        and not row["excluded"]
        and math.isfinite(row[rules.dice])
        and math.isfinite(row[rules.hd95])
    ]
    organs = {}
    for name in ORGANS:
        its = [row for row in counted if row["class"] == name]
        dice, hd95 = (mean_of([row[column] for row in its]) for column in (rules.dice, rules.hd95))
        organs[name] = Organ(100 * dice, hd95, len(its))
    if rules is HONEST_RULES:  # as everywhere but in the papers
        dice, hd95 = (mean_of([*case_means(counted, column).values()]) for column in (rules.dice, rules.hd95))
        means = (100 * dice, hd95)
    else:
        dice, hd95 = (mean_of([organ[i] for organ in organs.values() if organ.n]) for i in (0, 1))
        means = (dice, hd95)
    return OrganLine(run, rules, organs, len({row["case"] for row in rows}), *means)
