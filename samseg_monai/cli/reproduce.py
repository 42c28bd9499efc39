"""``samseg reproduce honours | sam-lst``: a published experiment as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.reproduce_sam_lst import sam_lst
from samseg_monai.data import BRATS_SCANS
from samseg_monai.demo.story import Story, write_results
from samseg_monai.errors import ConfigError, raise_all

reproduce_app = typer.Typer(help="Repeat published experiments, protocol and all.", no_args_is_help=True)
reproduce_app.command("sam-lst")(sam_lst)
RANKS = (64, 128, 256)


@reproduce_app.command("honours")
def honours(
    brats: Annotated[Path, typer.Option(help="folder of BraTS 2023 meningioma cases")],
    weights: Annotated[str, typer.Option(help="sam_vit_b_01ec64.pth, or 'random' for a dry run")],
    output: Annotated[Path, typer.Option(help="folder for datalist, runs and report")] = Path("runs/honours"),
    rank: Annotated[list[int] | None, typer.Option(help="LoRA ranks; default 64, 128 and 256")] = None,
    scan: Annotated[
        list[str] | None,
        typer.Option(help=f"MRI contrasts that are averaged; default {', '.join(BRATS_SCANS)}"),
    ] = None,
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
    chooses the epoch, the other is reported. Given again after an interruption, the command keeps finished trainings.
    """
    from samseg_monai.bundles import build_bundle
    from samseg_monai.data.datalists.brats import prepare_brats_men

    ranks, scans = rank or list(RANKS), list(dict.fromkeys(scan or BRATS_SCANS))
    unknown = [f"--scan {name}: choose from {', '.join(BRATS_SCANS)}" for name in scans if name not in BRATS_SCANS]
    raise_all(unknown, ConfigError, "These scans are not BraTS's")
    datalist = output / "datalist.json"
    prepare_brats_men(brats, datalist, fractions=(0.772, 0.114, 0.114), split_file=split_file, seed=seed, num_threads=4)
    configs = {n: build_bundle("meningioma", n, output / "bundles") / "configs" for n in ("zero_shot", "lora")}
    shared: dict[str, Any] = {
        "dataset_dir": str(brats), "datalist": str(datalist), "sam_checkpoint": weights, "seed": seed,
        "scans": scans,
    }  # fmt: skip
    if autocast:
        shared["autocast"] = autocast
    if checkpointing:
        shared["checkpointing"] = True
    story = Story()
    run = {**shared, "output_dir": str(output / "zero_shot")}
    story.run("zero-shot: evaluate", [configs["zero_shot"] / "evaluate.json"], run)
    for value in ranks:
        run = {**shared, "output_dir": str(output / f"lora_rank{value}"), "strategy::rank": value}
        what = f"LoRA, rank {value}"
        story.train(f"{what}: train", [configs["lora"] / "train.json"], {**run, "epochs": epochs})
        story.run(f"{what}: evaluate", [configs["lora"] / "evaluate.json"], run)
    typer.echo(_report(output, ranks, story.commands))
    typer.echo(f"report: {output / 'report.html'}")


def _report(output: Path, ranks: list[int], commands: list[str]) -> str:
    from samseg_monai.report.runs import RunResult

    zero_shot = output / "zero_shot" / "evaluation"
    runs = [
        RunResult.load(zero_shot, name="box_ellipse", cases="ellipse_cases.csv"),
        RunResult.load(zero_shot, name="zero_shot"),
    ]
    for value in ranks:
        folder = output / f"lora_rank{value}"
        label = f"LoRA, rank {value}"
        runs.append(RunResult.load(folder / "evaluation", name=f"lora_rank{value}", label=label))
    return write_results(output, runs, title="LoRA in SAM's encoder for meningioma", commands=commands)
