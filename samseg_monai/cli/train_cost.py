"""``samseg train-cost``: seconds, memory and file of a training before it starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.costs import NO_MEMORY, measured
from samseg_monai.cli.places import check_places, overrides_of
from samseg_monai.cli.predict import Trust
from samseg_monai.errors import SamsegError
from samseg_monai.faults import free_memory

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
    overlay: Annotated[
        list[str] | None, typer.Option(help="further config of the bundle whose values count, such as demo.json")
    ] = None,
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
    if datalist is not None and dataset_dir is None:
        dataset_dir = datalist.parent
    given = overrides_of(context.args)
    job: dict[str, Any] = {"bundle": os.path.abspath(bundle), "trust": trust, "steps": steps, "overlay": overlay or []}
    data: dict[str, Any] = {}
    if dataset_dir is not None:
        places = {"dataset_dir": os.path.abspath(dataset_dir)}
        places |= {"datalist": os.path.abspath(datalist)} if datalist is not None else {}
        data = _found({**job, "count": True, "overrides": {**given, **places}}, limit)
        job["size"] = data["size"]
    typer.echo("taking a few steps in a process of its own ...", err=True)
    free = free_memory() / 1e9
    cost = _found({**job, "overrides": given}, limit)
    cost |= whole_training(cost, data, minutes) if data else {}
    if as_json:
        typer.echo(
            json.dumps({**cost, "data": data or None, "free_gb": free if math.isfinite(free) else None}, indent=2)
        )
        return
    rows = list(_rows(cost, data, free))
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{cost['bundle']}: {_setting(cost)}")
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}")


def _found(job: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """What a job tells. Raises SamsegError with its words where it failed."""
    found = measured(job, limit=limit)
    if "failed" not in found:
        return found
    told = str(found["told"])
    kind, colon, text = told.partition("Error: ")
    if found["failed"] == NO_MEMORY or not colon:
        kind, text = "Training", told
    from samseg_monai import errors

    raise getattr(errors, f"{kind}Error", SamsegError)(text)


def whole_training(cost: Mapping[str, Any], data: Mapping[str, Any], within: float | None = None) -> dict[str, Any]:
    """Minutes of an epoch, of a validation and of the whole training; ``epochs_within`` so many minutes, if asked for.

    Args:
        cost: what ``cost.measure`` tells, by which ``data``, what ``cost.count_slices`` tells, is multiplied.
    """
    training, validation = data["training"], data["validation"] if cost["val_interval"] else None
    slices = training["cases"] * training["slices"]
    steps = cost.get("steps_per_epoch") or math.ceil(slices / cost["batch_size"])
    minutes = {
        "epoch": steps * cost["seconds_per_step"] / 60,
        "reading": training["cases"] * training["seconds_per_case"] / 60,
    }
    predicted = validation["cases"] * validation["slices"] if validation else 0.0
    if cost.get("stored"):  # of each look at a training slice; the first validation makes those of its slices
        looks = slices * cost["variants"] + predicted
        minutes["embeddings"] = looks * cost["seconds_per_encoded_slice"] / 60
    validations = 0
    if validation is not None:
        reading = validation["cases"] * validation["seconds_per_case"]
        minutes["validation"] = (reading + predicted * cost["seconds_per_slice"]) / 60
        validations = cost["epochs"] // min(cost["val_interval"], cost["epochs"])
        if validation["whole"] > validation["slices"]:  # some are picked: whole volumes are validated at the end
            unpicked = validation["cases"] * validation["whole"]
            minutes["last validation"] = (reading + unpicked * cost["seconds_per_slice"]) / 60
    once = sum(minutes.get(part, 0.0) for part in ("last validation", "reading", "embeddings"))
    whole = cost["epochs"] * minutes["epoch"] + validations * minutes.get("validation", 0.0) + once
    an_epoch = minutes["epoch"] + minutes.get("validation", 0.0) / (cost["val_interval"] or 1)
    fits = {} if within is None else {"epochs_within": max(0, int((within - once) / an_epoch))}
    return {
        **fits,
        "slices": round(slices), "steps_per_epoch": steps, "validations": validations,
        "minutes": {**minutes, "whole": whole}, "slices_gb": slices * data["slice_mb"] / 1000,
    }  # fmt: skip


def _setting(cost: Mapping[str, Any]) -> str:
    parts = [cost["sam_variant"]] if "sam_variant" in cost else []
    size = " x ".join(map(str, cost["patch"])) + " voxels" if "patch" in cost else f"{cost['image_size']} px"
    parts += [size, f"batch size {cost['batch_size']}"]
    parts += [f"{len(cost['scans'])} scans"] if len(cost["scans"]) > 1 else []
    parts += [name for name in ("checkpointing", "rectangular") if cost.get(name)]
    parts += ["embeddings stored"] if cost.get("stored") else []
    parts += [f"autocast {cost['autocast']}"] if cost.get("autocast") else []
    threads = f" ({cost['threads']} thread{'s' * (cost['threads'] > 1)})" if cost["device"] == "cpu" else ""
    return f"{', '.join(parts)}, on {cost['device']}{threads}; random weights and slices"


def _rows(cost: Mapping[str, Any], data: Mapping[str, Any], free: float) -> Iterator[tuple[str, str]]:
    """What a person reads: names and texts with units."""
    seconds = {
        "seconds_per_step": "a step: a batch, forward and backward",
        "seconds_per_slice": "a slice in validation or prediction",
        "seconds_per_encoded_slice": "a stored embedding, once for each look",
    }
    for key, name in seconds.items():
        if key in cost:
            yield name, f"{cost[key]:.3g} s"
    were = f" ({free:.1f} GB were free)" if math.isfinite(free) else ""
    yield "memory at its peak", f"{cost['peak_gb']:.2f} GB{were}"
    if "gpu_gb" in cost:
        yield "memory of the GPU at its peak", f"{cost['gpu_gb']:.2f} GB"
    learns = f"{cost['values_learned']:,} of {cost['values']:,} values, {cost['mb_learned']:.1f} MB as a file"
    yield "what learns", learns if cost["values_learned"] else "nothing"
    if not data:
        return
    minutes, training = cost["minutes"], data["training"]
    read = "" if training["sample"] == training["cases"] else f", as {training['sample']} of them tell"
    yield (
        "training patches" if "patch" in cost else "training slices",
        f"{cost['slices']:,} of {training['cases']:,} cases{read}; {cost['slices_gb']:.2f} GB in memory",
    )
    yield "an epoch", f"{cost['steps_per_epoch']:,} steps, {duration(minutes['epoch'])}"
    if "validation" in minutes:
        validation = data["validation"]
        each = f"{validation['cases']:,} cases of about {validation['slices']:.0f} slices"
        yield "a validation", f"{each}, {duration(minutes['validation'])}"
    if "last validation" in minutes:
        each = f"{validation['cases']:,} cases of about {validation['whole']:.0f} slices"
        yield "whole volumes, at the end", f"{each}, {duration(minutes['last validation'])}"
    once = f"{duration(minutes['reading'])} to read the cases"
    once += f", {duration(minutes['embeddings'])} for the embeddings" if "embeddings" in minutes else ""
    yield "before the first epoch", once
    yield (
        "the whole training",
        (f"about {duration(minutes['whole'])}: {cost['epochs']} epochs, {cost['validations']} validations"),
    )
    if "epochs_within" in cost:
        yield "epochs in the time given", f"{cost['epochs_within']:,}"


def duration(minutes: float) -> str:
    """Minutes for a person: ``12 s``, ``3.4 min``, ``5 h 20 min``, ``3 days 4 h``."""
    if minutes < 1.5:
        return f"{60 * minutes:.2g} s" if minutes < 1 / 6 else f"{60 * minutes:.0f} s"
    if minutes < 90:
        return f"{minutes:.3g} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
