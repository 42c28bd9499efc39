"""What several processes, at once or one after the other, have to agree on: running statistics, and a run's folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch.distributed as dist
from filelock import FileLock, Timeout
from ignite.engine import Events
from torch import nn

from samseg_monai.errors import TrainingError

logger = logging.getLogger(__name__)

LOCK = ".training.lock"
PATIENCE = 20.0  # seconds; workers of a killed training keep its lock until they see, after 5 s, that it is gone


class SameBuffers:
    """Gives every process rank 0's buffers (running statistics) when a validation starts.

    ``DistributedDataParallel`` does so before each forward pass of the training, so after the last batch of an epoch
    every process is left with statistics of its own, and would validate another network than the one that rank 0 saves.
    Validations themselves must run on the network inside: DDP's exchange in a forward pass would wait for a process
    that has fewer slices.

    Args:
        network: what is validated.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator, on every rank."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        if idist.get_world_size() > 1:
            for buffer in self.network.buffers():
                dist.broadcast(buffer, src=0)


def hold_folder(folder: str | os.PathLike[str]) -> FileLock | None:
    """Keep other processes from training into ``folder`` for as long as the result lives; a process that dies lets go.

    A training started by ``torchrun`` outlives a launcher that is killed, and would go on writing beside the next one.

    Returns:
        The lock, taken; None where the file system has no locks, which is logged.
    Raises:
        TrainingError: another process has it.
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
