"""Dice, cross-entropy, focal and boundary loss as one weighted sum, with classes weighted by name."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.losses import BoundaryLoss, DiceCELoss, FocalLoss
from monai.networks import one_hot
from torch import Tensor, nn
from torch.nn import functional as F

from samseg_monai.choices import IGNORE
from samseg_monai.errors import ConfigError, raise_all

BACKGROUND = "background"
_OURS = {"to_onehot_y", "sigmoid", "softmax", "other_act", "reduction", "weight", "lambda_dice", "lambda_ce"}
SETTINGS = tuple(sorted(set(inspect.signature(DiceCELoss).parameters) - _OURS))


class OnLogitGrid(nn.Module):
    """Compare on the grid of the logits: a finer label is thinned out by nearest neighbour first.

    SAMed (Zhang and Liu 2023) and SAM-LST (Chai et al. 2023) compare SAM's quarter-resolution logits with a thinned
    label, too; the grid of their code meets the label's at the corners (``scipy.ndimage.zoom`` of order 0), ours at the
    pixels' centres, as that of the logits does (up to 2 of 512 pixels apart). Labels that are on the logits' grid
    already pass unchanged.

    Of a network with two decoders both are compared: ``(1 - w) first + w second``, where w grows from 0.6 towards 1
    with the epoch e from 0 on, ``w = 0.6 ** (0.99 ** e)`` (code of H-SAM, Cheng et al. 2024).

    Args:
        loss: called with logits (B, C, h, w) and label (B, 1, h, w).
        corners: thin labels as the published code does.
    Shape: logits (B, C, h, w), or those of two decoders, label (B, 1, H, W) to what ``loss`` returns.
    """

    def __init__(self, loss: nn.Module, *, corners: bool = False) -> None:
        super().__init__()
        self.loss, self.corners = loss, corners
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, the first one being 1."""
        self.epoch = epoch

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        if not isinstance(logits, Tensor):
            weight = 0.6 ** (0.99 ** (self.epoch - 1))
            first, second = (self(maps, label) for maps in logits)
            return (1 - weight) * first + weight * second
        if label.shape[-2:] != logits.shape[-2:]:
            plain = label.as_subclass(torch.Tensor)
            if self.corners:
                rows, columns = map(_from_corner_to_corner, label.shape[-2:], logits.shape[-2:])
                return self.loss(logits, plain[..., rows, :][..., columns])
            # torch picks pixels of few kinds of integers only; float32 holds every class number exactly
            label = F.interpolate(plain.float(), logits.shape[-2:], mode="nearest-exact").to(plain.dtype)
        return self.loss(logits, label)


def _from_corner_to_corner(pixels: int, points: int) -> list[int]:
    """The pixels nearest to ``points`` at equal distances from the first pixel to the last one."""
    return [math.floor(i * (pixels - 1) / max(1, points - 1) + 0.5) for i in range(points)]


