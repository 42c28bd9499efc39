"""``samseg bench`` and ``samseg train-cost``: what strategies cost on this machine, and what one training will."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli import costs
from samseg_monai.cli.outputs import file_to_write
from samseg_monai.cli.places import Device, Overlay, check_places, overrides_of
from samseg_monai.cli.predict import Trust
from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.faults import free_memory
from samseg_monai.files import write_json, write_text

# key of a row -> heading and how its value is shown
COLUMNS = {
    "strategy": ("strategy", "{}"), "sam_variant": ("SAM", "{}"), "image_size": ("pixels", "{}"),
    "batch_size": ("batch", "{}"), "seconds_per_step": ("s a step", "{:.3g}"),
    "seconds_per_slice": ("s a predicted slice", "{:.3g}"), "peak_gb": ("GB", "{:.2f}"),
    "gpu_gb": ("GB of the GPU", "{:.2f}"), "mb_learned": ("MB learned", "{:.1f}"),
}  # fmt: skip
TIMES = ("seconds_per_step", "seconds_per_slice")
ENDS = (".md", ".csv", ".json")
STORED = ", embeddings stored"
MINUTES = Annotated[
    float | None, typer.Option(help="tell how many epochs so many minutes of training have room for", min=0.01)
]
LIMIT = Annotated[float, typer.Option(help="seconds that a measurement may take", min=1)]


def train_cost(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle")],
    dataset_dir: Annotated[
        Path | None,
        typer.Option("--dataset-dir", "--dataset_dir", help="folder of the data: whole epochs are told, too"),
    ] = None,
    datalist: Annotated[Path | None, typer.Option(help="datalist; default: datalist.json in --dataset-dir")] = None,
    overlay: Overlay = None,
    steps: Annotated[int, typer.Option(help="steps that count; the first is left out", min=1, max=1000)] = 3,
    minutes: MINUTES = None,
    limit: LIMIT = 600,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Measure what a bundle's training costs before it starts; --KEY VALUE overrides a value of the bundle.

    Takes a few steps with random weights and slices, in a process of its own, with all settings of the bundle: seconds
    of a step and of a validated slice, the peak of the memory, the size of what is learnt. With --dataset-dir some
    cases are read to tell how long an epoch and the whole training take. Nothing is written and no weights are read.
    """
    check_places("train-cost", {"BUNDLE": bundle, "--dataset-dir": dataset_dir, "--datalist": datalist})
    places = {"dataset_dir": dataset_dir or (datalist and datalist.parent), "datalist": datalist}
    job = {"bundle": os.path.abspath(bundle), "trust": trust, "steps": steps, "overlay": overlay or []}
    typer.echo("taking a few steps in a process of its own ...", err=True)
    free = free_memory() / 1e9
    cost = costs.forecast(
        job,
        overrides_of(context.args),
        {name: os.path.abspath(place) for name, place in places.items() if place is not None},
        limit=limit,
        within=minutes,
    )
    if as_json:
        typer.echo(json.dumps({**cost, "free_gb": free if math.isfinite(free) else None}, indent=2))
        return
    rows = list(_rows(cost, free))
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{cost['bundle']}: {_setting(cost)}")
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}")


def _setting(cost: Mapping[str, Any]) -> str:
    size = " x ".join(map(str, cost["patch"])) + " voxels" if "patch" in cost else f"{cost['image_size']} px"
    scans = f"{len(cost['scans'])} scans" if len(cost["scans"]) > 1 else ""
    parts = [cost.get("sam_variant"), size, f"batch size {cost['batch_size']}", scans]
    parts += [name for name in ("checkpointing", "rectangular") if cost.get(name)]
    parts += [
        "embeddings stored" if cost.get("stored") else "",
        f"autocast {auto}" if (auto := cost.get("autocast")) else "",
    ]
    threads = f" ({cost['threads']} thread{'s' * (cost['threads'] > 1)})" if cost["device"] == "cpu" else ""
    return f"{', '.join(filter(None, parts))}, on {cost['device']}{threads}; random weights and slices"


