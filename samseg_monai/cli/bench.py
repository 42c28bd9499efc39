"""``samseg bench``: what strategies cost on this machine, at several sizes."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.costs import NO_MEMORY, measured
from samseg_monai.cli.outputs import file_to_write
from samseg_monai.cli.places import overrides_of
from samseg_monai.errors import ConfigError, raise_all
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


def bench(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="name or recipe of a task, whose scans and classes count")] = "meningioma",
    strategies: Annotated[str, typer.Option(help="names or recipes, with commas between")] = "zero_shot,lora,ladder",
    sam_variants: Annotated[str, typer.Option(help="vit_b, vit_l, vit_h, vit_t, pico")] = "vit_t,vit_b",
    image_sizes: Annotated[str, typer.Option(help="longest side of a slice in pixels")] = "256",
    batches: Annotated[str, typer.Option(help="slices of a step, and of a call that predicts")] = "1",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")] = None,
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
    jobs = list(_jobs(task, strategies.split(","), sam_variants.split(","), sizes, counts, given))
    jobs = [(row, job) for row, job in jobs if stored or not job["stored"]]
    rows: list[dict[str, Any]] = []
    for number, (row, job) in enumerate(jobs, start=1):
        typer.echo(f"{number} of {len(jobs)}: {_name(row)}", err=True)
        found = measured({**job, "steps": steps}, limit=limit)
        why = "not enough memory" if found.get("failed") == NO_MEMORY else " ".join(str(found.get("told")).split())
        if job["stored"]:  # those of a new case are not there: its prediction takes what it takes without
            found = {key: value for key, value in found.items() if not key.endswith("seconds_per_slice")}
        rows.append({**row, **({"failed": why} if "failed" in found else found)})
    result = _result(task, given, rows, "processor" if processor_time else "wall")
    typer.echo(table(result))
    if output is not None:
        _write(output, result)
    if all("failed" in row for row in rows):
        raise typer.Exit(1)


def _result(task: str, given: dict[str, Any], rows: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    """Rows with what they share, once."""
    first = next((row for row in rows if "machine" in row), {})
    return {
        "task": task,
        "overrides": given,
        **{key: first.get(key) for key in ("machine", "device", "threads")},
        "clock": clock,
        "rows": [{key: value for key, value in row.items() if key != "machine"} for row in rows],
    }


def _write(output: Path, result: Mapping[str, Any]) -> None:
    if output.suffix == ".json":
        write_json(output, result)
    else:
        write_text(output, table(result) + "\n" if output.suffix == ".md" else _csv(result))
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
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row's first columns, and what is to be measured. Raises BundleError for a task or strategy that is none."""
    from samseg_monai.bundles.build import compose

    for strategy in strategies:
        settings = compose(task, strategy)
        frozen = settings.has_sam and settings.trains and settings.frozen_encoder
        for variant, size, batch in itertools.product(variants if settings.has_sam else [""], sizes, counts):
            overrides = {**given, "image_size": size, "batch_size": batch}
            overrides |= {"sam_variant": variant} if variant else {}
            overrides |= {"val_batch_size": batch} if settings.trains else {}
            for stored in (False, True) if frozen else (False,):
                row = {
                    "strategy": Path(strategy).stem + STORED * stored,
                    "sam_variant": variant,
                    "image_size": size,
                    "batch_size": batch,
                }
                yield row, {"task": task, "strategy": strategy, "overrides": overrides, "stored": stored}


def table(result: Mapping[str, Any]) -> str:
    """What ``bench`` tells, in Markdown: the rows, and below them which machine it was."""
    rows = result["rows"]
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[COLUMNS[key][0] for key in keys], *([_shown(row, key, result["clock"]) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys))]
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
    machine = result["machine"]
    if machine is None:
        return "Nothing could be measured."
    clock = "seconds of the processors" if result["clock"] == "processor" else "seconds by the clock"
    where = result["device"] if result["device"] != "cpu" else f"{machine['cpu']}, threads: {result['threads']}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    changed = "".join(f", {key} {value}" for key, value in result["overrides"].items())
    return f"Task {result['task']}{changed}; random weights and slices; {clock}; {where}; {versions}."


def _csv(result: Mapping[str, Any]) -> str:
    keys = [*COLUMNS, *(f"processor_{key}" for key in TIMES), "failed"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["rows"])
    return stream.getvalue()
