"""``samseg reproduce honours``: a published experiment as one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.workflow import run_workflow

reproduce_app = typer.Typer(help="Repeat published experiments, protocol and all.", no_args_is_help=True)
RANKS = (64, 128, 256)


@reproduce_app.callback()
def _group() -> None:
    """Keep ``honours`` a named command while it is the only one."""


@reproduce_app.command("honours")
def honours(
    brats: Annotated[Path, typer.Option(help="folder of BraTS 2023 meningioma cases")],
    weights: Annotated[str, typer.Option(help="sam_vit_b_01ec64.pth, or 'random' for a dry run")],
    output: Annotated[Path, typer.Option(help="folder for datalist, runs and report")] = Path("runs/honours"),
    rank: Annotated[list[int] | None, typer.Option(help="LoRA ranks; default 64, 128 and 256")] = None,
    epochs: Annotated[int, typer.Option(help="epochs of each training", min=1)] = 50,
    split_file: Annotated[
        Path | None, typer.Option(help="JSON of case lists; default: 680 of 880 patients train")
    ] = None,
    autocast: Annotated[str | None, typer.Option(help="'bf16' for mixed precision; default fp32")] = None,
    checkpointing: Annotated[bool, typer.Option(help="recompute activations: less memory, more time")] = False,
    seed: Annotated[int, typer.Option(help="seed of split and training")] = 0,
) -> None:
    """LoRA of rank 64, 128, 256 in SAM ViT-B's encoder against zero-shot, on BraTS 2023 meningioma with boxes.

    138 x 202 centre crop, resized to 700 x 1024; the largest tumour slice of each training case; validation and test on
    all tumour slices with boxes from the ground truth; decoder frozen; Adam; Dice + cross-entropy; 50 epochs.
    The paper does not list its cases and had no test set apart: here the 200 held-out patients are divided, one half
    chooses the epoch, the other is reported.
    """
    from samseg_monai.bundles import build_bundle
    from samseg_monai.data.brats import prepare_brats_men

    ranks = rank or list(RANKS)
    datalist = output / "datalist.json"
    prepare_brats_men(brats, datalist, fractions=(0.772, 0.114, 0.114), split_file=split_file, seed=seed)
    bundles = {name: build_bundle("meningioma", name, output / "bundles") for name in ("zero_shot", "lora")}
    shared: dict[str, Any] = {
        "dataset_dir": str(brats), "datalist": str(datalist), "sam_checkpoint": weights, "seed": seed,
    }  # fmt: skip
    if autocast:
        shared["autocast"] = autocast
    if checkpointing:
        shared["checkpointing"] = True
    commands = [_run(bundles["zero_shot"], "evaluate", {**shared, "output_dir": str(output / "zero_shot")})]
    for value in ranks:
        run = {**shared, "output_dir": str(output / f"lora_rank{value}"), "strategy::rank": value}
        commands.append(_run(bundles["lora"], "train", {**run, "epochs": epochs}))
        commands.append(_run(bundles["lora"], "evaluate", run))
    _report(output, ranks, commands)


def _run(bundle: Path, config: str, overrides: dict[str, Any]) -> str:
    return run_workflow([bundle / "configs" / f"{config}.json"], overrides)


def _report(output: Path, ranks: list[int], commands: list[str]) -> None:
    from samseg_monai.report import RunResult, results_json, table_text, write_report

    zero_shot = output / "zero_shot" / "evaluation"
    runs = [
        RunResult.load(zero_shot, name="box_ellipse", cases="ellipse_cases.csv"),
        RunResult.load(zero_shot, name="zero_shot"),
    ]
    for value in ranks:
        folder = output / f"lora_rank{value}"
        history = (folder / "history.csv").resolve()
        label = f"LoRA, rank {value}"
        runs.append(RunResult.load(folder / "evaluation", name=f"lora_rank{value}", history=history, label=label))
    (output / "results.json").write_text(json.dumps(results_json(runs), indent=2) + "\n", encoding="utf-8")
    write_report(output / "report.html", title="LoRA in SAM's encoder for meningioma", runs=runs, commands=commands)
    typer.echo(table_text(runs))
    typer.echo(f"report: {output / 'report.html'}")