def _rows(cost: Mapping[str, Any], free: float) -> Iterator[tuple[str, str]]:
    """What a person reads: names and texts with units."""
    from samseg_monai.training.cost import duration

    seconds = {
        "seconds_per_step": "a step: a batch, forward and backward",
        "seconds_per_slice": "a slice in validation or prediction",
        "seconds_per_encoded_slice": "a stored embedding, once for each look",
    }
    yield from ((name, f"{cost[key]:.3g} s") for key, name in seconds.items() if key in cost)
    were = f" ({free:.1f} GB were free)" if math.isfinite(free) else ""
    yield "memory at its peak", f"{cost['peak_gb']:.2f} GB{were}"
    if "gpu_gb" in cost:
        yield "memory of the GPU at its peak", f"{cost['gpu_gb']:.2f} GB"
    learns = f"{cost['values_learned']:,} of {cost['values']:,} values, {cost['mb_learned']:.1f} MB as a file"
    yield "what learns", learns if cost["values_learned"] else "nothing"
    if not (data := cost["data"]):
        return
    minutes, training = cost["minutes"], data["training"]
    read = "" if training["sample"] == training["cases"] else f", as {training['sample']} of them tell"
    each = f"{cost['slices']:,} of {training['cases']:,} cases{read}; {cost['slices_gb']:.2f} GB in memory"
    yield "training patches" if "patch" in cost else "training slices", each
    yield "an epoch", f"{cost['steps_per_epoch']:,} steps, {duration(minutes['epoch'])}"
    for part, name, slices in (
        ("validation", "a validation", "slices"),
        ("last validation", "whole volumes, at the end", "whole"),
    ):
        if part in minutes:
            each = f"{data['validation']['cases']:,} cases of about {data['validation'][slices]:.0f} slices"
            yield name, f"{each}, {duration(minutes[part])}"
    once = f", {duration(minutes['embeddings'])} for the embeddings" if "embeddings" in minutes else ""
    yield "before the first epoch", f"{duration(minutes['reading'])} to read the cases{once}"
    counts = f"{cost['epochs']} epochs, {cost['validations']} validations"
    yield "the whole training", f"about {duration(minutes['whole'])}: {counts}"
    if "epochs_within" in cost:
        yield "epochs in the time given", f"{cost['epochs_within']:,}"


def bench(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="name or recipe of a task, whose scans and classes count")] = "meningioma",
    strategies: Annotated[str, typer.Option(help="names or recipes, with commas between")] = "zero_shot,lora,ladder",
    sam_variants: Annotated[str, typer.Option(help="vit_b, vit_l, vit_h, vit_t, pico")] = "vit_t,vit_b",
    image_sizes: Annotated[str, typer.Option(help="longest side of a slice in pixels")] = "256",
    batches: Annotated[str, typer.Option(help="slices of a step, and of a call that predicts")] = "1",
    device: Device = None,
    steps: Annotated[int, typer.Option(help="steps that count; the first is left out", min=1, max=1000)] = 2,
    limit: Annotated[float, typer.Option(help="seconds that a row may take", min=1)] = 120,
    stored: Annotated[
        bool, typer.Option(help="measure strategies with a frozen encoder with stored embeddings, too")
    ] = True,
    processor_time: Annotated[
        bool,
        typer.Option("--processor-time", help="Show seconds of the processors, which other programs hardly change."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", callback=file_to_write, help="file to write: .md, .csv or .json"),
    ] = None,
) -> None:
    """Measure strategies on this machine: seconds of a step and of a predicted slice, memory, what is learned.

    Every combination runs in a process of its own, with random weights and slices; --KEY VALUE overrides a value in all
    of them. A strategy with a frozen encoder is measured with stored embeddings, too. What the machine has no memory or
    time for is a row that says so.
    """
    if output is not None and output.suffix not in ENDS:
        raise ConfigError(f"--output: got {output.name}; its name ends in {', '.join(ENDS)}")
    given = overrides_of(context.args) | ({} if device is None else {"device": device})
    sizes, counts = _numbers("--image-sizes", image_sizes), _numbers("--batches", batches)
    jobs = _jobs(task, strategies.split(","), sam_variants.split(","), sizes, counts, given)
    jobs = [(row, job) for row, job in jobs if stored or not job["stored"]]
    rows: list[dict[str, Any]] = []
    for number, (row, job) in enumerate(jobs, start=1):
        typer.echo(f"{number} of {len(jobs)}: {_name(row)}", err=True)
        found = costs.measured({**job, "steps": steps}, limit=limit)
        if "failed" in found:
            out = found["failed"] == costs.NO_MEMORY
            found = {"failed": "not enough memory" if out else " ".join(found["told"].split())}
        if job["stored"]:  # those of a new case are not there: its prediction takes what it takes without
            found = {key: value for key, value in found.items() if not key.endswith("seconds_per_slice")}
        rows.append({**row, **found})
    # what all rows share is told once
    shared: dict[str, Any] = next((row for row in rows if "machine" in row), {})
    shared = {key: shared.get(key) for key in ("machine", "device", "threads")}
    rows = [{key: value for key, value in row.items() if key != "machine"} for row in rows]
    clock = "processor" if processor_time else "wall"
    result = {"task": task, "overrides": given, **shared, "clock": clock, "rows": rows}
    typer.echo(table(result))
    if output is not None:
        _write(output, result)
    if all("failed" in row for row in rows):
        raise typer.Exit(1)


