"""SAM's image encoder, a ViT (Kirillov et al. 2023, arXiv:2304.02643), for any image size and rectangular input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from segment_anything.modeling.image_encoder import Attention, Block, ImageEncoderViT, MLPBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from samseg_monai.errors import ConfigError
from samseg_monai.sam.attention import Way, attend, drawn, in_pieces, positions, windowed, with_slab
from samseg_monai.sam.backbone import Backbone, Rows, SamSpec

HIDDEN = 1 << 22  # hidden values at a time on a CPU: enough for full speed, and blocks of memory that are used again


@dataclass(frozen=True)
class ViTSpec(SamSpec):
    """A SAM around a ViT, as segment_anything's build_sam.py has it."""

    embed_dim: int
    depth: int  # number of transformer blocks
    num_heads: int  # per block
    global_attn_indexes: tuple[int, ...]  # blocks with global attention; the others attend within windows
    window_size: int = 14  # side of an attention window, in tokens

    def encoder(self, *, image_size: int, checkpointing: bool = False) -> ImageEncoder:
        """Build the encoder with position tables for a square of ``image_size`` pixels."""
        return ImageEncoder(self, image_size=image_size, checkpointing=checkpointing)


def relative_rows(table: torch.Tensor, size: int) -> torch.Tensor:
    """Embeddings (size, size, d) of all offsets i - j between ``size`` positions, out of ``table`` (2 * n - 1, d).

    The middle row of the table is offset 0. Fewer than n positions use its middle: offsets keep their meaning, the
    table is not stretched. ConfigError where it has no row for the largest offset.
    """
    centre = (table.shape[0] - 1) // 2
    if size - 1 > centre:
        raise ConfigError(
            f"attention: {size} tokens along one side, but the position table holds {centre + 1}; "
            f"build SAM with image_size of at least {size} patches"
        )
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions[None, :] + centre]


