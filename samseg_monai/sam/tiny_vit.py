"""MobileSAM's image encoder, a TinyViT in four stages (Zhang et al. 2023, arXiv:2306.14289; Wu et al. 2022, ECCV).

Stage 0 is convolutions, the others are windowed attention; between stages the channels grow and the first two merges
halve the grid. State-dict keys are those of MobileSAM's published file. There are no absolute positions, so any
multiple of 16 pixels works, rectangular or not. Nothing is cached between calls: a table that is looked up once in
evaluation mode would be stale after loading weights.

On a CPU most of the time would go into waiting for memory: a block of stage 0 has 64 MiB of hidden channels for an
image of 1024 pixels. So frozen batch normalisation is folded into its convolution, channels are last in memory, and
what needs no gradient is computed in bands of rows that stay in the processor's cache. Only the order of sums changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from samseg_monai.errors import ConfigError
from samseg_monai.products import fits, linear
from samseg_monai.sam.attention import with_slab
from samseg_monai.sam.backbone import Backbone, Rows, SamSpec

Layer = Callable[[torch.Tensor], torch.Tensor]

EXPANSION = 4  # hidden by outer channels, of convolution blocks and MLPs
STRIDES = (2, 2, 1)  # of the merges between the four stages: SAM's embedding has stride 16, not TinyViT's 32
BAND = 1 << 21  # floats at the widest place of a band of rows: 8 MiB, about what a processor's cache holds


@dataclass(frozen=True)
class TinyViTSpec(SamSpec):
    """A SAM around a TinyViT: numbers of its four stages, the first of which has no attention."""

    widths: tuple[int, int, int, int]  # channels
    depths: tuple[int, int, int, int]  # blocks
    num_heads: tuple[int, int, int, int]
    windows: tuple[int, int, int, int]  # side of the attention windows, in tokens

    def encoder(self, *, image_size: int, checkpointing: bool = False) -> TinyViT:
        """Build the encoder; no tensor depends on ``image_size``."""
        return TinyViT(self, image_size=image_size, checkpointing=checkpointing)


class StoredBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that uses its stored statistics in training, too; scale and shift may learn.

    A few medical images in a batch say little of the statistics that the pretrained layers behind it expect.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.train()  # a module begins in training mode, whatever its ``train`` does

    def train(self, mode: bool = True) -> StoredBatchNorm:
        """Stay in evaluation mode."""
        super().train(False)
        return self


class ConvNorm(nn.Sequential):
    """Convolution ``c`` without bias and batch normalisation ``bn``; where neither learns, they are one convolution."""

    def __init__(self, channels: int, out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = StoredBatchNorm(out)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.folded(input)(input)

    def folded(self, x: torch.Tensor) -> Layer:
        """What computes this layer for ``x`` and its like now: the weights are scaled anew each time this is asked."""
        c, bn = self.c, self.bn
        if not fits(x, *self.parameters()) or wants_gradient(*self.parameters()):
            return super().forward
        assert bn.running_mean is not None and bn.running_var is not None  # StoredBatchNorm has both
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        weight, bias = c.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale
        layer: Layer = partial(F.conv2d, weight=weight, bias=bias, stride=c.stride, padding=c.padding, groups=c.groups)
        if c.kernel_size == (1, 1):
            layer = lambda x: linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)  # noqa: E731
        behind = getattr(bn, "ssf", None)
        return layer if behind is None else lambda x: behind(layer(x))


class Bottleneck(nn.Module):
    """1 x 1, depth-wise 3 x 3 and 1 x 1 convolutions: a block of stage 0 (with a shortcut), and the merge of stages.

    Shape: (B, channels, H, W) to (B, out, H / stride, W / stride).
    """

    def __init__(self, channels: int, hidden: int, out: int, *, stride: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv3 = ConvNorm(hidden, out)
        self.hidden, self.stride, self.shortcut = hidden, stride, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = (conv.folded(x) for conv in (self.conv1, self.conv2, self.conv3))

        def convolve(x: torch.Tensor) -> torch.Tensor:
            y = third(F.gelu(second(F.gelu(first(x)))))
            return F.gelu(x + y) if self.shortcut else y

        return in_bands(convolve, x, self, self.hidden, stride=self.stride, halo=1)


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each distance |dy|, |dx|; (B, H, W, C) to the same.

    A grid that windows do not divide is filled up with tokens that are zero before the normalisation, which makes real
    keys of them: so was the network trained. What the first layer makes of them is known from one, so that only
    real tokens go through the linear layers.
    The rows of ``qkv`` are sorted by head: [q, k, v] of the first head, then of the second ...
    """

    index: torch.Tensor

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = (place[:, :, None] - place[:, None, :]).abs()  # (2, window^2, window^2)
        self.register_buffer("index", distance[0] * window + distance[1], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (b, height, width, dim), s = x.shape, self.window
        tokens = qkv = self.qkv(self.norm(x))
        down, across = -(-height // s), -(-width // s)  # windows
        if (down * s, across * s) != (height, width):
            of_zeros = self.qkv(self.norm(x.new_zeros(1, 1, 1, dim)))
            filled = of_zeros.expand(b, down * s, across * s, -1).clone()
            filled[:, :height, :width] = qkv
            qkv = filled
        n = b * down * across
        qkv = qkv.view(b, down, s, across, s, 3 * dim).transpose(2, 3)
        qkv = qkv.reshape(n, s * s, self.num_heads, 3, dim // self.num_heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (N, heads, tokens, d) each
        # eight times as fast as indexing with the table
        bias = self.attention_biases.index_select(1, self.index.flatten()).unflatten(1, self.index.shape).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(n, -1, -1, -1)).transpose(1, 2)
        x = x.reshape(b, down, across, s, s, dim).transpose(2, 3).reshape(b, down * s, across * s, dim)
        return with_slab(self, self.proj(x[:, :height, :width]), tokens, parts=1)


def feed_forward(dim: int) -> nn.Sequential:
    """A normalised MLP."""
    layers = {"norm": nn.LayerNorm(dim), "fc1": nn.Linear(dim, EXPANSION * dim), "act": nn.GELU()}
    return nn.Sequential(OrderedDict(**layers, fc2=nn.Linear(EXPANSION * dim, dim)))


class AttentionBlock(nn.Module):
    """Attention in windows, a depth-wise convolution and an MLP; (B, C, H, W) to the same."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.dim, self.window = dim, window
        self.attn = WindowAttention(dim, num_heads, window)
        self.mlp = feed_forward(dim)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth = getattr(self.attn, "depth", None)  # of an adapter by which the images of a slab see each other
        slab = 1 if depth is None else depth.depth * depth.views
        x = in_bands(partial(_plus, self.attn), x, self.attn, 3 * self.dim, step=self.window, together=slab)
        return in_bands(partial(_plus, self.mlp), self.local_conv(x), self.mlp, EXPANSION * self.dim)


def _plus(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``x + layer(x)``, the channels of which are last; (B, C, H, W) to the same."""
    x = x.permute(0, 2, 3, 1)
    return (x + layer(x)).permute(0, 3, 1, 2)


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd follows what is computed from these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def in_bands(
    function: Layer,
    x: torch.Tensor,
    module: nn.Module,
    width: int,
    *,
    step: int = 1,
    stride: int = 1,
    halo: int = 0,
    together: int = 1,
) -> torch.Tensor:
    """``function(x)`` of (B, C, H, W), band of rows by band where that is faster: on a CPU, without a gradient.

    What lies between the layers of ``function`` then stays in the processor's cache, and no memory is taken for it.

    Args:
        function: with ``module``'s parameters; (B, C, H, W) to (B, C', H / stride, W / stride).
        width: channels at the widest place in between.
        step: rows of ``x`` that belong together; H need not be a multiple.
        stride: of the rows.
        halo: rows of the output on either side of a band that ``function`` gets wrong, as it does not see beyond.
        together: images that belong together, B a multiple of them.
    """
    if not fits(x) or wants_gradient(x, *module.parameters()):
        return function(x)
    batch, _, height, across = x.shape
    if batch * height * across * width <= BAND:
        return function(x)
    images = max(BAND // (height * across * width * together), 1) * together
    rows = max(BAND // (step * stride * across * width * together), 1) * step  # of the output
    height //= stride
    out = None
    for image in range(0, batch, images):
        for first in range(0, height, rows):
            low, high = max(first - halo, 0), first + rows + halo
            band = function(x[image : image + images, :, stride * low : stride * high])
            if out is None:
                shape = batch, band.shape[1], height, band.shape[3]
                out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            out[image : image + images, :, first : first + rows] = band[:, :, first - low : first - low + rows]
    assert out is not None  # more than BAND is more than nothing
    return out


class Stage(nn.Module):
    """Blocks of one grid, and the merge (``downsample``) to the next stage, if there is one."""

    def __init__(self, spec: TinyViTSpec, number: int) -> None:
        super().__init__()
        width, window, heads = spec.widths[number], spec.windows[number], spec.num_heads[number]
        self.blocks = nn.ModuleList(
            AttentionBlock(width, heads, window)
            if number
            else Bottleneck(width, EXPANSION * width, width, shortcut=True)
            for _ in range(spec.depths[number])
        )
        self.downsample: nn.Module | None = None
        if number < len(STRIDES):
            wider = spec.widths[number + 1]
            self.downsample = Bottleneck(width, wider, wider, stride=STRIDES[number])


class TinyViT(Backbone):
    """MobileSAM's encoder: (B, 3, h, w) to an embedding (B, prompt_dim, h / 16, w / 16), h and w multiples of 16.

    Its block outputs (``taps``) have strides 4, 8, 16, 16 and the widths of the four stages.

    Args:
        spec: sizes.
        image_size: kept as ``img_size``, to which segment_anything's ``SamPredictor`` resizes; nothing here reads it.
        checkpointing: see ``Backbone``.
    """

    def __init__(self, spec: TinyViTSpec, *, image_size: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.patch, self.img_size, self.checkpointing = spec.patch_size, image_size, checkpointing
        first, last = spec.widths[0], spec.widths[-1]
        self.unused_in_files = {  # what training on ImageNet's classes left in the published file
            "norm_head.weight": (last,), "norm_head.bias": (last,), "head.weight": (1000, last), "head.bias": (1000,),
        }  # fmt: skip
        # two convolutions of stride 2: (B, 3, H, W) to (B, first, H / 4, W / 4)
        stem = ConvNorm(3, first // 2, 3, stride=2), nn.GELU(), ConvNorm(first // 2, first, 3, stride=2)
        self.patch_embed = nn.Sequential(OrderedDict(seq=nn.Sequential(*stem)))
        self.layers = nn.ModuleList(Stage(spec, number) for number in range(len(spec.widths)))
        self.neck = nn.Sequential(
            nn.Conv2d(last, spec.prompt_dim, 1, bias=False),
            LayerNorm2d(spec.prompt_dim),
            nn.Conv2d(spec.prompt_dim, spec.prompt_dim, 3, padding=1, bias=False),
            LayerNorm2d(spec.prompt_dim),
        )

    def forward(
        self, x: torch.Tensor, taps: Sequence[int] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        height, width = x.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"image encoder: got {height} x {width} pixels; both sides must be multiples of {self.patch}"
            )
        if fits(x):
            x = x.contiguous(memory_format=torch.channels_last)  # what its convolutions are fastest in
        x = self.patch_embed(x)
        recompute = self.checkpointing and torch.is_grad_enabled()
        tapped: dict[int, torch.Tensor] = {}
        number = 0
        for stage in self.layers:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
                if number in taps:
                    tapped[number] = x.permute(0, 2, 3, 1)
                number += 1
            x = x if stage.downsample is None else stage.downsample(x)
        # oneDNN adds the 2304 products of the second convolution more exactly, and faster, where channels are not last
        embedding = self.neck(x.contiguous())
        return (embedding, [tapped[i] for i in taps]) if taps else embedding

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        """Blocks of all stages; the first ones have no attention."""
        return [
            (f"layers.{number}.blocks.{index}", block)
            for number, stage in self.layers.named_children()
            for index, block in stage.get_submodule("blocks").named_children()
        ]

    def targets(self, block: nn.Module) -> Mapping[str, Rows]:
        """Query, key and value are interleaved per head in one layer."""
        if not isinstance(block, AttentionBlock):
            return {}
        fused = {name: Rows("attn.qkv", part, 3, block.attn.num_heads) for part, name in enumerate("qkv")}
        return {**fused, "proj": Rows("attn.proj"), "lin1": Rows("mlp.fc1"), "lin2": Rows("mlp.fc2")}

    def depth_of(self, name: str) -> int:
        """As of ``Backbone``; a merge belongs to the last block before it."""
        stage, _, _ = name.partition(".downsample.")
        before = [i + 1 for i, (block, _) in enumerate(self.named_blocks()) if block.startswith(f"{stage}.")]
        return before[-1] if stage != name else super().depth_of(name)
