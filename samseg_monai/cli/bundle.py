"""``samseg bundle build|list|pack|check``; the last is also ``samseg lint``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.cli.places import BaseWeights, check_places
from samseg_monai.cli.predict import Trust
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
    output: Annotated[Path, typer.Option("--output", "--out", help="folder that will hold the bundle's folder")] = Path(
        "bundles"
    ),
) -> None:
    """Expand a task and a strategy into a complete MONAI bundle."""
    from samseg_monai.bundles.build import compose, write_bundle
    from samseg_monai.bundles.words import next_words

    settings = compose(task, strategy)
    folder = write_bundle(settings, output / settings.name)
    typer.echo(f"{folder}\n{next_words(settings, folder)}")


@bundle_app.command("pack")
def pack(
    run: Annotated[Path, typer.Argument(help="output_dir of a training and its evaluation")],
    output: Annotated[Path, typer.Option("--output", "--out", help="ZIP to write")],
    sam_checkpoint: BaseWeights = None,
    pt: Annotated[bool, typer.Option("--pt/--no-pt", help="write models/model.pt for MONAI's own loaders, too")] = True,
    with_package: Annotated[
        bool, typer.Option("--with-package", help="put a wheel of samseg-monai into it, for who has not installed it")
    ] = False,
    cases: Annotated[
        bool, typer.Option("--cases/--no-cases", help="put the tables per case into it, which name the test cases")
    ] = True,
    trust: Trust = False,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="pack it though it was evaluated on cases that it has learnt from")
    ] = False,
) -> None:
    """Pack a run as one ZIP that predicts and evaluates alone, offline.

    The ZIP's configs are written from the run's settings. With --trust those of the run are packed as they are, edited
    by hand or not; a receiver then needs --trust, too.
    """
    check_places("pack", {"RUN": run}, "; give the output_dir of a run")
    from samseg_monai.bundles.pack import named_cases, pack_bundle

    try:
        path = pack_bundle(
            run,
            output,
            sam_checkpoint=sam_checkpoint,
            pt=pt,
            package=with_package,
            cases=cases,
            trust=trust,
            allow_seen=allow_seen,
        )
    except WeightsError as error:
        raise WeightsError(
            f"pack: {error}\nHere sam_checkpoint is --sam-checkpoint FILE: the file that the training was given"
        ) from error
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    for file, count in named_cases(path).items():
        names = "the name of 1 case" if count == 1 else f"the names of {count} cases"
        typer.echo(f"holds {names} in {file}; --no-cases leaves them out")


@bundle_app.command("check")
def check(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle", exists=True)],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for machines")] = False,
) -> None:
    """Compare a bundle with what this package writes from its settings; nothing of it is run.

    Do this before "python -m monai.bundle run" on a bundle from elsewhere, which evaluates its JSON. (samseg predict,
    export and find-lr do not: they write the configs anew.)

    Exit code 0: as built. 1: edited, or damaged; all differences are listed by key. 2: a wrong command line. 3: made by
    another version of samseg-monai, so that its JSON was not judged.
    """
    from samseg_monai import __version__
    from samseg_monai.bundles.check import ANOTHER_VERSION, AS_BUILT, EDITED, check_bundle

    verdict = check_bundle(bundle)
    code = {AS_BUILT: 0, EDITED: 1, ANOTHER_VERSION: 3}[verdict.answer]
    if as_json:
        typer.echo(json.dumps(asdict(verdict), indent=2))
        raise typer.Exit(code)
    typer.echo(f"{verdict.name}: {verdict.answer}")
    for problem in verdict.problems:
        typer.echo(f"  - {problem}")
    for line in verdict.code:
        typer.echo(line)
    if verdict.sums:
        typer.echo(f"the sums of {verdict.sums} files fit: nothing was damaged; they do not tell who sent it")
    if verdict.answer == AS_BUILT:
        typer.echo(f"every other file is what samseg-monai {__version__} writes from configs/settings.json")
    elif verdict.answer == EDITED:
        typer.echo("do not run its JSON (monai.bundle run, --trust) unless you know who made these changes")
    else:
        typer.echo(
            f"its JSON is from samseg-monai {verdict.engine}, which others write otherwise: not judged.\n"
            f"To do so: install samseg-monai {verdict.engine} in an environment of its own, by pip install . in its "
            "source folder, and run samseg bundle check there"
        )
    raise typer.Exit(code)
