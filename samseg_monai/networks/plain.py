"""PlainSegmenter: any network without SAM behind the same interface, as the baseline that SAM has to beat.

Boxes are (R, 4) as x0 y0 x1 y1, float edges in pixels of the slice, x along its last axis.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit.frontend import FrontendError

from samseg_monai.errors import AdapterError, ConfigError, raise_all
from samseg_monai.networks.common import (
    EMPTY_LOGIT,
    UNSCRIPTED,
    check_options,
    empty_logits,
    join_boxes,
    named_scans,
    plain_inputs,
    where_boxes_are,
    whole_slice,
)
from samseg_monai.sam.weights import RANDOM
from samseg_monai.strategies import Scratch, Segmenter, Strategy

SMALLEST = 1e-3  # pixels: the shortest side of a box, so that a box without an area is no division by zero


class PlainSegmenter(Segmenter):
    """A network that learns as a whole from a random start, with or without boxes.

    Args:
        net: (B, S, side, side) to logits (B, C, side, side), C = ``channels_out``, or a list of nothing else; MONAI's
            U-Net for example. ``boxes`` changes what it sees.
        strategy: names it in tables; None is ``Scratch()``.
        image_size: side of the square that ``net`` sees, or of a three-dimensional net, without boxes, the three sides
            of the patch; smaller slices or patches are padded with zeros at their ends, and the logits cut back.
        num_classes: 1 gives one map; K > 1 gives K + 1 maps, channel 0 is the background.
        scans: channels of the input, or their names.
        input_scale: how the intensities were prepared; recorded only.
        boxes: "none": there are none, and giving one is an error. "channel": the net sees S + 1 channels, the last is 1
            where a pixel's centre is in a box, else 0. "crop": the net sees (R, S, crop_size, crop_size), a square
            around each of R boxes, and its logits are laid back into the slice, with -20 outside. "given": it is called
            ``net(image, boxes)``, a row of the padded square and one of (R, 4) for each box.
        crop_margin: the square's side is the box's longer one, moved out by this fraction of it at either end.
        crop_size: side of the crop in pixels, to which the square is resampled bilinearly.

    Raises:
        ConfigError: listing all options that are unknown or out of range.
        AdapterError: a strategy that needs SAM.
    """

    encoder_frozen = False

    def __init__(
        self,
        net: nn.Module,
        strategy: Strategy | None = None,
        *,
        image_size: int | Sequence[int] = 256,
        num_classes: int = 1,
        scans: int | Sequence[str] = 1,
        input_scale: Literal["zscore", "unit", "slice", "sam"] = "zscore",
        boxes: Literal["none", "channel", "crop", "given"] = "none",
        crop_margin: float = 0.5,
        crop_size: int = 128,
    ) -> None:
        super().__init__()
        scans, self.scan_names = named_scans(scans)
        check_options({"input_scale": input_scale, "boxes": boxes}, num_classes=num_classes, scans=scans)
        self.image_size: Any = image_size if isinstance(image_size, int) else [*image_size]  # as JSON knows it
        self.sides = [image_size] * 2 if isinstance(image_size, int) else [*image_size]
        _check_sizes(self.sides, boxes, crop_margin, crop_size)
        self.net, self.boxes, self.crop_margin, self.crop_size = net, boxes, crop_margin, crop_size
        self.num_classes, self.scans, self.input_scale = num_classes, scans, input_scale
        self.scan_mode, self.prompt = "channels", "none" if boxes == "none" else "box"
        self.spec = SimpleNamespace(name="no SAM")
        strategy = Scratch() if strategy is None else strategy
        if not isinstance(strategy, Scratch):
            raise AdapterError(
                f"strategy: got {type(strategy).__name__}, but {type(net).__name__} has no SAM in it; use Scratch"
            )
        self.adopt(strategy)
        self.eval()

    def load_base(self, checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> None:
        """Start at random: there are no base weights. ``checkpoint`` may be None or "random"."""
        if checkpoint is not None and os.fspath(checkpoint) != RANDOM:
            raise ConfigError(f"sam_checkpoint: got {checkpoint}, but this network has no SAM in it; leave it out")
        self.base_sha256 = RANDOM

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes instead: the net behind the padding, which needs none of this package."""
        if self.boxes != "none":
            raise ConfigError(f"TorchScript cannot hold this network; {UNSCRIPTED}")
        try:
            net = torch.jit.script(self.net)
        except (RuntimeError, FrontendError) as error:
            raise ConfigError(
                f"TorchScript cannot hold {type(self.net).__name__} as it is written; trace it, by --use_trace True"
            ) from error
        return _Padded(net, self.sides)

    def box_facts(self) -> dict[str, Any]:
        """How boxes reach the net, as JSON values for the card: an adapter of another way is another network's."""
        if self.boxes == "none":
            return {}
        crop = {"crop_margin": self.crop_margin, "crop_size": self.crop_size} if self.boxes == "crop" else {}
        return {"boxes": self.boxes, **crop}

    def forward(self, image: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Segment a batch of slices, or of patches of volumes.

        Args:
            image: (B, S, H, W), H and W at most ``image_size``; (B, S, H, W, D) where that has three sides.
            boxes: (B, 4) or (B, N, 4) as x0 y0 x1 y1 in pixels of ``image``, x along W; a row with NaN is no box. For
                a network with boxes None means one around the whole slice.
        Returns:
            Logits (B, C, H, W) or (B, C, H, W, D), float32. Of several boxes a pixel has the largest logit (background:
            smallest), and an image without any has -20 (background: +20) everywhere.
        Raises:
            ConfigError: naming the shape that was got and the one expected.
        """
        image, boxes = plain_inputs(self, image, boxes)
        if self.boxes == "none":
            return self._on_square(image)
        boxes = whole_slice(image).expand(len(image), -1, -1) if boxes is None else boxes
        return where_boxes_are(self, image, boxes, lambda images, *rows: self._segment(image[images], *rows))

    def _segment(self, image: Tensor, boxes: Tensor, given: Tensor) -> list[Tensor]:
        """(B, S, H, W), boxes (B, N, 4) and which of them are given (B, N), some for each image, to B of (C, H, W)."""
        height, width = image.shape[-2:]
        if self.boxes == "channel":
            return list(self._on_square(torch.cat([image, draw_boxes(boxes, (height, width))], dim=1)))
        counts = given.sum(1).tolist()
        each = torch.tensor(counts, device=image.device)
        rows, boxes = image.repeat_interleave(each, 0, output_size=sum(counts)), boxes[given]  # (R, S, H, W) and (R, 4)
        if self.boxes == "given":
            logits = self._on_square(rows, boxes)
        else:
            corner, side = squares(boxes, self.crop_margin)
            logits = self._run(cut_out(rows, corner, side, self.crop_size))
            logits = lay_back(logits, corner, side, (height, width))
        return join_boxes(logits, counts, self.num_classes)

    def _on_square(self, image: Tensor, *further: Tensor) -> Tensor:
        """The net on the slices padded with zeros to ``image_size``, its logits cut back."""
        return cut_back(self._run(padded(image, self.sides), *further), image)

    def _run(self, image: Tensor, *further: Tensor) -> Tensor:
        logits = self.net(image, *further)
        if isinstance(logits, (list, tuple)) and len(logits) == 1:  # so does BasicUNetPlusPlus answer
            logits = logits[0]
        expected = (len(image), self.channels_out, *image.shape[2:])
        shape = tuple(getattr(logits, "shape", ()))
        if shape != expected:
            raise ConfigError(
                f"{type(self.net).__name__} must return logits {expected}, got "
                f"{shape or f'a {type(logits).__name__}'}; check its output channels against the classes"
            )
        return logits.float()


class _Padded(nn.Module):
    """A net behind the padding of ``PlainSegmenter``, in the part of Python that TorchScript knows."""

    def __init__(self, net: nn.Module, sides: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.sides = list(sides)

    def forward(self, image: Tensor) -> Tensor:
        """Slices (B, S, H, W) or patches (B, S, H, W, D) to logits of their size, float32; no side above its limit."""
        for axis, side in enumerate(self.sides):
            if image.shape[2 + axis] > side:
                raise ValueError("image: a side is longer than image_size")
        logits = self.net(padded(image.float(), self.sides))
        if isinstance(logits, list):  # so does BasicUNetPlusPlus answer
            return cut_back(logits[0], image).float()
        else:
            return cut_back(logits, image).float()


def padded(image: Tensor, sides: list[int]) -> Tensor:
    """(B, S, H, W[, D]) with zeros at the ends of its axes, up to ``sides``."""
    missing: list[int] = []
    for axis in range(len(sides) - 1, -1, -1):
        missing += [0, sides[axis] - image.shape[2 + axis]]
    return F.pad(image, missing)


def cut_back(logits: Tensor, image: Tensor) -> Tensor:
    """Logits (B, C, ...) of a padded image without what lies beyond ``image``."""
    for axis in range(2, image.ndim):
        logits = logits.narrow(axis, 0, image.shape[axis])
    return logits


def _check_sizes(sides: Sequence[int], boxes: str, margin: float, size: int) -> None:
    problems = [] if math.isfinite(margin) and margin >= 0 else [f"crop_margin: got {margin}; a number from 0 on"]
    problems += [] if size >= 1 else [f"crop_size: got {size}; at least 1 pixel"]
    if len(sides) not in (2, 3) or min(sides) < 1:
        problems.append(f"image_size: got {list(sides)}; one side of a square, or three of a patch, at least 1")
    elif len(sides) == 3 and boxes != "none":
        problems.append(f"boxes: got {boxes!r}, but a three-dimensional net takes none")
    raise_all(problems, ConfigError, "the segmenter cannot be built")


def draw_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, 4), rows with NaN are no box, to (B, 1, H, W) of 0 and 1: 1 where a pixel's centre is in any box."""
    height, width = size
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    x0, y0, x1, y1 = boxes.float()[..., None].unbind(-2)  # (B, N, 1) each; NaN compares false
    across, down = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)  # (B, N, W) and (B, N, H)
    return (down[..., :, None] & across[..., None, :]).any(1, keepdim=True).float()


