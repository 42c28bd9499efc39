"""The worst case of every validation as a picture in TensorBoard: a mean hides what a look at one case tells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from torch.utils.tensorboard import SummaryWriter

from samseg_monai import pictures
from samseg_monai.metrics import mean_dice


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
    the cases go by. With several processes it is the worst case of all of them.

    Args:
        log_dir: folder of TensorBoard's files.
        classes: names, as given to ``CaseScores``.
        scan: channel of the image to be shown.
        tag: name of the pictures.
        image_key, pred_key, reference_key, case_key: where a decollated item has them. Prediction and reference are on
            one grid (1, H, W, D) of whole numbers or (K, H, W, D) of 0 and 1; the image, on any grid, is a MetaTensor.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        classes: Sequence[str],
        scan: int = 0,
        tag: str = "validation/worst_case",
        image_key: str = "image",
        pred_key: str = "pred",
        reference_key: str = "reference",
        case_key: str = "case",
    ) -> None:
        self.log_dir = str(log_dir)
        self.classes = (classes,) if isinstance(classes, str) else tuple(classes)
        self.scan = scan
        self.tag = tag
        self.keys = (image_key, pred_key, reference_key, case_key)
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
        batch, output = engine.state.batch, engine.state.output
        for old, new in zip(batch, output, strict=True):
            self._compare({**old, **new})

    def _compare(self, item: Mapping[str, Any]) -> None:
        image, pred, reference, case = (item[key] for key in self.keys)
        # on a GPU the prediction lies there and the reference, which the network never sees, does not
        pred, reference = pred.cpu(), reference.cpu()
        dice = mean_dice(pred, reference, len(self.classes))
        if np.isnan(dice) or (self._worst is not None and (self._worst.dice, self._worst.case) <= (dice, case)):
            return
        affine = np.asarray(reference.affine, dtype=float)
        axis = pictures.axial_axis(affine)
        truth, found = _labels(reference), _labels(pred)
        counts = list(zip(_per_slice(truth != found, axis), _per_slice(truth > 0, axis), strict=True))
        index = counts.index(max(counts))
        source = np.asarray(image.affine, dtype=float)
        grey = pictures.sampled(_plain(image)[self.scan].cpu(), source, affine, tuple(truth.shape), axis, index)
        planes = [grey, *(labels.select(axis, index).numpy() for labels in (truth, found))]
        if truth.shape[2] > 1:  # a 2-D image stands upright as it is, and nobody knows the patient's sides
            planes = [pictures.as_seen(plane, affine) for plane in planes]
        grey, first, second = planes
        aspect = pictures.aspect_of(affine) if truth.shape[2] > 1 else float(affine[0, 0] / affine[1, 1])
        self._worst = _Worst(dice, case, index, grey, first, second, aspect, truth.shape[2] > 1)

    def _write(self, engine: Any) -> None:
        found: Any = idist.all_gather([self._worst]) if idist.get_world_size() > 1 else [[self._worst]]
        self._worst = None
        cases = [worst for worsts in found for worst in worsts if worst is not None]
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
        self._writer.add_image(self.tag, picture, engine.state.epoch, dataformats="HWC")
        self._writer.flush()


def _plain(volume: torch.Tensor) -> torch.Tensor:
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


def _per_slice(mask: torch.Tensor, axis: int) -> list[int]:
    return mask.movedim(axis, 0).flatten(1).sum(1).tolist()


def _labels(volume: torch.Tensor) -> torch.Tensor:
    """(1, H, W, D) or (K, H, W, D) to (H, W, D) whole numbers; of overlapping channels the last is shown."""
    plain = _plain(volume)
    if len(plain) == 1:
        return plain[0].to(torch.uint8)
    numbers = torch.arange(1, len(plain) + 1, device=plain.device)[:, None, None, None]
    return ((plain > 0) * numbers).amax(0).to(torch.uint8)
