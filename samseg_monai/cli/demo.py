"""``samseg demo``: a whole story on phantoms with pico SAM, in minutes; ``samseg report``: a page of runs."""

from __future__ import annotations

import shutil
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class DemoTask(str, Enum):
    """Tasks that have a demo."""

    MENINGIOMA = "meningioma"
    ABDOMEN = "abdomen"


def demo(
    task: Annotated[
        DemoTask, typer.Option(help="meningioma: boxes and LoRA; abdomen: eight organs and the ladder")
    ] = DemoTask.MENINGIOMA,
    output: Annotated[
        Path | None, typer.Option(help="folder for phantoms, runs and the report; default: demo, or demo_abdomen")
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="labelled phantoms; default: 44, or 15 abdomens of at most 30", min=8)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="epochs of each training; default: the bundle's demo.json")] = None,
    seed: Annotated[int, typer.Option(help="seed of phantoms, split and training")] = 0,
) -> None:
    """Generate phantoms, train, evaluate beside zero-shot, pack, predict an unlabelled case, report."""
    from samseg_monai.cli import demo_abdomen, demo_meningioma

    began = time.monotonic()
    story = demo_meningioma if task is DemoTask.MENINGIOMA else demo_abdomen
    output = output or Path(story.FOLDER)
    shutil.rmtree(output / "runs", ignore_errors=True)  # a finished training would refuse to be trained again
    commands, table = story.tell(output, cases=cases or story.CASES, epochs=epochs, seed=seed)
    typer.echo("\nCommands of this demo:\n" + "\n".join(f"  {command}" for command in commands))
    typer.echo(f"\n{table}\nreport: {output / 'report.html'}   numbers: {output / 'results.json'}")
    typer.echo(f"took {time.monotonic() - began:.0f} s")


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="evaluation folders (with run_card.json, metrics.json, cases.csv)")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="heading of the page")] = "samseg-monai report",
) -> None:
    """Make one page with table, figures and provenance of evaluated runs, and print the table."""
    from samseg_monai.report import RunResult, table_text, write_report

    results = [RunResult.load(folder) for folder in runs]
    write_report(output, title=title, runs=results)
    typer.echo(table_text(results))
    typer.echo(f"report: {output}")
