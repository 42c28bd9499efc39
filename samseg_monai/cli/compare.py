"""``samseg compare``: the runs of a plan, and the tables and pages that they come to."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samseg_monai.cli import costs
from samseg_monai.cli.bench import LIMIT, MINUTES
from samseg_monai.cli.outputs import FIGURES, folder_to_write
from samseg_monai.errors import ConfigError, SamsegError, WeightsError, reason_of

if TYPE_CHECKING:
    from samseg_monai.comparison import Run


def compare(
    plan: Annotated[str, typer.Argument(help="JSON file of a plan, or the name of one that comes with the package")],
    output: Annotated[
        Path, typer.Option("--output", "--out", callback=folder_to_write, help="folder for runs, tables and pages")
    ] = Path("comparison"),
    dataset_dir: Annotated[Path | None, typer.Option(help="folder of the data, where the plan names none")] = None,
    rows: Annotated[str | None, typer.Option(help="rows to run, such as zero_shot,lora; default: all")] = None,
    workers: Annotated[int, typer.Option(help="runs at the same time on this machine", min=1, max=256)] = 1,
    ray: Annotated[
        str | None, typer.Option(help="run on a Ray cluster: its address, auto, or local for one on this machine")
    ] = None,
    shard: Annotated[str, typer.Option(help="I/N: every N-th run from the I-th on; for several jobs")] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and measure what each will cost.")] = False,
    minutes: MINUTES = None,
    limit: LIMIT = 600,
    figures: FIGURES = None,
) -> None:
    """Run everything that PLAN names, tasks x rows x backbones x seeds x folds, and compare it.

    Each run is monai.bundle's, in a process of its own; its command is recorded. Given again, the command keeps what is
    finished (by a hash of settings, data and weights, not by name), goes on with what was interrupted, and tries again
    what failed. Tables and pages are written of what is there; the exit code is 1 where runs are missing.
    """
    from samseg_monai.comparison import perform, read_plan, write_comparison
    from samseg_monai.comparison.performing import raise_failed
    from samseg_monai.report.tables import WIDTH

    part = _shard(shard)
    asked = read_plan(plan)
    runs = asked.runs(dataset_dir=dataset_dir, rows=None if rows is None else rows.split(","))
    here = runs[part[0] :: part[1]]
    typer.echo(f"{asked.title}: {len(runs)} runs" + (f", {len(here)} of them here" if part[1] > 1 else ""))
    for line in asked.text:
        typer.echo(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  "))
    if dry_run:
        for line in _lost_weights(here):
            typer.echo(f"! {line}")
        typer.echo(_forecast(here, output, workers, limit, minutes))
        return
    outcomes = perform(
        runs, output, shard=part, workers=workers, ray_address=ray, tell=lambda line: typer.echo(line, err=True)
    )
    command = f"samseg compare {shlex.quote(plan)} --output {shlex.quote(str(output))}"
    command += "" if dataset_dir is None else f" --dataset-dir {shlex.quote(str(dataset_dir))}"
    command += "" if rows is None else f" --rows {shlex.quote(rows)}"
    typer.echo(write_comparison(output, asked, outcomes, command=command, figures_dir=figures))
    typer.echo(f"tables and pages: {output}")
    raise_failed(outcomes)


def _lost_weights(runs: Sequence[Run]) -> list[str]:
    """Backbones whose weights the runs will not find on this machine, and where they can be had."""
    from samseg_monai.sam.weights import KNOWN, find_weights

    found = []
    for variant, weights in dict.fromkeys((run.variant, run.weights) for run in runs if run.variant is not None):
        try:
            find_weights(variant, weights, download=False)
        except WeightsError as error:
            absent = weights is None and variant in KNOWN and "downloading is switched off" in str(error)
            found.append(
                f"{variant}: its weights are not on this machine; the first run downloads {KNOWN[variant].name} "
                f"({KNOWN[variant].size / 1e6:,.0f} MB, {KNOWN[variant].url}), or name their file under 'weights'"
                if absent
                else f"{variant}: {error}"
            )
    return found


def _forecast(runs: Sequence[Run], output: Path, workers: int, limit: float, within: float | None) -> str:
    """A table of the runs: whether they are there, minutes of their training, seconds of a step and GB, by a
    measurement of each row; and how many epochs there are in ``within`` minutes, if asked for.

    Seeds and folds of a row cost the same. What is predicted in the end is not in the minutes.
    """
    from samseg_monai.comparison.performing import done, jobs
    from samseg_monai.report.tables import grid
    from samseg_monai.training.cost import duration

    known: dict[str, dict[str, Any]] = {}
    body, whole = [], 0.0
    for run, job in zip(runs, jobs(runs, output), strict=True):
        given = job.overrides.get("train", {})
        given = {key: value for key, value in given.items() if key not in ("output_dir", "seed", "sam_checkpoint")}
        bundle = output / "bundles" / run.settings.name
        overlay = ["demo.json"] if run.plan.demo and run.settings.demo is not None else []
        same = repr((bundle, {k: v for k, v in given.items() if k != "datalist"}))
        there, trains = done(Path(job.folder), job.identity), "train" in job.commands
        if trains and not there and same not in known:
            known[same] = _cost({"bundle": str(bundle), "overlay": overlay, "steps": 2}, given, limit, within)
        cost = known.get(same, {}) if trains and not there else {}
        minutes = cost.get("minutes", {}).get("whole")
        whole += minutes or 0.0
        what = "kept" if there else cost.get("failed") or ", ".join(job.commands)
        measured_here = [f"{cost[key]:.3g}" if key in cost else "-" for key in ("seconds_per_step", "peak_gb")]
        body.append([job.name, what, duration(minutes) if minutes else "-", *measured_here])
        body[-1] += [] if within is None else [str(cost.get("epochs_within", "-"))]
    head = ["run", "to do", "training", "s a step", "GB"]
    head += [] if within is None else [f"epochs in {duration(within)}"]
    table = grid(head, body, left=2)
    told = f"all trainings: about {duration(whole / workers)}, {workers} at a time; evaluations come on top"
    return f"{table}\n{told}"


def _cost(job: dict[str, Any], given: dict[str, Any], limit: float, within: float | None) -> dict[str, Any]:
    """What a training costs, or "failed": why that cannot be told."""
    places = {key: value for key, value in given.items() if key in ("dataset_dir", "datalist")}
    plain = {key: value for key, value in given.items() if key not in places}
    try:
        return costs.forecast(job, plain, places, limit=limit, within=within)
    except SamsegError as error:
        return {"failed": f"not measured: {reason_of(error)}"}


def _shard(text: str) -> tuple[int, int]:
    """I and N of "I/N". Raises ConfigError where they are none."""
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and int(number) < int(count):
        return int(number), int(count)
    raise ConfigError(f"--shard: got {text!r}; give I/N with I from 0 to N - 1, such as 0/4")
