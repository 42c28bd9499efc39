"""PlainSegmenter: any network without SAM behind the same interface, as the baseline that SAM has to beat."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samseg_monai.errors import AdapterError, ConfigError
from samseg_monai.networks.checks import check_image, check_options
from samseg_monai.sam.weights import RANDOM
from samseg_monai.strategies import Scratch, Segmenter, Strategy
from samseg_monai.trainable import keep_only


class PlainSegmenter(Segmenter):
    """A network that learns as a whole from a random start, without prompts.

    Args:
        net: (B, S, side, side) to logits (B, C, side, side), C = ``channels_out``; MONAI's U-Net for example.
        strategy: names it in tables; None is ``Scratch()``.
        image_size: side of the square that ``net`` sees; smaller slices are padded with zeros at the bottom and right,
            and the logits cut back.
        num_classes: 1 gives one map; K > 1 gives K + 1 maps, channel 0 is the background.
        scans: channels of the input.
        input_scale: how the intensities were prepared; recorded only.

    Attributes: as of ``SamSegmenter``, as far as training, saving and cards need them.

    Raises:
        ConfigError: unknown options.
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
    ) -> None:
        super().__init__()
        check_options({"input_scale": input_scale}, num_classes=num_classes, scans=scans)
        self.net = net
        self.image_size, self.num_classes, self.scans, self.input_scale = image_size, num_classes, scans, input_scale
        self.scan_mode, self.prompt, self.spec = "channels", "none", SimpleNamespace(name="no SAM")
        self.base_sha256: str | None = None
        self.base_file: str | None = None
        self.strategy = None
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

    def forward(self, image: Tensor) -> Tensor:
        """Segment slices (B, S, H, W), H and W at most ``image_size``, into logits (B, C, H, W), float32."""
        image = image.as_subclass(torch.Tensor).float()
        check_image(self, image)
        height, width = image.shape[-2:]
        logits = self.net(F.pad(image, (0, self.image_size - width, 0, self.image_size - height)))
        expected = (len(image), self.channels_out, self.image_size, self.image_size)
        shape = tuple(getattr(logits, "shape", ()))
        if shape != expected:
            raise ConfigError(
                f"{type(self.net).__name__} must return logits {expected}, got "
                f"{shape or f'a {type(logits).__name__}'}; check its output channels against the classes"
            )
        return logits[..., :height, :width].float()
