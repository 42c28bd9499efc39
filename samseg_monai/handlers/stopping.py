"""What a validation tells about going on: early stopping, and classes that are predicted empty everywhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping

from samseg_monai.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)


class EarlyStop(EarlyStopping):
    """Ignite's ``EarlyStopping``, as JSON can have it: its trainer is given later, and the run card learns the reason.

    A NaN score is no improvement. Count and best score survive a resume (ResumeSaver).

    Args:
        patience: validations in a row without improvement after which the trainer is terminated, at least 1.
        metric: name in ``engine.state.metrics``; ``None`` is the evaluator's key metric.
        trainer: engine to stop; else ``set_trainer`` from ``run``.

    Raises:
        ConfigError: on values out of range. TrainingError: when the metric is unknown or no trainer was set.
    """

    def __init__(self, patience: int, *, metric: str | None = None, trainer: Any | None = None) -> None:
        if patience < 1:
            raise ConfigError(f"EarlyStop: patience must be at least 1 validation, got {patience}")
        self.metric = metric
        self._absent = Engine(lambda engine, batch: None)  # ignite takes no None
        super().__init__(patience, self._score, trainer or self._absent)
        self.logger = logger

    def _score(self, engine: Any) -> float:
        score = metric_value(engine, self.metric, "EarlyStop")
        return -math.inf if math.isnan(score) else score

    def set_trainer(self, trainer: Any) -> None:
        """The engine to stop."""
        self.trainer: Any = trainer

    def attach(self, engine: Any, *_: Any, **__: Any) -> None:
        """Attach to the evaluator, on every rank: all must stop together. A new run of it does not reset the count."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take count and best score up again, also those of before it was ignite's."""
        super().load_state_dict({**self.state_dict(), **state_dict})

    def __call__(self, engine: Any) -> None:
        if self.trainer is self._absent:
            raise TrainingError("EarlyStop has no trainer; call set_trainer(trainer) in `run` before the training")
        super().__call__(engine)
        if self.counter >= self.patience:
            self.trainer.state.stop_reason = f"no better validation in {self.patience} in a row"


class CollapseDetector:
    """Warns when a class is predicted empty in all cases for some validations in a row.

    A collapsed class costs no error and, averaged with others, little Dice: it has to be looked for. Cases whose
    reference holds nothing of the class do not count. Rows come from ``engine.state.metric_details``: lists of dicts
    with ``case``, ``class``, ``prediction_ml`` and, if known, ``reference_ml`` (rows without a volume are ignored).
    The names of collapsed classes are left in ``engine.state.collapsed``, for the run card.

    Args:
        patience: validations in a row after which it speaks, at least 1.
    """

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ConfigError(f"CollapseDetector: patience must be at least 1 validation, got {patience}")
        self.patience = patience
        self.empty_runs: dict[str, int] = {}

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def state_dict(self) -> dict[str, Any]:
        """The counters, for ResumeSaver."""
        return {"empty_runs": dict(self.empty_runs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the counters up again."""
        self.empty_runs = {str(key): int(value) for key, value in state["empty_runs"].items()}

    def __call__(self, engine: Any) -> None:
        found: dict[str, bool] = {}
        for row in case_rows(engine):
            if row.get("prediction_ml") is not None and row.get("reference_ml", 1.0) != 0:
                name = str(row.get("class", "all classes"))
                found[name] = found.get(name, False) or float(row["prediction_ml"]) > 0
        for name, any_found in found.items():
            self.empty_runs[name] = 0 if any_found else self.empty_runs.get(name, 0) + 1
        collapsed = sorted(name for name, count in self.empty_runs.items() if count >= self.patience)
        if collapsed:
            engine.state.collapsed = collapsed
            logger.warning(
                "COLLAPSE: predicted empty in every case for %d or more validations in a row: %s. The network has "
                "stopped finding them; lower the learning rate, weight the class or look at its labels",
                self.patience, ", ".join(collapsed),
            )  # fmt: skip


def metric_value(engine: Any, name: str | None, asker: str) -> float:
    """One metric of an evaluator after its epoch as a float; ``name`` None is the key metric.

    Raises:
        TrainingError: if there is no such metric, listing those there are; ``asker`` says who wanted it.
    """
    name = name or engine.state.key_metric_name
    if name not in engine.state.metrics:
        raise TrainingError(
            f"{asker}: no metric {name!r}; the evaluator has {', '.join(map(str, engine.state.metrics)) or 'none'}"
        )
    return float(engine.state.metrics[name])


def case_rows(engine: Any, name: str | None = None) -> list[dict[str, Any]]:
    """Per-case rows (dicts with a ``case``) of one metric, or of all, in ``engine.state.metric_details``."""
    details = getattr(engine.state, "metric_details", None) or {}
    lists = details.values() if name is None else [details.get(name, [])]
    return [row for rows in lists if isinstance(rows, list) for row in rows if isinstance(row, dict) and "case" in row]
