"""``samseg report``: a page of evaluated runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.outputs import FIGURES, file_to_write
from samseg_monai.cli.places import check_places
from samseg_monai.errors import BundleError, ConfigError, DataError, raise_all
from samseg_monai.workflow import run_workflow

EVALUATION = "evaluation"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="output_dir of trainings, or evaluation folders (with run_card.json, metrics.json, cases.csv)"
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", callback=file_to_write, help="HTML file to write")
    ] = Path("report.html"),
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER=NAME", help="call the run in FOLDER (or the last part of it) like this; repeatable"
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="heading of the page")] = "samseg-monai report",
    dataset_dir: Annotated[
        Path | None, typer.Option(help="folder of the data, for a run not evaluated yet; default: as of its bundle")
    ] = None,
    sam_checkpoint: Annotated[
        str | None, typer.Option(help="base weights for a run not evaluated yet, if not found by name")
    ] = None,
    figures: FIGURES = None,
) -> None:
    """Make one page with table, figures and provenance of evaluated runs, and print the table.

    A training that was not evaluated since it ended is evaluated first, on the test cases of its data, with its own
    settings. The numbers are written beside the page, too, as JSON, CSV and a table for LaTeX. Several training seeds
    of one strategy are rows of their own.
    """
    check_places(
        "report",
        {**{f"run {number}": run for number, run in enumerate(runs, start=1)}, "--dataset-dir": dataset_dir},
        "; give the output_dir of a training, or a folder with run_card.json, metrics.json and cases.csv",
    )
    from samseg_monai.comparison.results import runs_latex
    from samseg_monai.files import write_text
    from samseg_monai.report.runs import RunResult, told_apart
    from samseg_monai.report.tables import table_text, write_results

    given: dict[str, Any] = {} if sam_checkpoint is None else {"sam_checkpoint": sam_checkpoint}
    if dataset_dir is not None:
        given["dataset_dir"] = os.path.abspath(dataset_dir)
    names = _names(name or [], runs)
    results = told_apart([RunResult.load(_evaluated(folder, given)) for folder in runs], runs)
    results = [
        replace(result, label=names[folder]) if folder in names else result
        for folder, result in zip(runs, results, strict=True)
    ]
    _write(output, title, results, dataset_dir, figures)
    numbers = output.with_name(f"{output.stem}_results.json")
    write_results(numbers, results)
    write_text(numbers.with_suffix(".tex"), runs_latex(title, results))
    typer.echo(table_text(results))
    typer.echo(f"report: {output}   numbers: {numbers}, {numbers.stem}.csv, {numbers.stem}.tex")


def _write(output: Path, title: str, results: list[Any], dataset_dir: Path | None, figures: Path | None) -> None:
    """The page, with slices where predictions and data are there."""
    from samseg_monai.comparison.commands import data_folder, report_commands
    from samseg_monai.report.montage import cases_of_data
    from samseg_monai.report.page import write_report

    data = dataset_dir or data_folder(results[0])
    montage, notes = cases_of_data(results, [data / "datalist.json"], data)
    write_report(
        output,
        title=title,
        runs=results,
        montage=montage,
        commands=report_commands(results, dataset_dir),
        notes=notes,
        figures_dir=figures,
    )


def _names(given: list[str], runs: list[Path]) -> dict[Path, str]:
    """Folder of a run -> how the page is to call it. Raises ConfigError for what is no FOLDER=NAME of the runs."""
    found, problems = {}, []
    for text in given:
        folder, equals, name = text.partition("=")
        meant = [run for run in runs if run == Path(folder)] or [run for run in runs if _own_name(run) == folder]
        if not (equals and name.strip()):
            problems.append(f"{text!r}: no FOLDER=NAME")
        elif len(meant) != 1:
            problems.append(f"{text!r}: {folder} is {'several' if meant else 'not among the'} runs")
        else:
            found[meant[0]] = name.strip()
    raise_all(problems, ConfigError, "report --name: give the folder of a run and its name")
    return found


def _own_name(run: Path) -> str:
    """The last part of a run's folder; of an evaluation's that of the run."""
    place = run.absolute()
    return place.parent.name if place.name == EVALUATION else place.name


def _evaluated(folder: Path, given: dict[str, Any]) -> Path:
    """The folder with the evaluation of a training; a folder that no training has written is returned as it is."""
    from samseg_monai.bundles.door import open_bundle
    from samseg_monai.bundles.record import RECORD
    from samseg_monai.checkpoints import TENSORS
    from samseg_monai.report.runs import METRICS_FILE

    adapter, done = folder / TENSORS, folder / EVALUATION / METRICS_FILE
    if not (folder / RECORD).is_dir() or (folder / METRICS_FILE).is_file():
        return folder
    if done.is_file() and not (adapter.is_file() and adapter.stat().st_mtime > done.stat().st_mtime):
        return done.parent
    typer.echo(f"{folder}: not evaluated since its training ended; now its test cases are", err=True)
    with open_bundle(folder) as opened:
        opened.check()
        if opened.settings is not None:
            data = Path(given.get("dataset_dir", f"data/{opened.settings.task.dataset}"))
            _same_data(folder, data / "datalist.json")
        places = {"output_dir": os.path.abspath(folder), "results_dir": os.path.abspath(done.parent)}
        places |= {} if opened.checkpoint is None else {"checkpoint": os.path.abspath(opened.checkpoint)}
        run_workflow([opened.config("evaluate")], {**places, **given}, echo=False)
    return done.parent


def _same_data(folder: Path, datalist: Path) -> None:
    """Raise DataError where a run was trained with another datalist than the one that would be evaluated."""
    from samseg_monai.files import hash_file, read_json
    from samseg_monai.report.runs import CARD_FILE

    card = folder / CARD_FILE
    known = read_json(card, BundleError, "run card").get("data_hash") if card.is_file() else None
    if not datalist.is_file():
        raise DataError(
            f"{datalist}: no such file; give the folder of the data that {folder} was trained on: --dataset-dir"
        )
    if known is not None and known != hash_file(datalist):
        raise DataError(
            f"{datalist}: not the datalist that {folder} was trained on, so that its test cases may have "
            "been learnt; give the right --dataset-dir, or evaluate it by its evaluate.json and report that folder"
        )
