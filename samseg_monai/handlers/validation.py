"""What validations and TensorBoard show: loss on volumes, a picture of the worst case; one network on all ranks."""

from __future__ import annotations

import logging
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.handlers import TensorBoardStatsHandler
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from samseg_monai import pictures
from samseg_monai.checkpoints import load_adapter, save_adapter
from samseg_monai.data.slices import Picker
from samseg_monai.data.slices.pickers import asked_slices
from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.files import unwrap
from samseg_monai.handlers.keeping import BestAdapter
from samseg_monai.handlers.provenance import plain
from samseg_monai.metrics import mean_dice
from samseg_monai.metrics.engine import ignored_in, of_all_ranks
from samseg_monai.training import OnLogitGrid, SegmentationLoss
from samseg_monai.training.owned import owned_state
from samseg_monai.transforms.grids import foreground

logger = logging.getLogger(__name__)

TAG = "validation/worst_case"  # of the pictures in TensorBoard
# TensorBoard puts the machine's name into the names of its files, which travel with the results; it cannot be told not
# to. This also holds for the files of MONAI's handlers, in bundles of any age.
vars(event_file_writer)["socket"] = types.SimpleNamespace(gethostname=lambda: "run")


class SameBuffers:
    """Gives every process rank 0's buffers (running statistics) when a validation starts.

    ``DistributedDataParallel`` does so before each forward pass of the training, so after the last batch of an epoch
    every process would validate another network than the one that rank 0 saves. Validations themselves must run on the
    network inside: DDP's exchange in a forward pass would wait for a process that has fewer slices.
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


class WholeVolumes:
    """Validates whole volumes once, where the validations before saw picked slices only.

    Behind the last epoch, also of a training that ends early, the adapter of the best epoch stands in the network, its
    card gets the scores of whole volumes beside those of the picked slices that chose it, and then the weights of the
    training stand there again. Attach it behind the handlers that validate and save.

    Args:
        evaluator: of whole volumes; not that of the validations.
        network: SamSegmenter (or DDP of it) that is trained.
        best: BestAdapter, attached to the evaluator of the validations.
        picker: which slices chose the epoch; None does nothing: those validations were of whole volumes.
    Attributes: ``metrics``: of whole volumes, with the names that validations of them have; empty before.
    """

    def __init__(self, evaluator: Any, network: Any, best: BestAdapter, *, picker: Picker | None = None) -> None:
        self.evaluator, self.best, self.picker = evaluator, best, picker
        self.network: Any = unwrap(network)
        self.metrics: dict[str, Any] = {}

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, on every rank."""
        if self.picker is not None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        last = engine.should_terminate or engine.state.epoch == engine.state.max_epochs
        if not last or self.best.epoch is None:
            return
        logger.info("Whole volumes are validated with the adapter of epoch %d", self.best.epoch)
        idist.barrier()  # rank 0 has written it
        trained = owned_state(self.network, self.network.owned)
        try:
            picked = load_adapter(self.network, self.best.folder).get("metrics", {})
            self.evaluator.run(self.best.epoch)
            self.metrics = dict(self.evaluator.state.metrics)
            if idist.get_rank() == 0:
                told = {**picked, **plain(self.metrics), "epoch": self.best.epoch, "chosen_by": repr(self.picker)}
                save_adapter(self.network, self.best.folder, metrics=told)
        finally:
            self.network.load_state_dict(trained, strict=False)

    def told(self, best: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What a run card says of the best epoch: of which slices its metric is, and what chose it."""
        if best is None:
            return None
        if not self.metrics:
            return {**best, "slices": repr(self.picker)}
        whole = self.metrics[self.evaluator.state.key_metric_name]
        return {"metric": whole, "epoch": best["epoch"], "slices": "all", "chosen_by": repr(self.picker),
                "chosen_metric": best["metric"]}  # fmt: skip


class TensorBoard:
    """MONAI's ``TensorBoardStatsHandler``, which writes on rank 0 alone.

    Args: as there.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        iteration_log: bool | int = True,
        epoch_log: bool | int = True,
        tag_name: str = "Loss",
        output_transform: Callable[[Any], Any] = lambda output: output[0],
    ) -> None:
        self.options: dict[str, Any] = {"log_dir": str(log_dir), "iteration_log": iteration_log, "epoch_log": epoch_log}
        self.options |= {"tag_name": tag_name, "output_transform": output_transform}

    def attach(self, engine: Any) -> None:
        """Attach to the trainer or the evaluator, on every rank."""
        if idist.get_rank() == 0:
            TensorBoardStatsHandler(**self.options).attach(engine)


