"""What a comparison comes to: tables as text, JSON, CSV and LaTeX, rows of every case, and a page for each task."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from samseg_monai import __version__
from samseg_monai.comparison.commands import prepare_lines
from samseg_monai.comparison.performing import EVALUATION, Outcome
from samseg_monai.comparison.plan import Plan, Run
from samseg_monai.comparison.pooling import DRAWS, Pooled, few_shot, pooled, rank_shares
from samseg_monai.files import write_json, write_text
from samseg_monai.metrics.rows import mean_of, spelt_out, write_table
from samseg_monai.report import tables
from samseg_monai.report.montage import OverlayCase, cases_of_data
from samseg_monai.report.names import ZERO_SHOT
from samseg_monai.report.organs import ORGANS, OrganTable, organ_table, organs_json, organs_text
from samseg_monai.report.page import write_report
from samseg_monai.report.runs import RunResult
from samseg_monai.workflow import from_here

CONVERGED = (
    "converged: by a line through the last third of the epochs validation Dice rises by no more than 0.005, or than "
    "twice the line's standard error; without three validations there, the training loss falls by no more than 5 %."
)
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''",
}  # fmt: skip


def write_comparison(
    output: Path, plan: Plan, outcomes: Sequence[Outcome], *, command: str = "", figures_dir: Path | None = None
) -> str:
    """Write all tables and pages of the runs that are there, and return the tables as text.

    ``command`` is the shell line that is given for all of it, ``figures_dir`` a folder for the figures as files, of
    several tasks each in a folder of its own.

    Files in ``output``: ``comparison.json`` (every number), ``comparison.csv`` (a line per row), ``comparison.tex``
    (booktabs), ``comparison.md``, ``cases.csv`` (a line per run, case and class) and ``report.html``, of several
    tasks ``report_<task>.html``.

    Raises:
        DataError: folds of a row share cases, or its seeds have different ones.
        BundleError: an evaluation that cannot be read.
    """
    there = [one for one in outcomes if one.status in ("done", "kept")]
    results = {one.run: RunResult.load(one.folder / EVALUATION, name=one.run.group) for one in there}
    whole: dict[str, Any] = {"title": plan.title, "version": __version__, "tasks": {}}
    lines, texts, latex, markdown = [], [], [], []
    names = list(dict.fromkeys(one.run.task_name for one in outcomes))
    for task in names:
        rows = rows_of({run: result for run, result in results.items() if run.task_name == task})
        missing = [one for one in outcomes if one.run.task_name == task and one not in there]
        if not rows:
            texts.append(f"{task}: no run has come to its end")
            continue
        base = _baseline(plan, rows, [one.run for one in there if one.run.task_name == task])
        organs = _organs({run: result for run, result in results.items() if run.task_name == task})
        entry = whole["tasks"][task] = _entry(rows, base, missing, [one.run for one in there], organs)
        for name, row in entry["rows"].items():
            plain = {key: value for key, value in row.items() if key != "classes"}
            lines.append({"task": task, "row": name, **tables.flat(plain)})
        texts.append(task_text(task, rows, entry, base, len(missing)))
        texts += [organs_text(organs)] if organs else []
        latex.append(task_latex(task, rows, entry, base))
        markdown.append(task_markdown(task, rows, entry, base))
        its = [one for one in outcomes if one.run.task_name == task]
        montage, told = _slices([row.result for row in rows], [one.run for one in its if one in there])
        write_report(
            output / ("report.html" if len(names) == 1 else f"report_{task}.html"),
            title=plan.title if len(names) == 1 else f"{plan.title}: {task}",
            runs=[row.result for row in rows],
            montage=montage,
            commands=_commands(output, its, command),
            notes={**_notes(plan, rows, entry, base, len(missing)), **told},
            base=base,
            shares={name: row["rank_shares"] for name, row in entry["rows"].items() if any(row.get("rank_shares", ()))},
            figures_dir=None if figures_dir is None else figures_dir / (task if len(names) > 1 else ""),
            organs=organs,
        )
    write_json(output / "comparison.json", whole)
    write_table(lines, output / "comparison.csv")
    write_text(output / "comparison.tex", "\n".join(latex))
    write_text(output / "comparison.md", "\n".join(markdown))
    _write_cases(output / "cases.csv", results)
    return spelt_out("\n\n".join(texts), keep="\n") + "\n"


def _entry(
    rows: Sequence[Pooled], base: str, missing: Sequence[Outcome], there: Sequence[Run], organs: OrganTable | None
) -> dict[str, Any]:
    """What ``comparison.json`` says of a task."""
    entry = task_json(rows, base)
    entry["missing"] = {one.folder.name: one.error for one in missing}
    kinds = {run.group: run.without("training_cases") for run in there}
    entry["curve"] = few_shot([(kinds[row.result.name], row) for row in rows])
    entry["organs"] = organs and organs_json(organs)
    return entry


def rows_of(results: Mapping[Run, RunResult]) -> list[Pooled]:
    """Rows of one task, each of its seeds and folds, in the order of the plan.

    A seed that lacks a fold is left out, unless none is whole: then those folds count that every seed has.
    """
    groups: dict[str, dict[tuple[int, int | None], RunResult]] = {}
    titles: dict[str, str | None] = {}
    for run, result in results.items():
        groups.setdefault(run.group, {})[run.seed, run.fold] = result
        titles[run.group] = run.title
    order = list(dict.fromkeys(run.group for run in sorted(results, key=lambda run: run.place)))
    found = []
    for name in order:
        its = groups[name]
        folds = {fold for _, fold in its}
        whole = {seed for seed, _ in its if all((seed, fold) in its for fold in folds)}
        common = folds if whole else {f for f in folds if all((s, f) in its for s, _ in its)}
        its = {(s, f): one for (s, f), one in its.items() if (s in whole or not whole) and f in common}
        if its:
            found.append(pooled(name, titles[name], its))
    return found


def _organs(results: Mapping[Run, RunResult]) -> OrganTable | None:
    """The table of Synapse's eight organs beside what papers publish: each run a row of it, where all can be tabulated;
    None where the task is another."""
    of_network = {run: result for run, result in results.items() if result.has_network}
    if not of_network or not all(set(ORGANS) <= set(result.classes) for result in of_network.values()):
        return None
    seeds = {run.seed for run in of_network if run.settings.trains}
    folds = {run.fold for run in of_network}
    named = []
    for run, result in of_network.items():
        more = [f"seed {run.seed}"] * (len(seeds) > 1 and run.settings.trains) + [f"fold {run.fold}"] * (len(folds) > 1)
        label = ", ".join([replace(result, label=run.title).title, *more])
        named.append(replace(result, name="_".join([run.group, *more]).replace(" ", ""), label=label))
    return organ_table(named)


def _baseline(plan: Plan, rows: Sequence[Pooled], runs: Sequence[Run]) -> str:
    """Name of the row that the others are compared with: of the plan's baseline the first, else the first of all."""
    wanted = plan.baseline or plan.rows[0].name
    names = [run.group for run in sorted(runs, key=lambda run: run.place) if run.row.name == wanted]
    there = {row.result.name for row in rows}
    return next((name for name in names if name in there), rows[0].result.name)


