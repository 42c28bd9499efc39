"""Exponential moving average of the tensors that learn: smoother than the weights of the last step.

Averaged weights generalise better than those that plain descent ends with (Polyak and Juditsky 1992; Tarvainen and
Valpola 2017, arXiv:1703.01780). With step t from 0, ``average = d * average + (1 - d) * weights`` and
``d = min(decay, (1 + t) / (10 + t))``: early on the average follows closely, so that the random start is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from samseg_monai.errors import ConfigError
from samseg_monai.handlers.stepping import steps_now


class EMA:
    """Averages the weights after every optimiser step; validations see the average, the training never does.

    The average stands in the network from the start to the end of each validation, so that a BestAdapter saves it;
    LastAdapter asks for it. Only parameters that learn are averaged, in float32 on their device; buffers (running
    statistics) stay those of the training. ResumeSaver keeps the weights of the training and the average.

    Attach it from ``run``, after the other handlers and before ResumeSaver's ``load``.

    Args:
        network: SamSegmenter (or DDP of it) that is trained.
        decay: largest weight of the old average, 0 < decay < 1; 0.999 averages over about 1000 steps. None
            averages nothing.
        evaluator: engine of the validations; None where there are none.

    Raises:
        ConfigError: decay out of range.
    """

    def __init__(self, network: nn.Module, decay: float | None, *, evaluator: Any = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ConfigError(f"EMA: decay must be between 0 and 1, got {decay}; null trains without an average")
        self.network = network
        self.decay = None if decay is None else float(decay)
        self.evaluator = evaluator
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # those of the training, while the average stands in the network

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer`` (and the evaluator), on every rank: all validate the average."""
        if self.decay is None:
            return
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._update)  # comes after the optimiser's step
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.STARTED, self.swap_in)
            self.evaluator.add_event_handler(Events.COMPLETED, self.swap_out)
            self.evaluator.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the average stand in the network for a while."""
        self.swap_in()
        try:
            yield
        finally:
            self.swap_out()

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the average into the network; without one yet, or when it is there already, nothing changes."""
        if self._weights or not self.average:
            return
        learning = self._learning()
        self._weights = {name: parameter.detach().clone() for name, parameter in learning.items()}
        for name, parameter in learning.items():
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the weights of the training back, bit for bit."""
        for name, parameter in self._learning().items() if self._weights else ():
            parameter.copy_(self._weights[name])
        self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and the average, as float32 copies on the CPU, for ResumeSaver."""
        return {"steps": self.steps, "average": {name: value.cpu().clone() for name, value in self.average.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the average up again.

        Raises:
            KeyError: a tensor that learns here has none.
        """
        average = state["average"]
        learning = self._learning()
        self.average = {name: average[name].to(p.device, torch.float32, copy=True) for name, p in learning.items()}
        self.steps = int(state["steps"])

    def _learning(self) -> dict[str, nn.Parameter]:
        plain = getattr(self.network, "module", self.network)
        return {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}

    def _begin(self, engine: Any) -> None:
        if not self.average:  # else resumed
            self.average = {name: p.detach().float().clone() for name, p in self._learning().items()}

    @torch.no_grad()
    def _update(self, engine: Any) -> None:
        if not steps_now(engine):
            return
        decay = min(self.decay or 0.0, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self._learning().items():
            self.average[name].lerp_(parameter.float(), 1 - decay)
        self.steps += 1

    def _fail(self, engine: Any, error: BaseException) -> None:
        """Leave the network as the training had it; ignite leaves it to a handler to raise the error again."""
        self.swap_out()
        raise error
