"""A learning-rate range test (Smith 2017, arXiv:1506.01186) with the parts of a training.

The rate grows from step to step, by a constant factor; where the loss falls fastest lies a good one. MONAI's
``LearningRateFinder`` does the steps. It knows one input and one rate: a wrapper hands our network its boxes or
embeddings, and groups of parameters keep the ratios of their rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from monai.optimizers import LearningRateFinder
from torch import Tensor, nn

from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.handlers.steps import optimised
from samseg_monai.metrics.rows import write_table
from samseg_monai.report.figures import write_lr_curve
from samseg_monai.training.losses import judged_slices

TABLE, CURVE = "lr_finder.csv", "lr_finder.png"
SMOOTHING = 0.2  # weight of the newest loss in the running mean
FEWEST = 5  # steps before the loss diverges


def range_test(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    loader: Any,
    prepare_batch: Callable[..., tuple[Any, ...]],
    *,
    device: torch.device | str,
    output_dir: str,
    lr: float,
    start_lr: float,
    end_lr: float,
    steps: int,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
) -> float:
    """Run the test, write its table and curve, and leave network and optimiser as they were.

    All but the schedule is of the training: the test is one, and the rate it suggests is that which warm-up leads to.

    Args:
        output_dir: folder of ``lr_finder.csv`` and ``lr_finder.png``, made if need be.
        lr: the rate of the config, shown in the curve; groups of ``optimizer`` keep their ratio to it.
        start_lr, end_lr, steps: first and last rate and the number of steps between them.
    Returns: the rate where the smoothed loss falls most steeply.
    Raises: ConfigError where ``lr`` is not above 0; TrainingError where the loss fell nowhere, or never was finite, or
        no pixel of any batch counts in it.
    """
    if not lr > 0:
        raise ConfigError(f"find-lr: lr must be above 0, got {lr:g}: the rates of parts are told as multiples of it")
    ratios = [group["lr"] / lr for group in optimizer.param_groups]

    def before_step(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for group, ratio in zip(stepping.param_groups, ratios, strict=True):
            group["lr"] *= ratio  # set anew before the next step
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(optimised(stepping), clip_norm)

    def inputs_of(batch: Any) -> tuple[Any, ...]:
        image, _, args, kwargs = prepare_batch(batch, device, False)
        return image, args, kwargs

    hook = optimizer.register_step_pre_hook(before_step)
    criterion: Any = partial(_finite, loss)
    finder = _Finder(_OneInput(network), optimizer, criterion, device=device)
    try:
        finder.range_test(
            loader,
            image_extractor=inputs_of,
            start_lr=start_lr,
            end_lr=end_lr,
            num_iter=steps,
            smooth_f=SMOOTHING,
            accumulation_steps=accumulation_steps,
            auto_reset=False,
        )
    finally:
        finder.reset()
        hook.remove()
    return _conclude(finder, Path(output_dir), lr)


def _conclude(finder: Any, folder: Path, lr: float) -> float:
    """Write the table and the curve, tell where they are, and return the suggestion."""
    finite = [pair for pair in zip(finder.history["lr"], finder.history["loss"], strict=True) if math.isfinite(pair[1])]
    finder.history = {"lr": [rate for rate, _ in finite], "loss": [value for _, value in finite]}
    rows = [{"learning_rate": rate, "smoothed_loss": value} for rate, value in finite]
    write_table(rows, folder / TABLE, ("learning_rate", "smoothed_loss"))
    if len(finite) < FEWEST:
        raise TrainingError(
            f"find-lr: the loss was finite for {len(finite)} steps only; begin with a smaller --start-lr, and look for "
            "NaN or constant images"
        )
    suggested, _ = finder.get_steepest_gradient()
    falls = min(np.gradient(finder.history["loss"][:-1])) < 0
    write_lr_curve(folder / CURVE, *finder.history.values(), suggested=suggested if falls else None, configured=lr)
    typer.echo(f"curve: {folder / CURVE}   table: {folder / TABLE}")
    if not falls:
        raise TrainingError(
            f"find-lr: the loss fell nowhere between {finite[0][0]:g} and {finite[-1][0]:g}; widen the range or take "
            "more --steps"
        )
    typer.echo(f"suggested: lr {suggested:.2g} (the config has {lr:g})")
    return float(suggested)


def _finite(loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, label: Tensor) -> Tensor:
    """Mean loss, infinite where it would be NaN, which the finder would not take for divergence."""
    return torch.nan_to_num(loss(prediction, label).mean(), nan=math.inf, posinf=math.inf)


class _Finder(LearningRateFinder):
    """MONAI's, but batches in which no pixel counts in the loss, as slices without a box, are passed over: their 0 is
    no loss."""

    def _train_batch(self, train_iter: Any, *given: Any, **options: Any) -> float:
        return super()._train_batch(_judged(train_iter), *given, **options)


def _judged(batches: Any) -> Any:
    empty = 0
    for inputs, label in batches:
        if judged_slices(label).any():
            yield inputs, label
        elif (empty := empty + 1) > len(batches.data_loader):
            raise TrainingError(
                "find-lr: there is nothing to learn from in any batch; look for slices without a box, or labels that "
                "are to be ignored"
            )


class _OneInput(nn.Module):
    """A network whose image and further inputs come as one tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]) -> Tensor:
        image, args, kwargs = inputs
        return self.network(image, *args, **kwargs)
