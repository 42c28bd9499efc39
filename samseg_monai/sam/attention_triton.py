"""Kernels for GPUs of attention with SAM's decomposed relative positions, forward and backward (see ``attention``).

A block of keys is one row of the image, so that the term of the row is one number per query and block, and the term of
the columns is the same tile for all blocks: both stay out of memory traffic. Otherwise it is FlashAttention-2 (Dao
2023, arXiv:2307.08691, algorithms 1 and 2): a running softmax forwards, and the weights computed again backwards, once
for the gradients of queries and terms, and once for those of keys and values. No sum depends on the order of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# queries and warps per program, forwards and backwards, for narrow rows of keys and for those from 64 on: the best of
# five each on an H200 in bf16 with 64 channels: 97 and 608 us for ViT-B's 300 windows, 291 and 1555 us for its 12 heads
TILES = {False: ((64, 4), (128, 8)), True: ((128, 8), (64, 4))}


@triton.jit
def _tile(start, b, head, places, channels, stride_b, stride_h, stride_n, mask):  # type: ignore[no-untyped-def]
    at = start + b * stride_b + head * stride_h + places[:, None] * stride_n + channels[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    Q, K, V, ROWS, COLS, OUT, LSE,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    heads, tokens, H, W: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    b, head = g // heads, g % heads
    m, n, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    in_m, in_n = (m < tokens)[:, None], (n < W)[None, :]
    of_m, of_n = in_m & (d < D)[None, :], (n < W)[:, None] & (d < D)[None, :]
    q = _tile(Q, b, head, m, d, q_b, q_h, q_n, of_m)
    columns = tl.load(COLS + (g * tokens + m[:, None]) * W + n[None, :], mask=in_m & in_n, other=0.0)
    columns = tl.where(in_n, columns.to(tl.float32), float("-inf"))
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for y in range(H):
        k = _tile(K, b, head, y * W + n, d, k_b, k_h, k_n, of_n)
        v = _tile(V, b, head, y * W + n, d, v_b, v_h, v_n, of_n)
        row = tl.load(ROWS + (g * tokens + m) * H + y, mask=m < tokens, other=0.0).to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) + columns + row[:, None]
        now = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - now[:, None])
        shrink = tl.exp(largest - now)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = now
    at = OUT + b * o_b + head * o_h + m[:, None] * o_n + d[None, :]
    tl.store(at, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=of_m)
    tl.store(LSE + g * tokens + m, largest + tl.log(total), mask=m < tokens)


@triton.jit
def _for_queries(  # type: ignore[no-untyped-def]
    Q, K, V, ROWS, COLS, LSE, DELTA, GRAD, DQ, DROWS, DCOLS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dq_b, dq_h, dq_n,
    heads, tokens, H, W: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    b, head = g // heads, g % heads
    m, n, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    in_m, in_n = (m < tokens)[:, None], (n < W)[None, :]
    of_m, of_n = in_m & (d < D)[None, :], (n < W)[:, None] & (d < D)[None, :]
    q = _tile(Q, b, head, m, d, q_b, q_h, q_n, of_m)
    gradient = _tile(GRAD, b, head, m, d, g_b, g_h, g_n, of_m)
    lse = tl.load(LSE + g * tokens + m, mask=m < tokens, other=0.0)
    delta = tl.load(DELTA + g * tokens + m, mask=m < tokens, other=0.0)
    columns = tl.load(COLS + (g * tokens + m[:, None]) * W + n[None, :], mask=in_m & in_n, other=0.0)
    columns = tl.where(in_n, columns.to(tl.float32), float("-inf"))
    for_q = tl.zeros([BM, BD], tl.float32)
    for_columns = tl.zeros([BM, BN], tl.float32)
    for y in range(H):
        k = _tile(K, b, head, y * W + n, d, k_b, k_h, k_n, of_n)
        v = _tile(V, b, head, y * W + n, d, v_b, v_h, v_n, of_n)
        row = tl.load(ROWS + (g * tokens + m) * H + y, mask=m < tokens, other=0.0).to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) + columns + row[:, None]
        weights = tl.exp(logits - lse[:, None])
        change = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        change = weights * (change - delta[:, None])
        for_q += tl.dot(change.to(k.dtype), k, input_precision=PRECISION)
        for_columns += change
        for_row = tl.sum(change, 1).to(DROWS.dtype.element_ty)
        tl.store(DROWS + (g * tokens + m) * H + y, for_row, mask=m < tokens)
    at = DQ + b * dq_b + head * dq_h + m[:, None] * dq_n + d[None, :]
    tl.store(at, for_q.to(DQ.dtype.element_ty), mask=of_m)
    at = DCOLS + (g * tokens + m[:, None]) * W + n[None, :]
    tl.store(at, for_columns.to(DCOLS.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def _for_keys(  # type: ignore[no-untyped-def]
    Q, K, V, ROWS, COLS, LSE, DELTA, GRAD, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n,
    heads, tokens, H, W: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    b, head, y = g // heads, g % heads, tl.program_id(0)
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    in_n, of_n = (n < W)[None, :], (n < W)[:, None] & (d < D)[None, :]
    k = _tile(K, b, head, y * W + n, d, k_b, k_h, k_n, of_n)
    v = _tile(V, b, head, y * W + n, d, v_b, v_h, v_n, of_n)
    for_k = tl.zeros([BN, BD], tl.float32)
    for_v = tl.zeros([BN, BD], tl.float32)
    for start in range(0, tokens, BM):
        m = start + tl.arange(0, BM)
        in_m = (m < tokens)[:, None]
        of_m = in_m & (d < D)[None, :]
        q = _tile(Q, b, head, m, d, q_b, q_h, q_n, of_m)
        gradient = _tile(GRAD, b, head, m, d, g_b, g_h, g_n, of_m)
        lse = tl.load(LSE + g * tokens + m, mask=m < tokens, other=0.0)
        delta = tl.load(DELTA + g * tokens + m, mask=m < tokens, other=0.0)
        row = tl.load(ROWS + (g * tokens + m) * H + y, mask=m < tokens, other=0.0).to(tl.float32)
        columns = tl.load(COLS + (g * tokens + m[:, None]) * W + n[None, :], mask=in_m & in_n, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) + columns.to(tl.float32) + (row - lse)[:, None]
        weights = tl.where(in_m & in_n, tl.exp(logits), 0.0)
        for_v += tl.dot(tl.trans(weights.to(gradient.dtype)), gradient, input_precision=PRECISION)
        change = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
        change = weights * (change - delta[:, None])
        for_k += tl.dot(tl.trans(change.to(q.dtype)), q, input_precision=PRECISION)
    at = b * dk_b + head * dk_h + (y * W + n)[:, None] * dk_n + d[None, :]
    tl.store(DK + at, for_k.to(DK.dtype.element_ty), mask=of_n)
    tl.store(DV + at, for_v.to(DV.dtype.element_ty), mask=of_n)


def _launch(q: Tensor, rows: Tensor, cols: Tensor, *, backward: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes, and how the kernels are built for them."""
    _, heads, tokens, d = q.shape
    h, w = rows.shape[-1], cols.shape[-1]
    full = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    keys, channels = max(16, triton.next_power_of_2(w)), max(16, triton.next_power_of_2(d))
    queries, warps = TILES[keys >= 64][backward]
    block = {"BM": queries, "BN": keys, "BD": channels, "num_warps": warps}
    return (heads, tokens, h, w, d), {**block, "PRECISION": "ieee" if full else "tf32"}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _empty(like: Tensor) -> Tensor:
    """(B, heads, N, d) in the memory order that lets heads be put together without a copy."""
    b, heads, tokens, d = like.shape
    return like.new_empty(b, tokens, heads, d).transpose(1, 2)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v, rows, cols = _dense(q), _dense(k), _dense(v), rows.contiguous(), cols.contiguous()
        sizes, block = _launch(q, rows, cols, backward=False)
        out = _empty(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        grid = (triton.cdiv(q.shape[2], block["BM"]), q.shape[0] * q.shape[1])
        _forward[grid](q, k, v, rows, cols, out, lse, *_strides(q, k, v, out), *sizes, **block)
        ctx.save_for_backward(q, k, v, rows, cols, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, rows, cols, out, lse = ctx.saved_tensors
        gradient = _dense(gradient)
        delta = (out.float() * gradient.float()).sum(-1).contiguous()
        sizes, block = _launch(q, rows, cols, backward=True)
        for_q, for_k, for_v = _empty(q), _empty(k), _empty(v)
        for_rows, for_cols = torch.empty_like(rows), torch.empty_like(cols)
        groups = q.shape[0] * q.shape[1]
        given = q, k, v, rows, cols, lse, delta, gradient
        strides = _strides(q, k, v, gradient)
        _for_queries[(triton.cdiv(q.shape[2], block["BM"]), groups)](
            *given, for_q, for_rows, for_cols, *strides, *_strides(for_q), *sizes, **block
        )
        _for_keys[(rows.shape[-1], groups)](*given, for_k, for_v, *strides, *_strides(for_k), *sizes, **block)
        return for_q, for_k, for_v, for_rows, for_cols


@torch.compiler.disable  # of what is around it all can still be compiled
def by_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Arguments and result as of ``attention``, all of one dtype."""
    return _RowAttention.apply(q, k, v, rows, cols)
