"""A training that is interrupted at any moment and started again ends as if nothing had happened.

Every random draw of an epoch follows from (seed, epoch), a file holds the state after each epoch, and a lock keeps a
second process out of the folder.
"""

from __future__ import annotations

import logging
import pickle
import random
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from filelock import FileLock, Timeout
from ignite.engine import Events
from torch import nn

from samseg_monai.checkpoints import OF_NETWORK, card_facts
from samseg_monai.data.datalists import case_hash, read_datalist
from samseg_monai.data.datalists.splits import SECTIONS
from samseg_monai.data.slices import SliceDataset
from samseg_monai.errors import CheckpointError, ConfigError, TrainingError, raise_all
from samseg_monai.files import StrPath, unwrap, write_tensors, write_whole
from samseg_monai.handlers.provenance import plain
from samseg_monai.training.owned import owned_state

logger = logging.getLogger(__name__)

LOCK = ".training.lock"
PATIENCE = 20.0  # seconds; workers of a killed training keep its lock until they see, after 5 s, that it is gone
_KEYS = ("card", "epoch", "epoch_length", "network", "parts", "scaler", "random")


def hold_folder(folder: StrPath) -> FileLock | None:
    """Keep other processes from training into ``folder`` for as long as the result lives; a process that dies lets go.

    A training started by ``torchrun`` outlives a launcher that is killed, and would go on writing beside the next one.
    None where the file system has no locks, which is logged; TrainingError if another process has it.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True)  # a second training of this process follows the first, so it may pass
    try:
        lock.acquire(timeout=0 if lock.is_locked else PATIENCE)
    except Timeout:
        raise TrainingError(
            f"another process is training into {folder}: end it (a killed torchrun leaves its processes behind), wait "
            "for it, or choose another output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s); do not start a second training into this folder", path, error)
        return None
    return lock


class EpochSeeder:
    """Seeds, at each epoch's start, everything the trainer's data loader and network draw from.

    Calls ``set_epoch`` of dataset, sampler (DistributedSampler) and loss where there is one, seeds the generators of
    loader and sampler from (seed, epoch), and the global ones of torch (dropout), numpy and Python from (seed, epoch,
    rank).

    Raises:
        ConfigError: at the start, for persistent workers with a dataset that has an epoch but is no SliceDataset
            (which shares its epoch with them): their copies of the dataset would never hear of a new one.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = int(seed)

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, on every rank."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def _check(self, engine: Any) -> None:
        loader = engine.state.dataloader
        dataset = getattr(loader, "dataset", None)
        deaf = hasattr(dataset, "set_epoch") and not isinstance(dataset, SliceDataset)
        if deaf and getattr(loader, "num_workers", 0) > 0 and getattr(loader, "persistent_workers", False):
            raise ConfigError(
                f"EpochSeeder: persistent workers never hear of a new epoch of {type(dataset).__name__}; "
                "set persistent_workers to false"
            )

    def __call__(self, engine: Any) -> None:
        epoch, loader = engine.state.epoch, engine.state.dataloader
        parts: list[Any] = [getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler")]
        for part in (*parts, getattr(engine, "loss_function", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for part in (loader, parts[1]):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(_mix(self.seed, epoch))
        own = _mix(self.seed, epoch, idist.get_rank())
        torch.manual_seed(own)
        np.random.seed(own)
        random.seed(own)
        # Ignite 0.5.5 makes a later epoch's iterator of batches only once the old one is asked for one batch too many,
        # and RandomSampler draws a whole permutation on that occasion: after a resume the epoch would be shuffled
        # otherwise. So the iterator is made here.
        engine.set_data(loader)


def _mix(*numbers: int) -> int:
    """32 well-mixed bits: neighbouring (seed, epoch) pairs must not give the same stream, as their sum would."""
    return zlib.crc32(",".join(str(number) for number in numbers).encode())


class ResumeSaver:
    """Writes ``resume.pt`` after an epoch, whole or not at all, and goes on from it.

    The file holds the owned tensors, the states of optimiser, schedule and given handlers, the random state and the
    card of the network; ``torch.load(weights_only=True)`` reads it. With EpochSeeder and a dataset that draws from
    (seed, epoch, item), a training killed at any moment and resumed ends with the same weights, best adapter and
    metrics as one that never was: what was half done is done again. The last epoch's file is written behind everything
    else (RunCard's "completed"), so that nothing is left out after a kill; after an error nothing is written.

    Ignite's ``Checkpoint`` writes through a temporary file of random name, which a kill leaves behind, and neither
    looks at whose file it reads nor whether the training in it is finished; hence this one.

    In ``run`` attach it after the other handlers, then ``load()`` it, with base weights loaded before.

    Args:
        output_dir: folder of the run, made if need be.
        network: SamSegmenter (or DDP of it).
        optimizer: the trainer's.
        lr_scheduler, best, early_stop, collapse, ema: whatever has ``state_dict`` and ``load_state_dict``; None is
            skipped.
        datalist: JSON, whose names of cases a refusal tells where the split has changed (files hold hashes).
        validated: which slices validations look at, in words; scores of others say nothing of the best epoch. None:
            nobody knows, or there are no validations.

    Raises:
        CheckpointError: at the first write, if a part's state cannot be read again.
    """

    def __init__(
        self,
        output_dir: StrPath,
        network: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        best: Any = None,
        early_stop: Any = None,
        collapse: Any = None,
        ema: Any = None,
        datalist: StrPath | None = None,
        validated: str | None = None,
    ) -> None:
        self.path = Path(output_dir) / "resume.pt"
        self.network: Any = unwrap(network)
        parts = {"lr_scheduler": lr_scheduler, "best": best, "early_stop": early_stop, "collapse": collapse, "ema": ema}
        self.parts = {"optimizer": optimizer, **{key: part for key, part in parts.items() if part is not None}}
        self.datalist, self.validated = datalist, validated
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
        if not engine.should_terminate and engine.state.epoch != engine.state.max_epochs:
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
            "validated": self.validated,
        }
        write_whole(self.path, lambda temporary: self._write(_numbers(content), temporary))

    def _write(self, content: dict[str, Any], path: Path) -> None:
        write_tensors(path, content)
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
        """Restore everything if the file exists, and return the epoch that was finished last; 0 without a file.

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
        self.network.load_state_dict(content["network"], strict=False)  # the names were compared before
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
            if absent := [key for key in _KEYS if key not in content]:
                raise ValueError(f"no {', '.join(absent)} in it")
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}: not a resume file ({error}); delete it to train from the start"
            ) from error
        return dict(content)

    def _refuse_another(self, content: Mapping[str, Any]) -> None:
        def facts(card: Mapping[str, Any], length: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
            shapes = {f"tensor {name}": tuple(tensor.shape) for name, tensor in tensors.items()}
            return {**card, "batches per epoch": length, **shapes}

        theirs = facts(content["card"], content["epoch_length"], content["network"])
        ours = facts(self._card(), self._trainer.state.epoch_length, self._owned())
        unknown = {key for key in ("scan_names", "cases") if theirs.get(key) is None or ours.get(key) is None}
        apart = {"cases", *unknown}  # older files do not have them
        differing = [key for key in {**theirs, **ours} if key not in apart and theirs.get(key) != ours.get(key)]
        problems = [f"{key}: {theirs.get(key)!r} in the file, {ours.get(key)!r} now" for key in differing]
        problems += [] if "cases" in unknown else self._moved_cases(theirs["cases"], ours["cases"])
        looked, looks = content.get("validated"), self.validated
        if looked is not None and looks is not None and looked != looks:  # older files do not tell
            problems.append(f"validated slices: {looked} in the file, {looks} now (validation::picker)")
        where = f"{self.path} belongs to another training; choose another output_dir, or delete the file"
        raise_all(problems, CheckpointError, where)

    def _moved_cases(self, before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> list[str]:
        """A line for each case that is in one of the two splits only; of validation, where both have some."""
        listed = {} if self.datalist is None else read_datalist(Path(self.datalist))
        names = {case_hash(item["case"]): item["case"] for section in SECTIONS for item in listed.get(section, [])}
        lines = []
        for section in ("training", "validation"):
            old, new = set(before.get(section, [])), set(now.get(section, []))
            if section == "validation" and not (old and new):  # a run may go on with validations, or without
                continue
            lines += [f"{section}: {names.get(case, case)} in the file, not now" for case in sorted(old - new)]
            lines += [f"{section}: {names.get(case, case)} now, not in the file" for case in sorted(new - old)]
        return lines

    def _refuse_finished(self, content: Mapping[str, Any]) -> None:
        """Ignite would start a finished training all over again, from its trained weights."""
        epochs, done = self._trainer.state.max_epochs, content["epoch"]
        again = f"Nothing was changed. To train from the start choose another output_dir, or delete {self.path}"
        if done >= epochs:
            raise TrainingError(f"already trained: {done} of {epochs} epochs; to go on raise epochs. {again}")
        patience = getattr(self.parts.get("early_stop"), "patience", None)
        waited = content["parts"].get("early_stop", {}).get("counter", 0)
        if patience is not None and waited >= patience:
            raise TrainingError(
                f"already trained: stopped early after epoch {done} ({waited} validations without a better "
                f"one, patience {patience}); to go on raise the patience. {again}"
            )

    def _restore_parts(self, parts: Mapping[str, Any]) -> None:
        optimizer = self.parts["optimizer"]
        wanted = _rates(optimizer)
        for key, part in self.parts.items():
            if key not in parts:
                logger.warning("%s has no state of %s; it starts anew", self.path.name, key)
                continue
            try:
                part.load_state_dict(parts[key])
            except (KeyError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"{self.path}: state of {key} does not fit ({error}); delete the file") from error
        if wanted != (found := _rates(optimizer)):
            logger.warning(
                "Resumed with the learning rate of the file, %s; that of the config, %s, is not used", found, wanted
            )

    def _restore_scaler(self, engine: Any) -> None:
        # MONAI makes the scaler when the run begins, so later than load()
        if self._scaler_state is not None and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(self._scaler_state)
        self._scaler_state = None

    def _owned(self) -> dict[str, torch.Tensor]:
        return owned_state(self.network, getattr(self.network, "owned", self.network.state_dict()))

    def _card(self) -> dict[str, Any]:
        """What must agree for a resume to make sense, as plain values."""
        facts = card_facts(self.network)
        known = (*OF_NETWORK, "sam_variant", "strategy", *({"scan_names", "cases"} & facts.keys()))
        return plain({key: facts[key] for key in known})


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def _numbers(value: Any) -> Any:
    """``value`` with Python's numbers in place of numpy's, which ``weights_only`` refuses (a rate may be computed)."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_numbers(item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((_numbers(key), _numbers(item)) for key, item in value.items())
    return value
