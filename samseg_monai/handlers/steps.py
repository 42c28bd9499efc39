"""Around the optimiser's steps: stop at numbers that are not finite, say what does not learn, clip gradients.

MONAI 1.6.1's ``SupervisedTrainer`` fires ``BACKWARD_COMPLETED`` after every backward pass, also on batches whose
gradients are only accumulated. Gradients are complete, and may be measured or clipped, on stepping batches alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from samseg_monai.errors import ConfigError, TrainingError, raise_all
from samseg_monai.files import unwrap
from samseg_monai.training.losses import judged_slices

logger = logging.getLogger(__name__)

# torch.amp.GradScaler starts at 65536 and halves at each skipped step: 16 skips reach 1, where scaling explains nothing
MAX_SKIPPED_STEPS = 16
MAX_IDLE = 20  # steps without any gradient at all that are passed over: slices without a box teach nothing


def steps_now(engine: Any) -> bool:
    """Whether the optimiser of ``engine`` (a MONAI ``SupervisedTrainer``) steps after the present backward pass."""
    length = engine.state.epoch_length
    index = engine.state.iteration - 1
    if length is not None:
        index %= length
    # MONAI flushes what is left over at the end of an epoch
    return (index + 1) % getattr(engine, "accumulation_steps", 1) == 0 or (length is not None and index + 1 == length)


def unscale_once(engine: Any) -> None:
    """Undo amp's scaling of the gradients, at most once per step: the ``GradScaler`` refuses to be asked twice."""
    scaler = getattr(engine, "scaler", None)
    if scaler is not None and steps_now(engine) and getattr(engine.state, "unscaled_at", 0) != engine.state.iteration:
        scaler.unscale_(engine.optimizer)
        engine.state.unscaled_at = engine.state.iteration


