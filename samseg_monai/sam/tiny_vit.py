"""MobileSAM's image encoder, a TinyViT in four stages (Zhang et al. 2023, arXiv:2306.14289; Wu et al. 2022, ECCV).

Stage 0 is convolutions, the others are windowed attention; between stages the channels grow and the first two merges
halve the grid. State-dict keys are those of MobileSAM's published file. There are no absolute positions, so any
multiple of 16 pixels works, rectangular or not. Nothing is cached between calls: a table that is looked up once in
evaluation mode would be stale after loading weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from samseg_monai.errors import ConfigError
from samseg_monai.sam.backbone import Backbone, Rows, SamSpec

EXPANSION = 4  # hidden by outer channels, of convolution blocks and MLPs
STRIDES = (2, 2, 1)  # of the merges between the four stages: SAM's embedding has stride 16, not TinyViT's 32


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
    """Convolution ``c`` without bias and batch normalisation ``bn``."""

    def __init__(self, channels: int, out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = StoredBatchNorm(out)


class Bottleneck(nn.Module):
    """1 x 1, depth-wise 3 x 3 and 1 x 1 convolutions: a block of stage 0 (with a shortcut), and the merge of stages.

    Shape: (B, channels, H, W) to (B, out, H / stride, W / stride).
    """

    def __init__(self, channels: int, hidden: int, out: int, *, stride: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv3 = ConvNorm(hidden, out)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y) if self.shortcut else y


class WindowAttention(nn.Module):
    """Attention within one window, with a learned bias for each distance |dy|, |dx|; (N, window^2, C) to the same.

    The rows of ``qkv`` are sorted by head: [q, k, v] of the first head, then of the second ...
    """

    index: torch.Tensor

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = (place[:, :, None] - place[:, None, :]).abs()  # (2, window^2, window^2)
        self.register_buffer("index", distance[0] * window + distance[1], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, tokens, self.num_heads, 3, dim // self.num_heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (N, heads, tokens, d) each
        bias = self.attention_biases[:, self.index].to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(n, -1, -1, -1))
        return self.proj(x.transpose(1, 2).reshape(n, tokens, dim))


def feed_forward(dim: int) -> nn.Sequential:
    """A normalised MLP."""
    layers = {"norm": nn.LayerNorm(dim), "fc1": nn.Linear(dim, EXPANSION * dim), "act": nn.GELU()}
    return nn.Sequential(OrderedDict(**layers, fc2=nn.Linear(EXPANSION * dim, dim)))


class AttentionBlock(nn.Module):
    """Attention in windows, a depth-wise convolution and an MLP; (B, C, H, W) to the same."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, num_heads, window)
        self.mlp = feed_forward(dim)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attend(x)
        x = self.local_conv(x).permute(0, 2, 3, 1)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        (b, c, h, w), s = x.shape, self.window
        # zeros are padded before the normalisation, which makes real keys of them: so was the network trained
        x = F.pad(x, (0, -w % s, 0, -h % s))
        rows, columns = x.shape[2] // s, x.shape[3] // s
        windows = x.reshape(b, c, rows, s, columns, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        seen = self.attn(windows).reshape(b, rows, columns, s, s, c).permute(0, 5, 1, 3, 2, 4)
        return seen.reshape(b, c, rows * s, columns * s)[:, :, :h, :w]


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
        embedding = self.neck(x)
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