class FusedAttention(Attention):
    """Multi-head attention over a grid of tokens, equal to SAM's own and with the same state-dict keys.

    SAM fills the grid up with tokens of zeros before it cuts windows, and sends them through the linear layers. Here
    windows are cut behind the first of them and put together before the last, so that only real tokens go through
    either: what the first makes of zeros is known from one of them.

    Attributes:
        way: how the attention itself is computed; None chooses by device and need.

    Shape: (B, H, W, C) to (B, H, W, C); ``window`` is the side of the windows in tokens, 0 for one of all tokens.
    """

    way: Way | None = None

    def forward(self, x: torch.Tensor, window: int = 0) -> torch.Tensor:
        b, height, width, c = x.shape
        heads, d = self.num_heads, c // self.num_heads
        tokens = qkv = self.qkv(x)  # (B, H, W, 3 C)
        h, w = window or height, window or width
        down, across = -(-height // h), -(-width // w)  # windows
        whole = (down * h, across * w) == (height, width)
        fill = qkv.new_zeros(3 * c) if whole else self.qkv(x.new_zeros(1, 1, 1, c)).flatten()
        offsets = relative_rows(self.rel_pos_h, h), relative_rows(self.rel_pos_w, w)
        if self.way is None and in_pieces(qkv):
            return with_slab(self, self.proj(windowed(qkv, fill, *offsets, heads, self.scale)), tokens, parts=0)
        if not whole:
            filled = fill.expand(b, down * h, across * w, -1).clone()
            filled[:, :height, :width] = qkv
            qkv = filled
        # three of (B * windows, heads, h * w, d)
        qkv = qkv.view(b, down, h, across, w, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, b * down * across, heads, h * w, d).unbind(0)
        rows, cols = positions(q.unflatten(2, (h, w)), *offsets)
        out = (self.way or attend)(q, k, v, rows, cols, self.scale)
        out = out.reshape(b, down, across, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)
        out = self.proj(out.reshape(b, down * h, across * w, c)[:, :height, :width])
        return with_slab(self, out, tokens, parts=0)


class ThriftyMLP(MLPBlock):
    """SAM's two linear layers with GELU between, behind a normalisation; for some tokens at a time on a CPU.

    The hidden values are four times the width of all else. Where the layers are frozen, the backward pass needs those
    values for the GELU's slope alone, and there computes them again: with LoRA in the attention of ViT-B they were a
    third of what a step keeps.

    Shape: (B, H, W, C) to (B, H, W, C).
    """

    def forward(self, x: torch.Tensor, norm: nn.Module, again: bool = True) -> torch.Tensor:  # type: ignore[override]
        """``again`` False keeps the hidden values, for a block that is computed again as a whole."""
        if x.device.type != "cpu" or drawn():
            return self.lin2(self._hidden(x, norm))
        learned = any(parameter.requires_grad for parameter in self.parameters())
        again = again and torch.is_grad_enabled() and x.requires_grad and not learned
        parts = [
            self.lin2(checkpoint(self._hidden, part, norm, use_reentrant=False) if again else self._hidden(part, norm))
            for part in x.flatten(0, -2).split(max(1, HIDDEN // self.lin1.out_features))
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    def _hidden(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self.act(self.lin1(norm(x)))


class EncoderBlock(Block):
    """SAM's transformer block around fused attention.

    Args:
        spec: sizes.
        tokens: side of the square region one attention sees, in tokens (window or whole image).
        window_size: 0 for global attention.
    """

    def __init__(self, spec: ViTSpec, *, tokens: int, window_size: int) -> None:
        super().__init__(
            dim=spec.embed_dim,
            num_heads=spec.num_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window_size,
            input_size=(tokens, tokens),
        )
        self.mlp.__class__ = ThriftyMLP  # the same layers: no number is drawn again
        self.attn = FusedAttention(
            spec.embed_dim, num_heads=spec.num_heads, use_rel_pos=True, input_size=(tokens, tokens)
        )

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        """``again`` as of ``ThriftyMLP``."""
        x = x + self.attn(self.norm1(x), self.window_size)
        return x + self.mlp(x, self.norm2, again)


class ImageEncoder(ImageEncoderViT, Backbone):
    """SAM's ViT: (B, 3, h, w) to an embedding (B, prompt_dim, h / 16, w / 16).

    Keys and results are those of segment_anything's ``ImageEncoderViT``. Beyond it, h and w may be any multiples of the
    patch size up to ``image_size``: the position tables are then cropped, not stretched.

    Args:
        spec: sizes.
        image_size: side of the square the position tables cover, in pixels; a multiple of the patch size.
        checkpointing: recompute the blocks in the backward pass instead of storing their activations.
    """

    # segment_anything has no type hints
    patch_embed: Any
    pos_embed: Any
    blocks: nn.ModuleList
    neck: nn.Module
    img_size: int

    stem = ("patch_embed.", "pos_embed")

    def __init__(self, spec: ViTSpec, *, image_size: int, checkpointing: bool = False) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=spec.patch_size,
            embed_dim=spec.embed_dim,
            depth=0,
            out_chans=spec.prompt_dim,
        )
        grid = image_size // spec.patch_size
        for i in range(spec.depth):
            window = 0 if i in spec.global_attn_indexes else spec.window_size
            self.blocks.append(EncoderBlock(spec, tokens=window or grid, window_size=window))
        self.checkpointing = checkpointing

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, taps: Sequence[int] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Encode ``x``; with ``taps``, also return the outputs (B, h/16, w/16, embed_dim) of those blocks, in order."""
        patch = self.patch_embed.proj.kernel_size[0]
        height, width = x.shape[-2:]
        if height % patch or width % patch or max(height, width) > self.img_size:
            raise ConfigError(
                f"image encoder: got {height} x {width} pixels; both sides must be multiples of {patch} "
                f"and at most {self.img_size}"
            )
        x = self.patch_embed(x)  # (B, h/16, w/16, C)
        assert self.pos_embed is not None  # built with use_abs_pos
        x = x + self.pos_embed[:, : x.shape[1], : x.shape[2]]
        tapped: dict[int, torch.Tensor] = {}
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, False, use_reentrant=False)
            else:
                x = block(x)
            if i in taps:
                tapped[i] = x
        embedding = self.neck(x.permute(0, 3, 1, 2))
        return (embedding, [tapped[i] for i in taps]) if taps else embedding

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        """``blocks.0``, ``blocks.1`` ..."""
        return [(f"blocks.{name}", block) for name, block in self.blocks.named_children()]

    def targets(self, block: nn.Module) -> Mapping[str, Rows]:
        """Query, key and value are the three thirds of one layer."""
        fused = {name: Rows("attn.qkv", part, 3) for part, name in enumerate("qkv")}
        return {**fused, "proj": Rows("attn.proj"), "lin1": Rows("mlp.lin1"), "lin2": Rows("mlp.lin2")}

    def sized_tables(self) -> set[str]:
        """The absolute positions and the relative ones of global blocks; those of windows never change."""
        of_blocks = {
            f"{name}.attn.rel_pos_{axis}"
            for name, block in self.named_blocks()
            if getattr(block, "window_size", None) == 0
            for axis in "hw"
        }
        return {"pos_embed"} | of_blocks
