"""The organs' table in the forms that people read: plain text, Markdown, a section of the HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from samseg_monai.report.labels import gate_text
from samseg_monai.report.organs import QUOTED, OrganLine, OrganTable
from samseg_monai.report.published import ORGANS, Quoted
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import fixed
from samseg_monai.report.text import WIDTH, grid

HEAD = ("DSC %", "HD95", *ORGANS)
NOT_COMPARABLE = (
    "Numbers of pico or of phantoms cannot be compared with the quoted rows: other weights or other images."
)
SECOND_HAND = (
    "* quoted second-hand: read in another paper's table, in a listing or in an issue, not in the authors' own text."
)


def organs_text(table: OrganTable) -> str:
    """The organs' table: two lines for each run, below them the quoted rows, each marked, and where they are from."""
    body: list[Sequence[str]] = []
    for run in table.runs:
        body.append([_run_heading(table, run)])
        body += [[f"  {line.rules.short}", *_line_cells(line)] for line in table.of(run)]
        body += [[f"  {remark}"] for remark in _remarks(table, run)]
    if table.quoted:
        body.append([QUOTED])
        body += [[f"  {row.method} {_mark(row)}", *_quoted_cells(row)] for row in table.quoted]
    sources = [f"  {methods}: {source}" for source, methods in _sources_of(table.quoted).items()]
    below = [_rules_text(), *_caveats(table), *(["Sources of the quoted rows:", *sources] if sources else [])]
    wrapped = [textwrap.fill(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False) for text in below]
    return grid(["method", *HEAD], body, left=1) + "\n\n" + "\n".join(wrapped) + "\n"


def organs_markdown(table: OrganTable) -> str:
    """The table for a README: every row says by itself what it is, quoted rows that they are quoted and from where."""
    rows = []
    for run in table.runs:
        heading = _run_heading(table, run)
        rows += [[f"{heading}: {line.rules.label}", *_line_cells(line)] for line in table.of(run)]
    rows += [
        [f"{row.method} ({QUOTED}{'*' if row.second_hand else ''}: {row.source})", *_quoted_cells(row)]
        for row in table.quoted
    ]
    lines = [["method", *HEAD], ["---", *["---:"] * len(HEAD)], *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    found = [f"- {run.title}: {remark}" for run in table.runs for remark in _remarks(table, run)]
    blocks = [text, *(["\n".join(found)] if found else []), _rules_text(), *_caveats(table)]
    return "\n\n".join(blocks) + "\n"


def organs_section(table: OrganTable) -> dict[str, Any]:
    """What the page's template shows: ``groups`` of (run, heading, rows, remarks), ``quoted`` rows, texts below."""
    groups = [
        {
            "name": run.name,
            "heading": _run_heading(table, run),
            "rows": [(line.rules.label, _line_cells(line)) for line in table.of(run)],
            "remarks": _remarks(table, run),
        }
        for run in table.runs
    ]
    return {
        "head": HEAD,
        "groups": groups,
        "quoted": [(row.method, _mark(row), _quoted_cells(row)) for row in table.quoted],
        "mark": QUOTED,
        "sources": [(methods, source) for source, methods in _sources_of(table.quoted).items()],
        "rules": _rules_text(),
        "caveats": _caveats(table),
    }


def _run_heading(table: OrganTable, run: RunResult) -> str:
    """What a run is, on one line: title, SAM, phantoms, cases, split, prompts."""
    cases = table.of(run)[0].cases
    kind = "phantoms" if run.is_phantom else "cases"
    sam = f" [{run.sam}]" if run.sam not in run.title else ""
    return f"{run.title}{sam}, n = {cases} {kind}, split: {run.split}, {run.prompt_source}"


def _remarks(table: OrganTable, run: RunResult) -> list[str]:
    """Lines below a run: its gate, and organs that not every case counts for."""
    found = [] if run.gate is None else [gate_text(run.gate)]
    return found + [line.remark for line in table.of(run) if line.remark]


def _line_cells(line: OrganLine) -> list[str]:
    """Cells of a measured line under ``HEAD``."""
    return [fixed(line.dice, 2), fixed(line.hd95, 2), *(fixed(line.organs[name].dice, 2) for name in ORGANS)]


def _quoted_cells(row: Quoted) -> list[str]:
    """Cells of a quoted row under ``HEAD``, as printed; a dash where not known."""
    return [row.dsc, row.hd95 or "-", *(row.organs.get(name, "-") for name in ORGANS)]


def _mark(row: Quoted) -> str:
    return "(quoted*)" if row.second_hand else "(quoted)"


def _sources_of(quoted: Sequence[Quoted]) -> dict[str, str]:
    """Source -> methods quoted from it, in the order of the rows."""
    found: dict[str, list[str]] = {}
    for row in quoted:
        found.setdefault(row.source, []).append(row.method)
    return {source: "; ".join(methods) for source, methods in found.items()}


def _rules_text() -> str:
    """What the two sets of rules are, in two sentences."""
    return (
        "Published rules: medpy's Dice and HD95 of whole volumes, in voxels, with TransUNet's special cases (an organ "
        "missed or wholly absent scores Dice 0 and HD95 0, one found where there is none Dice 1); all cases count. "
        "Honest rules: HD95 in mm (larger of the two directed percentiles); an organ missed, or found where there is "
        "none, scores Dice 0 and the image's diagonal; absent in both, the case is excluded. Organs: mean DSC in %."
    )


def _caveats(table: OrganTable) -> list[str]:
    """What a reader must know before comparing runs with quoted rows."""
    stand_ins = table.quoted and any(run.is_pico or run.is_phantom for run in table.runs)
    second_hand = any(row.second_hand for row in table.quoted)
    return [*([NOT_COMPARABLE] if stand_ins else []), *([SECOND_HAND] if second_hand else [])]
