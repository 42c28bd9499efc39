"""Ladder side-tuning: a network beside SAM's frozen encoder, mixed into its embedding by a learnable gate.

Chai et al. 2023 (SAM-LST, arXiv:2306.12737), equation 3: ``x = g * x_sam + (1 - g) * x_side``; in their code
``g = sigmoid(alpha)`` with ``alpha`` starting at 0, so both halves start with equal weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from samseg_monai.errors import AdapterError

MIXES = ("gate", "side", "sam")
PUBLISHED_WIDTH = 64  # ResNet18's


class ResNetSide(nn.Sequential):
    """ResNet18 up to ``layer3``: 13 convolutions of 3 x 3 and larger in a row, stride 16, 256 channels.

    Keys are torchvision's (``conv1``, ``bn1``, ``layer1`` ...), so that its ImageNet weights load by name. The unused
    ``layer4`` and ``fc`` do not exist here.

    Args:
        width: channels of the first stage; the others have 2 and 4 times as many. 64 is ResNet18, whose ImageNet
            weights fit no other width; 32 needs a quarter of the work.
    Attributes:
        checkpointing: recompute activations in the backward pass, stage by stage, instead of storing them. Results
            and running statistics are the same.

    Shape: (B, 3, H, W) to (B, 4 * width, H/16, W/16).
    Raises:
        AdapterError: width below 1.
    """

    stages = (("conv1", "bn1", "relu", "maxpool"), ("layer1",), ("layer2",), ("layer3",))

    def __init__(self, width: int = PUBLISHED_WIDTH) -> None:
        super().__init__()
        if width < 1:
            raise AdapterError(f"ResNetSide: width must be at least 1 channel, got {width}")
        self.checkpointing = False
        self.width = width
        # what to start from in the table of known files
        self.published = "resnet18" if width == PUBLISHED_WIDTH else None
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2, self.layer3 = _halving(width, 2 * width), _halving(2 * width, 4 * width)
        for module in self.modules():  # as torchvision starts them
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        if image.device.type == "cpu":
            # channels side by side let oneDNN go through all layers without rearranging: 1.2 times as fast on a CPU,
            # while no difference was found on an H200
            image = image.contiguous(memory_format=torch.channels_last)
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return super().forward(image)
        x = image
        for names in self.stages:
            stage = nn.Sequential(*(getattr(self, name) for name in names))
            x = checkpoint(stage, x, use_reentrant=False, context_fn=partial(_twice, stage))
        return x


def _halving(channels: int, out: int) -> nn.Sequential:
    """Two blocks of ResNet18, the first of which halves height and width."""
    shortcut = nn.Sequential(_OfEverySecond(channels, out, 1, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(BasicBlock(channels, out, 2, shortcut), BasicBlock(out, out))


class _OfEverySecond(nn.Conv2d):
    """Convolution of 1 x 1 pixels, stride 2, by taking every second pixel first.

    The numbers are those of ``stride=2``, whose backward pass (torch 2.14.1 with oneDNN, channels last, AVX-512) ended
    a training with a corrupted heap; without oneDNN for this layer, or with AVX2, it did not.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., ::2, ::2])


class _Uncounted(AbstractContextManager[None]):
    """Batch statistics within do not enter the running ones: a batch that is computed again counts once."""

    def __init__(self, net: nn.Module) -> None:
        self.norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        self.before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        for norm in self.norms:
            count = norm.num_batches_tracked
            self.before.append((norm.momentum, None if count is None else count.clone()))
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
        self.before.clear()


def _twice(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first computation and of the one in the backward pass."""
    return nullcontext(), _Uncounted(stage)


class FeatureMap(nn.Module):
    """One of the feature maps of a network that returns several, as MONAI's encoders do.

    Args:
        net: (B, 3, H, W) to a sequence of feature maps.
        index: which of them; its stride must be 16.
    """

    def __init__(self, net: nn.Module, index: int) -> None:
        super().__init__()
        self.net, self.index = net, index

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)[self.index]


class GatedSide(nn.Module):
    """A side network and how it meets SAM's embedding.

    Args:
        net: (B, 3, H, W) to (B, C', H/16, W/16). It is tried once on an empty image to learn C'.
        channels: C of SAM's embedding; a 1 x 1 convolution projects C' to it where they differ.
        mix: "gate": ``g * sam + (1 - g) * side``, ``g = sigmoid(alpha)``. "side": the side network alone; SAM's encoder
            is then not needed (``needs_embedding``).
        patch_size: stride of SAM's embedding, 16.

    Attributes:
        alpha: the gate's parameter, one value from 0; absent with "side".
        idle: names of parameters of ``net`` that its feature map does not depend on, such as those of later stages.

    Raises:
        AdapterError: the network does not give one feature map of stride ``patch_size``.
    """

    taps: tuple[int, ...] = ()  # of SAM's blocks: the published ladder sees the embedding alone

    def __init__(self, net: nn.Module, channels: int, *, mix: str = "gate", patch_size: int = 16) -> None:
        super().__init__()
        self.net = net
        self.needs_embedding = mix == "gate"
        found, self.idle = _try_out(net, patch_size)
        self.project = nn.Identity() if found == channels else nn.Conv2d(found, channels, 1)
        if self.needs_embedding:
            self.alpha = nn.Parameter(torch.zeros(1))

    @property
    def gate(self) -> float:
        """``g``: 1 is SAM alone, 0 the side network alone."""
        return float(torch.sigmoid(self.alpha.detach())) if self.needs_embedding else 0.0

    def forward(self, image: Tensor, embedding: Tensor | None, taps: list[Tensor]) -> Tensor:
        """Mix: prepared image (B, 3, H, W) and embedding (B, C, H/16, W/16) to (B, C, H/16, W/16)."""
        features = self.project(self.net(image))
        if embedding is None or not self.needs_embedding:
            return features
        gate = torch.sigmoid(self.alpha)
        return gate * embedding + (1 - gate) * features


def _try_out(net: nn.Module, patch_size: int) -> tuple[int, list[str]]:
    """Channels of the feature map that ``net`` makes, and its parameters without influence on it.

    Statistics and mode of ``net`` stay as they are.
    """
    side = 4 * patch_size
    where = next((p.device for p in net.parameters()), torch.device("cpu"))
    was_training = net.training
    net.eval()
    try:
        with torch.enable_grad():
            found = net(torch.zeros(1, 3, side, side, device=where))
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise AdapterError(
            f"side network {type(net).__name__} failed on an image (1, 3, {side}, {side}): {error}; it must map an "
            f"image (B, 3, H, W) to one feature map (B, C, H/{patch_size}, W/{patch_size})"
        ) from error
    finally:
        net.train(was_training)
    shape = tuple(getattr(found, "shape", ()))
    if len(shape) != 4 or shape[2:] != (4, 4):
        got = f"shape {shape}" if shape else f"a {type(found).__name__}"
        raise AdapterError(
            f"side network {type(net).__name__}: an image (1, 3, {side}, {side}) gives {got}, expected (1, C, 4, 4); "
            "choose one of several feature maps with samseg_monai.adapters.FeatureMap"
        )
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    if not named or not found.requires_grad:
        return shape[1], []
    with torch.enable_grad():
        gradients = torch.autograd.grad(found.sum(), [parameter for _, parameter in named], allow_unused=True)
    return shape[1], [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]
