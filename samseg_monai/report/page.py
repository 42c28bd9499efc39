"""One self-contained HTML page of a few runs: what was run, table, curves, cases, overlays, how to reproduce it.

Nothing on the page is fetched: CSS is inline, figures are inline, fonts are the reader's own. It follows the reader's
light or dark scheme, fits a narrow window and prints. How it is laid out is in the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from samseg_monai.files import StrPath, write_text
from samseg_monai.metrics.rows import MIN_CASES, mean_of, spelt_out
from samseg_monai.report import figures, tables
from samseg_monai.report import organs as organ_tables
from samseg_monai.report.comparing import unequal
from samseg_monai.report.montage import OverlayCase, image_tag, pick_cases
from samseg_monai.report.runs import (
    LORA,
    NO_PROMPTS,
    NOT_RECORDED,
    PICO_LABEL,
    ZERO_SHOT,
    RunResult,
    check_runs,
    facts,
    gate_text,
)

_MOST_LISTED = 200  # entries of a list or table in a card, such as the hashes of all cases that trained
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
) -> Path:
    """Write the page.

    Args:
        output: HTML file; its folder is made.
        title: heading of the page.
        runs: rows of the table, in this order; each with its own name.
        montage: slices to show, best, median and worst case of the LoRA run as `pick_cases` names them.
        commands: shell lines that made the runs and this page.
        notes: heading -> sentence, shown below the table.
        organs: table of `organ_table`, shown as a section with the rows it quotes.
        base: name of the run that the others are compared with.

    Raises:
        BundleError: no run, or two of one name.
    """
    check_runs(runs)
    gates = "; ".join(f"{run.title}: {gate_text(run.gate)}" for run in runs if run.gate is not None)
    names = [run.name for run in runs]
    source = resources.files("samseg_monai.report").joinpath("template.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        title=title,
        banner=banner(runs),
        warnings=[*(line for run in runs for line in run.warnings), *(one.text for one in unequal(runs, base))],
        headline=headline(runs),
        schemes={scheme: figures.css_variables(names, scheme) for scheme in ("light", "dark")},
        runs=runs,
        colors={name: index for index, name in enumerate(names)},
        tables=tables,
        **_numbers(runs, base),
        base_title=tables.base_title(runs, base),
        organs=organ_tables,
        organ_table=organs,
        curves=figures.curves_svg(runs),
        cases=figures.dice_svg(runs),
        hidden=_hidden(runs),
        montage=_montage(runs, montage),
        boxes=any(case.box is not None for case in montage),
        commands=list(commands),
        facts=facts(runs),
        cards=[(run.title, json.dumps(_shortened(run.card), indent=2, default=str)) for run in runs],
        notes={**(notes or {}), **({"Gate": gates} if gates else {})},
        failures=tables.failures(runs),
        least=MIN_CASES,
        held_out=all(run.held_out for run in runs),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_text(output, spelt_out(page, keep="\n\t"))
    return Path(output)


def banner(runs: Sequence[RunResult]) -> str | None:
    """Warning over the page, from what the cards say; None when the numbers are of real SAM on real images."""
    parts = [PICO_LABEL] if any(run.is_pico for run in runs) else []
    parts += ["phantoms, not patients"] if any(run.is_phantom for run in runs) else []
    return ": ".join(parts) or None


def headline(runs: Sequence[RunResult]) -> str:
    """What was run and what came out, in one sentence, from the files alone."""
    dice = [tables.dice_of_cases(run) for run in runs]
    means = [f"{run.title}: {tables.fixed(mean_of([*its.values()]))}" for run, its in zip(runs, dice, strict=True)]
    sources = dict.fromkeys(run.prompt_source for run in runs)
    prompts = NO_PROMPTS if list(sources) == [NO_PROMPTS] else f"prompts: {'; '.join(sources)}"
    kind = "phantoms" if all(run.is_phantom for run in runs) else "cases"
    kind = f"held-out {kind}" if all(run.held_out for run in runs) else kind
    several = len(tables.classes_of(runs))
    over = f", mean over {several} classes" if several > 1 else ""
    return f"Mean Dice of {max(map(len, dice))} {kind}{over} ({prompts}). {'; '.join(means)}."


def _hidden(runs: Sequence[RunResult]) -> str:
    """Which cases the figure draws as points, where it does not draw all of them."""
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
    """What the template makes its tables of."""
    lines, gaps = tables.table_lines(runs), tables.differences(runs, base=base)
    return {
        "lines": [line for line in lines if line.klass == tables.MEAN_OF_CLASSES or len(line.run.classes) == 1],
        "of_class": {(line.run.name, line.klass): line for line in lines},
        "dice": tables.MEASURES[tables.dice_column(runs[0])][0],
        "others": tables.other_measures(runs),
        "definitions": _definitions(runs),
        "gaps": {run.name: {one.measure: one for one in gaps if one.run is run} for run in runs},
        "measures": list(dict.fromkeys(one.measure for one in gaps)),
    }


def _definitions(runs: Sequence[RunResult]) -> str:
    """What the columns of distances are; the two policies of `samseg_monai.metrics` measure differently."""
    found = tables.measures(runs)
    texts = [text for name, text in _DEFINITIONS.items() if name in found]
    if units := [unit for unit in ("mm", "px") if f"nsd_1{unit}" in found]:
        texts.append(f"NSD: share of the surface within 1 or 2 {' or '.join(units)} of the other surface")
    return "; ".join(texts)


def _montage(runs: Sequence[RunResult], montage: Sequence[OverlayCase]) -> list[dict[str, Any]]:
    """Per case its role, its caption and its panels; strategies in the order of the table."""
    names = [run.name for run in runs]
    ranked = next((run for run in runs if run.name == LORA), runs[-1])
    picked = pick_cases(ranked)
    shown = []
    for case in montage:
        roles = " and ".join(role for role, name in picked.items() if name == case.case)
        role = f"{roles} of {ranked.title}" if roles else ""
        whole = image_tag(case.picture(), f"{case.case}: whole slice with reference outline and box")
        panels: list[dict[str, Any]] = [{"image": whole, "title": "Whole slice", "dice": None, "color": ""}]
        for run in (run for run in runs if run.name in case.predictions):
            picture = case.picture(run.name, names=names)
            image = image_tag(picture, f"{case.case}: outline of {run.name} over the reference")
            dice = tables.fixed(case.dice[run.name]) if run.name in case.dice else NOT_RECORDED
            colour = figures.looks(names)[run.name].overlay
            panels.append({"image": image, "title": run.title, "dice": dice, "color": colour})
        place = "" if case.slice_index is None else f", slice {case.slice_index}"
        shown.append({"role": role, "case": case.case, "place": place, "panels": panels})
    return shown