class ValidationLoss:
    """Mean loss over the slices of all validation volumes that have foreground or a prompt, in the volumes' own grid.

    Logits are taken as the inferer returns them, before any postprocessing. Each slice counts once, whatever the
    batches, the volumes and the number of processes. A training's loss is of another grid (``image_size``) and of the
    slices that its picker takes, so the two curves can be compared in their course, and in their values only roughly.

    It belongs under the evaluator's ``additional_metrics``: those are complete before any handler reads them.

    Args:
        loss: called with logits (1, C, H, W) and label (1, 1, H, W), returns a scalar; the training's own.
    Shape: of a batch: "label" (B, 1, H, W, D); "prompt", if there is one, (B, 1, H, W, D), above 0 inside; "boxes" of
        images of one slice (B, N, 4), of volumes with clicks (B, D, N, 4 + 3 P), NaN is none; "case" B names; "slices",
        where some are picked, bool (B, D).

    Raises:
        TrainingError: during the run, if predictions are no logits of the label's grid, or cases have no names.
    """

    def __init__(self, loss: nn.Module) -> None:
        if not callable(loss):
            raise ConfigError(f"ValidationLoss: loss must be callable with logits and label, got {type(loss).__name__}")
        self.loss = loss
        self.name = "val_loss"
        inner = loss.loss if isinstance(loss, OnLogitGrid) else loss
        self._on_cpu = isinstance(inner, SegmentationLoss)  # takes labels there, and then makes no GPU wait
        self._cases: dict[str, tuple[Tensor | None, int]] = {}  # sum over slices where it lies, and their number

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
        logits, label = (_bare(output[key]) for key in ("pred", "label"))
        names = batch.get("case") if isinstance(batch, Mapping) else None
        if not isinstance(names, (list, tuple)) or len(names) != len(logits):
            raise TrainingError("ValidationLoss: the batch names no cases under 'case'; add names to items")
        if logits.ndim != 5 or label.shape != (len(logits), 1, *logits.shape[2:]):
            raise TrainingError(
                f"ValidationLoss: got predictions {tuple(logits.shape)} and label {tuple(label.shape)}, expected "
                "(B, C, H, W, D) and (B, 1, H, W, D) of one grid; load image and label into the same grid"
            )
        prompt, boxes, loaded = (batch.get(key) for key in ("prompt", "boxes", "label"))
        known = _bare(loaded) if isinstance(loaded, Tensor) and loaded.shape == label.shape else label
        label = known if self._on_cpu else label
        for index, case in enumerate(names):
            wanted = foreground(known[index]).flatten(0, 2).any(0).cpu()  # (D,)
            masks, rows = (_bare(each)[index] if isinstance(each, Tensor) else None for each in (prompt, boxes))
            if (asked := asked_slices(masks, rows)) is not None:
                wanted |= asked
            if isinstance(picked := batch.get("slices"), Tensor):
                wanted &= picked[index].cpu()
            slices = wanted.nonzero()[:, 0].tolist()
            losses = [self.loss(logits[index, None, ..., z], label[index, None, ..., z]).mean() for z in slices]
            # summed where they lie: reading every loss would make the CPU wait for the GPU
            self._cases[str(case)] = (torch.stack(losses).sum(dtype=torch.float64) if losses else None, len(losses))

    def _publish(self, engine: Any) -> None:
        """Mean over the slices of all processes; a case that several of them hold (padded samplers) counts once."""
        own = [(case, (0.0 if total is None else float(total), n)) for case, (total, n) in self._cases.items()]
        merged = dict(pair for pairs in of_all_ranks(own) for pair in pairs)
        count = sum(slices for _, slices in merged.values())
        if not count:
            logger.warning("%s: no validated slice has foreground or a prompt, so there is none", self.name)
            return
        engine.state.metrics[self.name] = math.fsum(total for total, _ in merged.values()) / count


@dataclass(frozen=True)
class _Worst:
    """The slice to be shown of the worst case so far; arrays (H, W), rows and columns as seen."""

    dice: float
    case: str
    index: int
    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    aspect: float
    sides: bool


