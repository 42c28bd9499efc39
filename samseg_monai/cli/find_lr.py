"""``samseg find-lr``: try learning rates on a bundle's own network and data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.cli.places import Overlay, check_places, overlays, overrides_of
from samseg_monai.cli.predict import Trust
from samseg_monai.errors import ConfigError
from samseg_monai.workflow import run_workflow

# what a training does before its first step
BEFORE = (
    "$bundles.guard()",
    "$@network_def.load_base(@sam_checkpoint)",
    "$@train::dataset.fill(@network_def, device=@device)",
)


def find_lr(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle")],
    overlay: Overlay = None,
    start_lr: Annotated[float, typer.Option(help="rate of the first step")] = 1e-6,
    end_lr: Annotated[float, typer.Option(help="rate of the last step, unless the loss diverges before")] = 1.0,
    steps: Annotated[int, typer.Option(help="optimiser steps", min=10)] = 100,
    trust: Trust = False,
) -> None:
    """Try learning rates on a bundle's training data and suggest one; --KEY VALUE overrides a value of the bundle.

    Gradients are clipped and accumulated as in training; the schedule (warm-up, decay) is left out: the rate grows
    from step to step. Writes lr_finder.csv and lr_finder.png to the bundle's folder eval (--output_dir DIR changes it).
    Of the bundle its settings are read; its own JSON is not run, unless --trust says so.
    """
    check_places("find-lr", {"BUNDLE": bundle}, "; give the folder or ZIP of a bundle")
    if not 0 < start_lr < end_lr < math.inf:
        raise ConfigError(f"find-lr: 0 < start-lr < end-lr needed, got {start_lr:g} and {end_lr:g}")
    test = {
        "_target_": "samseg_monai.cli.range_test.range_test",
        **{name: f"@{name}" for name in ("network", "device", "output_dir", "lr", "accumulation_steps", "clip_norm")},
        "optimizer": "@train::optimizer",
        "loss": "@train::criterion",
        "loader": "@train::dataloader",
        "prepare_batch": "@train::trainer::prepare_batch",
        "start_lr": start_lr,
        "end_lr": end_lr,
        "steps": steps,
    }
    overrides = {"output_dir": str(bundle.absolute() / "eval"), **overrides_of(context.args)}
    if "--output_dir" not in {word.partition("=")[0] for word in context.args}:
        if bundle.is_file():
            raise ConfigError(f"find-lr: {bundle} is no folder that results could be written to; give --output_dir DIR")
        if (bundle / "eval").is_symlink():
            raise ConfigError(f"find-lr: {bundle / 'eval'} is a link, which can lead anywhere; give --output_dir DIR")
    from samseg_monai.bundles.door import open_bundle

    with open_bundle(bundle, trust=trust) as opened:
        opened.check()
        folder = opened.root / "configs"
        configs = [folder / "train.json", *overlays(folder, overlay or ())]
        run_workflow(configs, {**overrides, "run": [*BEFORE, test]}, echo=False)
