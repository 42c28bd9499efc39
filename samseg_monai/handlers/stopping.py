"""Early stopping that can be written in JSON and survives a resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ignite.engine import Events

from samseg_monai.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)


class EarlyStop:
    """Terminates the trainer after ``patience`` validations running without a better metric.

    MONAI's EarlyStopHandler forgets its count on resume and takes a NaN score for an improvement; this one does not.

    Args:
        patience: validations without improvement, at least 1.
        metric: name in ``engine.state.metrics``; ``None`` is the evaluator's key metric.
        min_delta: how much better counts as better, in the metric's unit, at least 0.
        mode: ``"max"`` or ``"min"``.
        trainer: engine to stop; else ``set_trainer`` from ``run``.

    Raises:
        ConfigError: on values out of range. TrainingError: when the metric is unknown or no trainer was set.
    """

    def __init__(
        self,
        patience: int,
        *,
        metric: str | None = None,
        min_delta: float = 0.0,
        mode: str = "max",
        trainer: Any | None = None,
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise ConfigError(f"EarlyStop: patience >= 1 and min_delta >= 0 needed, got {patience} and {min_delta}")
        if mode not in ("max", "min"):
            raise ConfigError(f"EarlyStop: mode must be 'max' or 'min', got {mode!r}")
        self.patience = patience
        self.metric = metric
        self.min_delta = min_delta
        self.sign = 1.0 if mode == "max" else -1.0
        self.trainer = trainer
        self.counter = 0
        self.best_score: float | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the patience is used up."""
        return self.counter >= self.patience

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator, on every rank: all must stop together."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def set_trainer(self, trainer: Any) -> None:
        """The engine to stop."""
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Count and best score, for ResumeSaver."""
        return {"counter": self.counter, "best_score": self.best_score}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take count and best score up again."""
        self.counter = int(state["counter"])
        self.best_score = None if state["best_score"] is None else float(state["best_score"])

    def __call__(self, engine: Any) -> None:
        if self.trainer is None:
            raise TrainingError("EarlyStop has no trainer; call set_trainer(trainer) in `run` before the training")
        score = self.sign * metric_value(engine, self.metric, "EarlyStop")
        if not math.isnan(score) and (self.best_score is None or score > self.best_score + self.min_delta):
            self.best_score = score
            self.counter = 0
            return
        self.counter += 1
        logger.info("EarlyStop: no better validation, %d of %d", self.counter, self.patience)
        if self.exhausted:
            reason = f"no better validation in {self.patience} running"
            logger.info("EarlyStop: training stops, %s", reason)
            self.trainer.state.stop_reason = reason
            self.trainer.terminate()


def metric_value(engine: Any, name: str | None, asker: str) -> float:
    """One metric of an evaluator as a float.

    Args:
        engine: evaluator after its epoch.
        name: metric; ``None`` is the key metric.
        asker: who asks, for the message.

    Raises:
        TrainingError: if there is no such metric, listing those there are.
    """
    name = name or engine.state.key_metric_name
    if name not in engine.state.metrics:
        raise TrainingError(
            f"{asker}: no metric {name!r}; the evaluator has {', '.join(map(str, engine.state.metrics)) or 'none'}"
        )
    return float(engine.state.metrics[name])
