"""What the handlers must know about MONAI 1.6.1's optimiser steps: accumulation and mixed precision; clipping.

``SupervisedTrainer`` fires ``BACKWARD_COMPLETED`` after every backward pass, also on batches whose gradients are only
accumulated. Gradients are complete, and may be measured or clipped, on stepping batches alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from torch import nn

from samseg_monai.errors import ConfigError

logger = logging.getLogger(__name__)


def steps_now(engine: Any) -> bool:
    """Whether the optimiser of ``engine`` (a MONAI ``SupervisedTrainer``) steps after the present backward pass."""
    every = getattr(engine, "accumulation_steps", 1)
    length = engine.state.epoch_length
    index = engine.state.iteration - 1
    if length is not None:
        index %= length
    # MONAI flushes what is left over at the end of an epoch
    return (index + 1) % every == 0 or (length is not None and index + 1 == length)


def unscale_once(engine: Any) -> None:
    """Undo the loss scaling of the gradients, at most once per optimiser step however many handlers ask for it.

    Under ``amp`` the gradients carry the factor of the ``GradScaler``, which refuses to be asked twice.
    """
    scaler = getattr(engine, "scaler", None)
    if scaler is None or not steps_now(engine):
        return
    if getattr(engine.state, "unscaled_at", None) != engine.state.iteration:
        scaler.unscale_(engine.optimizer)
        engine.state.unscaled_at = engine.state.iteration


def optimised(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """All parameters of all groups of an optimiser."""
    for group in optimizer.param_groups:
        yield from group["params"]


class GradientClip:
    """Scales the gradients of the optimiser's parameters down to a total L2 norm of at most ``max_norm``.

    Acts on stepping batches only, so accumulated gradients are clipped once as a whole, and after unscaling under amp.

    Args:
        max_norm: largest total norm, above 0 (no unit); None does nothing.

    Raises:
        ConfigError: if ``max_norm`` is not above 0.
    """

    def __init__(self, max_norm: float | None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"GradientClip: max_norm must be above 0, got {max_norm}; leave it out to not clip")
        self.max_norm = None if max_norm is None else float(max_norm)
        self.last_norm: float | None = None

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if self.max_norm is None or not steps_now(engine):
            return
        unscale_once(engine)
        norm = nn.utils.clip_grad_norm_(list(optimised(engine.optimizer)), self.max_norm)
        self.last_norm = float(norm)
        engine.state.gradient_norm = self.last_norm
