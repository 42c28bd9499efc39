"""A report at the start of a training: which groups of tensors get gradients, and which are left out.

A strategy that freezes one tensor too many, or an adapter that is installed but never called, trains without any error
and merely scores low. Two optimiser steps are looked at because a fresh LoRA has no gradient on ``A`` in its first step
(``B`` is zero; Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn

from samseg_monai.errors import ConfigError, TrainingError, raise_all
from samseg_monai.handlers.stepping import optimised, steps_now, unscale_once

logger = logging.getLogger(__name__)
MAX_IDLE = 20  # steps without any gradient at all that are passed over: slices without a box teach nothing


@dataclass
class _Seen:
    """Largest gradient norm of one tensor over the steps looked at; ``None`` if it never had a gradient."""

    numel: int
    norm: float | None = None


class GradientFlow:
    """Logs one row per group of trainable tensors after the first steps, and raises when a tensor does not learn.

    A group is the tensor's name up to its block (``sam.image_encoder.blocks.3``). The rows are put in
    ``engine.state.gradient_flow`` (and ``.rows``): dicts of ``group``, ``tensors``, ``parameters``,
    ``gradient_norm`` (L2, of the last step looked at or the largest before it), ``silent`` (names without gradient).

    Args:
        network: what is trained; DDP is unwrapped.
        steps: optimiser steps to look at, at least 1; up to ``MAX_IDLE`` in which no tensor has a gradient do not
            count.
        strict: raise TrainingError on a tensor that gets no gradient or is not in the optimiser; else warn.

    Raises:
        TrainingError: during the run, naming all such tensors.
    """

    def __init__(self, network: nn.Module, *, steps: int = 2, strict: bool = True) -> None:
        if steps < 1:
            raise ConfigError(f"GradientFlow: steps must be at least 1, got {steps}")
        self.network = network
        self.steps = steps
        self.strict = strict
        self.rows: list[dict[str, Any]] = []
        self._seen: dict[str, _Seen] = {}
        self._left = 0
        self._idle = 0

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``, before GradientClip if the norms are to be those of the loss."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._look)

    def _start(self, engine: Any) -> None:
        self._left = self.steps
        self._idle = 0
        self._seen = {name: _Seen(parameter.numel()) for name, parameter in self._trainable()}

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        plain = getattr(self.network, "module", self.network)
        return [(name, parameter) for name, parameter in plain.named_parameters() if parameter.requires_grad]

    def _look(self, engine: Any) -> None:
        if self._left == 0 or not steps_now(engine):
            return
        unscale_once(engine)
        gradients = {n: p.grad.detach().float() for n, p in self._trainable() if p.grad is not None}
        norms = {name: float(torch.linalg.vector_norm(gradient)) for name, gradient in gradients.items()}
        if norms and not any(norms.values()) and self._idle < MAX_IDLE:
            self._idle += 1
            return
        for name, norm in norms.items():
            seen = self._seen.setdefault(name, _Seen(gradients[name].numel()))
            seen.norm = norm if norm > 0 or seen.norm is None else seen.norm
        self._left -= 1
        if self._left == 0:
            self._report(engine)

    def _report(self, engine: Any) -> None:
        self.rows = _group_rows(self._seen)
        engine.state.gradient_flow = self.rows
        logger.info("Gradients after %d optimiser steps:\n%s", self.steps, _table(self.rows))
        taken = {id(parameter) for parameter in optimised(engine.optimizer)}
        problems = [] if self._seen else ["no tensor of the network is trainable"]
        for name, parameter in self._trainable():
            norm = self._seen[name].norm if name in self._seen else None
            if id(parameter) not in taken:
                problems.append(f"{name} is trainable but not in the optimiser")
            elif norm is None:
                problems.append(f"{name} got no gradient at all: it took no part in the loss")
            elif norm == 0:
                problems.append(f"{name} got only zero gradients")
        heading = f"After {self.steps} optimiser steps some tensors do not learn"
        if self.strict:
            raise_all(problems, TrainingError, heading)
        for problem in problems:
            logger.warning("%s: %s", heading, problem)


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


def _group_rows(seen: dict[str, _Seen]) -> list[dict[str, Any]]:
    groups: dict[str, list[str]] = {}
    for name in seen:
        groups.setdefault(_group(name), []).append(name)
    return [
        {
            "group": group,
            "tensors": len(names),
            "parameters": sum(seen[name].numel for name in names),
            "gradient_norm": sum((seen[name].norm or 0.0) ** 2 for name in names) ** 0.5,
            "silent": [name for name in names if not seen[name].norm],
        }
        for group, names in groups.items()
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    width = max([len(row["group"]) for row in rows] + [len("group")])
    lines = [f"{'group':<{width}}  tensors  parameters  gradient norm"]
    for row in rows:
        silent = f"  ({len(row['silent'])} silent)" if row["silent"] else ""
        lines.append(
            f"{row['group']:<{width}}  {row['tensors']:>7}  {row['parameters']:>10,}"
            f"  {row['gradient_norm']:>13.3e}{silent}"
        )
    return "\n".join(lines)