def squares(boxes: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Upper left corners (R, 2) as x y and sides (R, 1), in pixels, of the squares around the boxes.

    A square has the box's centre; its side is the box's longer one, moved out by ``margin`` of it at either end.
    """
    boxes = boxes.float()
    longer = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=1.0)  # a square has at least a pixel
    side = (1 + 2 * margin) * longer
    return (boxes[:, :2] + boxes[:, 2:] - side) / 2, side


def cut_out(image: Tensor, corner: Tensor, side: Tensor, size: int) -> Tensor:
    """(R, S, H, W) to (R, S, size, size): the squares, bilinearly; 0 outside of the slice."""
    steps = (torch.arange(size, device=image.device) + 0.5) / size
    points = corner[:, None, :] + side[:, None, :] * steps[None, :, None]  # (R, size, 2) as x, y
    frame = torch.tensor([image.shape[-1], image.shape[-2]], device=image.device)
    x, y = (2 * points / frame - 1).unbind(-1)
    return _sample(image, x, y, "zeros")


def lay_back(logits: Tensor, corner: Tensor, side: Tensor, size: tuple[int, int]) -> Tensor:
    """(R, C, n, n) of the squares to (R, C, H, W), bilinearly; outside of its square a slice has nothing."""
    height, width = size
    x = 2 * (torch.arange(width, device=logits.device) + 0.5 - corner[:, :1]) / side - 1  # (R, W)
    y = 2 * (torch.arange(height, device=logits.device) + 0.5 - corner[:, 1:]) / side - 1  # (R, H)
    inside = (y.abs() <= 1)[:, None, :, None] & (x.abs() <= 1)[:, None, None, :]
    classes = max(logits.shape[1] - 1, 1)
    return torch.where(inside, _sample(logits, x, y, "border"), empty_logits(logits, len(logits), classes, size))


def _sample(image: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
    """(R, C, H, W) at columns x (R, w) and rows y (R, h), both -1 to 1 from edge to edge, to (R, C, h, w)."""
    grid = torch.stack(
        [x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=-1
    )  # (R, h, w, 2)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=False)


class BoxEllipse(nn.Module):
    """What there is to learn about boxes without any image: an ellipse in the box with five learned numbers.

    Logit ``k (1 - (2 (x - cx) / (a w))^2 - (2 (y - cy) / (b h))^2)`` of the pixel centres (x, y) in a box w by h.

    The factors a and b of the half axes and the sharpness k are learned as logarithms, the centre (cx, cy) as an
    offset from the box's own in fractions of its sides. At the start a = b = 1 without offset: the ellipse inscribed in
    the box. Logits are bounded below by -20, smoothly: l < 0 becomes 20 l / (20 - l), whose gradient never ends.

    Args:
        sharpness: k at the start, above 0; the logit in the centre.
    Shape: image (R, S, H, W), of which only the size counts, and boxes (R, 4) as x0 y0 x1 y1, float edges in pixels, x
        along W, to logits (R, 1, H, W).
    Raises: ConfigError if the sharpness is not above 0.
    """

    def __init__(self, sharpness: float = 4.0) -> None:
        super().__init__()
        if not (math.isfinite(sharpness) and sharpness > 0):
            raise ConfigError(f"sharpness: got {sharpness}; a finite number above 0")
        self.log_axes = nn.Parameter(torch.zeros(2))  # x, y
        self.offset = nn.Parameter(torch.zeros(2))  # x, y
        self.log_sharpness = nn.Parameter(torch.tensor([math.log(sharpness)]))

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        boxes = boxes.float()
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=SMALLEST)  # (R, 2) as x, y
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + self.offset * sides
        half = self.log_axes.exp() * sides / 2
        across, down = (self._distances(image, axis, centre, half) for axis in (0, 1))  # (R, W) and (R, H)
        logits = self.log_sharpness.exp() * (1 - across[:, None, :] - down[:, :, None])
        below = logits.clamp(max=0) / EMPTY_LOGIT
        return (F.relu(logits) + EMPTY_LOGIT * (below / (1 + below)))[:, None]

    def facts(self) -> dict[str, float]:
        """What was learnt, for the run card: axes and offset as fractions of the box's sides, and the sharpness."""
        names = ("axis_x", "axis_y", "offset_x", "offset_y", "sharpness")
        values = (*self.log_axes.exp(), *self.offset, *self.log_sharpness.exp())
        return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}

    @staticmethod
    def _distances(image: Tensor, axis: int, centre: Tensor, half: Tensor) -> Tensor:
        """(R, n) squared distances of pixel centres along x (0) or y (1), in half axes."""
        pixels = torch.arange(image.shape[-1 - axis], device=image.device) + 0.5
        return ((pixels - centre[:, axis, None]) / half[:, axis, None]) ** 2
