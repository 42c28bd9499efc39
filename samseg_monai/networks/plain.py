"""PlainSegmenter: any network without SAM behind the same interface, as the baseline that SAM has to beat."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samseg_monai.errors import AdapterError, ConfigError, raise_all
from samseg_monai.networks.checks import check_boxes, check_image, check_options
from samseg_monai.networks.crops import cut_out, draw_boxes, lay_back, squares
from samseg_monai.networks.joining import empty_logits, join_boxes
from samseg_monai.sam.weights import RANDOM
from samseg_monai.strategies import Scratch, Segmenter, Strategy
from samseg_monai.training.owned import keep_only


class PlainSegmenter(Segmenter):
    """A network that learns as a whole from a random start, with or without boxes.

    Args:
        net: (B, S, side, side) to logits (B, C, side, side), C = ``channels_out``; MONAI's U-Net for example.
            ``boxes`` changes what it sees.
        strategy: names it in tables; None is ``Scratch()``.
        image_size: side of the square that ``net`` sees; smaller slices are padded with zeros at the bottom and right,
            and the logits cut back.
        num_classes: 1 gives one map; K > 1 gives K + 1 maps, channel 0 is the background.
        scans: channels of the input.
        input_scale: how the intensities were prepared; recorded only.
        boxes: "none": there are none, and giving one is an error. "channel": the net sees S + 1 channels, the last is 1
            where a pixel's centre is in a box, else 0. "crop": the net sees (R, S, crop_size, crop_size), a square
            around each of R boxes, and its logits are laid back into the slice, with -20 outside. "given": it is called
            ``net(image, boxes)``, a row of the padded square and one of (R, 4) for each box.
        crop_margin: the square's side is the box's longer one, moved out by this fraction of it at either end.
        crop_size: side of the crop in pixels, to which the square is resampled bilinearly.

    Attributes: as of ``SamSegmenter``, as far as training, saving and cards need them.

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
        image_size: int = 256,
        num_classes: int = 1,
        scans: int = 1,
        input_scale: Literal["zscore", "unit", "sam"] = "zscore",
        boxes: Literal["none", "channel", "crop", "given"] = "none",
        crop_margin: float = 0.5,
        crop_size: int = 128,
    ) -> None:
        super().__init__()
        check_options({"input_scale": input_scale, "boxes": boxes}, num_classes=num_classes, scans=scans)
        _check_crop(crop_margin, crop_size)
        self.net, self.boxes, self.crop_margin, self.crop_size = net, boxes, crop_margin, crop_size
        self.image_size, self.num_classes, self.scans, self.input_scale = image_size, num_classes, scans, input_scale
        self.scan_mode, self.prompt = "channels", "none" if boxes == "none" else "box"
        self.spec = SimpleNamespace(name="no SAM")
        self.base_sha256 = self.base_file = self.strategy = None
        strategy = Scratch() if strategy is None else strategy
        if not isinstance(strategy, Scratch):
            raise AdapterError(
                f"strategy: got {type(strategy).__name__}, but {type(net).__name__} has no SAM in it; use Scratch"
            )
        self.owned = strategy.install(self)
        self.unused: list[str] = []
        self.fixed: list[str] = []
        self.strategy = strategy
        keep_only(self, self.owned)
        self.eval()

    @property
    def channels_out(self) -> int:
        """Number of logit maps: 1, or the number of classes and the background."""
        return 1 if self.num_classes == 1 else self.num_classes + 1

    def load_base(self, checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> None:
        """Start at random: there are no base weights. ``checkpoint`` may be None or "random"."""
        if checkpoint is not None and os.fspath(checkpoint) != RANDOM:
            raise ConfigError(f"sam_checkpoint: got {checkpoint}, but this network has no SAM in it; leave it out")
        self.base_sha256 = RANDOM

    def box_facts(self) -> dict[str, Any]:
        """How boxes reach the net, as JSON values for the card: an adapter of another way is another network's."""
        if self.boxes == "none":
            return {}
        crop = {"crop_margin": self.crop_margin, "crop_size": self.crop_size} if self.boxes == "crop" else {}
        return {"boxes": self.boxes, **crop}

    def forward(self, image: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Segment a batch of slices.

        Args:
            image: (B, S, H, W), H and W at most ``image_size``.
            boxes: (B, 4) or (B, N, 4) as x0 y0 x1 y1 in pixels of ``image``, x along W; a row with NaN is no box. For
                a network with boxes None means one around the whole slice.
        Returns:
            Logits (B, C, H, W), float32. Of several boxes a pixel has the largest logit (background: smallest), and an
            image without any has -20 (background: +20) everywhere.
        Raises:
            ConfigError: naming the shape that was got and the one expected.
        """
        image = image.as_subclass(torch.Tensor).float()
        check_image(self, image)
        boxes = None if boxes is None else boxes.as_subclass(torch.Tensor).float()
        check_boxes(self, image, boxes)
        if self.boxes == "none":
            return self._on_square(image)
        whole = image.new_tensor([[[0, 0, image.shape[-1], image.shape[-2]]]])  # (1, 1, 4)
        boxes = whole.expand(len(image), -1, -1) if boxes is None else boxes
        boxes = boxes[:, None] if boxes.ndim == 2 else boxes  # (B, N, 4)
        given = ~boxes.isnan().any(-1)  # (B, N)
        seen = given.any(1).nonzero()[:, 0].tolist()
        empty = empty_logits(image, len(image), self.num_classes, image.shape[-2:])
        if not seen:
            # A batch without any box must still reach every tensor, or backward() and DDP would fail.
            reach = torch.is_grad_enabled() and len(image) > 0
            return empty + 0 * self._segment(image[:1], whole, given.new_ones(1, 1))[0].sum() if reach else empty
        result = list(empty)
        for index, logits in zip(seen, self._segment(image[seen], boxes[seen], given[seen]), strict=True):
            result[index] = logits
        return torch.stack(result)

    def _segment(self, image: Tensor, boxes: Tensor, given: Tensor) -> list[Tensor]:
        """(B, S, H, W), boxes (B, N, 4) and which of them are given (B, N), some for each image, to B of (C, H, W)."""
        height, width = image.shape[-2:]
        if self.boxes == "channel":
            return list(self._on_square(torch.cat([image, draw_boxes(boxes, (height, width))], dim=1)))
        counts = given.sum(1)
        rows, boxes = image.repeat_interleave(counts, 0), boxes[given]  # (R, S, H, W) and (R, 4)
        if self.boxes == "given":
            logits = self._on_square(rows, boxes)
        else:
            corner, side = squares(boxes, self.crop_margin)
            logits = self._run(cut_out(rows, corner, side, self.crop_size))
            logits = lay_back(logits, corner, side, (height, width))
        return join_boxes(logits, counts.tolist(), self.num_classes)

    def _on_square(self, image: Tensor, *further: Tensor) -> Tensor:
        """The net on the slices padded with zeros to ``image_size``, its logits cut back."""
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, self.image_size - width, 0, self.image_size - height))
        return self._run(padded, *further)[..., :height, :width]

    def _run(self, image: Tensor, *further: Tensor) -> Tensor:
        logits = self.net(image, *further)
        expected = (len(image), self.channels_out, *image.shape[-2:])
        shape = tuple(getattr(logits, "shape", ()))
        if shape != expected:
            raise ConfigError(
                f"{type(self.net).__name__} must return logits {expected}, got "
                f"{shape or f'a {type(logits).__name__}'}; check its output channels against the classes"
            )
        return logits.float()


def _check_crop(margin: float, size: int) -> None:
    problems = [] if math.isfinite(margin) and margin >= 0 else [f"crop_margin: got {margin}; a number from 0 on"]
    problems += [] if size >= 1 else [f"crop_size: got {size}; at least 1 pixel"]
    raise_all(problems, ConfigError, "the segmenter cannot be built")
