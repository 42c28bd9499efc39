"""What came out, in plain sentences: what a reader should know who reads nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from samseg_monai.metrics.rows import MIN_CASES, NOT_DISTINGUISHABLE
from samseg_monai.report import tables
from samseg_monai.report.montage import OverlayCase
from samseg_monai.report.names import NO_PROMPTS
from samseg_monai.report.runs import RunResult, some

_DRAWN = " They are made from the answer, on the slices that hold it: scores are those of a perfect helper."
_TOLERANCES = {"nsd_1mm": 1.0, "nsd_2mm": 2.0}


def in_short(runs: Sequence[RunResult], montage: Sequence[OverlayCase] = ()) -> list[str]:
    """Sentences for the head of the page: what was compared on what, which row is best and how sure that is, where the
    boxes came from, how long each row was trained, and which tolerance lies below the size of a voxel."""
    parts = (_best(runs), _prompts(runs), _budgets(runs), _tolerances(runs, montage), _few(runs))
    return [_compared(runs), *(line for part in parts for line in part)]


def _compared(runs: Sequence[RunResult]) -> str:
    count = max(len(tables.dice_of_cases(run)) for run in runs)
    kind = "phantoms" if all(run.is_phantom for run in runs) else "images" if runs[0].is_image else "cases"
    kind = f"held-out {kind}" if all(run.held_out for run in runs) else kind
    data = runs[0].fact("dataset")
    classes = len(tables.classes_of(runs))
    over = f"over the {classes} classes of a case, then over cases" if classes > 1 else "over cases"
    what = f"{len(runs)} methods are" if len(runs) > 1 else "One method is"
    return f"{what} measured on {count} {kind}{f' of {data}' if data else ''}. Mean Dice, on this whole page: {over}."


def _best(runs: Sequence[RunResult]) -> list[str]:
    means = {run.name: tables.mean_dice(run) for run in runs}
    known = [run for run in runs if means[run.name] == means[run.name]]
    if not known:
        return ["No case counts."]
    best = max(known, key=lambda run: means[run.name])
    told = f"{best.title} has the highest mean Dice, {means[best.name]:.3f}"
    if len(runs) == 1:
        return [f"{best.title}: mean Dice {means[best.name]:.3f}."]
    gaps = {gap.run.name: gap for gap in tables.differences(runs, only=tables.dice_column(best), base=best.name)}
    close = [run.title for run in runs if run.name in gaps and gaps[run.name].verdict == NOT_DISTINGUISHABLE]
    worse = [run for run in runs if run.name in gaps and gaps[run.name].verdict == "worse"]
    other = [run.title for run in runs if run is not best and run.name not in gaps]
    parts = [f"{told}. Picked on these very cases, this number is a little too good."]
    if close:
        parts.append(f"Not distinguishable from it on these cases: {'; '.join(close)}.")
    if worse:
        named = [f"{run.title}: {means[run.name]:.3f}" for run in worse]
        parts.append(f"Lower by more than chance (p below 0.05 after Holm's correction): {'; '.join(named)}.")
    if other:
        parts.append(f"Not compared with it, since more than the method differs: {'; '.join(other)}.")
    return parts


def _prompts(runs: Sequence[RunResult]) -> list[str]:
    sources: dict[str, list[RunResult]] = {}
    for run in runs:
        sources.setdefault(run.prompt_source, []).append(run)
    if list(sources) == [NO_PROMPTS]:
        return ["No boxes or other prompts were given: everything was found by the networks."]
    found = []
    for text, its in sources.items():
        whose = "" if len(sources) == 1 else f" ({some([run.title for run in its])})"
        drawn = its[0].fact("prompt_source") == "label"
        found.append(f"Prompts{whose}: {text}.{_DRAWN if drawn else ''}")
    return found


def _budgets(runs: Sequence[RunResult]) -> list[str]:
    """Batches that each row learnt from, where the cards of its training tell."""
    found: dict[str, list[str]] = {}
    for run in runs:
        settings = run.training.get("settings") or {}
        batches, size = run.training.get("iterations"), settings.get("batch_size")
        if isinstance(batches, int) and isinstance(size, int):
            found.setdefault(f"{batches:,} batches of {size}", []).append(run.title)
    if len(found) == 1 and len(runs) > 1:
        return [f"One training budget for all rows that learn: {next(iter(found))}."]
    if len(found) > 1:
        return [f"Training budgets differ: {'; '.join(f'{budget}: {some(its)}' for budget, its in found.items())}."]
    return []


def _tolerances(runs: Sequence[RunResult], montage: Sequence[OverlayCase]) -> list[str]:
    """Where a voxel is larger than the tolerance of NSD, it only counts what coincides."""
    sides = [run.fact("voxel_mm") or 0.0 for run in runs]  # of their longest side, slices apart included
    voxel = max([*sides, *(max(case.spacing_mm) for case in montage if case.spacing_mm)])
    there = [name for name in _TOLERANCES if name in tables.measures(runs)]
    below = [f"{_TOLERANCES[name]:g} mm" for name in there if _TOLERANCES[name] < voxel]
    if below:
        return [f"NSD within {' and '.join(below)}: the tolerance lies below the voxel of {voxel:.3g} mm."]
    rows = [row for run in runs for row in run.rows if not row["excluded"] and set(there) <= row.keys()]
    same = len(there) == 2 and all(row[there[0]] == row[there[1]] for row in rows)
    return ["NSD within 1 and 2 mm is the same in every case: these tolerances lie below the voxel."] if same else []


def _few(runs: Sequence[RunResult]) -> list[str]:
    count = max(len(tables.dice_of_cases(run)) for run in runs)
    if count >= MIN_CASES:
        return []
    return [f"{count} cases are too few for intervals and verdicts."]
