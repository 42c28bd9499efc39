"""One self-contained HTML page of a few runs: what was run, table, curves, cases, overlays, how to reproduce it.

Nothing on the page is fetched: CSS is inline, figures are inline SVG, fonts are the reader's own. It follows the
reader's light or dark scheme, fits a narrow window and prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from samseg_monai.metrics.rows import BOOTSTRAP_DRAWS
from samseg_monai.report import tables
from samseg_monai.report.facts import facts
from samseg_monai.report.figures import curves_svg, dice_svg
from samseg_monai.report.labels import LORA, NO_PROMPTS, NOT_RECORDED, PICO_LABEL, gate_text
from samseg_monai.report.montage import OverlayCase, overlay_svg, pick_cases, slice_svg
from samseg_monai.report.organs import OrganTable
from samseg_monai.report.organs_view import organs_section
from samseg_monai.report.palette import css_variables, looks
from samseg_monai.report.runs import RunResult, check_runs

_TEMPLATE = "template.html.jinja"
_ROLES = ("best", "median", "worst")


def write_report(
    output: str | Path,
    *,
    title: str,
    runs: Sequence[RunResult],
    montage: Sequence[OverlayCase] = (),
    commands: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
    organs: OrganTable | None = None,
) -> Path:
    """Write the page.

    Args:
        output: HTML file; its folder is made.
        title: heading of the page.
        runs: rows of the table, in this order; each with its own name.
        montage: slices to show, best, median and worst case of the LoRA run as `pick_cases` names them.
        commands: shell lines that made the runs and this page.
        notes: heading -> sentence, shown below the table; ``headline`` replaces the generated first sentence.
        organs: table of `organ_table`, shown as a section with the rows it quotes.

    Returns: the path written.

    Raises:
        BundleError: no run, or two of one name.
    """
    check_runs(runs)
    notes = dict(notes or {})
    names = [run.name for run in runs]
    source = resources.files("samseg_monai.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        title=title,
        banner=banner(runs),
        warnings=[line for run in runs for line in run.warnings],
        headline=notes.pop("headline", None) or headline(runs),
        light=css_variables(names, "light"),
        dark=css_variables(names, "dark"),
        head=_head(runs),
        rows=_rows(runs),
        definitions=_definitions(runs),
        by_class=_by_class(runs),
        organs=organs and organs_section(organs),
        colors={run.name: index for index, run in enumerate(runs)},
        gaps=_gaps(runs),
        curves=curves_svg(runs),
        dice=dice_svg(runs),
        montage=_montage(runs, montage),
        boxes=any(case.box is not None for case in montage),
        commands=list(commands),
        facts=facts(runs),
        runs=[(run.title, json.dumps(run.card, indent=2, default=str)) for run in runs],
        notes=notes | _gates(runs),
        resamples=f"{BOOTSTRAP_DRAWS:,}",
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def banner(runs: Sequence[RunResult]) -> str | None:
    """Warning over the page, from what the cards say; None when the numbers are of real SAM on real images."""
    parts = []
    if any(run.is_pico for run in runs):
        parts.append(PICO_LABEL)
    if any(run.is_phantom for run in runs):
        parts.append("phantoms, not patients")
    return ": ".join(parts) or None


def headline(runs: Sequence[RunResult]) -> str:
    """What was run and what came out, in one sentence, from the files alone."""
    dice = {run.name: tables.dice_of_cases(run) for run in runs}
    scores = [f"{run.title}: {tables.fixed(tables.mean(dice[run.name].values()))}" for run in runs]
    count = max(len(cases) for cases in dice.values())
    sources = dict.fromkeys(run.prompt_source for run in runs)
    prompts = NO_PROMPTS if list(sources) == [NO_PROMPTS] else f"prompts: {'; '.join(sources)}"
    kind = "phantoms" if all(run.is_phantom for run in runs) else "cases"
    several = len(tables.classes_of(runs))
    over = f", mean over {several} classes" if several > 1 else ""
    return f"Mean Dice of {count} held-out {kind}{over} ({prompts}). {'; '.join(scores)}."


def _head(runs: Sequence[RunResult]) -> list[str]:
    others = [tables.MEASURES[name][0] for name in tables.other_measures(runs)]
    dice = tables.MEASURES[tables.dice_column(runs[0])][0]
    first = ["Strategy", "SAM", "Prompt source", "n", f"{dice}, mean ± SD (95 % CI)", "Median"]
    return [*first, *others, "Excluded", "Trainable parameters", "Seconds"]


def _rows(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Rows of the table, one for each run: colour index, and cells as (text, second line)."""
    index = {run.name: position for position, run in enumerate(runs)}
    rows = []
    for line in tables.table_lines(runs):
        run, several = line.run, len(line.run.classes) > 1
        if several and line.klass != tables.MEAN_OF_CLASSES:
            continue
        prompt = run.prompt_source.replace(" %", "\u00a0%")
        cells = [(run.title, line.klass if several else ""), (run.sam, ""), (prompt, ""), (str(line.dice.n), "")]
        spread = f"{tables.fixed(line.dice.mean)} ± {tables.fixed(line.dice.sd)}"
        cells += [(spread, f"({tables.interval(line.low, line.high)})"), (tables.fixed(line.dice.median), "")]
        for name in tables.other_measures(runs):
            mean = line.values[name].mean if name in line.values else float("nan")
            cells.append((tables.fixed(mean, tables.digits(name)), ""))
        cells += [(str(line.excluded), ""), (tables.count_text(run.trainable), ""), _seconds(run)]
        rows.append({"color": index[run.name], "cells": cells})
    return rows


