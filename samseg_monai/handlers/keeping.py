"""What a training keeps: the adapter of its best validation, or that of its last epoch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from samseg_monai.checkpoints import TENSORS, save_adapter
from samseg_monai.errors import ConfigError
from samseg_monai.handlers.provenance import plain
from samseg_monai.handlers.stopping import metric_value

logger = logging.getLogger(__name__)


class BestAdapter:
    """Saves the adapter and its card whenever a validation beats all before it; else the files stay as they are.

    Its best score goes into the resume file, so the first validation after a resume replaces a better adapter no more.

    Args:
        network: SamSegmenter (or DDP of it) that is trained.
        output_dir: folder for ``adapter.safetensors`` and ``card.json``; the card's metrics hold the epoch.
        key_metric_name: name in ``engine.state.metrics``; None is the evaluator's key metric.
        mode: ``"max"`` or ``"min"``.

    Raises:
        ConfigError: unknown mode. TrainingError: during the run, when there is no such metric.
    """

    def __init__(
        self,
        network: Any,
        output_dir: str | os.PathLike[str],
        *,
        key_metric_name: str | None = None,
        mode: str = "max",
    ) -> None:
        if mode not in ("max", "min"):
            raise ConfigError(f"BestAdapter: mode must be 'max' or 'min', got {mode!r}")
        self.network = network
        self.folder = Path(output_dir)
        self.key_metric_name = key_metric_name
        self.sign = 1.0 if mode == "max" else -1.0
        self.score: float | None = None
        self.epoch: int | None = None
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator."""
        self._engine = engine
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        score = metric_value(engine, self.key_metric_name, "BestAdapter")
        if math.isnan(score) or (self.score is not None and self.sign * score <= self.sign * self.score):
            return
        if idist.get_rank() == 0:
            metrics = {**plain(engine.state.metrics), "epoch": engine.state.epoch}
            save_adapter(getattr(self.network, "module", self.network), self.folder, metrics=metrics)
            logger.info("Best so far: %.4f in epoch %d, saved in %s", score, engine.state.epoch, self.folder)
        self.score, self.epoch = score, engine.state.epoch

    def state_dict(self) -> dict[str, Any]:
        """Best score and its epoch."""
        return {"score": self.score, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the best score up again, unless the adapter it belongs to is gone."""
        if state["score"] is not None and not (self.folder / TENSORS).is_file():
            logger.warning("%s is gone; the next validation saves the adapter anew", self.folder / TENSORS)
            return
        self.score, self.epoch = state["score"], state["epoch"]
        if self._engine is not None and self.score is not None:
            # MONAI keeps its own best, which others (CaseTable, TensorBoard) read
            self._engine.state.best_metric, self._engine.state.best_metric_epoch = self.score, self.epoch


class LastAdapter:
    """Saves the adapter after every epoch, so that the last one stays: for protocols with a fixed number of epochs.

    Args:
        network: SamSegmenter (or DDP of it) that is trained.
        output_dir: folder for ``adapter.safetensors`` and ``card.json``.
    """

    def __init__(self, network: Any, output_dir: str | os.PathLike[str]) -> None:
        self.network = network
        self.folder = Path(output_dir)

    def attach(self, engine: Any) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if idist.get_rank() == 0:
            metrics = {"epoch": engine.state.epoch}
            save_adapter(getattr(self.network, "module", self.network), self.folder, metrics=metrics)
