"""``samseg report``: a page of evaluated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.errors import visible_lines


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="evaluation folders (with run_card.json, metrics.json, cases.csv)")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="heading of the page")] = "samseg-monai report",
) -> None:
    """Make one page with table, figures and provenance of evaluated runs, and print the table."""
    from samseg_monai.report import RunResult, table_text, write_report

    results = [RunResult.load(folder) for folder in runs]
    write_report(output, title=title, runs=results)
    typer.echo(visible_lines(table_text(results)))
    typer.echo(f"report: {output}")
