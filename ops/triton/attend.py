"""Attention within chosen neighbors on a GPU; `ops.maps.attend` has the formulas.

All queries of all samples are R = B·M rows. A program takes a block of rows with all their
neighbors, whose channels it reads in pieces: once for the scores, once for the sums. The backward
pass finds the scores' gradients from the kept attention, then reads the neighbors a second time for
the gradients of q, k and v; those of q and v meet in atomic additions, those of the weights in a
kernel of their own that adds over rows first. Last bits depend on the order. All is float32.

A neighbor's index outside q is not followed: the results it belongs to are not numbers.

Symbols: B batch, M queries, N keys, C channels, K neighbors (KP: the next power of two).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.rows import contiguous, index_step
from ops.triton.launch import next_power, on_device, tuned

__all__ = ["MOST", "attend", "attend_backward"]

MOST = 64  # neighbors whose rows a program holds
_PARTS = 256  # blocks of rows whose sums are gradients of weights


@triton.jit
def _neighbors(indices_ptr, step, row, mask, M, N, K, KP: tl.constexpr):
    """Row numbers among all keys (BM, KP), which of them exist, and which should."""
    j = tl.arange(0, KP)
    wanted = mask[:, None] & (j < K)[None, :]
    b = (row // M)[:, None]
    index = tl.load(
        indices_ptr + b * step + (row % M)[:, None] * K + j[None, :], mask=wanted, other=-1
    )
    exists = (index >= 0) & (index < N)
    return b * N + tl.where(exists, index, 0), exists, wanted


@triton.jit
def _rows_of(x_ptr, at, exists, c, C):
    """Rows (BM, KP, BC) of x (…, C), zero where there are none."""
    return tl.load(
        x_ptr + at[:, :, None] * C + c[None, None, :],
        mask=exists[:, :, None] & (c < C)[None, None, :],
        other=0.0,
    )


@triton.jit
def _kept(keep_ptr, row, wanted, K, KP: tl.constexpr):
    """Factors of dropout (BM, KP)."""
    j = tl.arange(0, KP)
    return tl.load(keep_ptr + row[:, None] * K + j[None, :], mask=wanted, other=0.0)


@tuned(
    ["C", "KP"],
    {"BM": 4, "BC": 8},
    {"BM": 1, "BC": 64, "num_warps": 1},
    {"BM": 2, "BC": 32, "num_warps": 2},
    {"BM": 4, "BC": 32, "num_warps": 4},
    {"BM": 8, "BC": 32, "num_warps": 8},
)
@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    indices_ptr,
    w_ptr,
    bias_ptr,
    keep_ptr,
    a_ptr,
    y_ptr,
    self_score,
    step,
    R,
    M,
    N,
    C,
    K,
    KP: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    FIXED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Weights are (K, C)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask = row < R
    j = tl.arange(0, KP)
    at, exists, wanted = _neighbors(indices_ptr, step, row, mask, M, N, K, KP)
    score = tl.zeros((BM, KP), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        mine = tl.load(
            k_ptr + row[:, None] * C + c[None, :],
            mask=mask[:, None] & (c < C)[None, :],
            other=0.0,
        )[:, None, :]
        rows = _rows_of(q_ptr, at, exists, c, C)
        if EUCLIDEAN:
            score -= tl.sum((mine - rows) * (mine - rows), 2)
        else:
            score += tl.sum(mine * rows, 2)
    if FIXED:
        score = tl.where((j == 0)[None, :], self_score, score)
    score = tl.where(wanted & ~exists, float("nan"), score)
    score = tl.where((j < K)[None, :], score, float("-inf"))
    score = tl.exp(score - tl.max(score, 1)[:, None])
    a = score / tl.sum(score, 1)[:, None]
    tl.store(a_ptr + row[:, None] * K + j[None, :], a, mask=wanted)
    if keep_ptr is not None:
        a *= _kept(keep_ptr, row, wanted, K, KP)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = c < C
        w = tl.load(
            w_ptr + j[:, None] * C + c[None, :],
            mask=(j < K)[:, None] & inside[None, :],
            other=0.0,
        )
        y = tl.sum(a[:, :, None] * w[None, :, :] * _rows_of(v_ptr, at, exists, c, C), 1)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c, mask=inside, other=0.0)[None, :]
        tl.store(y_ptr + row[:, None] * C + c[None, :], y, mask=mask[:, None] & inside[None, :])


@tuned(
    ["C", "KP"],
    {"BM": 4, "BC": 8},
    {"BM": 1, "BC": 64, "num_warps": 1},
    {"BM": 2, "BC": 32, "num_warps": 2},
    {"BM": 4, "BC": 32, "num_warps": 4},
    {"BM": 8, "BC": 32, "num_warps": 8},
    reset_to_zero=["gq_ptr", "gv_ptr"],
)
@triton.jit
def _backward(
    gy_ptr,
    a_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    indices_ptr,
    w_ptr,
    keep_ptr,
    gq_ptr,
    gk_ptr,
    gv_ptr,
    step,
    R,
    M,
    N,
    C,
    K,
    KP: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    FIXED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Weights are (K, C); gq and gv are zero."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask = row < R
    j = tl.arange(0, KP)
    at, exists, wanted = _neighbors(indices_ptr, step, row, mask, M, N, K, KP)
    a = tl.load(a_ptr + row[:, None] * K + j[None, :], mask=wanted, other=0.0)
    share = a
    ga = tl.zeros((BM, KP), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = c < C
        gy = tl.load(
            gy_ptr + row[:, None] * C + c[None, :],
            mask=mask[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + j[:, None] * C + c[None, :],
            mask=(j < K)[:, None] & inside[None, :],
            other=0.0,
        )
        weighted = gy[:, None, :] * w[None, :, :]
        ga += tl.sum(weighted * _rows_of(v_ptr, at, exists, c, C), 2)
    if keep_ptr is not None:
        kept = _kept(keep_ptr, row, wanted, K, KP)
        ga *= kept
        share *= kept
    gs = a * (ga - tl.sum(a * ga, 1)[:, None])
    if FIXED:
        gs = tl.where((j == 0)[None, :], 0.0, gs)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = c < C
        flat = row[:, None] * C + c[None, :]
        both = mask[:, None] & inside[None, :]
        gy = tl.load(gy_ptr + flat, mask=both, other=0.0)
        w = tl.load(
            w_ptr + j[:, None] * C + c[None, :],
            mask=(j < K)[:, None] & inside[None, :],
            other=0.0,
        )
        mine = tl.load(k_ptr + flat, mask=both, other=0.0)[:, None, :]
        rows = _rows_of(q_ptr, at, exists, c, C)
        if EUCLIDEAN:
            pull = 2 * gs[:, :, None] * (mine - rows)
            gk = -tl.sum(tl.where(exists[:, :, None], pull, 0.0), 1)
        else:
            pull = gs[:, :, None] * mine
            gk = tl.sum(gs[:, :, None] * rows, 1)
        tl.store(gk_ptr + flat, gk, mask=both)
        where = at[:, :, None] * C + c[None, None, :]
        fits = exists[:, :, None] & inside[None, None, :]
        tl.atomic_add(gq_ptr + where, pull, mask=fits, sem="relaxed")
        gv = gy[:, None, :] * w[None, :, :] * share[:, :, None]
        tl.atomic_add(gv_ptr + where, gv, mask=fits, sem="relaxed")


@tuned(
    ["C", "KP"],
    {"BM": 4, "BC": 8},
    {"BM": 4, "BC": 32, "num_warps": 4},
    {"BM": 8, "BC": 32, "num_warps": 8},
    {"BM": 2, "BC": 64, "num_warps": 4},
    reset_to_zero=["gw_ptr"],
)
@triton.jit
def _weight_gradient(
    gy_ptr,
    a_ptr,
    v_ptr,
    indices_ptr,
    keep_ptr,
    gw_ptr,
    step,
    part,
    R,
    M,
    N,
    C,
    K,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Add what `part` rows give; gw is (K, C) and zero."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    j = tl.arange(0, KP)
    begin = tl.program_id(1).to(tl.int64) * part
    acc = tl.zeros((KP, BC), tl.float32)
    for r in range(0, part, BM):
        more = r + tl.arange(0, BM)
        row = begin + more
        mask = (more < part) & (row < R)
        at, exists, wanted = _neighbors(indices_ptr, step, row, mask, M, N, K, KP)
        share = tl.load(a_ptr + row[:, None] * K + j[None, :], mask=wanted, other=0.0)
        if keep_ptr is not None:
            share *= _kept(keep_ptr, row, wanted, K, KP)
        gy = tl.load(
            gy_ptr + row[:, None] * C + c[None, :],
            mask=mask[:, None] & (c < C)[None, :],
            other=0.0,
        )
        rows = _rows_of(v_ptr, at, exists, c, C)
        acc += tl.sum(gy[:, None, :] * share[:, :, None] * rows, 0)
    tl.atomic_add(
        gw_ptr + j[:, None] * C + c[None, :],
        acc,
        mask=(j < K)[:, None] & (c < C)[None, :],
        sem="relaxed",
    )


@on_device
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    euclidean: bool,
    fixed: bool,
    self_score: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the attention (B, M, K) before dropout; float32, K up to `MOST`."""
    q, k, v, indices, taps, bias, keep = contiguous(q, k, v, indices, weight.T, bias, keep)
    (b, n, c), (m, K) = q.shape, indices.shape[-2:]
    y, attention = v.new_empty(b, m, c), v.new_empty(b, m, K)
    _forward[lambda size: (triton.cdiv(b * m, size["BM"]),)](
        *(q, k, v, indices, taps, bias, keep, attention, y, float(self_score)),
        *(index_step(indices, 2), b * m, m, n, c, K),
        **{"KP": next_power(K), "EUCLIDEAN": euclidean, "FIXED": fixed},
    )
    return y, attention


@on_device
def attend_backward(
    gy: Tensor,
    attention: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weight: Tensor,
    euclidean: bool,
    fixed: bool,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and weight; float32, K up to `MOST`."""
    gy, attention, q, k, v, indices = contiguous(gy, attention, q, k, v, indices)
    taps, keep = contiguous(weight.T, keep)
    (b, n, c), (m, K) = q.shape, indices.shape[-2:]
    step, sizes, power = index_step(indices, 2), (b * m, m, n, c, K), next_power(K)
    gq, gk, gv = torch.zeros_like(q), torch.empty_like(k), torch.zeros_like(v)
    gw = torch.zeros_like(taps)
    _backward[lambda size: (triton.cdiv(b * m, size["BM"]),)](
        *(gy, attention, q, k, v, indices, taps, keep, gq, gk, gv, step, *sizes),
        **{"KP": power, "EUCLIDEAN": euclidean, "FIXED": fixed},
    )
    part = next_power(max(8, triton.cdiv(b * m, _PARTS)))
    _weight_gradient[lambda size: (triton.cdiv(c, size["BC"]), triton.cdiv(b * m, part))](
        gy, attention, v, indices, keep, gw, step, part, *sizes, KP=power
    )
    return gq, gk, gv, gw.T.contiguous()