def optimised(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def warn(engine: Any, text: str) -> None:
    """Log a warning, and leave it in ``engine.state.warnings`` for the run card."""
    logger.warning("%s", text)
    known = engine.state.__dict__.setdefault("warnings", [])
    if text not in known:
        known.append(text)


class Accumulation:
    """Makes a step of accumulated gradients that of one batch of all their slices.

    MONAI divides each batch's loss by ``accumulation_steps``, whatever is in it: the gradients of a group that the
    epoch's end cuts short were too small, and a slice in a smaller batch weighed more. Here each slice that counts in
    the loss weighs the same. That is the big batch's gradient where the loss is a mean over slices and no layer uses
    the statistics of a batch; else the start of the training says what differs. With one batch per step, nothing is
    done.

    Args:
        network: what is trained; DDP is unwrapped.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = unwrap(network)
        self._total: torch.Tensor | None = None  # slices of the group so far, in full batches

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``, before whatever measures or clips gradients."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._weigh)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._scale)

    def _start(self, engine: Any) -> None:
        self._total = None
        steps = getattr(engine, "accumulation_steps", 1)
        reasons = [*_batch_layers(self.network), *_batch_terms(engine.loss_function)] if steps > 1 else []
        if reasons:
            warn(engine, f"{steps} batches per step are not one batch of their size: {'; '.join(reasons)}")

    def _weigh(self, engine: Any) -> None:
        loss, label = engine.state.output["loss"], engine.state.output.get("label")
        if getattr(engine, "accumulation_steps", 1) == 1 or not isinstance(label, torch.Tensor):
            return
        full = getattr(engine.state.dataloader, "batch_size", None) or len(label)
        weight = judged_slices(label).sum().to(loss.dtype) / full
        self._total = weight if self._total is None else self._total + weight
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * weight)  # of the loss only what is told stays as it was

    def _scale(self, engine: Any) -> None:
        if self._total is None or not steps_now(engine):
            return
        total, self._total = float(self._total), None
        if idist.get_world_size() > 1:  # DDP has averaged the gradients, so all ranks must scale them alike
            total = float(idist.all_reduce(total)) / idist.get_world_size()
        if total not in (0.0, engine.accumulation_steps):
            for parameter in optimised(engine.optimizer):
                if parameter.grad is not None:
                    parameter.grad.mul_(engine.accumulation_steps / total)


def _batch_layers(network: nn.Module) -> list[str]:
    """What layers of a network in training take from the batch, as one sentence or none."""
    before = network.training
    network.train()  # a network that holds statistics does so here
    names = [name for name, layer in network.named_modules() if layer.training and isinstance(layer, _BatchNorm)]
    network.train(before)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more} normalise by the statistics of each batch"] if names else []


def _batch_terms(loss: Any) -> list[str]:
    """What a loss takes from the batch as a whole, as one sentence or none."""
    parts = loss.modules() if isinstance(loss, nn.Module) else ()
    whole = any(getattr(part, "batch", False) is True for part in parts)
    return ["Dice is taken over each batch (loss::batch)"] if whole else []


class GradientClip:
    """Scales the gradients of the optimiser's parameters down to a total L2 norm of at most ``max_norm``.

    Accumulated gradients are clipped once as a whole, and after unscaling under amp.

    Args:
        max_norm: largest total norm, above 0 (no unit), else ConfigError; None does nothing.
    """

    def __init__(self, max_norm: float | None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"GradientClip: max_norm must be above 0, got {max_norm}; leave it out to not clip")
        self.max_norm = None if max_norm is None else float(max_norm)
        self._norm: torch.Tensor | None = None

    @property
    def last_norm(self) -> float | None:
        """Total norm of the last step's gradients before they were clipped; None before the first."""
        return None if self._norm is None else float(self._norm)

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if self.max_norm is None or not steps_now(engine):
            return
        unscale_once(engine)
        self._norm = nn.utils.clip_grad_norm_(list(optimised(engine.optimizer)), self.max_norm)


class NonFiniteGuard:
    """Stops the training at the first loss or gradient that is not finite and names the cases of that batch.

    It acts before the optimiser steps, so the weights are those of the step before. Both are read at once, since a GPU
    has to finish everything for it; from then on the loss in ``engine.state.output`` lies on the CPU.
    Under amp a ``GradScaler`` skips steps with infinite gradients on purpose; then only 16 of them in a row raise.

    Raises:
        TrainingError: during the run.
    """

    def __init__(self) -> None:
        self._skipped = 0

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``; before GradientClip, whose scaling would spread a NaN over all."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        output = engine.state.output
        values = [output["loss"].detach().float().mean()]
        if steps_now(engine):
            unscale_once(engine)
            gradients = [parameter.grad for parameter in optimised(engine.optimizer) if parameter.grad is not None]
            if gradients:
                values.append(nn.utils.get_total_norm(gradients, torch.inf).float().to(values[0].device))
        loss, *norm = torch.stack(values).tolist()
        if not math.isfinite(loss):
            raise TrainingError(_no_loss(engine, loss))
        output["loss"] = torch.tensor(loss)
        if all(map(math.isfinite, norm)):
            self._skipped = 0 if steps_now(engine) else self._skipped
            return
        self._skipped += 1
        if getattr(engine, "scaler", None) is not None and self._skipped < MAX_SKIPPED_STEPS:
            logger.warning("%s: infinite gradients, step skipped (%d in a row)", _place(engine), self._skipped)
            return
        raise TrainingError(
            f"{_place(engine)}: gradients are not finite for {', '.join(batch_names(engine.state.batch))}, "
            "though the loss is. Lower the learning rate, add GradientClip, or train without amp"
        )


def _no_loss(engine: Any, loss: float) -> str:
    """What is wrong with a batch whose loss is not finite."""
    names, prediction = batch_names(engine.state.batch), engine.state.output.get("pred")
    where = ""
    if isinstance(prediction, torch.Tensor) and len(prediction) == len(names):
        finite = torch.isfinite(prediction.detach()).flatten(1).all(dim=1).tolist()
        guilty = [name for name, good in zip(names, finite, strict=True) if not good]
        where = f"; the prediction itself is not finite for {', '.join(guilty)}" if guilty else ""
    return (
        f"{_place(engine)}: the loss is {loss} for {', '.join(names)}{where}. "
        "Look for NaN or constant images there, else lower the learning rate or add GradientClip"
    )


def batch_names(batch: Any) -> list[str]:
    """``"case BraTS-MEN-00001-000 slice 12"`` for every item of a collated or decollated batch."""
    items = batch if isinstance(batch, (list, tuple)) else [batch]
    names = []
    for item in items if all(isinstance(item, Mapping) for item in items) else []:
        cases, slices = _as_list(item.get("case")), _as_list(item.get("slice"))
        for index in range(max(len(cases), len(slices))):
            parts = [f"case {case}" for case in cases[index : index + 1]]
            names.append(" ".join([*parts, *(f"slice {int(number)}" for number in slices[index : index + 1])]))
    return names or ["a batch that names no case"]


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _place(engine: Any) -> str:
    return f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"


class GradientFlow:
    """Logs one row per group of trainable tensors after the first steps, and raises when a tensor does not learn.

    A strategy that freezes one tensor too many, or an adapter that is installed but never called, trains without any
    error and merely scores low. Two steps are looked at because a fresh LoRA has no gradient on ``A`` in its first one
    (``B`` is zero; Hu et al. 2021, arXiv:2106.09685). Rows go to ``engine.state.gradient_flow`` and ``.rows``: dicts of
    ``group`` (name up to the block), ``tensors``, ``parameters``, ``gradient_norm`` (L2, of the last step looked at or
    the largest before it), ``silent`` (names without gradient).

    Args:
        network: what is trained; DDP is unwrapped.
        steps: optimiser steps to look at, at least 1; up to ``MAX_IDLE`` without any gradient do not count.

    Raises:
        TrainingError: during the run, naming all tensors that get no gradient or are not in the optimiser.
    """

    def __init__(self, network: nn.Module, *, steps: int = 2) -> None:
        if steps < 1:
            raise ConfigError(f"GradientFlow: steps must be at least 1, got {steps}")
        self.network = unwrap(network)
        self.steps = steps
        self.rows: list[dict[str, Any]] = []
        self._norms: dict[str, float | None] = {}  # None if it never had a gradient
        self._left = self._idle = 0

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``, before GradientClip if the norms are to be those of the loss."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._look)

    def _start(self, engine: Any) -> None:
        self._left, self._idle = self.steps, 0
        self._norms = dict.fromkeys(self._trainable())

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def _look(self, engine: Any) -> None:
        if self._left == 0 or not steps_now(engine):
            return
        unscale_once(engine)
        gradients = {name: p.grad.detach().float() for name, p in self._trainable().items() if p.grad is not None}
        norms: dict[str, float] = {}
        if gradients:
            together = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
            norms = dict(zip(gradients, together.tolist(), strict=True))
        if norms and not any(norms.values()) and self._idle < MAX_IDLE:
            self._idle += 1
            return
        for name, norm in norms.items():
            self._norms[name] = norm or self._norms.get(name) or 0.0
        self._left -= 1
        if self._left == 0:
            self._report(engine)

    def _report(self, engine: Any) -> None:
        learning = self._trainable()
        groups: dict[str, list[str]] = {}
        for name in learning:
            groups.setdefault(_group(name), []).append(name)
        self.rows = engine.state.gradient_flow = [
            {
                "group": group,
                "tensors": len(names),
                "parameters": sum(learning[name].numel() for name in names),
                "gradient_norm": sum((self._norms.get(name) or 0.0) ** 2 for name in names) ** 0.5,
                "silent": [name for name in names if not self._norms.get(name)],
            }
            for group, names in groups.items()
        ]
        logger.info("Gradients after %d optimiser steps:\n%s", self.steps, _table(self.rows))
        taken = {id(parameter) for parameter in optimised(engine.optimizer)}
        problems = [] if learning else ["no tensor of the network is trainable"]
        for name, parameter in learning.items():
            norm = self._norms.get(name)
            if id(parameter) not in taken:
                problems.append(f"{name} is trainable but not in the optimiser")
            elif not norm:
                silence = "no gradient at all: it took no part in the loss" if norm is None else "only zero gradients"
                problems.append(f"{name} got {silence}")
        raise_all(problems, TrainingError, f"After {self.steps} optimiser steps some tensors do not learn")


def _group(name: str) -> str:
    """``sam.image_encoder.blocks.3.attn.qkv.lora_a`` to ``sam.image_encoder.blocks.3``; without a number, 3 words.

    Blocks within a stage are groups of their own: ``layers.1.blocks.0``.
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            nested = index + 2 < len(parts) - 1 and parts[index + 2].isdigit()
            return ".".join(parts[: index + (3 if nested else 1)])
    return ".".join(parts[:-1][:3]) or name


def _table(rows: list[dict[str, Any]]) -> str:
    width = max([len(row["group"]) for row in rows] + [len("group")])
    lines = [f"{'group':<{width}}  tensors  parameters  gradient norm"]
    for row in rows:
        silent = f"  ({len(row['silent'])} silent)" if row["silent"] else ""
        numbers = f"{row['tensors']:>7}  {row['parameters']:>10,}  {row['gradient_norm']:>13.3e}"
        lines.append(f"{row['group']:<{width}}  {numbers}{silent}")
    return "\n".join(lines)
