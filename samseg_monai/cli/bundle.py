"""``samseg bundle build|list|pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.cli.predict import TRUST
from samseg_monai.errors import WeightsError

bundle_app = typer.Typer(help="Build bundles from recipes and pack runs to share them.", no_args_is_help=True)


@bundle_app.command("list")
def list_recipes() -> None:
    """List the tasks and strategies that bundles can be built from."""
    from samseg_monai.bundles import recipe_names

    for kind in ("tasks", "strategies"):
        typer.echo(f"{kind}: {', '.join(recipe_names(kind))}")


@bundle_app.command("build")
def build(
    task: Annotated[str, typer.Option(help="name of a task recipe, or path of a .json file")],
    strategy: Annotated[str, typer.Option(help="name of a strategy recipe, or path of a .json file")],
    out: Annotated[Path, typer.Option(help="folder that will hold the bundle's folder")] = Path("bundles"),
) -> None:
    """Expand a task and a strategy into a complete MONAI bundle."""
    from samseg_monai.bundles import build_bundle

    typer.echo(str(build_bundle(task, strategy, out)))


@bundle_app.command("pack")
def pack(
    run: Annotated[Path, typer.Argument(help="output_dir of a training and its evaluation")],
    output: Annotated[Path, typer.Option(help="ZIP to write")],
    sam_checkpoint: Annotated[str | None, typer.Option(help="base weights, if not found by name")] = None,
    pt: Annotated[bool, typer.Option("--pt/--no-pt", help="write models/model.pt for MONAI's own loaders, too")] = True,
    with_package: Annotated[
        bool, typer.Option("--with-package", help="put a wheel of samseg-monai into it, for who has not installed it")
    ] = False,
    trust: Annotated[bool, typer.Option("--trust", help=TRUST)] = False,
) -> None:
    """Pack a run as one ZIP that predicts and evaluates alone, offline.

    The ZIP's configs are written from the run's settings. With --trust those of the run are packed as they are, edited
    by hand or not; a receiver then needs --trust, too.
    """
    from samseg_monai.bundles import pack_bundle

    try:
        path = pack_bundle(run, output, sam_checkpoint=sam_checkpoint, pt=pt, package=with_package, trust=trust)
    except WeightsError as error:
        raise WeightsError(
            f"pack: {error}\nHere sam_checkpoint is --sam-checkpoint FILE: the file that the training was given"
        ) from error
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
