"""What a training keeps: the adapter of its best validation, or that of its last epoch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from samseg_monai.checkpoints import CARD, TENSORS, save_adapter
from samseg_monai.errors import ConfigError
from samseg_monai.handlers.ema import EMA
from samseg_monai.handlers.provenance import plain
from samseg_monai.handlers.stopping import metric_value
from samseg_monai.sam.weights import hash_file

logger = logging.getLogger(__name__)


class BestAdapter:
    """Saves the adapter and its card whenever a validation beats all before it; else the files stay as they are.

    Its best score goes into the resume file, so the first validation after a resume replaces a better adapter no more;
    and so do the metrics of the last validation, which the card of the resumed run reports, too.

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
        self.sha256: str | None = None  # of the saved tensors
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
            self.sha256 = hash_file(self.folder / TENSORS)
            logger.info("Best so far: %.4f in epoch %d, saved in %s", score, engine.state.epoch, self.folder)
        self.score, self.epoch = score, engine.state.epoch

    def state_dict(self) -> dict[str, Any]:
        """Best score, its epoch and the hash of its tensors; metrics of the last validation."""
        metrics = {} if self._engine is None else dict(self._engine.state.metrics)
        return {"score": self.score, "epoch": self.epoch, "sha256": self.sha256, "metrics": metrics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the best score up again, unless the adapter it belongs to is gone.

        It is gone, too, when a process was killed after it had replaced the adapter and before the resume file: that
        adapter is of an epoch which the training has still to reach.
        """
        if self._engine is not None:
            self._engine.state.metrics.update(state.get("metrics", {}))
        if state["score"] is not None and not self._still_there(state.get("sha256")):
            logger.warning("the adapter of epoch %s is not in %s; the next validation saves one", state["epoch"],
                           self.folder)  # fmt: skip
            return
        self.score, self.epoch, self.sha256 = state["score"], state["epoch"], state.get("sha256")
        if self._engine is not None and self.score is not None:
            # MONAI keeps its own best, which others (CaseTable, TensorBoard) read
            self._engine.state.best_metric, self._engine.state.best_metric_epoch = self.score, self.epoch

    def _still_there(self, sha256: str | None) -> bool:
        path = self.folder / TENSORS
        return path.is_file() and (self.folder / CARD).is_file() and sha256 in (None, hash_file(path))


class LastAdapter:
    """Saves the adapter after every epoch, so that the last one stays: for protocols with a fixed number of epochs.

    Args:
        network: SamSegmenter (or DDP of it) that is trained.
        output_dir: folder for ``adapter.safetensors`` and ``card.json``; None saves nothing.
        ema: EMA whose average is saved in place of the weights; None where there is none.
    """

    def __init__(self, network: Any, output_dir: str | os.PathLike[str] | None, *, ema: EMA | None = None) -> None:
        self.network = network
        self.folder = None if output_dir is None else Path(output_dir)
        self.ema = ema

    def attach(self, engine: Any) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if self.folder is not None and idist.get_rank() == 0:
            metrics = {"epoch": engine.state.epoch}
            with nullcontext() if self.ema is None else self.ema.in_use():
                save_adapter(getattr(self.network, "module", self.network), self.folder, metrics=metrics)
