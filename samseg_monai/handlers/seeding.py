"""Every random draw of an epoch follows from (seed, epoch), so an interrupted training repeats exactly when resumed.

Ignite 0.5.5 makes the first epoch's iterator of batches after ``EPOCH_STARTED``, but a later one's only once the old
iterator is asked for one batch too many, and torch's RandomSampler draws a whole permutation on that occasion: the same
epoch would be shuffled otherwise after a resume. So the iterator is made here, right after seeding.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events

from samseg_monai.data.slices import SliceDataset
from samseg_monai.errors import ConfigError


class EpochSeeder:
    """Seeds, at each epoch's start, everything the trainer's data loader and network draw from.

    Calls ``set_epoch`` of the dataset and of the sampler (DistributedSampler) if they have it, seeds the generators of
    the loader and its sampler from (seed, epoch), and the global ones of torch (dropout), numpy and Python from
    (seed, epoch, rank). The loader is found in the engine.

    Args:
        seed: any integer.

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
        epoch = engine.state.epoch
        loader = engine.state.dataloader
        sampler = getattr(loader, "sampler", None)
        for part in (getattr(loader, "dataset", None), sampler, getattr(loader, "batch_sampler", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        shared = _mix(self.seed, epoch)
        for generator in (getattr(loader, "generator", None), getattr(sampler, "generator", None)):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(shared)
        own = _mix(self.seed, epoch, idist.get_rank())
        torch.manual_seed(own)
        np.random.seed(own)
        random.seed(own)
        engine.set_data(loader)


def _mix(*numbers: int) -> int:
    """32 well-mixed bits: neighbouring (seed, epoch) pairs must not give the same stream, as their sum would."""
    return zlib.crc32(",".join(str(number) for number in numbers).encode())