class SegmentationLoss(nn.Module):
    """``dice * Dice + ce * CE + focal * Focal + boundary * Boundary``; a term of weight 0 is left out.

    - Dice and CE: MONAI's ``DiceCELoss``, softmax over background and classes, or sigmoid for a single class.
    - Focal (Lin et al. 2017, arXiv:1708.02002, eq. 4): ``-(1 - p) ** gamma * log(p)``, ``p`` the probability of the
      label; mean over pixels, so that ``focal_gamma = 0`` is the cross-entropy.
    - Boundary (Kervadec et al. 2019, arXiv:1812.07032, eq. 5): mean over pixels and classes, without the background, of
      ``p * phi``, where ``phi`` is the signed distance to the label's boundary (MONAI's ``BoundaryLoss``), negative
      inside, in units of the grid's longer side: a weight means the same at every image size. A class that a slice does
      not have, or has everywhere, adds 0, so the term works only beside another one. It is the most expensive one (two
      distance transforms on the CPU per image and class present), and may be negative.

    Pixels whose label is 255 (nobody has judged them) are in no term and get no gradient, and neither are slices that
    are such as a whole: a batch without any other costs 0.

    Args:
        classes: names of the classes, without the background; more than one means softmax.
        dice, ce, focal, boundary: weights of the terms, not negative.
        focal_gamma: how strongly pixels that are right already are left alone, not negative.
        class_weights: name -> weight, see ``weigh_classes``; counts in every term. For a single class it is the
            weight of its pixels in CE and Focal; Dice and Boundary have one class then and nothing to weigh.
        settings: more of ``DiceCELoss``, such as ``batch``, ``squared_pred`` or ``smooth_nr``.
    Shape: logits (B, C, h, w) with C = K + 1, or 1 for a single class; label (B, 1, h, w) of 0 to K, or 255, which may
        stay on the CPU, where looking for 255 makes no GPU wait; to a scalar. Patches of volumes have a third axis, d.
    Raises: ConfigError listing everything that is out of range or unknown.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        dice: float = 0.5,
        ce: float = 0.5,
        focal: float = 0.0,
        boundary: float = 0.0,
        focal_gamma: float = 2.0,
        class_weights: Mapping[str, float] | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        _check({"dice": dice, "ce": ce, "focal": focal, "boundary": boundary}, focal_gamma, settings)
        self.multiclass = len(classes) > 1
        self.focal_weight = focal
        self.boundary_weight = boundary
        weight = weigh_classes(class_weights, classes)
        self.register_buffer("weight", weight, persistent=False)
        self.weight: Tensor | None
        self.dice_ce: DiceCELoss | None = None
        if dice or ce:
            settings |= {"softmax": self.multiclass, "to_onehot_y": self.multiclass, "sigmoid": not self.multiclass}
            self.dice_ce = DiceCELoss(lambda_dice=dice, lambda_ce=ce, weight=weight, **settings)
        self.focal = FocalLoss(
            gamma=focal_gamma, use_softmax=self.multiclass, to_onehot_y=self.multiclass, reduction="none"
        )
        self.boundary = BoundaryLoss()

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.weight is not None and self.weight.device != logits.device:
            self.to(logits.device)  # a trainer moves networks, not losses
        label = label.as_subclass(torch.Tensor)
        counts = label != IGNORE
        judged = None if counts.all() else counts.to(logits.device)  # (B, 1, h, w); None: all of it
        label = label.to(logits.device, non_blocking=True)
        if judged is not None:
            if not (kept := judged_slices(label)).any():
                return torch.where(judged, logits, 0.0).sum()
            if not kept.all():
                return self(logits[kept], label[kept])
            # no value of the network's may reach the sums, not even as NaN times 0
            logits, label = torch.where(judged, logits, 0.0), torch.where(judged, label, 0)
        if not self.multiclass:
            label = label.to(logits.dtype)  # MONAI's squared Dice and focal loss take no integers here
        terms = []
        if self.dice_ce is not None:
            terms.append(self.dice_ce(logits, label) if judged is None else self._dice_ce(logits, label, judged))
        if self.focal_weight:
            terms.append(self.focal_weight * self._focal(logits, label, judged))
        if self.boundary_weight:
            terms.append(self.boundary_weight * self._boundary(logits, label, judged))
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _dice_ce(self, logits: Tensor, label: Tensor, judged: Tensor) -> Tensor:
        """MONAI's ``DiceCELoss`` over the judged pixels alone; its own masked Dice makes 0.5 of what is left out."""
        assert self.dice_ce is not None
        dice, target = copy.copy(self.dice_ce.dice), label
        dice.sigmoid = dice.softmax = dice.to_onehot_y = False
        if self.multiclass:
            target = one_hot(label, logits.shape[1])
            marked = torch.where(judged, label.long(), IGNORE)[:, 0]
            smoothing = self.dice_ce.cross_entropy.label_smoothing
            ce = F.cross_entropy(logits, marked, self.weight, ignore_index=IGNORE, label_smoothing=smoothing)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, label, pos_weight=self.weight, reduction="none")
            ce = _mean(losses, judged)
        probabilities = logits.softmax(1) if self.multiclass else logits.sigmoid()
        overlap = dice(probabilities * judged, target * judged)
        return self.dice_ce.lambda_dice * overlap + self.dice_ce.lambda_ce * ce

    def _focal(self, logits: Tensor, label: Tensor, judged: Tensor | None) -> Tensor:
        losses = self.focal(logits, label).sum(1, keepdim=True)  # 0 but in the label's own channel
        if self.weight is None:
            return _mean(losses, judged)
        if not self.multiclass:
            return _mean(losses * torch.where(label > 0, self.weight, 1.0), judged)
        weight = self.weight[label.long()] * (1.0 if judged is None else judged)
        return (losses * weight).sum() / weight.sum()

    def _boundary(self, logits: Tensor, label: Tensor, judged: Tensor | None) -> Tensor:
        masks, probabilities = label, logits.sigmoid()
        if self.multiclass:
            masks, probabilities = one_hot(label, logits.shape[1])[:, 1:], logits.softmax(1)[:, 1:]
        # on the CPU, where the distances are computed: one transfer instead of four per image and class
        distances = self.boundary.compute_distance_map(masks.cpu()).to(logits.device)
        losses, others = probabilities * distances / max(logits.shape[2:]), (0, *range(2, logits.ndim))
        means = losses.mean(others) if judged is None else (losses * judged).sum(others) / judged.sum()  # (K,)
        if self.weight is None or not self.multiclass:
            return means.mean()
        return (means * self.weight[1:]).sum() / self.weight[1:].sum()


