"""``samseg report``: a page of evaluated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="evaluation folders (with run_card.json, metrics.json, cases.csv)")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="heading of the page")] = "samseg-monai report",
) -> None:
    """Make one page with table, figures and provenance of evaluated runs, and print the table."""
    from samseg_monai.report.page import write_report
    from samseg_monai.report.runs import RunResult
    from samseg_monai.report.tables import table_text

    results = [RunResult.load(folder) for folder in runs]
    write_report(output, title=title, runs=results)
    typer.echo(table_text(results))
    typer.echo(f"report: {output}")
