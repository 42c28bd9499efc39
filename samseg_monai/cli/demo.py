"""``samseg demo``: the whole story on phantoms with pico SAM, in minutes; ``samseg report``: a page of runs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from samseg_monai.cli.overlays import overlay_cases
from samseg_monai.cli.workflow import run_workflow

TASK = "meningioma"
FRACTIONS = (0.6, 0.1, 0.3)  # of the phantoms, to train, choose the epoch and test
NOTE = (
    "Every number here comes from generated phantoms and from pico, a network of two million parameters that this "
    "project trained on drawn shapes. It shows that the pipeline works and learns. It says nothing about SAM or about "
    "patients."
)


def demo(
    output: Annotated[Path, typer.Option(help="folder for phantoms, runs and the report")] = Path("demo"),
    cases: Annotated[int, typer.Option(help="labelled phantoms", min=8)] = 44,
    epochs: Annotated[
        int | None, typer.Option(help="epochs of the LoRA training; default: the bundle's demo.json")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of phantoms, split and training")] = 0,
) -> None:
    """Generate phantoms, evaluate zero-shot, train and evaluate LoRA, pack, predict an unlabelled case, report."""
    began = time.monotonic()
    commands: list[str] = []
    shutil.rmtree(output / "runs", ignore_errors=True)  # a finished training would refuse to be trained again
    bundles = _bundles(output)
    data = _phantoms(output, cases, seed, commands)
    runs = {name: output / "runs" / name for name in ("zero_shot", "lora")}
    shared: dict[str, Any] = {"dataset_dir": str(data), "seed": seed}

    _say(commands, "zero-shot: evaluate")
    commands.append(_evaluate(bundles["zero_shot"], runs["zero_shot"], shared))
    _say(commands, "LoRA: train")
    configs = [bundles["lora"] / "configs" / name for name in ("train.json", "demo.json")]
    training = {**shared, "output_dir": str(runs["lora"]), **({} if epochs is None else {"epochs": epochs})}
    commands.append(run_workflow(configs, training))
    _say(commands, "LoRA: evaluate")
    commands.append(_evaluate(bundles["lora"], runs["lora"], shared))
    _pack_and_predict(output, runs["lora"], data, seed, commands)
    results = _write_report(output, runs, data, commands)
    typer.echo("\nCommands of this demo:\n" + "\n".join(f"  {command}" for command in commands))
    typer.echo(f"\n{results}\nreport: {output / 'report.html'}   numbers: {output / 'results.json'}")
    typer.echo(f"took {time.monotonic() - began:.0f} s")


def _say(commands: list[str], what: str) -> None:
    typer.echo(f"\n== {len(commands) + 1}. {what}", err=True)


def _bundles(output: Path) -> dict[str, Path]:
    from samseg_monai.bundles import build_bundle

    return {name: build_bundle(TASK, name, output / "bundles") for name in ("zero_shot", "lora")}


def _phantoms(output: Path, cases: int, seed: int, commands: list[str]) -> Path:
    from samseg_monai.data.brats import prepare_brats_men
    from samseg_monai.data.phantoms import write_brats_cases

    data = output / "phantoms"
    _say(commands, f"phantoms: {cases} labelled, 1 unlabelled")
    commands.append(f"samseg phantom brats --cases {cases} --unlabelled 1 --seed {seed} --output {data}")
    write_brats_cases(data, cases, seed=seed, unlabelled=1, progress=True)
    _say(commands, "datalist, split by patient")
    parts = ",".join(map(str, FRACTIONS))
    commands.append(
        f"samseg prepare brats-men --src {data} --output {data / 'datalist.json'} --fractions {parts} --seed {seed}"
    )
    prepare_brats_men(data, data / "datalist.json", fractions=FRACTIONS, seed=seed)
    return data


def _evaluate(bundle: Path, run: Path, shared: dict[str, Any]) -> str:
    configs = [bundle / "configs" / name for name in ("evaluate.json", "demo.json")]
    return run_workflow(configs, {**shared, "output_dir": str(run), "save_predictions": True})


def _pack_and_predict(output: Path, run: Path, data: Path, seed: int, commands: list[str]) -> None:
    """Pack the run, unpack the ZIP as its receiver would, and segment the unlabelled case with boxes from a person."""
    from samseg_monai.bundles import pack_bundle
    from samseg_monai.cli.bundle import predict

    archive = output / f"{TASK}_segmentation_lora.zip"
    _say(commands, "pack")
    commands.append(f"samseg bundle pack {run} --output {archive}")
    pack_bundle(run, archive)
    _say(commands, "predict the unlabelled case with the packed bundle")
    unlabelled = data / "unlabelled"
    boxes = output / "boxes.json"
    boxes.write_text(json.dumps(_drawn_boxes(unlabelled, seed), indent=1), encoding="utf-8")
    commands.append(f"samseg predict {archive} --input {unlabelled} --boxes {boxes} --output {output / 'predictions'}")
    predict(archive, input=unlabelled, output=output / "predictions", boxes=boxes)


def _drawn_boxes(folder: Path, seed: int) -> dict[str, Any]:
    """Stand in for a person: one loose box over the range of slices where the (unwritten) label of a phantom lies."""
    from samseg_monai.data.phantoms import make_case

    found = {}
    for case in sorted(p.name for p in folder.iterdir() if p.is_dir()):
        where = np.argwhere(make_case([seed, int(case.split("-")[2])])["seg"] > 0)
        low, high = where.min(0), where.max(0)
        margin = np.maximum(1, (high - low) // 10)
        box = [int(v) for v in (*(low - margin)[:2].clip(0), *(high + margin)[:2])]
        found[case] = [{"slices": [int(low[2]), int(high[2])], "box": box}]
    return found


def _write_report(output: Path, runs: dict[str, Path], data: Path, commands: list[str]) -> str:
    from samseg_monai.data.datalists import load_datalist
    from samseg_monai.report import RunResult, results_json, table_text, write_report

    folders = {name: run / "evaluation" for name, run in runs.items()}
    history = runs["lora"] / "history.csv"
    results = [
        RunResult.load(folders["zero_shot"], name="box_ellipse", cases="ellipse_cases.csv"),
        RunResult.load(folders["zero_shot"], name="zero_shot"),
        RunResult.load(folders["lora"], name="lora", history=history.resolve()),
    ]
    montage = overlay_cases(results[2], folders, load_datalist(data / "datalist.json", data, "testing"))
    (output / "results.json").write_text(json.dumps(results_json(results), indent=2) + "\n", encoding="utf-8")
    write_report(
        output / "report.html",
        title="samseg-monai demo: box-prompted tumour segmentation",
        runs=results,
        montage=montage,
        commands=commands,
        notes={"What this is": NOTE},
    )
    return table_text(results)


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
    typer.echo(table_text(results))
    typer.echo(f"report: {output}")
