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
    """Make one page with table, figures and provenance of evaluated runs, and print the table.

    The numbers are written beside it, too, as JSON and CSV. Several training seeds of one strategy are rows of their
    own.
    """
    from samseg_monai.report.page import write_report
    from samseg_monai.report.runs import RunResult, by_seed
    from samseg_monai.report.tables import table_text, write_results

    results = by_seed([RunResult.load(folder) for folder in runs])
    write_report(output, title=title, runs=results)
    numbers = output.with_name(f"{output.stem}_results.json")
    write_results(numbers, results)
    typer.echo(table_text(results))
    typer.echo(f"report: {output}   numbers: {numbers}, {numbers.with_suffix('.csv').name}")
