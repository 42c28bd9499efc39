"""``samseg reproduce honours | sam-lst``: a published experiment as one command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.outputs import folder_to_write
from samseg_monai.data import BRATS_SCANS
from samseg_monai.demo.story import Story, write_results
from samseg_monai.errors import ConfigError, raise_all

reproduce_app = typer.Typer(help="Repeat published experiments, protocol and all.", no_args_is_help=True)
RANKS = (64, 128, 256)  # of the first experiment; what follows is of the second
PAPER = ("zero_shot", "sam_only", "cnn_only", "ladder_paper")
REPAIRED = "ladder"
CHOOSING = 3  # patients that choose the epoch of the repaired ladder where --validation names no other number
INTERVAL = 10  # epochs between validations: the published 200 epochs are validated 20 times
STORED = 224
BATCH, EPOCHS, WARMUP = 24, 200, 250
OutputFolder = Annotated[
    Path, typer.Option("--output", "--out", callback=folder_to_write, help="folder for datalists, runs and report")
]


@reproduce_app.command("honours")
def honours(
    brats: Annotated[Path, typer.Option(help="folder of BraTS 2023 meningioma cases")],
    weights: Annotated[str, typer.Option(help="sam_vit_b_01ec64.pth, or 'random' for a dry run")],
    output: OutputFolder = Path("runs/honours"),
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
    seed: Annotated[int, typer.Option(help="seed of split and training", min=0, max=2**32 - 1)] = 0,
) -> None:
    """LoRA of rank 64, 128, 256 in SAM ViT-B's encoder against zero-shot, on BraTS 2023 meningioma with boxes.

    138 x 202 centre crop, resized to 700 x 1024; the largest tumour slice of each training case; validation and test on
    all tumour slices with boxes from the ground truth; decoder frozen; Adam; Dice + cross-entropy; 50 epochs.
    The paper does not list its cases and had no test set apart: here the 200 held-out patients are divided, one half
    chooses the epoch, the other is reported. Given again after an interruption, the command keeps finished trainings.
    """
    from samseg_monai.bundles import build_bundle
    from samseg_monai.data.datalists.brats import prepare_brats_men
    from samseg_monai.report.runs import RunResult

    ranks, scans = rank or list(RANKS), list(dict.fromkeys(scan or BRATS_SCANS))
    unknown = [f"--scan {name}: choose from {', '.join(BRATS_SCANS)}" for name in scans if name not in BRATS_SCANS]
    raise_all(unknown, ConfigError, "These scans are not BraTS's")
    datalist = output / "datalist.json"
    parts = None if split_file else (0.772, 0.114, 0.114)
    summary = prepare_brats_men(brats, datalist, fractions=parts, split_file=split_file, seed=seed, num_threads=4)
    typer.echo("\n".join(summary.lines()))
    configs = {n: build_bundle("meningioma", n, output / "bundles") / "configs" for n in ("zero_shot", "lora")}
    shared: dict[str, Any] = {
        "dataset_dir": str(brats), "datalist": str(datalist), "sam_checkpoint": weights, "seed": seed,
        "scans": scans,
    }  # fmt: skip
    shared |= ({"autocast": autocast} if autocast else {}) | ({"checkpointing": True} if checkpointing else {})
    story = Story()
    run = {**shared, "output_dir": str(output / "zero_shot")}
    story.run("zero-shot: evaluate", [configs["zero_shot"] / "evaluate.json"], run)
    for value in ranks:
        run = {**shared, "output_dir": str(output / f"lora_rank{value}"), "strategy::rank": value}
        what = f"LoRA, rank {value}"
        story.train(f"{what}: train", [configs["lora"] / "train.json"], {**run, "epochs": epochs})
        story.run(f"{what}: evaluate", [configs["lora"] / "evaluate.json"], run)
    found = output / "zero_shot" / "evaluation"
    runs = [
        RunResult.load(found, name="box_ellipse", cases="ellipse_cases.csv"),
        RunResult.load(found, name="zero_shot"),
    ]
    for value in ranks:
        name = f"lora_rank{value}"
        runs.append(RunResult.load(output / name / "evaluation", name=name, label=f"LoRA, rank {value}"))
    typer.echo(write_results(output, runs, title="LoRA in SAM's encoder for meningioma", commands=story.commands))
    typer.echo(f"report: {output / 'report.html'}")


@reproduce_app.command("sam-lst")
def sam_lst(
    synapse: Annotated[Path, typer.Option(help="BTCV's RawData, or the folder in it that holds img and label")],
    weights: Annotated[str, typer.Option(help="sam_vit_b_01ec64.pth, or 'random' for a dry run")],
    resnet: Annotated[str, typer.Option(help="torchvision's resnet18-f37072fd.pth, or 'random' for a dry run")],
    output: OutputFolder = Path("runs/sam_lst"),
    only: Annotated[
        list[str] | None, typer.Option(help=f"run only this one of {', '.join(PAPER)}; may be given several times")
    ] = None,
    repaired: Annotated[
        bool, typer.Option("--repaired", help=f"train the repaired ladder, too; {CHOOSING} patients choose its epoch")
    ] = False,
    epochs: Annotated[int, typer.Option(help="epochs of each training", min=1)] = EPOCHS,
    batch_size: Annotated[int, typer.Option(help="slices of a step", min=1)] = BATCH,
    accumulation: Annotated[
        int, typer.Option(help="steps whose gradients are added up: 4 with --batch-size 6 is batch 24", min=1)
    ] = 1,
    validation: Annotated[
        int, typer.Option(help="of the 18 patients that many choose the epoch; 0: the last one, as published", min=0)
    ] = 0,
    label_coding: Annotated[str, typer.Option(help="btcv13 as published; samed, merit, transunet")] = "btcv13",
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="go on without missing cases")] = False,
    cache_embeddings: Annotated[
        Path | None, typer.Option(help="folder: SAM's encoder sees each look at a slice once, not in every epoch")
    ] = None,
    variants: Annotated[
        int | None, typer.Option(help="looks per slice; default 8 with cached embeddings, else without end", min=1)
    ] = None,
    autocast: Annotated[str | None, typer.Option(help="'bf16' for mixed precision; default fp32")] = None,
    seed: Annotated[
        int, typer.Option(help="seed of trainings and of the choice of validation patients", min=0, max=2**32 - 1)
    ] = 1234,
) -> None:
    """SAM-LST on Synapse: the ladder as published, CNN only, SAM only and no fine-tuning, under both sets of rules.

    18 cases to train, 12 to test; slices stored at 224, network at 512; the published augmentation, drawn anew in every
    epoch; 0.2 cross-entropy + 0.8 Dice; AdamW; batch 24; 200 epochs, of which the last is kept. Nothing but the final
    evaluation sees the test cases. Given again after an interruption, the command keeps finished trainings.
    """
    names = _chosen(only, repaired)
    plan = _Plan(
        output, resnet, validation, cache_embeddings, variants,
        shared={
            "dataset_dir": str(synapse), "sam_checkpoint": weights, "seed": seed, "batch_size": batch_size,
            **({"autocast": autocast} if autocast else {}),
        },
        training={"epochs": epochs, "accumulation_steps": accumulation},
    )  # fmt: skip
    story = Story()
    _prepare(story, plan, names, label_coding, allow_missing=allow_missing)
    for name in names:
        _run(story, name, plan)
    typer.echo(_report(plan, names, story.commands))
    typer.echo(f"report: {output / 'report.html'}")


@dataclass(frozen=True)
class _Plan:
    """What the command line asks of every run; ``shared`` and ``training`` are overrides of configs."""

    output: Path
    resnet: str
    validation: int
    cache: Path | None
    variants: int | None
    shared: dict[str, Any]
    training: dict[str, Any]

    def choosing(self, name: str) -> int:
        """Patients that choose the epoch of a run."""
        return self.validation or (CHOOSING if name == REPAIRED else 0)

    def datalist(self, count: int) -> Path:
        """Datalist with ``count`` patients to validate."""
        return self.output / (f"datalist_validation{count}.json" if count else "datalist.json")

    def evaluation(self, name: str) -> dict[str, Any]:
        """Overrides of the evaluation, and of the training, too."""
        found = {**self.shared, "datalist": str(self.datalist(self.choosing(name)))}
        found["output_dir"] = str(self.output / name)
        if name == "zero_shot":
            found["store_size"] = STORED  # its slices go the way of the others
            found["strategy::random_masks"] = True  # table II has this row of noise
        if self.cache is not None and name != "cnn_only":  # which has no encoder whose output could be stored
            found["embeddings::cache_dir"] = str(self.cache)
        return found

    def fitting(self, name: str) -> dict[str, Any]:
        """Overrides of the training."""
        from samseg_monai.data.slices import DEFAULT_VARIANTS

        found = {**self.evaluation(name), **self.training}
        if name != "sam_only":
            found["strategy::side_weights"] = self.resnet
        if self.variants is not None or self.cache is not None:  # cnn_only gets as many looks as the others
            found["embeddings::variants"] = self.variants or DEFAULT_VARIANTS
        if self.choosing(name):
            found["val_interval"] = INTERVAL
        if self.training["epochs"] < EPOCHS:  # or the warm-up of a dry run would outlast it
            found["schedule::warmup"] = WARMUP * (self.training["epochs"] - 1) // EPOCHS
        return found

    def departures(self) -> list[str]:
        """In what these runs are not the published ones."""
        found = []
        batch = self.shared["batch_size"] * self.training["accumulation_steps"]
        if "random" in (self.shared["sam_checkpoint"], self.resnet):
            found.append("a dry run: weights that should be trained are random, and the scores mean nothing")
        if self.training["epochs"] != EPOCHS:
            shorter = ", and a warm-up shortened with them" if self.training["epochs"] < EPOCHS else ""
            found.append(f"{self.training['epochs']} epochs, not {EPOCHS}{shorter}")
        if batch != BATCH:
            found.append(f"batch {batch}, not {BATCH}")
        if self.variants is not None or self.cache is not None:
            looks = self.fitting("ladder_paper")["embeddings::variants"]
            found.append(f"{looks} augmented looks per slice, taken in turn, not a new one in every epoch")
        if "autocast" in self.shared:
            found.append(f"mixed precision ({self.shared['autocast']}), not float32")
        if self.validation:
            found.append(
                f"{self.validation} of the 18 patients choose the epoch; published: all train, the last counts"
            )
        return found


def _chosen(only: Sequence[str] | None, repaired: bool) -> list[str]:
    if unknown := [name for name in only or () if name not in PAPER]:
        raise ConfigError(
            f"--only: got {', '.join(unknown)}; choose among {', '.join(PAPER)} (for the repaired ladder: --repaired)"
        )
    return [name for name in PAPER if not only or name in only] + ([REPAIRED] if repaired else [])


def _prepare(story: Story, plan: _Plan, names: Sequence[str], label_coding: str, *, allow_missing: bool) -> None:
    from samseg_monai.data.datalists.synapse import prepare_synapse

    src, seed = plan.shared["dataset_dir"], plan.shared["seed"]
    for count in sorted({plan.choosing(name) for name in names}):
        datalist = plan.datalist(count)
        command = f"samseg prepare synapse --src {src} --output {datalist} --label-coding {label_coding}"
        command += f" --validation {count} --seed {seed}" + (" --allow-missing" if allow_missing else "")
        story.step(f"datalist with {count} patients to validate", command)
        prepare_synapse(
            src, datalist, label_coding=label_coding, validation=count, allow_missing=allow_missing, seed=seed
        )


def _run(story: Story, name: str, plan: _Plan) -> None:
    """Train, where there is something to train, and evaluate."""
    from samseg_monai.bundles import build_bundle

    configs = build_bundle("abdomen", name, plan.output / "bundles") / "configs"
    if name != "zero_shot":
        story.train(f"{name}: train", [configs / "train.json"], plan.fitting(name))
    story.run(f"{name}: evaluate", [configs / "evaluate.json"], plan.evaluation(name))


def _report(plan: _Plan, names: Sequence[str], commands: Sequence[str]) -> str:
    from samseg_monai.report.runs import RunResult

    labels = {REPAIRED: "Ladder, repaired", "zero_shot": "No fine-tuning (random masks)"}
    runs = [RunResult.load(plan.output / name / "evaluation", name=name, label=labels.get(name)) for name in names]
    departures = plan.departures()
    notes = {"Not as published": "; ".join(departures) + "."} if departures else {}
    if REPAIRED in names:
        notes["Ladder, repaired"] = (
            "Mask tokens and hyper-networks start from SAM's own and learn, the augmentation does not mirror, and "
            f"{plan.choosing(REPAIRED)} of the 18 patients choose the epoch."
        )
    return write_results(
        plan.output,
        runs,
        title="SAM-LST: a CNN ladder beside SAM on Synapse",
        commands=commands,
        notes=notes,
        organs=True,
    )
