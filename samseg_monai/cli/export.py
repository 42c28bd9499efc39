"""``samseg export``: a trained network as SAM's own .pth, torch.export programs or ONNX, checked."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.cli.bundle import opened
from samseg_monai.errors import BundleError, ConfigError


class Format(str, Enum):
    """Formats that a network can be exported to."""

    PTH = "pth"
    TORCH = "torch"
    ONNX = "onnx"


def export(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle, or output_dir of a run")],
    format: Annotated[
        Format,
        typer.Option(help="pth: plain SAM in the official layout; torch: torch.export programs (.pt2); onnx"),
    ],
    output: Annotated[Path, typer.Option(help="folder for the files and export.json, which explains them")],
    sam_checkpoint: Annotated[str | None, typer.Option(help="base weights, if not found by name")] = None,
    size: Annotated[
        str | None, typer.Option(help="height,width of the slices of a rectangular network; default: its square")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="build a bundle that 'samseg lint' has findings in")] = False,
) -> None:
    """Write a trained network in another format, after its files were read back and compared with it.

    A network that the format cannot hold is refused with all reasons, and with the formats that are possible. A bundle
    is a program: one that could do more than build its network (see 'samseg lint') is refused without --trust.
    """
    from samseg_monai.bundles.record import RECORD

    if not bundle.exists():
        raise BundleError(f"export: there is no {bundle}; give a bundle, or the output_dir of a run")
    sides = None if size is None else _sides(size)
    record = bundle / RECORD
    run = record.is_dir()
    with opened(record if run else bundle, "export", trust=trust) as root:
        _export(bundle if run else root, format.value, output, sam_checkpoint, sides)


def _sides(text: str) -> tuple[int, int]:
    words = text.split(",")
    if len(words) != 2 or not all(word.strip().isdigit() for word in words):
        raise ConfigError(f"--size: got {text!r}; give height,width in pixels, such as 700,1024")
    return int(words[0]), int(words[1])


def _export(folder: Path, fmt: str, output: Path, sam_checkpoint: str | None, size: tuple[int, int] | None) -> None:
    from samseg_monai.export import export_network, read_source

    source = read_source(folder, sam_checkpoint=sam_checkpoint)
    typer.echo(source.loaded)
    if source.warning:
        typer.echo(f"note: {source.warning}")
    done = export_network(source, fmt, output, size=size)
    for difference in done.differences:
        typer.echo(str(difference))
    for path in done.files:
        typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
