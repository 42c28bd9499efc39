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


def positions(grid: Tensor, offsets_h: Tensor, offsets_w: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` (..., h * w, h) and ``cols`` (..., h * w, w) of queries (..., h, w, d).

    Offsets are (h, h, d) and (w, w, d), the embeddings of those between rows and between columns.
    """
    rows = torch.einsum("...yxd,ykd->...yxk", grid, offsets_h).flatten(-3, -2)
    return rows, torch.einsum("...yxd,xkd->...yxk", grid, offsets_w).flatten(-3, -2)


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


def _forward(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """Attention in chunks, of tensors of this module with B and heads as one dimension, G."""
    out = torch.empty_like(v)
    for group, part in _chunks(q.shape[0], q.shape[1], k.shape[1]):
        weights = _weights(q[group, part] * scale, k[group], rows[group, part], cols[group, part])
        out[group, part] = _product(weights, v[group])
    return out


def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rows and cols from that of ``_forward``'s result, which is computed again."""
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
    return for_q, for_k.transpose(1, 2), for_v.transpose(1, 2), for_rows, for_cols


def with_slab(layer: Any, output: Tensor, qkv: Tensor, *, parts: int) -> Tensor:
    """An attention layer's output (B, H, W, C), with what a slice takes from its slab where the layer has a ``depth``.

    Args:
        layer: the attention, whose ``depth`` an adapter is (``adapters.bottleneck.DepthBranch``).
        qkv: (B, H, W, 3 * heads * d), what it made of each token.
        parts: axis of query, key and value in its rows: 0 before the heads, 1 behind.
    """
    branch = getattr(layer, "depth", None)
    if branch is None:
        return output
    sizes = (3, layer.num_heads, -1) if parts == 0 else (layer.num_heads, 3, -1)
    return branch(output, *qkv.unflatten(-1, sizes).unbind(parts - 3), layer.proj)


def drawn() -> bool:
    """Whether a graph is being drawn, which what is done piece by piece would make long."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def in_pieces(qkv: Tensor) -> bool:
    """Whether ``windowed`` is the way for this tensor."""
    return qkv.device.type == "cpu" and qkv.dtype in (torch.float32, torch.float64) and not drawn()


def windowed(qkv: Tensor, fill: Tensor, offsets_h: Tensor, offsets_w: Tensor, heads: int, scale: float) -> Tensor:
    """Attention within windows, or over the whole grid as one, of about ``CHUNK`` logits at a time; for CPUs.

    Windows are cut, filled up and put together piece by piece, here and again in the backward pass, so that nothing but
    ``qkv`` is kept and copies stay in the processor's cache.

    Args:
        qkv: (B, H, W, 3 * heads * d), queries, keys and values of a grid of tokens.
        fill: (3 * heads * d,), those of the tokens that fill the grid up to whole windows.
        offsets_h: (h, h, d), embeddings of the offsets between the rows of a window.
        offsets_w: (w, w, d), those between its columns.
        heads: how many.
        scale: of the products of queries and keys.

    Returns:
        (B, H, W, heads * d).
    """
    return _Windowed.apply(qkv, fill, offsets_h, offsets_w, heads, scale)


Place = tuple[slice, slice, slice, slice, slice]  # images, rows of tokens, columns, query to value, heads


def _pieces(shape: torch.Size, h: int, w: int, heads: int) -> Iterator[Place]:
    """Whole windows of h x w tokens with about ``CHUNK`` logits, or with some heads of one window."""
    images, height, width = shape[:3]
    down, across = -(-height // h), -(-width // w)
    windows = max(1, CHUNK // (heads * (h * w) ** 2))
    columns = min(across, windows)
    rows = min(down, windows // columns)
    several, group = max(1, windows // (rows * columns)), max(1, CHUNK // (h * w) ** 2)
    for image in range(0, images, several):
        for y in range(0, height, rows * h):
            for x in range(0, width, columns * w):
                for head in range(0, heads, group):
                    yield (
                        slice(image, image + several), slice(y, y + rows * h), slice(x, x + columns * w),
                        slice(None), slice(head, head + group),
                    )  # fmt: skip


def _cut(piece: Tensor, fill: Tensor, h: int, w: int) -> Tensor:
    """A piece (images, rows, columns, parts, heads, d), and (parts, heads, d) that fills it up, as whole windows.

    (parts, images * windows * heads, h * w, d).
    """
    images, rows, columns, parts, _, d = piece.shape
    down, across = -(-rows // h), -(-columns // w)
    if (down * h, across * w) != (rows, columns):
        filled = fill.expand(images, down * h, across * w, -1, -1, -1).clone()
        filled[:, :rows, :columns] = piece
        piece = filled
    windows = piece.unflatten(2, (across, w)).unflatten(1, (down, h))
    return windows.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(parts, -1, h * w, d)


def _join(cut: Tensor, like: Tensor, h: int, w: int) -> Tensor:
    """What ``_cut`` made of a piece like ``like``, put together again, with the tokens that filled it up."""
    images, rows, columns, parts, heads, d = like.shape
    down, across = -(-rows // h), -(-columns // w)
    windows = cut.view(parts, images, down, across, heads, h, w, d).permute(1, 2, 5, 3, 6, 0, 4, 7)
    return windows.reshape(images, down * h, across * w, parts, heads, d)


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, fill: Tensor, offsets_h: Tensor, offsets_w: Tensor, heads: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(qkv, fill, offsets_h, offsets_w)
        ctx.heads, ctx.scale = heads, scale
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        given, made = qkv.unflatten(-1, (3, heads, -1)), out.unflatten(-1, (1, heads, -1))
        h, w = len(offsets_h), len(offsets_w)
        for place in _pieces(qkv.shape, h, w, heads):
            q, k, v, rows, cols = _given(given[place], fill.view(given.shape[3:])[place[3:]], offsets_h, offsets_w)
            target = made[place]
            joined = _join(_forward(q, k, v, rows, cols, scale)[None], target, h, w)
            target.copy_(joined[:, : target.shape[1], : target.shape[2]])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, fill, offsets_h, offsets_w = ctx.saved_tensors
        h, w = len(offsets_h), len(offsets_w)
        for_qkv = torch.empty_like(qkv)
        for_fill, for_h, for_w = (torch.zeros_like(x) for x in (fill, offsets_h, offsets_w))
        given, made = (x.unflatten(-1, (3, ctx.heads, -1)) for x in (qkv, for_qkv))
        filling, made_of_it = (x.unflatten(-1, (3, ctx.heads, -1)) for x in (fill, for_fill))
        gradient = gradient.unflatten(-1, (1, ctx.heads, -1))
        for place in _pieces(qkv.shape, h, w, ctx.heads):
            q, k, v, rows, cols = _given(given[place], filling[place[3:]], offsets_h, offsets_w)
            part = gradient[place]
            part = _cut(part, part.new_zeros(part.shape[3:]), h, w)[0]
            for_q, for_k, for_v, for_rows, for_cols = _backward(part, q, k, v, rows, cols, ctx.scale)
            for_rows, for_cols = for_rows.unflatten(1, (h, w)), for_cols.unflatten(1, (h, w))
            for_grid = torch.einsum("gyxk,ykd->gyxd", for_rows, offsets_h)
            for_grid += torch.einsum("gyxk,xkd->gyxd", for_cols, offsets_w)
            for_q += for_grid.flatten(1, 2)
            grid = q.unflatten(1, (h, w))
            if ctx.needs_input_grad[2]:
                for_h += torch.einsum("gyxk,gyxd->ykd", for_rows, grid)
            if ctx.needs_input_grad[3]:
                for_w += torch.einsum("gyxk,gyxd->xkd", for_cols, grid)
            target = made[place]
            y, x = target.shape[1:3]
            joined = _join(torch.stack([for_q, for_k, for_v]), target, h, w)
            target.copy_(joined[:, :y, :x])
            if ctx.needs_input_grad[1]:
                made_of_it[place[3:]] += joined[:, y:].sum((0, 1, 2)) + joined[:, :y, x:].sum((0, 1, 2))
        return for_qkv, for_fill, for_h, for_w, None, None


def _given(piece: Tensor, fill: Tensor, offsets_h: Tensor, offsets_w: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, rows and cols of a piece."""
    h, w = len(offsets_h), len(offsets_w)
    q, k, v = _cut(piece, fill, h, w)
    return q, k, v, *positions(q.unflatten(1, (h, w)), offsets_h, offsets_w)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float) -> Tensor:
    """In the way that was measured to be fastest (``benchmarks``) for a device, a type and what is being done."""
    given = q, k, v, rows, cols
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return folded(*given, scale)
    full = q.dtype == torch.float32
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
}
