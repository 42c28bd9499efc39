"""What demos share: steps told in their order, results written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from samseg_monai.workflow import run_workflow

if TYPE_CHECKING:
    from samseg_monai.report.montage import OverlayCase
    from samseg_monai.report.runs import RunResult


class Story:
    """Steps of a demo, told on stderr as they begin; ``commands`` are shell lines that do the same."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def step(self, what: str, command: str) -> None:
        """Tell what begins now; ``command`` is the shell line of a step that the caller does itself."""
        typer.echo(f"\n== {len(self.commands) + 1}. {what}", err=True)
        self.commands.append(command)

    def phantoms(self, kind: str, write: Callable[..., Any], output: Path, cases: int, seed: int) -> Path:
        """Tell and draw ``cases`` labelled phantoms and an unlabelled one by ``write``: ``samseg phantom KIND``."""
        data = output / "phantoms"
        told = f"samseg phantom {kind} --cases {cases} --unlabelled 1 --seed {seed} --output {data}"
        self.step(f"phantoms: {cases} labelled, 1 unlabelled", told)
        write(data, cases, seed=seed, unlabelled=1, progress=True)
        return data

    def run(self, what: str, configs: Sequence[Path], overrides: dict[str, Any]) -> None:
        """Tell and run a workflow of a bundle; raises as ``run_workflow``."""
        typer.echo(f"\n== {len(self.commands) + 1}. {what}", err=True)
        self.commands.append(run_workflow(configs, overrides))

    def evaluate_demo(self, what: str, configs: Path, overrides: dict[str, Any]) -> None:
        """Evaluate with a bundle's demo settings, predictions saved."""
        self.run(
            what, [configs / name for name in ("evaluate.json", "demo.json")], {**overrides, "save_predictions": True}
        )

    def pack_and_predict(
        self, run: Path, archive: Path, cases: Path, *, boxes: Path | None = None, weights: str | None = None
    ) -> None:
        """Pack ``run`` as ``archive`` and segment unlabelled ``cases`` with it, into "predictions" beside the ZIP.

        ``boxes`` is the JSON of their prompts, ``weights`` the file of base weights that the package does not have.
        """
        from samseg_monai.bundles import pack_bundle
        from samseg_monai.cli.predict import predict

        given = "" if weights is None else f" --sam-checkpoint {weights}"
        self.step("pack", f"samseg bundle pack {run} --output {archive}{given}")
        pack_bundle(run, archive, sam_checkpoint=weights)
        output, prompts = archive.with_name("predictions"), "" if boxes is None else f" --boxes {boxes}"
        command = f"samseg predict {archive} --input {cases}{prompts} --output {output}"
        self.step("predict the unlabelled case with the packed bundle", command)
        predict(archive, input=cases, output=output, boxes=boxes)


def write_results(
    output: Path,
    runs: Sequence[RunResult],
    *,
    title: str,
    commands: Sequence[str],
    montage: Sequence[OverlayCase] = (),
    notes: Mapping[str, str] | None = None,
    organs: bool = False,
) -> str:
    """Write ``results.json``, ``results.csv`` and ``report.html``, and return the table as text.

    With ``organs`` it is the table of the eight organs, with quoted rows, which ``organs.json`` holds, too. Raises
    BundleError for runs that cannot stand in one table.
    """
    from samseg_monai.files import write_json
    from samseg_monai.report import tables
    from samseg_monai.report.organs import organ_table, organs_json, organs_text
    from samseg_monai.report.page import write_report

    table = organ_table(runs) if organs else None
    tables.write_results(output / "results.json", runs)
    if table is not None:
        write_json(output / "organs.json", organs_json(table))
    page = output / "report.html"
    write_report(page, title=title, runs=runs, montage=montage, commands=commands, notes=notes, organs=table)
    return tables.table_text(runs) if table is None else organs_text(table)
