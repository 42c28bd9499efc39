"""``samseg bundle check``, also ``samseg lint``: whether a bundle's own JSON may be run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


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
    if as_json:
        typer.echo(json.dumps(asdict(verdict), indent=2))
        raise typer.Exit({AS_BUILT: 0, EDITED: 1, ANOTHER_VERSION: 3}[verdict.answer])
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
        raise typer.Exit(1)
    else:
        typer.echo(
            f"its JSON is from samseg-monai {verdict.engine}, which others write otherwise: not judged.\n"
            f"To do so: install samseg-monai {verdict.engine} in an environment of its own, by pip install . in its "
            "source folder, and run samseg bundle check there"
        )
        raise typer.Exit(3)
