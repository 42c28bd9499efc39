"""A file to go on from after a training was interrupted."""

from __future__ import annotations

import logging
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from filelock import FileLock
from ignite.engine import Events
from torch import nn

from samseg_monai.checkpoints import write_whole
from samseg_monai.errors import CheckpointError, ConfigError, TrainingError, raise_all
from samseg_monai.handlers.processes import hold_folder
from samseg_monai.handlers.provenance import plain
from samseg_monai.training.owned import owned_state

logger = logging.getLogger(__name__)

# what makes a resume file that of another training
_IDENTITY = ("base_sha256", "num_classes", "image_size", "scans", "scan_mode", "input_scale", "prompt")
_KEYS = ("card", "epoch", "epoch_length", "network", "parts", "scaler", "random")


class ResumeSaver:
    """Writes ``resume.pt`` after an epoch, whole or not at all, and goes on from it.

    The file holds the owned tensors only, the optimiser, the schedule, the counters of the given handlers, the random
    state and the card of the network; ``torch.load(weights_only=True)`` reads it. After an error nothing is written.
    With EpochSeeder and a dataset that draws from (seed, epoch, item), a training killed at any moment and resumed ends
    with the same weights, best adapter and metrics as one that never was: what was half done is done again. The last
    epoch's file is written behind everything else (RunCard's "completed"), so that nothing is left out after a kill.

    Attach it from ``run`` (inside ``train::handlers`` it would refer to itself), after the other handlers, then
    ``load()`` it, with base weights loaded before::

        "$@resume.attach(@train::trainer)", "$@resume.load()", "$@train::trainer.run()"

    Args:
        output_dir: folder of the run, made if need be.
        network: SamSegmenter (or DDP of it).
        optimizer: the trainer's.
        lr_scheduler, best, early_stop, collapse, ema: whatever has ``state_dict`` and ``load_state_dict``; None is
            skipped.
        every: epochs between two writes; the last epoch is always written.
        filename: name of the file.

    Raises:
        ConfigError: ``every`` below 1. CheckpointError: at the first write, if a part's state cannot be read again.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        network: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        best: Any = None,
        early_stop: Any = None,
        collapse: Any = None,
        ema: Any = None,
        every: int = 1,
        filename: str = "resume.pt",
    ) -> None:
        if every < 1:
            raise ConfigError(f"ResumeSaver: every must be at least 1 epoch, got {every}")
        self.path = Path(output_dir) / filename
        self.network = network
        parts = {"lr_scheduler": lr_scheduler, "best": best, "early_stop": early_stop, "collapse": collapse, "ema": ema}
        self.parts = {"optimizer": optimizer, **{key: part for key, part in parts.items() if part is not None}}
        self.early_stop = early_stop
        self.every = every
        self._trainer: Any = None
        self._saved_epoch = 0
        self._verified = False
        self._lock: FileLock | None = None
        self._scaler_state: dict[str, Any] | None = None

    def attach(self, engine: Any) -> None:
        """Attach to the trainer."""
        self._trainer = engine
        engine.add_event_handler(Events.STARTED, self._restore_scaler)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self._release)

    def _epoch(self, engine: Any) -> None:
        last = engine.should_terminate or engine.state.epoch == engine.state.max_epochs
        if engine.state.epoch % self.every == 0 and not last:
            self.save(engine)

    def save(self, engine: Any) -> None:
        """Write the file, unless it is up to date or the epoch was left half way."""
        state = engine.state
        if state.epoch == self._saved_epoch or state.iteration != state.epoch * state.epoch_length:
            return
        self._saved_epoch = state.epoch
        if idist.get_rank() != 0:
            return
        scaler = getattr(engine, "scaler", None)
        content = {
            "card": self._card(),
            "epoch": state.epoch,
            "epoch_length": state.epoch_length,
            "network": self._owned(),
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda temporary: self._write(_numbers(content), temporary))

    def _write(self, content: dict[str, Any], path: Path) -> None:
        torch.save(content, path)
        if self._verified:
            return
        try:  # once: now a state that cannot be read costs an epoch, at the resume it would cost the training
            torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[-1] if str(error) else "unknown type"
            raise CheckpointError(
                f"{self.path}: could not be resumed from: a state in it is no tensor or plain value ({reason}); "
                f"parts are {', '.join(self.parts)}"
            ) from error
        self._verified = True

    def _release(self, engine: Any) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def load(self) -> int:
        """Restore everything if the file exists.

        Returns:
            The epoch that was finished last; 0 without a file.

        Raises:
            TrainingError: not attached yet; another process trains in this folder; or the training is finished already.
            CheckpointError: the file is damaged or belongs to another training, with all differences.
        """
        if self._trainer is None:
            raise TrainingError("ResumeSaver: attach(trainer) comes before load()")
        if idist.get_rank() == 0 and self._lock is None:
            self._lock = hold_folder(self.path.parent)
        if not self.path.is_file():
            logger.info("No %s in the run's folder: training starts from epoch 1", self.path.name)
            return 0
        content = self._read()
        self._refuse_another(content)
        self._refuse_finished(content)
        plain_network = getattr(self.network, "module", self.network)
        plain_network.load_state_dict(content["network"], strict=False)  # the names were compared before
        self._restore_parts(content["parts"])
        self._scaler_state = content["scaler"]
        if idist.get_world_size() == 1:  # the file holds rank 0's state, which the others must not share
            torch.set_rng_state(content["random"]["cpu"])
            if len(content["random"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(content["random"]["cuda"])
        state = self._trainer.state
        self._saved_epoch = state.epoch = content["epoch"]
        state.iteration = content["epoch"] * content["epoch_length"]
        logger.info("Resumed: epoch %d of %d is done, going on with the next", state.epoch, state.max_epochs)
        return content["epoch"]

    def _read(self) -> dict[str, Any]:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            absent = [key for key in _KEYS if key not in content]
            if absent:
                raise ValueError(f"no {', '.join(absent)} in it")
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}: not a resume file ({error}); delete it to train from the start"
            ) from error
        return dict(content)

    def _refuse_another(self, content: Mapping[str, Any]) -> None:
        theirs = {**content["card"], "batches per epoch": content["epoch_length"]}
        ours = {**self._card(), "batches per epoch": self._trainer.state.epoch_length}
        problems = [
            f"{key}: {theirs.get(key)!r} in the file, {ours.get(key)!r} now"
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        saved, now = content["network"], self._owned()
        problems += [f"tensor {name}: only in the file" for name in saved if name not in now]
        problems += [f"tensor {name}: only in this network" for name in now if name not in saved]
        problems += [
            f"tensor {name}: shape {tuple(saved[name].shape)} in the file, {tuple(now[name].shape)} now"
            for name in now
            if name in saved and saved[name].shape != now[name].shape
        ]
        where = f"{self.path} belongs to another training; choose another output_dir, or delete the file"
        raise_all(problems, CheckpointError, where)

    def _refuse_finished(self, content: Mapping[str, Any]) -> None:
        """Ignite would start a finished training all over again, from its trained weights."""
        epochs, done = self._trainer.state.max_epochs, content["epoch"]
        again = f"Nothing was changed. To train from the start choose another output_dir, or delete {self.path}"
        if done >= epochs:
            raise TrainingError(f"already trained: {done} of {epochs} epochs; to go on raise epochs. {again}")
        patience = getattr(self.early_stop, "patience", None)
        waited = content["parts"].get("early_stop", {}).get("counter", 0)
        if patience is not None and waited >= patience:
            raise TrainingError(
                f"already trained: stopped early after epoch {done} ({waited} validations without a better "
                f"one, patience {patience}); to go on raise the patience. {again}"
            )

    def _restore_parts(self, parts: Mapping[str, Any]) -> None:
        for key, part in self.parts.items():
            if key not in parts:
                logger.warning("%s has no state of %s; it starts anew", self.path.name, key)
                continue
            wanted = _rates(part)
            try:
                part.load_state_dict(parts[key])
            except (KeyError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"{self.path}: state of {key} does not fit ({error}); delete the file") from error
            if wanted != _rates(part):
                logger.warning("Resumed with the learning rate of the file, %s; that of the config, %s, is not used",
                               _rates(part), wanted)  # fmt: skip

    def _restore_scaler(self, engine: Any) -> None:
        # MONAI makes the scaler when the run begins, so later than load()
        if self._scaler_state is not None and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(self._scaler_state)
        self._scaler_state = None

    def _owned(self) -> dict[str, torch.Tensor]:
        network = getattr(self.network, "module", self.network)
        return owned_state(network, getattr(network, "owned", network.state_dict()))

    def _card(self) -> dict[str, Any]:
        """What must agree for a resume to make sense, as plain values."""
        network = getattr(self.network, "module", self.network)
        strategy = getattr(network, "strategy", None)
        card = {key: getattr(network, key, None) for key in _IDENTITY}
        card["sam_variant"] = getattr(getattr(network, "spec", None), "name", None)
        card["strategy"] = None if strategy is None else strategy.card()
        return plain(card)


def _rates(part: Any) -> list[float] | None:
    """Base learning rates of an optimiser; None of anything else."""
    if not isinstance(part, torch.optim.Optimizer):
        return None
    return [float(group.get("initial_lr", group["lr"])) for group in part.param_groups]


def _numbers(value: Any) -> Any:
    """``value`` with Python's numbers in place of numpy's, which ``weights_only`` refuses (a rate may be computed)."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_numbers(item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((_numbers(key), _numbers(item)) for key, item in value.items())
    return value