def task_json(rows: Sequence[Pooled], base: str) -> dict[str, Any]:
    """Numbers of one task; unrounded, None where there are none."""
    runs = [row.result for row in rows]
    found = tables.results_json(runs, base=base)
    shares = rank_shares(rows) if len(rows) > 1 else {}
    for row in rows:
        entry = found[row.result.name]
        entry["title"] = row.result.title
        entry["folds"], entry["seeds"] = row.folds, list(row.seeds)
        entry["dice_of_seeds"] = {str(seed): value for seed, value in row.means.items()}
        entry["dice_sd_of_seeds"] = tables.or_none(row.spread)
        entry["validation"], entry["minutes_training"] = row.validation, row.minutes
        entry["peak_mb"], entry["training_cases"] = row.memory, row.training_cases
        entry["ends"] = list(row.ends)
        if row.result.name in shares:
            entry["rank_shares"] = [tables.or_none(share) for share in shares[row.result.name]]
    chosen = [row for row in rows if row.validation is not None]
    best = max(chosen, key=lambda row: row.validation or 0.0, default=None)
    return {"baseline": base, "chosen_on_validation": best and best.result.name, "rows": found}


def task_text(task: str, rows: Sequence[Pooled], entry: Mapping[str, Any], base: str, missing: int) -> str:
    """The table of one task for a terminal: what `tables.table_text` gives, then seeds, ranks and cost."""
    head = ["row", "seeds", "folds", "validation", "SD of seeds", "first of all", "converged", "min training"]
    head += ["GB peak", "cases"]
    body = []
    for row in rows:
        its = entry["rows"][row.result.name]
        first = (its.get("rank_shares") or [math.nan])[0]
        body.append(
            [
                tables.named(row.result), str(len(row.seeds)), str(row.folds), tables.fixed(row.validation),
                tables.fixed(row.spread), "-" if first is None or math.isnan(first) else f"{100 * first:.0f} %",
                _ended(row), tables.fixed(row.minutes, 1), tables.fixed(row.memory and row.memory / 1024, 1),
                str(row.training_cases or "-"),
            ]
        )  # fmt: skip
    chosen = entry["chosen_on_validation"]
    lines = [
        f"== {task}",
        tables.table_text([row.result for row in rows], base=base),
        tables.grid(head, body),
        f"first of all: share of {DRAWS:,} draws of cases and seeds in which the row's mean Dice is the best.",
    ]
    lines += [CONVERGED] if any(row.ends for row in rows) else []
    lines += [f"best on validation: {chosen}"] if chosen else []
    lines += [f"! {missing} runs are missing"] if missing else []
    return "\n".join(lines)


