"""``samseg demo``: a story on phantoms with pico SAM or MobileSAM, in minutes; ``samseg report``: a page of runs."""

from __future__ import annotations

import shutil
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.errors import ConfigError, raise_all


class DemoTask(str, Enum):
    """Tasks that have a demo."""

    MENINGIOMA = "meningioma"
    ABDOMEN = "abdomen"


class DemoSam(str, Enum):
    """SAMs that a demo can use."""

    PICO = "pico"
    VIT_T = "vit_t"


def demo(
    task: Annotated[
        DemoTask, typer.Option(help="meningioma: boxes and LoRA; abdomen: eight organs and the ladder")
    ] = DemoTask.MENINGIOMA,
    sam: Annotated[
        DemoSam, typer.Option(help="pico: the toy in the package; vit_t: MobileSAM, from a file (meningioma only)")
    ] = DemoSam.PICO,
    sam_checkpoint: Annotated[
        str | None, typer.Option(help="MobileSAM's weights, if not found by name; nothing is downloaded")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="folder for phantoms, runs and the report; default: demo, demo_vit_t or demo_abdomen"),
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
    _check_sam(task, sam, sam_checkpoint)
    story = demo_meningioma if task is DemoTask.MENINGIOMA else demo_abdomen
    which = {} if sam is DemoSam.PICO else {"sam": demo_meningioma.mobile_sam(sam_checkpoint)}
    output = output or Path(story.FOLDER if sam is DemoSam.PICO else f"{story.FOLDER}_{sam.value}")
    shutil.rmtree(output / "runs", ignore_errors=True)  # a finished training would refuse to be trained again
    commands, table = story.tell(output, cases=cases or story.CASES, epochs=epochs, seed=seed, **which)
    typer.echo("\nCommands of this demo:\n" + "\n".join(f"  {command}" for command in commands))
    typer.echo(f"\n{table}\nreport: {output / 'report.html'}   numbers: {output / 'results.json'}")
    typer.echo(f"took {time.monotonic() - began:.0f} s")


def _check_sam(task: DemoTask, sam: DemoSam, sam_checkpoint: str | None) -> None:
    """Raise ConfigError, before anything is done, for options that do not go together."""
    problems = []
    if sam is not DemoSam.PICO and task is not DemoTask.MENINGIOMA:
        problems.append(f"--sam {sam.value}: only the demo of --task meningioma has it, got --task {task.value}")
    if sam is DemoSam.PICO and sam_checkpoint is not None:
        problems.append(f"--sam-checkpoint {sam_checkpoint}: pico's weights come with the package; add --sam vit_t")
    raise_all(problems, ConfigError, "These options of the demo do not go together")


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
