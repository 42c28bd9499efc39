"""``samseg lint``: every reason not to run a bundle, and the refusal of ``samseg predict`` that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.errors import BundleError, raise_all


def lint(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle", exists=True)],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for machines")] = False,
) -> None:
    """Look through a bundle for code, pickles, downloads and paths that lead out of it, without running any of it.

    Exit code 0: nothing was found; 1: findings, all of which are listed; 2: a wrong command line.
    """
    from samseg_monai import lint as linter

    findings = linter.lint_bundle(bundle)
    if as_json:
        typer.echo(linter.as_json(findings))
    elif findings:
        typer.echo(linter.as_table(findings))
    else:
        typer.echo(f"{bundle}: nothing found")
    if findings:
        raise typer.Exit(1)


def refuse_findings(bundle: Path, command: str) -> None:
    """Let a bundle pass only when the linter finds nothing.

    Raises:
        BundleError: with every finding, and the option of ``command`` that goes on regardless.
    """
    from samseg_monai.lint import as_lines, lint_bundle

    heading = f"{command}: {bundle} could do more than it should and is not run; give --trust if you know who made it"
    raise_all(as_lines(lint_bundle(bundle)), BundleError, heading)