class WorstCaseImage:
    """Writes one picture per validation: the case with the lowest Dice, at its axial slice with most wrong voxels.

    Of cases with equal Dice the first by name is taken, of equal slices the one with most of the reference. Dice is
    that of ``CaseScores``: the mean over the classes that are in reference or prediction. Only one slice is kept while
    the cases go by. With several processes it is the worst case of all.

    Args:
        log_dir: folder of TensorBoard's files.
        classes: names, as given to ``CaseScores``.
        scan: channel of the image to be shown.
    Shape: a decollated item has "case", "pred" and "reference" on one grid, (1, H, W, D) of whole numbers or
        (K, H, W, D) of 0 and 1, and "image", a MetaTensor on any grid.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, classes: Sequence[str], scan: int = 0) -> None:
        self.log_dir = str(log_dir)
        self.classes = classes
        self.scan = scan
        self._worst: _Worst | None = None
        self._writer: SummaryWriter | None = None

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator, on every rank: all take part in finding the worst."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _forget(self, engine: Any) -> None:
        self._worst = None

    def _look(self, engine: Any) -> None:
        for old, new in zip(engine.state.batch, engine.state.output, strict=True):
            self._compare({**old, **new})

    def _compare(self, item: Mapping[str, Any]) -> None:
        # on a GPU the prediction lies there and the reference, which the network never sees, does not
        image, pred, reference, case = item["image"], item["pred"].cpu(), item["reference"].cpu(), item["case"]
        dice = mean_dice(pred, reference, len(self.classes))
        if np.isnan(dice) or (self._worst is not None and (self._worst.dice, self._worst.case) <= (dice, case)):
            return
        affine = np.asarray(reference.affine, dtype=float)
        axis = pictures.axial_axis(affine)
        truth, found = _labels(reference), _labels(pred)
        if (ignored := ignored_in(reference)) is not None:
            truth, found = (labels.masked_fill(ignored, 0) for labels in (truth, found))
        counts = list(zip(_per_slice(truth != found, axis), _per_slice(truth > 0, axis), strict=True))
        index = counts.index(max(counts))
        source = np.asarray(image.affine, dtype=float)
        grey = pictures.sampled(_bare(image)[self.scan].cpu(), source, affine, tuple(truth.shape), axis, index)
        planes = [grey, *(labels.select(axis, index).numpy() for labels in (truth, found))]
        volume = truth.shape[2] > 1  # a 2-D image stands upright as it is, and nobody knows the patient's sides
        if volume:
            planes = [pictures.as_seen(plane, affine) for plane in planes]
        grey, first, second = planes
        aspect = pictures.aspect_of(affine) if volume else float(affine[0, 0] / affine[1, 1])
        self._worst = _Worst(dice, case, index, grey, first, second, aspect, volume)

    def _write(self, engine: Any) -> None:
        cases = [worst for [worst] in of_all_ranks([self._worst]) if worst is not None]
        self._worst = None
        if not cases or idist.get_rank() != 0:
            return
        worst = min(cases, key=lambda w: (w.dice, w.case))
        empty = "" if worst.prediction.any() else ", empty prediction here"
        caption = f"{worst.case}: Dice {worst.dice:.3f}, slice {worst.index}{empty}"
        outlines = (worst.reference, pictures.REFERENCE), (worst.prediction, pictures.PREDICTION)
        picture = pictures.draw(worst.image, outlines, both=pictures.BOTH, aspect=worst.aspect)
        picture = pictures.named(picture) if worst.sides else picture
        picture = np.concatenate([picture, pictures.legend(caption, picture.shape[1])])
        if self._writer is None:
            self._writer = SummaryWriter(self.log_dir)
        self._writer.add_image(TAG, picture, engine.state.epoch, dataformats="HWC")
        self._writer.flush()


def _bare(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(torch.Tensor)


def _per_slice(mask: Tensor, axis: int) -> list[int]:
    return mask.movedim(axis, 0).flatten(1).sum(1).tolist()


def _labels(volume: Tensor) -> Tensor:
    """(1, H, W, D) or (K, H, W, D) to (H, W, D) whole numbers; of overlapping channels the last is shown."""
    bare = _bare(volume)
    if len(bare) == 1:
        return bare[0].to(torch.uint8)
    numbers = torch.arange(1, len(bare) + 1, device=bare.device)[:, None, None, None]
    return ((bare > 0) * numbers).amax(0).to(torch.uint8)
