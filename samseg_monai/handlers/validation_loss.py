"""The training's loss on validation volumes: the second curve beside the training's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from samseg_monai.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)


class ValidationLoss:
    """Mean loss over the slices of all validation volumes that have foreground or a prompt, in the volumes' own grid.

    Logits are taken as the inferer returns them, before any postprocessing. Each slice counts once, whatever the
    batches, the volumes and the number of processes; slices without foreground or prompt, which prompted networks are
    not asked about, count nothing. A training's loss is of another grid (``image_size``) and of the slices that its
    picker takes, so the two curves can be compared in their course, and in their values only roughly.

    Written in JSON it belongs under the evaluator's ``additional_metrics``: metrics are complete before any of the
    evaluator's handlers reads them, so the value reaches cards, TensorBoard and ``history.csv`` of the same epoch.

    Args:
        loss: called with logits (1, C, H, W) and label (1, 1, H, W), returns a scalar; the training's own.
        label_key, prompt_key, boxes_key, case_key: of the batch. label (B, 1, H, W, D). prompt, if there is one, (B, 1,
            H, W, D), above 0 inside. boxes of an image of one slice (B, N, 4), NaN is none. case: B names.

    Raises:
        TrainingError: during the run, if predictions are no logits of the label's grid, or cases have no names.
    """

    def __init__(
        self,
        loss: nn.Module,
        *,
        label_key: str = "label",
        prompt_key: str = "prompt",
        boxes_key: str = "boxes",
        case_key: str = "case",
    ) -> None:
        if not callable(loss):
            raise ConfigError(f"ValidationLoss: loss must be callable with logits and label, got {type(loss).__name__}")
        self.loss = loss
        self.label_key, self.prompt_key, self.boxes_key, self.case_key = label_key, prompt_key, boxes_key, case_key
        self.name = "val_loss"
        self._cases: dict[str, tuple[float, int]] = {}  # sum over slices, and their number

    def attach(self, engine: Any, name: str = "val_loss") -> None:
        """Attach to a MONAI ``SupervisedEvaluator``, on every rank; ``engine.state.metrics[name]`` is the value."""
        self.name = name
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._publish)

    def _begin(self, engine: Any) -> None:
        self._cases = {}

    @torch.no_grad()
    def _collect(self, engine: Any) -> None:
        batch, output = engine.state.batch, engine.state.output
        logits, label = (_plain(output[key]) for key in ("pred", self.label_key))
        names = batch.get(self.case_key) if isinstance(batch, Mapping) else None
        if not isinstance(names, (list, tuple)) or len(names) != len(logits):
            raise TrainingError(f"ValidationLoss: the batch names no cases under {self.case_key!r}; add names to items")
        if logits.ndim != 5 or label.shape != (len(logits), 1, *logits.shape[2:]):
            raise TrainingError(
                f"ValidationLoss: got predictions {tuple(logits.shape)} and label {tuple(label.shape)}, expected "
                "(B, C, H, W, D) and (B, 1, H, W, D) of one grid; load image and label into the same grid"
            )
        prompt, boxes = batch.get(self.prompt_key), batch.get(self.boxes_key)
        for index, case in enumerate(names):
            wanted = (label[index] > 0).flatten(0, 2).any(0)  # (D,)
            if prompt is not None:
                wanted |= (_plain(prompt)[index] > 0).flatten(0, 2).any(0).to(wanted.device)
            if isinstance(boxes, Tensor) and len(wanted) == 1:
                wanted |= bool((~_plain(boxes)[index].reshape(-1, 4).isnan().any(-1)).any())
            slices = wanted.nonzero()[:, 0].tolist()
            losses = [self.loss(logits[index, None, ..., z], label[index, None, ..., z]).mean() for z in slices]
            # summed where they lie: reading every loss would make the CPU wait for the GPU
            self._cases[str(case)] = (float(torch.stack(losses).double().sum()) if losses else 0.0, len(losses))

    def _publish(self, engine: Any) -> None:
        """Mean over the slices of all processes; a case that several of them hold (padded samplers) counts once."""
        own = list(self._cases.items())
        gathered: Any = idist.all_gather(own) if idist.get_world_size() > 1 else [own]
        merged = dict(pair for pairs in gathered for pair in pairs)
        count = sum(slices for _, slices in merged.values())
        if not count:
            logger.warning("%s: no validated slice has foreground or a prompt, so there is none", self.name)
            return
        engine.state.metrics[self.name] = math.fsum(total for total, _ in merged.values()) / count


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(torch.Tensor)
