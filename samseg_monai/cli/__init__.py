"""The command ``samseg``: prepare data, build and pack bundles, predict, and show it all in one demo.

Training and evaluation stay ``python -m monai.bundle run``, but for that of two bundles one after the other
(``cascade``). Exit code 0: done; 1: an error in data, weights or files, or a fault of the machine, told in words; 2: a
wrong command line; 130 and 143: interrupted by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from samseg_monai import __version__
from samseg_monai.cli.bench import bench, train_cost
from samseg_monai.cli.boxes import boxes_app
from samseg_monai.cli.bundle import bundle_app, check
from samseg_monai.cli.cascade import cascade
from samseg_monai.cli.compare import compare
from samseg_monai.cli.data import bbox, phantom_app, prepare_app
from samseg_monai.cli.export import export
from samseg_monai.cli.find_lr import find_lr
from samseg_monai.cli.info import info
from samseg_monai.cli.predict import predict
from samseg_monai.cli.report import report
from samseg_monai.cli.task import task_app
from samseg_monai.demo.command import demo
from samseg_monai.errors import ConfigError, log_visibly
from samseg_monai.faults import end_like_ctrl_c, explain
from samseg_monai.workflow import import_quickly

app = typer.Typer(
    name="samseg",
    help="Fine-tune the Segment Anything Model for medical images, as MONAI bundles.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(prepare_app, name="prepare")
app.command(name="bbox")(bbox)
app.add_typer(phantom_app, name="phantom")
app.add_typer(task_app, name="task")
app.add_typer(bundle_app, name="bundle")
app.add_typer(boxes_app, name="boxes")
app.command(name="predict")(predict)
app.command(name="cascade")(cascade)
app.command(name="lint", help="The same as samseg bundle check.", hidden=True)(check)
app.command(name="export")(export)
app.command(name="report")(report)
app.command(name="compare")(compare)
app.command(name="demo")(demo)
overridable = {"allow_extra_args": True, "ignore_unknown_options": True}  # --KEY VALUE of a bundle
app.command(name="find-lr", context_settings=overridable)(find_lr)
app.command(name="train-cost", context_settings=overridable)(train_cost)
app.command(name="bench", context_settings=overridable)(bench)
app.command(name="info")(info)


@app.command(name="reproduce", hidden=True, context_settings=overridable)
def _reproduce() -> None:
    """Name what took the place of this command."""
    raise ConfigError(
        "samseg reproduce became plans: samseg compare honours --dataset-dir DIR --output DIR, and samseg compare "
        "sam_lst with the same options; data are prepared by samseg prepare, and SAM's weights are looked for as in "
        "every training"
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"samseg-monai {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    # options of ``samseg`` itself; the help text stands in ``app``
    return


def main() -> None:
    """Run the command line; what a person can act on ends it with one text, without a traceback."""
    end_like_ctrl_c()
    log_visibly()
    import_quickly()
    try:
        try:
            _refuse_nothing(sys.argv[1:])
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as in `samseg ... | head`
        _leave_stdout()
        sys.exit(1)
    except BaseException as error:
        told = explain(error)
        if told is None:
            raise
        typer.echo(told.text, err=True)
        try:
            sys.stdout.flush()
        except OSError:
            _leave_stdout()
        sys.exit(told.code)


def _leave_stdout() -> None:
    """Let Python end without one more try to write what nobody takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_nothing(words: Sequence[str]) -> None:
    """Refuse an empty word, as of a variable of the shell that is not set: as a path it means the current folder."""
    for before, word in zip(("", *words), words, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            where = f" behind {before}" if not word and before.startswith("-") else f" ({word})" if word else ""
            typer.echo(f"an argument is empty{where}; is a variable of the shell not set?", err=True)
            sys.exit(2)
