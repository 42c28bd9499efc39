"""One self-contained HTML page of a few runs: what to know first, tables, figures, cases, slices, how to make it again.

Nothing on the page is fetched, and its policy (CSP) lets a browser fetch nothing: CSS and the few lines of JavaScript
are inline and known to it by their hashes, figures are inline, fonts are the reader's own. It follows the reader's
light or dark scheme, fits a narrow window and prints. How it is laid out is in the template, ``page.css`` and
``page.js``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from samseg_monai.files import StrPath, write_text
from samseg_monai.metrics.rows import MIN_CASES, case_means, spelt_out
from samseg_monai.report import figures, tables
from samseg_monai.report import organs as organ_tables
from samseg_monai.report.facts import facts
from samseg_monai.report.montage import OverlayCase
from samseg_monai.report.names import PICO_LABEL, ZERO_SHOT
from samseg_monai.report.runs import RunResult, check_runs
from samseg_monai.report.summary import in_short

_MOST_LISTED = 200  # entries of a list or table in a card, such as the hashes of all cases that trained
_SEEN_FIRST = 2  # outlines of rows that a viewer shows before more are switched on
_DEFINITIONS = {
    "hd95_mm": "HD95 mm: larger of the two directed 95th percentiles of surface distances (MONAI's definition)",
    "hd95_px": "HD95 px: larger of the two directed 95th percentiles of surface distances (MONAI's definition)",
    "hd95_transunet_voxel": "HD95 voxel: 95th percentile of both directions' distances pooled (medpy's definition), in "
    "voxels, with the special cases for empty masks of the TransUNet tables",
    "lesion_hd95_mm": "Lesion Dice and HD95: BraTS 2023's means over the lesions found, missed and false of a case, "
    "missed and false ones with Dice 0 and a fixed HD95; HD95 is weighted by surface area, and excluded cases "
    "count, too",
    "ece": "ECE and Brier: of the probability of the foreground (any class) within the box around reference and "
    "prediction, 10 mm (or pixels) wider; ECE in 15 bins of equal width; 0 is best",
}


def write_report(
    output: StrPath,
    *,
    title: str,
    runs: Sequence[RunResult],
    montage: Sequence[OverlayCase] = (),
    commands: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
    organs: organ_tables.OrganTable | None = None,
    base: str = ZERO_SHOT,
    shares: Mapping[str, Sequence[float]] | None = None,
    figures_dir: StrPath | None = None,
) -> Path:
    """Write the page.

    Args:
        output: HTML file; its folder is made.
        title: heading of the page.
        runs: rows of the table, in this order; each with its own name.
        montage: cases to show, best, median and worst case of a run as `pick_cases` names them.
        commands: shell lines that made the runs and this page.
        notes: heading -> sentence, shown below the table.
        organs: table of `organ_table`, shown as a section with the rows it quotes.
        base: name of the run that the others are compared with.
        shares: name of a run -> share of the draws of a bootstrap at each rank, drawn as a figure.
        figures_dir: folder that gets every figure as SVG and PNG.

    Raises:
        BundleError: no run, or two of one name.
    """
    check_runs(runs)
    names = [run.name for run in runs]
    drawn = figures.all_figures(runs, shares)
    if figures_dir is not None:
        for one in drawn:
            one.write(Path(figures_dir))
    schemes = {scheme: figures.css_variables(names, scheme) for scheme in ("light", "dark")}
    style = _part("page.css", looks=figures.looks(names), schemes=schemes)
    script = _part("page.js")
    page = _part(
        "template.html.jinja",
        title=title,
        style=style,
        script=script,
        policy=_policy(style, script),
        banner=banner(runs),
        warnings=tables.warnings(runs, base),
        in_short=in_short(runs, montage),
        **_numbers(runs, base),
        base_title=tables.base_title(runs, base),
        **{"organs": organ_tables, "organ_table": organs},
        figures=[one for one in drawn if one.name not in ("loss", "dice")],
        curves=[one for one in drawn if one.name in ("loss", "dice")],
        viewers=_viewers(runs, montage),
        commands=list(commands),
        notes={**(notes or {}), **({"Gate": "; ".join(gates)} if (gates := tables.gates(runs)) else {})},
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_text(output, spelt_out(page, keep="\n\t"))
    return Path(output)


def _part(name: str, **values: Any) -> Markup:
    source = resources.files("samseg_monai.report").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return Markup(environment.from_string(source).render(**values))


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: nothing from anywhere, but these very CSS and JavaScript, and inline pictures."""

    def known(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {known(style)}; script-src {known(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def banner(runs: Sequence[RunResult]) -> str | None:
    """Warning over the page, from what the cards say; None when the numbers are of real SAM on real images."""
    parts = [PICO_LABEL] if any(run.is_pico for run in runs) else []
    parts += ["phantoms, not patients"] if any(run.is_phantom for run in runs) else []
    return ": ".join(parts) or None


def _hidden(runs: Sequence[RunResult]) -> str:
    """Which cases figures and table show, where they do not show all of them."""
    count = len({case for run in runs for case in run.cases})
    if count <= figures.MOST_DRAWN:
        return ""
    return (
        f"Of {count:,} cases the {figures.MOST_DRAWN} with the lowest Dice in any strategy are drawn as points; boxes "
        "are of all. Every case stands in the CSV of cases of its run."
    )


def _shortened(value: Any) -> Any:
    """A card with the first entries of what is long in it, and how many more there are: a page has to open."""
    if isinstance(value, Mapping):
        more = len(value) - _MOST_LISTED
        kept = {key: _shortened(item) for key, item in islice(value.items(), _MOST_LISTED)}
        return kept if more <= 0 else {**kept, "...": _more(more)}
    if isinstance(value, (list, tuple)):
        more = len(value) - _MOST_LISTED
        kept_items = [_shortened(item) for item in value[:_MOST_LISTED]]
        return kept_items if more <= 0 else [*kept_items, _more(more)]
    return value


def _more(count: int) -> str:
    return f"... and {count:,} more, in the file run_card.json"


def _numbers(runs: Sequence[RunResult], base: str) -> dict[str, Any]:
    """What the template makes its tables of; what is the same in every row gets no column."""
    lines, gaps = tables.table_lines(runs), tables.differences(runs, base=base)
    prompts = {run.prompt_source for run in runs}
    return {
        "tables": tables,
        "runs": runs,
        "colors": {run.name: index for index, run in enumerate(runs)},
        "least": MIN_CASES,
        "failures": tables.failures(runs),
        "held_out": all(run.held_out for run in runs),
        "cases": _cases(runs),
        "hidden": _hidden(runs),
        "facts": facts(runs),
        "facts_short": lambda text: re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}", r"\1", text),
        "cards": [(run.title, json.dumps(_shortened(run.card), indent=2, default=str)) for run in runs],
        "lines": [line for line in lines if line.klass == tables.MEAN_OF_CLASSES or len(line.run.classes) == 1],
        "of_class": {(line.run.name, line.klass): line for line in lines},
        "dice": tables.MEASURES[tables.dice_column(runs[0])][0],
        "others": tables.other_measures(runs),
        "definitions": _definitions(runs),
        "gaps": {run.name: {one.measure: one for one in gaps if one.run is run} for run in runs},
        "measures": list(dict.fromkeys(one.measure for one in gaps)),
        "prompts": prompts,
        "excluded": any(line.excluded for line in lines),
    }


def _definitions(runs: Sequence[RunResult]) -> str:
    """What the columns of distances are; the two policies of `samseg_monai.metrics` measure differently."""
    found = tables.measures(runs)
    texts = [text for name, text in _DEFINITIONS.items() if name in found]
    if units := [unit for unit in ("mm", "px") if f"nsd_1{unit}" in found]:
        texts.append(f"NSD: share of the surface within 1 or 2 {' or '.join(units)} of the other surface")
    return "; ".join(texts)


def _cases(runs: Sequence[RunResult]) -> dict[str, Any]:
    """The table of cases: measures, and for each case its size and its scores, texts in the order of the measures for
    each run; the case with the lowest Dice in any run first."""
    names = tables.measures(runs)
    scores = [{name: case_means(run.rows, name) if name in run.rows[0] else {} for name in names} for run in runs]
    dice = [tables.dice_of_cases(run) for run in runs]
    shown = figures.drawn_cases(dice)
    lowest = {case: min(its[case] for its in dice if case in its) for case in shown}
    unit, sizes = tables.sizes_of_cases(runs[0])
    rows = [
        {
            "case": case,
            "size": tables.fixed(sizes[case][1], 1) if case in sizes else "-",
            "cells": [
                [tables.fixed(its[name].get(case, float("nan")), tables.digits(name)) for name in names]
                for its in scores
            ],
        }
        for case in sorted(shown, key=lambda case: (lowest[case], case))
    ]
    measures = [(tables.MEASURES[name][0], tables.MEASURES[name][1]) for name in names]
    return {"measures": measures, "unit": unit, "rows": rows}


def _viewers(runs: Sequence[RunResult], montage: Sequence[OverlayCase]) -> list[dict[str, Any]]:
    """Per case its heading, what the viewer shows, and its rows in the order of the table."""
    found = []
    for case in montage:
        data = case.for_page()
        width, height = data["size"][0], data["size"][1] * data["aspect"]
        first = list(case.predictions)[:_SEEN_FIRST]
        rows = [run for run in runs if run.name in case.predictions]
        found.append(
            {
                "heading": f"{case.role[:1].upper()}{case.role[1:]}: {case.case}" if case.role else case.case,
                "data": data,
                "height": round(1000 * height / width),
                "view": f"0 0 {width:g} {height:g}",
                "rows": [{"run": run, "dice": case.dice.get(run.name), "on": run.name in first} for run in rows],
                "boxed": any(data["boxes"]),
                "json": Markup(json.dumps(data).replace("<", "\\u003c")),
            }
        )
    return found
