"""Networks without SAM that settings can name: the classes of MONAI, with the arguments that may be chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from samseg_monai.choices import Fraction, Model, Side

Channels = Annotated[list[Annotated[int, Field(ge=1, le=2048)]], Field(min_length=1, max_length=8)]
Steps = Annotated[list[Annotated[int, Field(ge=1, le=4)]], Field(min_length=1, max_length=8)]
Three = Field(min_length=3, max_length=3)  # a value for each axis
EachStep = Annotated[int, Field(ge=1, le=4)] | Annotated[list[Annotated[int, Field(ge=1, le=4)]], Three]
EachKernel = Annotated[int, Field(ge=1, le=7)] | Annotated[list[Annotated[int, Field(ge=1, le=7)]], Three]
Width = Annotated[int, Field(ge=1, le=2048)]
Boxes = Literal["none", "channel", "crop"]


class _Net(Model):
    """A network of MONAI behind ``PlainSegmenter``; channels in and out follow from scans, boxes and classes."""

    spatial_dims: Literal[2, 3] = 2
    """2: it sees slices of ``image_size``; 3: volumes, patch by patch (``patch``), and no boxes."""
    boxes: Boxes = "none"
    """Boxes: none; as one more channel; or the network sees a square crop around each."""
    crop_margin: Annotated[float, Field(ge=0, le=10)] = 0.5
    """The crop's side is the box's longer one, moved out by this fraction of it at either end."""
    crop_size: Side = 128
    """Side of the crop in pixels."""
    _normed_alone: ClassVar[bool] = False
    _levels: ClassVar[dict[str, int]] = {}  # lists of a value for each level -> how many fewer they have

    @property
    def factors(self) -> list[int]:
        """What it sees is halved, and so on: along each axis the side is a multiple of this."""
        steps = [[step] * 3 if isinstance(step, int) else step for step in getattr(self, "strides", [16])]
        return [math.prod(step[axis] for step in steps) for axis in range(self.spatial_dims)]

    def needs(self, sides: Sequence[int]) -> str:
        """What these sides, in pixels or voxels, would have to be; "" where they are.

        Norms of each image by itself need two values at the lowest level.
        """
        factors = self.factors
        rests, lowest = (
            [s % f for s, f in zip(sides, factors, strict=True)],
            [s // f for s, f in zip(sides, factors, strict=True)],
        )
        if not any(rests) and math.prod(lowest) > self._normed_alone:
            return ""
        if self.spatial_dims == 2:
            return f"a multiple of {factors[0]}, at least {factors[0] * (1 + self._normed_alone)}"
        return f"multiples of {factors}" + (", not all of them the smallest" if self._normed_alone else "")

    @model_validator(mode="after")
    def _fit(self) -> _Net:
        """Lists of a value for each level are as long as MONAI takes them."""
        lengths = {name: len(getattr(self, name)) + more for name, more in self._levels.items() if getattr(self, name)}
        if len(set(lengths.values())) > 1:
            have = ", ".join(f"{name} {len(getattr(self, name))}" for name in lengths)
            fix = ", ".join(name if not more else f"{name} {more} fewer" for name, more in self._levels.items())
            raise ValueError(f"lists of as many values as there are levels ({fix}), got {have}")
        if self.spatial_dims == 2 and any(
            isinstance(v, list) for name in self._levels for v in getattr(self, name) or ()
        ):
            raise ValueError("lists of three values are for spatial_dims 3; a slice has one value for both axes")
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
    def factors(self) -> list[int]:
        return [32] * self.spatial_dims


class SegResNet(_Net):
    """MONAI's encoder and decoder of residual blocks, without the variational branch."""

    name: Literal["SegResNet"]
    init_filters: Annotated[int, Field(ge=8, le=512, multiple_of=8)] = 8
    blocks_down: Steps = [1, 2, 2, 4]
    blocks_up: Steps = [1, 1, 1]
    dropout_prob: Fraction | None = None
    _levels: ClassVar[dict[str, int]] = {"blocks_down": 0, "blocks_up": 1}

    @property
    def factors(self) -> list[int]:
        return [2 ** (len(self.blocks_down) - 1)] * self.spatial_dims


class DynUNet(_Net):
    """MONAI's nnU-Net; a stride or kernel is one number, or with ``spatial_dims`` 3 a list of one for each axis."""

    name: Literal["DynUNet"]
    _normed_alone: ClassVar[bool] = True
    kernel_size: Annotated[list[EachKernel], Field(min_length=3, max_length=8)] = [3, 3, 3, 3]
    strides: Annotated[list[EachStep], Field(min_length=3, max_length=8)] = [1, 2, 2, 2]
    upsample_kernel_size: Annotated[list[EachStep], Field(min_length=1, max_length=8)] = [2, 2, 2]
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
