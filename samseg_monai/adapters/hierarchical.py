"""A second mask decoder behind SAM's, led by the masks of the first (H-SAM, Cheng et al. CVPR 2024, arXiv:2403.18271).

The equations are those of the authors' code, https://github.com/Cccccczh404/H-SAM. With M masks, an embedding of C
channels and N = gh gw positions, the first decoder gives mask tokens t (M, C), image tokens s (N, C), logits, and an
upscaled map of C/8 channels; P (M, N) are the probabilities of its logits, brought to the embedding's grid.

- Class-balanced, mask-guided self-attention: the masks' features F = t s^T (M, N) attend to each other, mask to mask;
  a weight for each position is made of them, and the embedding becomes ``x (1 + weight)``. While training, F gets
  dropout, and noise that is the stronger the rarer the class of a position is.
- Learnable mask cross-attention: between mask tokens and image in both directions, attention behind its softmax is
  multiplied by P.
- Hierarchical pixel decoder: SAM's upscaling, joined with that of the first decoder, goes on from a quarter of the
  resolution to all of it.

Three things are done otherwise than there. The code takes its softmax of the weight over the single channel that there
is, which gives 1 everywhere, so that its self-attention neither does nor learns anything; here it goes over the
positions, times N: 1 on average, and with ``even`` there is none of it. Its noise knows classes from the label, here
they are those that the first decoder finds, for a network sees no label; its deviations for nine classes, 0.35 to 0 in
steps, are evenly spaced here, and their mean is 0. Its first decoder has SAM's layers in another order; here that one
stays SAM's, unless it is given to ``look_first``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

MAX_HEADS = 8
RAREST = 0.35  # deviation of the noise of the rarest class; the most frequent one has none
EMBEDDING_NOISE = 0.2  # deviation of the noise of the embedding, in its range


class MaskedAttention(Attention):
    """SAM's attention whose weights are multiplied by a mask, behind the softmax."""

    def __init__(self, channels: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__(channels, heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Queries (B, n, C), keys and values (B, m, C), mask (B, n, m) to (B, n, C)."""
        q, k, v = (
            self._separate_heads(project(x), self.num_heads)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) * mask[:, None]
        return self.dropout(self.out_proj(self._recombine_heads(weights @ v)))


class LookFirstBlock(TwoWayAttentionBlock):
    """A layer of SAM's two-way transformer in H-SAM's order: tokens look at the image before at each other."""

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, M, C), image (B, N, C), what is added to each of them, and of ``MaskedBlock`` probabilities
        (B, M, N)."""
        tokens, image = queries, keys
        there, back = ([], []) if mask is None else ([mask], [mask.transpose(-1, -2)])
        seen = self.cross_attn_token_to_image(tokens + query_pe, image + key_pe, image, *there)
        tokens = self.norm2(tokens + seen)
        if self.skip_first_layer_pe:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + query_pe
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        told = self.cross_attn_image_to_token(image + key_pe, tokens + query_pe, tokens, *back)
        return tokens, self.norm4(image + told)


class MaskedBlock(LookFirstBlock):
    """Such a layer with ``MaskedAttention`` of full width."""

    def __init__(self, channels: int, heads: int, mlp_dim: int, *, first: bool) -> None:
        super().__init__(channels, heads, mlp_dim, skip_first_layer_pe=first)
        self.cross_attn_token_to_image = MaskedAttention(channels, heads, dropout=0.2)
        self.cross_attn_image_to_token = MaskedAttention(channels, heads)


def look_first(transformer: TwoWayTransformer) -> None:
    """Put the layers of SAM's own transformer into H-SAM's order; their tensors stay what they are."""
    for layer in transformer.layers:
        layer.__class__ = LookFirstBlock


class HierarchicalDecoder(nn.Module):
    """Masks in four times the resolution of SAM's, from an embedding and what SAM's mask decoder made of it.

    Args:
        channels: of the embedding, a multiple of 16.
        masks: number of masks, M; a single one counts as two, the background first, which has the logit 0 so far.
        positions: of the embedding's grid, N. The self-attention is built for them: its layers are N wide.
        heads: of the cross-attention; the self-attention has the largest number up to 8 that divides N.
        mlp_dim: width of the MLPs.
        even: all positions weigh the same, as in the authors' code, and there is no self-attention.
    """

    def __init__(
        self, channels: int, masks: int, positions: int, *, heads: int, mlp_dim: int, even: bool = False
    ) -> None:
        super().__init__()
        self.single, masks, self.even = masks == 1, max(2, masks), even
        self.mask_tokens = nn.Embedding(masks, channels)
        if not even:
            own = next(heads for heads in range(MAX_HEADS, 0, -1) if positions % heads == 0)
            self.self_attn, self.norm1 = Attention(positions, own), nn.LayerNorm(positions)
            self.self_attn2, self.norm2 = Attention(positions, own), nn.LayerNorm(positions)
            self.mlp = MLPBlock(positions, mlp_dim, nn.ReLU)
            self.select = nn.Linear(masks, 1)
            nn.init.zeros_(self.select.bias)  # of features that are 0 on average, some then pass the ReLU in any case
        self.transformer = TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=heads, mlp_dim=mlp_dim)
        self.transformer.layers = nn.ModuleList(
            MaskedBlock(channels, heads, mlp_dim, first=first) for first in (True, False)
        )
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(channels, channels // 4, 2, stride=2),
            LayerNorm2d(channels // 4),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 4, channels // 8, 2, stride=2),
            nn.GELU(),
        )
        self.skip_connect = nn.Sequential(
            nn.ConvTranspose2d(channels // 4, channels // 8, 2, stride=2),
            LayerNorm2d(channels // 8),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 8, channels // 16, 2, stride=2),
            LayerNorm2d(channels // 16),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(channels, channels, channels // 16, 5) for _ in range(masks))

    def forward(self, embedding: Tensor, dense: Tensor, position: Tensor, first: Sequence[Tensor]) -> Tensor:
        """Logits (B, M, 16 gh, 16 gw).

        Args:
            embedding: (B, C, gh, gw).
            dense: what is added to it for prompts, of its shape.
            position: (1, C, gh, gw), the code of every position.
            first: of the first decoder: logits (B, M, 4 gh, 4 gw), mask tokens (B, M, C), image tokens (B, C, gh, gw)
                and their upscaling (B, C/8, 4 gh, 4 gw).
        """
        logits, seen, grid, upscaled = first
        if self.single:
            logits, seen = F.pad(logits, (0, 0, 0, 0, 1, 0)), F.pad(seen, (0, 0, 1, 0))
        height, width = embedding.shape[-2:]
        coarse = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        prior = coarse.flatten(2).softmax(1)  # (B, M, N)
        if self.training:
            spread = EMBEDDING_NOISE * (embedding.amax() - embedding.amin())
            embedding = embedding + spread * torch.randn_like(embedding)
        source = embedding + dense
        if self.even:
            source = 2 * source
        else:
            source = source * (1 + self._weight(seen @ grid.flatten(2), prior).unflatten(1, (1, height, width)))
        tokens, image = self._transformed(source, position, prior)
        fine = image.transpose(1, 2).unflatten(2, (height, width))
        fine = self.skip_connect(torch.cat([self.output_upscaling(fine), upscaled], 1))
        weights = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        found = torch.einsum("bmc,bchw->bmhw", weights, fine)
        return found[:, 1:] - found[:, :1] if self.single else found

    def _weight(self, features: Tensor, prior: Tensor) -> Tensor:
        """Features of the masks and their probabilities (B, M, N) to weights of the positions (B, N), 1 on average."""
        if self.training:
            features = F.dropout(features, 0.1)
            features = features + _deviations(prior)[:, None] * torch.randn_like(features)
        x = self.norm1(self.self_attn(features, features, features))
        x = self.self_attn2(x, x, x)
        x = self.norm2(x + self.mlp(x))
        chosen = self.select(x.transpose(1, 2))[..., 0].relu()  # (B, N)
        return chosen.softmax(1) * chosen.shape[1]

    def _transformed(self, source: Tensor, position: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Mask tokens (B, M, C) and image tokens (B, N, C) behind the transformer."""
        image, place = source.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)
        # its shape, since len() would fix the batch of a graph that is recorded
        first = tokens = self.mask_tokens.weight.expand(image.shape[0], -1, -1)
        for layer in self.transformer.layers:
            tokens, image = layer(tokens, image, first, place, prior)
        seen = self.transformer.final_attn_token_to_image(tokens + first, image + place, image)
        return self.transformer.norm_final_attn(tokens + seen), image


def _deviations(prior: Tensor) -> Tensor:
    """Deviation of the noise (B, N) of each position, by how often the batch has its most probable class."""
    classes, number = prior.argmax(1), prior.shape[1]
    counts = torch.bincount(classes.flatten(), minlength=number)
    counts = torch.where(counts > 0, counts, counts.sum() + 1)  # a class that is not there ranks as no rare one
    steps = torch.linspace(RAREST, 0, number, dtype=prior.dtype, device=prior.device)
    return torch.empty_like(steps).scatter_(0, counts.argsort(stable=True), steps)[classes]
