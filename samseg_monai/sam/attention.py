"""Attention with SAM's decomposed relative positions, in the ways that are fastest on some device.

SAM adds to the logit of query (y, x) and key (y', x') the terms ``q . R_h[y - y']`` and ``q . R_w[x - x']`` (Li et al.
2022, arXiv:2112.01526, equation 4). All ways here compute softmax(scale q k^T + rows + cols) v with

    q, k, v  (B, heads, N, d), N = h * w tokens in the order of rows
    rows     (B, heads, N, h), the first term for each row of keys
    cols     (B, heads, N, w), the second term for each column of keys

to (B, heads, N, d), and are differentiable in all five. They differ in time and memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samseg_monai.products import fits, times, times_plus

Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]

WIDEST = 128  # channels, and keys in a row, that the kernels for GPUs hold at a time
TRITON = find_spec("triton") is not None
# logits at a time: what stays in a core's cache between the product and the softmax
CHUNK = 1 << 19


def folded(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """In one kernel of ``scaled_dot_product_attention``, without any matrix of logits.

    Both terms are inner products of a vector that depends on the query alone with a one-hot code of the key's row or
    column: they are appended to query and key as extra channels, h + w of them.
    """
    h, w, d = rows.shape[-1], cols.shape[-1], q.shape[-1]
    spare = -(h + w + d) % 8  # what the kernels of GPUs would fill up by copying
    query = F.pad(torch.cat([(q * scale).to(rows.dtype), rows, cols], dim=-1), (0, spare))
    key_row = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, dim=0)
    key_col = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
    code = F.pad(torch.cat([key_row, key_col], dim=-1), (0, spare)).expand(*k.shape[:-1], -1)
    # the fused kernels want values as wide as queries; the padding is cut off again
    out = F.scaled_dot_product_attention(query, torch.cat([k, code], dim=-1), F.pad(v, (0, h + w + spare)), scale=1.0)
    return out[..., :d]


def masked(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """With both terms as one matrix (B, heads, N, N) that is added to the logits."""
    bias = (rows[..., :, None] + cols[..., None, :]).flatten(-2).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def by_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """With kernels of this package for GPUs, which take a row of keys at a time and so need no matrix either."""
    from samseg_monai.sam.attention_triton import by_rows  # a compiler that exists where GPUs are

    return by_rows(q * scale, k, v, rows.to(q.dtype), cols.to(q.dtype))


def chunked(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """For some heads and queries at a time, all of it computed again in the backward pass; for CPUs."""
    flat = (x.flatten(0, 1) for x in (q, k, v, rows, cols))
    return _Chunked.apply(*flat, scale).view(q.shape)


def _chunks(groups: int, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of queries with about ``CHUNK`` logits each; several heads only where all queries fit."""
    rows = max(1, CHUNK // keys)
    heads = max(1, rows // queries)
    for group in range(0, groups, heads):
        for query in range(0, queries, rows):
            yield slice(group, group + heads), slice(query, min(query + rows, queries))


def _weights(q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Softmax over all keys: (G, n, d), (G, N, d), (G, n, h) and (G, n, w) to (G, n, N)."""
    bias = (rows[..., :, None] + cols[..., None, :]).flatten(-2)
    if len(q) == 1 and fits(q, k, bias):
        return times_plus(q[0], k[0], bias[0]).softmax(-1)[None]
    return bias.baddbmm_(q, k.transpose(1, 2)).softmax(-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm`` of (G, n, m) and (G, m, k)."""
    if len(a) == 1 and fits(a, b):
        return times(a[0], b[0].t())[None]
    return torch.bmm(a, b)


class _Chunked(torch.autograd.Function):
    """Arguments as of this module with B and heads as one dimension, G."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once instead of for each chunk
        out = torch.empty_like(v)
        for group, part in _chunks(q.shape[0], q.shape[1], k.shape[1]):
            weights = _weights(q[group, part] * scale, k[group], rows[group, part], cols[group, part])
            out[group, part] = _product(weights, v[group])
        ctx.save_for_backward(q, k, v, rows, cols)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, rows, cols = ctx.saved_tensors
        gradient, scale = gradient.contiguous(), ctx.scale
        h, w = rows.shape[-1], cols.shape[-1]
        for_q, for_rows, for_cols = torch.empty_like(q), torch.empty_like(rows), torch.empty_like(cols)
        for_k, for_v = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1]) for x in (k, v))
        for group, part in _chunks(q.shape[0], q.shape[1], k.shape[1]):
            some = q[group, part] * scale
            weights = _weights(some, k[group], rows[group, part], cols[group, part])
            for_v[group] += _product(gradient[group, part].transpose(1, 2), weights)
            logits = _product(gradient[group, part], v[group].transpose(1, 2))
            logits = torch._softmax_backward_data(logits, weights, -1, logits.dtype)
            for_k[group] += _product(some.transpose(1, 2), logits)
            for_q[group, part] = _product(logits, k[group]) * scale
            grid = logits.unflatten(-1, (h, w))
            for_rows[group, part], for_cols[group, part] = grid.sum(-1), grid.sum(-2)
        return for_q, for_k.transpose(1, 2), for_v.transpose(1, 2), for_rows, for_cols, None


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """In the way that was measured to be fastest (``benchmarks``) for a device, a type and what is being done."""
    given = q, k, v, rows, cols
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return folded(*given, scale)
    full = q.dtype == torch.float32
    if q.device.type == "cpu" and (full or q.dtype == torch.float64) and not torch.compiler.is_compiling():
        return chunked(*given, scale)
    if q.is_cuda and TRITON and max(q.shape[-1], cols.shape[-1]) <= WIDEST and q.dtype != torch.float64:
        if not full or torch.backends.cuda.matmul.allow_tf32:
            return by_rows(*given, scale)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            return masked(*given, scale)  # faster, but a backward pass would keep the matrix
    return folded(*given, scale)


WAYS: dict[str, Way] = {
    "folded": folded,
    "masked": masked,
    "by_rows": by_rows,
    "chunked": chunked,
}