def task_latex(task: str, rows: Sequence[Pooled], entry: Mapping[str, Any], base: str) -> str:
    """A table for LaTeX with booktabs: mean Dice with its interval, difference, seeds and cost."""
    body = []
    for row in rows:
        its = entry["rows"][row.result.name]
        column = tables.dice_column(row.result)
        low, high = its[f"{column}_ci95"]
        gap = its.get(f"minus_{base}", {}).get(column)
        cells = [
            _escaped(row.result.title),
            str(its["n"]),
            tables.fixed(its[f"{column}_mean"]),
            "--" if low is None else f"{low:.3f} to {high:.3f}",
            "--" if gap is None else f"${gap['mean']:+.3f}$",
            "--" if gap is None or gap["p_holm"] is None else _escaped(tables.p_text(gap["p_holm"])),
            tables.fixed(row.spread).replace("-", "--"),
            f"{row.result.trainable:,}".replace(",", r"\,") if row.result.trainable is not None else "--",
            tables.fixed(row.minutes, 1).replace("-", "--"),
        ]
        body.append("  " + " & ".join(cells) + r" \\")
    head = ["Row", "$n$", "Dice", r"95\,\% CI", "Difference", "$p$ (Holm)", "SD of seeds", "Trained", "Minutes"]
    over = tables.intervals([row.result for row in rows])
    minus = f"minus {_escaped(base)}" if base in entry["rows"] else "none, for there is no row to compare with"
    note = f"Difference: {minus}, paired by case; {over}."
    return "\n".join(
        [
            f"% {task}; needs \\usepackage{{booktabs}}",
            r"\begin{tabular}{lrrrrrrrr}", r"  \toprule", "  " + " & ".join(head) + r" \\", r"  \midrule",
            *body,
            r"  \bottomrule", r"\end{tabular}", f"% {note}", "",
        ]
    )  # fmt: skip


def runs_latex(title: str, runs: Sequence[RunResult]) -> str:
    """The table of runs that no plan has made, as ``task_latex``; each is a row of one seed."""
    rows = [pooled(run.name, run.title, {(0, None): run}) for run in runs]
    return task_latex(" ".join(title.split()), rows, {"rows": tables.results_json(runs)}, ZERO_SHOT)


def task_markdown(task: str, rows: Sequence[Pooled], entry: Mapping[str, Any], base: str) -> str:
    """A table for Markdown: what ``task_latex`` holds, with classes, validation, verdicts and ends of the trainings."""
    runs = [row.result for row in rows]
    classes = tables.classes_of(runs)
    classes = classes if len(classes) > 1 else []
    title = next(run.title for run in runs if run.name == base)
    head = ["row", "Dice", "95 % CI", *classes, f"minus {title}", "95 % CI", "p (Holm)", "verdict", "HD95 mm"]
    head += ["validation", "converged", "seeds", "SD of seeds", "trained values"]
    body = []
    for row in rows:
        its = entry["rows"][row.result.name]
        column = tables.dice_column(row.result)
        gap = its.get(f"minus_{base}", {}).get(column)
        body.append(
            [
                row.result.title, tables.fixed(its[f"{column}_mean"]), _range(its[f"{column}_ci95"]),
                *(tables.fixed(its["classes"].get(name, {}).get(f"{column}_mean")) for name in classes),
                tables.fixed(gap and gap["mean"], sign="+"), _range(gap and gap["ci95"], "+"),
                tables.p_text(math.nan if gap is None or gap["p_holm"] is None else gap["p_holm"]),
                (gap and gap["verdict"]) or "-", tables.fixed(its.get("hd95_mm_mean"), 2),
                tables.fixed(row.validation), _ended(row), str(len(row.seeds)), tables.fixed(row.spread, 4),
                tables.count_text(row.result.trainable),
            ]
        )  # fmt: skip
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return f"**{task}**, n = {entry['rows'][base]['n']}\n\n{table}\n\n95 % CI: {tables.intervals(runs)}.\n"