def _gates(runs: Sequence[RunResult]) -> dict[str, str]:
    """Note on the gates of the runs that have one."""
    gates = [f"{run.title}: {gate_text(run.gate)}" for run in runs if run.gate is not None]
    return {"Gate": "; ".join(gates)} if gates else {}


def _by_class(runs: Sequence[RunResult]) -> dict[str, Any] | None:
    """Table of classes against runs, None where there is one class: headings, cells as (Dice, HD95 below it)."""
    classes = tables.classes_of(runs)
    if len(classes) < 2:
        return None
    lines = {(line.run.name, line.klass): line for line in tables.table_lines(runs)}
    shown = tables.other_measures(runs)[:1]  # the rest is in the JSON: more would not fit beside several runs
    rows = [
        (klass, [_class_cell(lines[run.name, klass], shown) if klass in run.classes else ("-", "") for run in runs])
        for klass in classes
    ]
    return {"head": [(run.title, run.sam) for run in runs], "rows": rows}


def _class_cell(line: tables.Line, shown: Sequence[str]) -> tuple[str, str]:
    more = [
        f"{tables.MEASURES[name][0]} {tables.fixed(line.values[name].mean, tables.digits(name))}"
        for name in shown
        if name in line.values
    ]
    more += [f"n {line.dice.n}, {line.excluded} excluded"] if line.excluded else []
    dice = f"{tables.fixed(line.dice.mean)} ± {tables.fixed(line.dice.sd)}"
    return dice, "; ".join(text.replace(" ", "\u00a0") for text in more)


def _seconds(run: RunResult) -> tuple[str, str]:
    """Cell of seconds: training above evaluation where something was trained."""
    evaluation = tables.seconds_text(run.seconds)
    if run.training_seconds is None:
        return evaluation, "" if run.seconds is None else "evaluation"
    return tables.seconds_text(run.training_seconds), f"training; {evaluation}\u00a0evaluation"


def _definitions(runs: Sequence[RunResult]) -> str:
    """What the columns of distances are; the two policies of `samseg_monai.metrics` measure differently."""
    found = tables.measures(runs)
    texts = []
    for unit in ("mm", "px"):
        if f"hd95_{unit}" in found:
            texts.append(
                f"HD95 {unit}: larger of the two directed 95th percentiles of surface distances (MONAI's definition)"
            )
    if "hd95_transunet_voxel" in found:
        texts.append(
            "HD95 voxel: 95th percentile of both directions' distances pooled (medpy's definition), in voxels, "
            "with the special cases for empty masks of the TransUNet tables"
        )
    if "lesion_hd95_mm" in found:
        texts.append(
            "Lesion Dice and HD95: BraTS 2023's means over the lesions found, missed and false of a case, missed and "
            "false ones with Dice 0 and a fixed HD95; HD95 is weighted by surface area, and excluded cases count, too"
        )
    units = [unit for unit in ("mm", "px") if f"nsd_1{unit}" in found]
    if units:
        texts.append(f"NSD: share of the surface within 1 or 2 {' or '.join(units)} of the other surface")
    return "; ".join(texts)


def _gaps(runs: Sequence[RunResult]) -> dict[str, Any] | None:
    """Table of differences: headings, and per run its cells as (text, interval, verdict)."""
    found = tables.differences(runs)
    if not found:
        return None
    index = {run.name: position for position, run in enumerate(runs)}
    head = list(dict.fromkeys(one.measure for one in found))
    rows = []
    for name in dict.fromkeys(one.run.name for one in found):
        mine = {one.measure: one for one in found if one.run.name == name}
        run = next(iter(mine.values())).run
        cells = [_gap_cell(mine[measure]) if measure in mine else ("-", "", "") for measure in head]
        n = max(one.n for one in mine.values())
        rows.append({"color": index[name], "title": run.title, "sam": run.sam, "n": n, "cells": cells})
    return {"head": [tables.MEASURES[measure][0] for measure in head], "rows": rows}


def _gap_cell(one: tables.Difference) -> tuple[str, str, str]:
    places = tables.digits(one.measure)
    mean, low, high = (tables.signed(value, places).replace("-", "\u2212") for value in (one.mean, one.low, one.high))
    return mean, f"({low} to {high})", one.verdict


def _montage(runs: Sequence[RunResult], montage: Sequence[OverlayCase]) -> list[dict[str, Any]]:
    """Per case its role, its caption and its panels; strategies in the order of the table."""
    names = [run.name for run in runs]
    titles = {run.name: run.title for run in runs}
    ranked = next((run for run in runs if run.name == LORA), runs[-1])
    picked = pick_cases(ranked)
    shown = []
    for position, case in enumerate(montage):
        roles = [role for role in _ROLES if picked.get(role) == case.case]
        role = case.role or (f"{' and '.join(roles)} of {ranked.title}" if roles else "")
        panels = [{"svg": slice_svg(case, f"m{position}"), "title": "Whole slice", "dice": None, "color": ""}]
        for name in [name for name in names if name in case.predictions]:
            svg = overlay_svg(case, name, f"m{position}-{names.index(name)}", names=names)
            value = tables.fixed(case.dice[name]) if name in case.dice else NOT_RECORDED
            panels.append({"svg": svg, "title": titles[name], "dice": value, "color": looks(names)[name].overlay})
        place = "" if case.slice_index is None else f", slice {case.slice_index}"
        shown.append({"role": role, "case": case.case, "place": place, "panels": panels})
    return shown