def _write(output: Path, result: Mapping[str, Any]) -> None:
    if output.suffix == ".json":
        write_json(output, result)
    elif output.suffix == ".md":
        write_text(output, table(result) + "\n")
    else:
        from samseg_monai.metrics.rows import write_table

        write_table(result["rows"], output, [*COLUMNS, *(f"processor_{key}" for key in TIMES), "failed"])
    typer.echo(f"wrote {output}")


def _numbers(option: str, text: str) -> list[int]:
    wrong = [word for word in text.split(",") if not word.strip().isdigit() or not int(word)]
    raise_all([f"got {word!r}" for word in wrong], ConfigError, f"{option}: expected whole numbers, such as 256,512")
    return [int(word) for word in text.split(",")]


def _jobs(
    task: str,
    strategies: Sequence[str],
    variants: Sequence[str],
    sizes: Sequence[int],
    counts: Sequence[int],
    given: Mapping[str, Any],
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A row's first columns, and what is to be measured. Raises BundleError for a task or strategy that is none."""
    from samseg_monai.bundles.build import compose

    found = []
    for strategy in strategies:
        settings = compose(task, strategy)
        frozen = settings.has_sam and settings.trains and settings.frozen_encoder
        several = (variants if settings.has_sam else [""], sizes, counts, (False, True) if frozen else (False,))
        for variant, size, batch, stored in itertools.product(*several):
            sizes_of = {"image_size": size, "batch_size": batch}
            overrides = {**given, **sizes_of, **({"sam_variant": variant} if variant else {})}
            overrides |= {"val_batch_size": batch} if settings.trains else {}
            row = {"strategy": Path(strategy).stem + STORED * stored, "sam_variant": variant, **sizes_of}
            found.append((row, {"task": task, "strategy": strategy, "overrides": overrides, "stored": stored}))
    return found


def table(result: Mapping[str, Any]) -> str:
    """What ``bench`` tells, in Markdown: the rows, and below them which machine it was."""
    rows = result["rows"]
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[COLUMNS[key][0] for key in keys], *([_shown(row, key, result["clock"]) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    shown = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    shown += ["", *(f"- {_name(row)}: {row['failed']}" for row in rows if "failed" in row)]
    return "\n".join([*shown, _machine(result)])


def _shown(row: Mapping[str, Any], key: str, clock: str) -> str:
    value = row.get(f"processor_{key}" if clock == "processor" and key in TIMES else key)
    return COLUMNS[key][1].format(value) if value is not None else "failed" if "failed" in row else "-"


def _name(row: Mapping[str, Any]) -> str:
    variant = f" with {row['sam_variant']}" if row["sam_variant"] else ""
    return f"{row['strategy']}{variant} at {row['image_size']} px, batch {row['batch_size']}"


def _machine(result: Mapping[str, Any]) -> str:
    if (machine := result["machine"]) is None:
        return "Nothing could be measured."
    clock = "seconds of the processors" if result["clock"] == "processor" else "seconds by the clock"
    where = result["device"] if result["device"] != "cpu" else f"{machine['cpu']}, threads: {result['threads']}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    changed = "".join(f", {key} {value}" for key, value in result["overrides"].items())
    return f"Task {result['task']}{changed}; random weights and slices; {clock}; {where}; {versions}."
