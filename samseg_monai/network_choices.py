"""Networks without SAM that settings can name: the classes of MONAI, with the arguments that may be chosen."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from samseg_monai.choices import Fraction, Model, Side

Channels = Annotated[list[Annotated[int, Field(ge=1, le=2048)]], Field(min_length=1, max_length=8)]
Steps = Annotated[list[Annotated[int, Field(ge=1, le=4)]], Field(min_length=1, max_length=8)]
Width = Annotated[int, Field(ge=1, le=2048)]
Boxes = Literal["none", "channel", "crop"]


class _Net(Model):
    """A network of MONAI behind ``PlainSegmenter``; channels in and out follow from scans, boxes and classes."""

    boxes: Boxes = "none"
    """Boxes: none; as one more channel; or the network sees a square crop around each."""
    crop_margin: Annotated[float, Field(ge=0, le=10)] = 0.5
    """The crop's side is the box's longer one, moved out by this fraction of it at either end."""
    crop_size: Side = 128
    """Side of the crop in pixels."""
    _normed_alone: ClassVar[bool] = False
    _levels: ClassVar[dict[str, int]] = {}  # lists of a value for each level -> how many fewer they have

    @property
    def factor(self) -> int:
        """What it sees is halved, and so on: the side in pixels is a multiple of this."""
        return math.prod(getattr(self, "strides", [16]))

    @property
    def least(self) -> int:
        """Smallest side in pixels: norms of each image by itself need two pixels at the lowest level."""
        return self.factor * (2 if self._normed_alone else 1)

    @model_validator(mode="after")
    def _fit(self) -> _Net:
        """Lists of a value for each level are as long as MONAI takes them."""
        lengths = {name: len(getattr(self, name)) + more for name, more in self._levels.items() if getattr(self, name)}
        if len(set(lengths.values())) > 1:
            have = ", ".join(f"{name} {len(getattr(self, name))}" for name in lengths)
            fix = ", ".join(name if not more else f"{name} {more} fewer" for name, more in self._levels.items())
            raise ValueError(f"lists of as many values as there are levels ({fix}), got {have}")
        return self


class UNet(_Net):
    """MONAI's U-Net of residual units."""

    name: Literal["UNet"]
    _normed_alone: ClassVar[bool] = True
    channels: Channels = [32, 64, 128, 256]
    strides: Steps = [2, 2, 2]
    _levels: ClassVar[dict[str, int]] = {"channels": 0, "strides": 1}
    num_res_units: Annotated[int, Field(ge=0, le=8)] = 2


class BasicUNetPlusPlus(_Net):
    """MONAI's U-Net++."""

    name: Literal["BasicUNetPlusPlus"]
    _normed_alone: ClassVar[bool] = True
    features: Annotated[Channels, Field(min_length=6, max_length=6)] = [32, 32, 64, 128, 256, 32]
    deep_supervision: Literal[False] = False


class VNet(_Net):
    name: Literal["VNet"]
    dropout_prob_down: Fraction | None = 0.5


class AttentionUnet(_Net):
    name: Literal["AttentionUnet"]
    channels: Channels = [32, 64, 128, 256]
    strides: Steps = [2, 2, 2]
    _levels: ClassVar[dict[str, int]] = {"channels": 0, "strides": 1}
    dropout: Fraction = 0.0


class UNETR(_Net):
    name: Literal["UNETR"]
    feature_size: Width = 16
    hidden_size: Width = 768
    mlp_dim: Annotated[int, Field(ge=1, le=8192)] = 3072
    num_heads: Annotated[int, Field(ge=1, le=64)] = 12


class SwinUNETR(_Net):
    """MONAI's Swin UNETR with its window of 7 tokens."""

    name: Literal["SwinUNETR"]
    _normed_alone: ClassVar[bool] = True
    depths: Annotated[list[Annotated[int, Field(ge=1, le=24)]], Field(min_length=4, max_length=4)] = [2, 2, 2, 2]
    num_heads: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=4, max_length=4)] = [3, 6, 12, 24]
    feature_size: Annotated[int, Field(ge=12, le=768, multiple_of=12)] = 24

    @property
    def factor(self) -> int:
        return 32


class SegResNet(_Net):
    """MONAI's encoder and decoder of residual blocks, without the variational branch."""

    name: Literal["SegResNet"]
    init_filters: Annotated[int, Field(ge=8, le=512, multiple_of=8)] = 8
    blocks_down: Steps = [1, 2, 2, 4]
    blocks_up: Steps = [1, 1, 1]
    dropout_prob: Fraction | None = None
    _levels: ClassVar[dict[str, int]] = {"blocks_down": 0, "blocks_up": 1}

    @property
    def factor(self) -> int:
        return 2 ** (len(self.blocks_down) - 1)


class DynUNet(_Net):
    """MONAI's nnU-Net; strides and kernels are the same for both axes."""

    name: Literal["DynUNet"]
    _normed_alone: ClassVar[bool] = True
    kernel_size: Annotated[list[Annotated[int, Field(ge=1, le=7)]], Field(min_length=3, max_length=8)] = [3, 3, 3, 3]
    strides: Annotated[Steps, Field(min_length=3, max_length=8)] = [1, 2, 2, 2]
    upsample_kernel_size: Steps = [2, 2, 2]
    filters: Channels | None = None
    res_block: bool = False
    _levels: ClassVar[dict[str, int]] = {"kernel_size": 0, "strides": 0, "filters": 0, "upsample_kernel_size": 1}


class Ellipse(Model):
    """An ellipse in each box, fitted to the training boxes; it never looks at the image."""

    name: Literal["BoxEllipse"]


Network = Annotated[
    UNet | BasicUNetPlusPlus | VNet | AttentionUnet | UNETR | SwinUNETR | SegResNet | DynUNet | Ellipse,
    Field(discriminator="name"),
]
