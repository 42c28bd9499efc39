"""``samseg demo``: a story on phantoms with pico SAM or MobileSAM, in minutes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from samseg_monai.errors import ConfigError, raise_all


def demo(
    task: Annotated[
        Literal["meningioma", "abdomen"],
        typer.Option(help="meningioma: boxes and LoRA; abdomen: eight organs and the ladder"),
    ] = "meningioma",
    sam: Annotated[
        Literal["pico", "vit_t"],
        typer.Option(help="pico: the toy in the package; vit_t: MobileSAM, from a file (meningioma only)"),
    ] = "pico",
    sam_checkpoint: Annotated[
        str | None, typer.Option(help="MobileSAM's weights, if not found by name; nothing is downloaded")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            help="folder for phantoms, runs and the report; default: demo, demo_vit_t or demo_abdomen",
        ),
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="labelled phantoms; default: 44, or 15 abdomens of at most 30", min=8)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="epochs of each training; default: the bundle's demo.json")] = None,
    seed: Annotated[int, typer.Option(help="seed of phantoms, split and training", min=0, max=2**32 - 1)] = 0,
) -> None:
    """Generate phantoms, train, evaluate beside zero-shot, pack, predict an unlabelled case, report."""
    from samseg_monai.demo import abdomen, meningioma

    began = time.monotonic()
    problems = []
    if sam != "pico" and task != "meningioma":
        problems.append(f"--sam {sam}: only the demo of --task meningioma has it, got --task {task}")
    if sam == "pico" and sam_checkpoint is not None:
        problems.append(f"--sam-checkpoint {sam_checkpoint}: pico's weights come with the package; add --sam vit_t")
    raise_all(problems, ConfigError, "These options of the demo do not go together")
    story = meningioma if task == "meningioma" else abdomen
    which = {} if sam == "pico" else {"sam": meningioma.mobile_sam(sam_checkpoint)}
    output = output or Path(story.FOLDER if sam == "pico" else f"{story.FOLDER}_{sam}")
    shutil.rmtree(output / "runs", ignore_errors=True)  # a finished training would refuse to be trained again
    commands, table = story.tell(output, cases=cases or story.CASES, epochs=epochs, seed=seed, **which)
    typer.echo("\nCommands of this demo:\n" + "\n".join(f"  {command}" for command in commands))
    typer.echo(f"\n{table}\nreport: {output / 'report.html'}   numbers: {output / 'results.json'}")
    typer.echo(f"took {time.monotonic() - began:.0f} s")