def _range(ends: Sequence[float | None] | None, sign: str = "-") -> str:
    low, high = (math.nan if end is None else end for end in ends or (None, None))
    return tables.interval(low, high, sign=sign)


def _notes(plan: Plan, rows: Sequence[Pooled], entry: Mapping[str, Any], base: str, missing: int) -> dict[str, str]:
    """Headings and sentences for the page."""
    notes = {"This comparison": " ".join(plan.text)} if plan.text else {}
    several = [row for row in rows if len(row.seeds) > 1]
    if several:
        notes["Seeds"] = "Mean Dice of each seed: " + "; ".join(
            f"{row.result.title}: "
            + ", ".join(f"{value:.3f} (seed {seed})" for seed, value in row.means.items())
            + f", SD {row.spread:.3f}"
            for row in several
        )
    if several or any(row.folds > 1 for row in rows):
        notes["Curves"] = "Those of a row with several seeds or folds are of its first training."
    if len(rows) > 1:
        notes["Order of the rows"] = (
            f"In {DRAWS:,} draws of cases and seeds with replacement the best mean Dice was that of "
            + "; ".join(
                f"{row.result.title}: {100 * (entry['rows'][row.result.name]['rank_shares'][0] or 0):.0f} %"
                for row in rows
            )
            + "."
        )
    if chosen := entry["chosen_on_validation"]:
        title = next(row.result.title for row in rows if row.result.name == chosen)
        notes["Chosen on validation"] = f"{title} has the best validation score; test cases had no part in that choice."
    if ends := [f"{row.result.title}: {_ended(row)}" for row in rows if row.converged]:
        notes["Converged"] = f"{'; '.join(ends)}. That is, {CONVERGED.partition(': ')[2]}"
    if missing:
        notes["Missing"] = f"{missing} runs of the plan did not come to their end: {', '.join(entry['missing'])}."
    return notes


def _slices(results: Sequence[RunResult], runs: Sequence[Run]) -> tuple[list[OverlayCase], dict[str, str]]:
    """Cases for the page's viewer; or none, and a note that says why."""
    datalists = list(dict.fromkeys(run.datalist for run in runs))
    given = [{**run.shared, **run.evaluation}.get("prompt::boxes") for run in runs]
    return cases_of_data(results, datalists, runs[0].dataset_dir, boxes=next((one for one in given if one), None))


def _commands(output: Path, outcomes: Sequence[Outcome], command: str) -> list[str]:
    """Shell lines from the data to the page: one that makes everything, and those of every single run.

    How the data were prepared is the recipe's line with the split that the datalist records; folds that a plan names
    itself are taken as they are.
    """
    runs = [one.run for one in outcomes]
    lines = prepare_lines(runs[0].settings.task.prepare, runs[0].dataset_dir, [run.datalist for run in runs])
    builds = [
        f"samseg bundle build --task {shlex.quote(run.task.recipe)} --strategy {shlex.quote(run.row.strategy)} "
        f"--output {shlex.quote(str(output / 'bundles'))}"
        for run in runs
    ]
    its = [line for one in outcomes for line in one.commands]
    found = [*lines, *dict.fromkeys(builds), *its, *([command] if command else [])]
    return [from_here(line) for line in found]


def _ended(row: Pooled) -> str:
    """Whether its trainings had stopped learning, and what validation Dice or else loss did in the last third."""
    if not row.converged:
        return "-"
    count = len(row.converged)
    told = {0: "no", count: "yes"}.get(sum(row.converged), f"{sum(row.converged)} of {count}")
    dice = [one["dice"] for one in row.ends if one["dice"] is not None]
    loss = [one["loss"] for one in row.ends if one["loss"] is not None]
    return f"{told}, {mean_of(dice):+.3f}" if dice else f"{told}, loss {100 * mean_of(loss):+.0f} %"


def _write_cases(path: Path, results: Mapping[Run, RunResult]) -> None:
    lines = [
        {"task": run.task_name, "row": run.group, "seed": run.seed, "fold": "" if run.fold is None else run.fold, **row}
        for run, result in results.items()
        for row in result.rows
    ]
    write_table(lines, path)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
