"""What a training keeps, and what its validations tell about going on.

It keeps the adapter of its best validation or of its last epoch, or the average of weights; it ends early when no
validation is better, and warns of classes that are predicted empty everywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from samseg_monai.checkpoints import CARD, TENSORS, save_adapter
from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.files import StrPath, hash_file, unwrap
from samseg_monai.handlers.provenance import plain
from samseg_monai.handlers.steps import steps_now, warn

logger = logging.getLogger(__name__)

UNSCORED = "no validation could be scored (no case counts): no epoch is known to be the best, the last one is kept"


class EMA:
    """Exponential moving average of what learns; validations see the average, the training never does.

    Averaged weights generalise better than those that plain descent ends with (Polyak and Juditsky 1992; Tarvainen and
    Valpola 2017, arXiv:1703.01780). With step t from 0, ``average = d * average + (1 - d) * weights`` and
    ``d = min(decay, (1 + t) / (10 + t))``: early on it follows closely, so that the random start is forgotten.

    The average stands in the network from the start to the end of each validation, so that a BestAdapter saves it;
    LastAdapter asks for it. What learns is averaged, in float32 on its device, and so are the running statistics of its
    normalisations: those of the plain weights do not belong to it. In ``run`` attach it after the other handlers
    and before ResumeSaver's ``load``.

    Args:
        network: SamSegmenter (or DDP of it) that is trained.
        decay: largest weight of the old average, 0 < decay < 1, else ConfigError; 0.999: over about 1000 steps. None
            averages nothing.
        evaluator: engine of the validations; None where there are none.
    """

    def __init__(self, network: nn.Module, decay: float | None, *, evaluator: Any = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ConfigError(f"EMA: decay must be between 0 and 1, got {decay}; null trains without an average")
        self.network = unwrap(network)
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
            self.evaluator.add_event_handler(Events.STARTED, self._show)
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
        self._weights = {name: tensor.detach().clone() for name, tensor in self._learning().items()}
        for name, tensor in self._learning().items():
            tensor.copy_(self.average[name])

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the weights of the training back, bit for bit."""
        for name, tensor in self._learning().items() if self._weights else ():
            tensor.copy_(self._weights[name])
        self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and the average, as float32 copies on the CPU, for ResumeSaver."""
        return {"steps": self.steps, "average": {name: value.cpu().clone() for name, value in self.average.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the average up again; KeyError if a parameter that learns here has none.

        Running statistics, which older files do not have, begin with those of the training.
        """
        learning = self._learning()
        stored = {name: t for name, t in learning.items() if not isinstance(t, nn.Parameter)} | state["average"]
        self.average = {name: stored[name].to(t.device, torch.float32, copy=True) for name, t in learning.items()}
        self.steps = int(state["steps"])

    def _learning(self) -> dict[str, Tensor]:
        """Parameters that learn, and the running statistics that go with them."""
        owned = getattr(self.network, "owned", None)  # of other networks all; a state dict would take milliseconds
        names = None if owned is None else set(owned)
        named = ((n, b) for n, b in self.network.named_buffers() if b.is_floating_point())
        buffers = ((name, b) for name, b in named if names is None or name in names)
        return {**{name: p for name, p in self.network.named_parameters() if p.requires_grad}, **dict(buffers)}

    def _show(self, engine: Any) -> None:
        if idist.get_world_size() > 1:  # each rank has seen other batches: all validate what rank 0 saves
            for name in self.average.keys() & dict(self.network.named_buffers()).keys():
                dist.broadcast(self.average[name], src=0)
        self.swap_in()

    def _begin(self, engine: Any) -> None:
        if not self.average:  # else resumed
            self.average = {name: t.detach().float().clone() for name, t in self._learning().items()}

    @torch.no_grad()
    def _update(self, engine: Any) -> None:
        if not steps_now(engine):
            return
        decay = min(self.decay or 0.0, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self._learning().items():
            self.average[name].lerp_(tensor.float(), 1 - decay)
        self.steps += 1

    def _fail(self, engine: Any, error: BaseException) -> None:
        """Leave the network as the training had it; ignite leaves it to a handler to raise the error again."""
        self.swap_out()
        raise error


class BestAdapter:
    """Saves the adapter and its card whenever a validation beats all before it; else the files stay as they are.

    As long as the score of every validation is NaN (no case could be scored) the best epoch is not known: then the last
    one is kept, with a warning; that of an epoch without a validation is saved by the trainer's LastAdapter.

    Its best score and the metrics of the last validation go into the resume file.

    Args:
        network: SamSegmenter (or DDP of it) that is trained.
        output_dir: folder for ``adapter.safetensors`` and ``card.json``; the card's metrics hold the epoch.
        key_metric_name: name in ``engine.state.metrics``, more is better; None is the evaluator's key metric. During
            the run TrainingError, if there is none.
    """

    def __init__(self, network: Any, output_dir: StrPath, *, key_metric_name: str | None = None) -> None:
        self.network: Any = unwrap(network)
        self.folder = Path(output_dir)
        self.key_metric_name = key_metric_name
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
        unknown = math.isnan(score)
        if self.score is not None and (unknown or score <= self.score):
            return
        if idist.get_rank() == 0:
            metrics = {**plain(engine.state.metrics), "epoch": engine.state.epoch}
            save_adapter(self.network, self.folder, metrics=metrics)
            self.sha256 = hash_file(self.folder / TENSORS)
        if unknown:
            warn(engine, UNSCORED)
        else:
            logger.info("Best so far: %.4f in epoch %d, saved in %s", score, engine.state.epoch, self.folder)
            known = engine.state.__dict__.get("warnings", [])
            known[:] = [text for text in known if text != UNSCORED]
        self.score, self.epoch = None if unknown else score, engine.state.epoch

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
            logger.warning(
                "adapter of epoch %s is not in %s; the next validation saves one", state["epoch"], self.folder
            )
            return
        self.score, self.epoch, self.sha256 = state["score"], state["epoch"], state.get("sha256")
        if self._engine is not None and self.score is not None:
            # MONAI keeps its own best, which others (TensorBoard) read
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
        best: BestAdapter in whose folder, too, the last epoch stays for as long as no validation could be scored.
    """

    def __init__(
        self,
        network: Any,
        output_dir: StrPath | None,
        *,
        ema: EMA | None = None,
        best: BestAdapter | None = None,
    ) -> None:
        self.network: Any = unwrap(network)
        self.folder = None if output_dir is None else Path(output_dir)
        self.ema = ema
        self.best = best

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, on every rank, behind the handler that validates."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        folders = [] if self.folder is None else [self.folder]
        if self.best is not None and self.best.score is None and self.best.epoch not in (None, engine.state.epoch):
            self.best.epoch = engine.state.epoch
            folders.append(self.best.folder)
            if (
                engine.state.epoch == engine.state.max_epochs
            ):  # after a resume there was perhaps no validation to say so
                warn(engine, UNSCORED)
        if folders and idist.get_rank() == 0:
            with nullcontext() if self.ema is None else self.ema.in_use():
                for folder in folders:
                    save_adapter(self.network, folder, metrics={"epoch": engine.state.epoch})


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
        return {"empty_runs": dict(self.empty_runs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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
