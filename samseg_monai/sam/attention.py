"""SAM's attention with decomposed relative positions, computed by one fused kernel.

SAM adds to the logit of query (y, x) and key (y', x') the terms ``q . R_h[y - y']`` and ``q . R_w[x - x']``
(Li et al. 2022, arXiv:2112.01526, equation 4). Both are inner products of a vector that depends on the query alone with
a one-hot code of the key's row or column. So they are appended to query and key as extra channels, and
``scaled_dot_product_attention`` needs no bias matrix: the (H*W) x (H*W) attention map is never stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention

from samseg_monai.errors import ConfigError


def relative_rows(table: torch.Tensor, size: int) -> torch.Tensor:
    """Look up the embeddings of all offsets between ``size`` positions.

    Args:
        table: (2 * n - 1, d) embeddings of the offsets -(n - 1) ... n - 1; its middle row is offset 0.
        size: number of positions, at most n. Fewer than n positions use the middle of the table: offsets keep their
            meaning, the table is not stretched.

    Returns:
        (size, size, d): entry (i, j) belongs to the offset i - j.

    Raises:
        ConfigError: the table has no row for the largest offset.
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

    Shape: (B, H, W, C) to (B, H, W, C).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        heads, d = self.num_heads, c // self.num_heads
        # (B, H, W, 3 C) -> three of (B, heads, H*W, d)
        q, k, v = self.qkv(x).reshape(b, h * w, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        q_grid = q.reshape(b, heads, h, w, d)
        rows = torch.einsum("bnhwd,hkd->bnhwk", q_grid, relative_rows(self.rel_pos_h, h)).flatten(2, 3)
        cols = torch.einsum("bnhwd,wkd->bnhwk", q_grid, relative_rows(self.rel_pos_w, w)).flatten(2, 3)
        query = torch.cat([(q * self.scale).to(rows.dtype), rows, cols], dim=-1)
        key_row = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, dim=0)
        key_col = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
        code = torch.cat([key_row, key_col], dim=-1).expand(b, heads, h * w, h + w)
        # the fused kernels want values as wide as queries; the padding is cut off again
        out = F.scaled_dot_product_attention(query, torch.cat([k, code], dim=-1), F.pad(v, (0, h + w)), scale=1.0)
        out = out[..., :d].reshape(b, heads, h, w, d).permute(0, 2, 3, 1, 4).reshape(b, h, w, c)
        return self.proj(out)