def judged_slices(label: Tensor) -> Tensor:
    """Which slices of a label (B, 1, h, w) have a pixel that counts in the loss: bool (B,), on its device."""
    return (label != IGNORE).flatten(1).any(1)


def _mean(losses: Tensor, judged: Tensor | None) -> Tensor:
    """Mean over pixels (B, 1, h, w), of those that are judged; None: of all."""
    return losses.mean() if judged is None else (losses * judged).sum() / judged.sum()


def _check(weights: Mapping[str, float], gamma: float, settings: Mapping[str, Any]) -> None:
    numbers = {**weights, "focal_gamma": gamma}
    bad = {k: v for k, v in numbers.items() if not isinstance(v, (int, float)) or not (math.isfinite(v) and v >= 0)}
    problems = [f"{name} must be a number from 0 on, got {value!r}" for name, value in bad.items()]
    if not bad and not any(weights.values()):
        problems.append("all weights are 0: nothing would be learned")
    elif not bad and not any(weight for name, weight in weights.items() if name != "boundary"):
        problems.append("boundary alone costs nothing where a class is absent: give dice, ce or focal a weight, too")
    unknown = sorted(set(settings) - set(SETTINGS))
    problems += [f"{name}: no such setting; there are {', '.join([*numbers, *SETTINGS])}" for name in unknown]
    raise_all(problems, ConfigError, "the loss cannot be built")


def weigh_classes(weights: Mapping[str, float] | str | None, classes: Sequence[str]) -> Tensor | None:
    """How much each class counts in MONAI's losses: only ratios matter, and who is not named has weight 1.

    Args:
        weights: name -> positive number, as ``{"gallbladder": 3}``, or the same as a text for command lines,
            ``"gallbladder=3,pancreas=2"``; "background" may be among the names. None or empty: no weights.
        classes: names of the classes in the order of the network's channels, without the background.
    Returns: None without weights. For several classes float32 (K + 1,), background first, with mean 1: the balance
        between Dice and cross-entropy stays as it is. For a single class float32 (1,): its weight divided by the
        background's.
    Raises: ConfigError listing every unknown name, with the classes there are, and every weight that is no positive
        number.
    """
    table = _parsed(weights) if isinstance(weights, str) else weights or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f'class weights are {{"gallbladder": 3}} or "gallbladder=3,pancreas=2", got {weights!r}')
    if not table:
        return None
    names = [BACKGROUND, *classes]
    problems = [f"{name}: no such class; there are {', '.join(names)}" for name in table if name not in names]
    for name, weight in table.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight > 0):
            problems.append(f"{name}: the weight must be a positive number, got {weight!r}")
    raise_all(problems, ConfigError, "class weights cannot be used")
    found = torch.tensor([float(table.get(name, 1.0)) for name in names])
    return found / found.mean() if len(classes) > 1 else found[1:] / found[0]


def _parsed(text: str) -> dict[str, Any]:
    """``"gallbladder=3,pancreas=2"`` as a table; what is no number stays a text, to be refused by name."""
    table: dict[str, Any] = {}
    for name, _, value in (part.partition("=") for part in text.split(",") if text.strip()):
        if name.strip() in table:
            raise ConfigError(f"class weights name a class twice: {text!r}")
        try:
            table[name.strip()] = float(value)
        except ValueError:
            table[name.strip()] = value.strip()
    return table
