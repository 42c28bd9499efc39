"""``samseg export``: a trained network as SAM's own .pth, torch.export programs, ONNX, or SAMed's or peft's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from samseg_monai.cli.places import BaseWeights, check_places
from samseg_monai.cli.predict import Trust
from samseg_monai.errors import ConfigError, visible_lines


def export(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle, or output_dir of a run")],
    format: Annotated[
        Literal["pth", "torch", "onnx", "samed", "peft"],
        typer.Option(
            help="pth: plain SAM in the official layout; torch: torch.export programs (.pt2); onnx; "
            "samed: SAMed's .pth; peft: an adapter for transformers' SamModel"
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", help="folder for the files and export.json, which explains them")
    ],
    sam_checkpoint: BaseWeights = None,
    size: Annotated[
        str | None, typer.Option(help="height,width of the slices of a rectangular network; default: its square")
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a trained network in another format, after its files were read back and compared with it.

    A network that the format cannot hold is refused with all reasons, and with the formats that are possible. Of the
    bundle its settings and its weights are read; its own JSON is not run, unless --trust says so.
    """
    check_places("export", {"BUNDLE": bundle})
    from samseg_monai.export import export_network, read_source

    words = (size or "").split(",")
    if size is not None and (len(words) != 2 or not all(word.strip().isdigit() for word in words)):
        raise ConfigError(f"--size: got {size!r}; give height,width in pixels, such as 700,1024")
    sides = None if size is None else (int(words[0]), int(words[1]))
    source = read_source(bundle, sam_checkpoint=sam_checkpoint, trust=trust)
    typer.echo(visible_lines(source.loaded))
    if source.warning:
        typer.echo(f"note: {source.warning}")
    done = export_network(source, format, output, size=sides)
    for difference in done.differences:
        typer.echo(str(difference))
    for path in done.files:
        typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
