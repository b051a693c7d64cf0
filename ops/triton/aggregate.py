"""Weighted sums over chosen neighbors on a GPU: products whose rows are gathered as they are read.

See `ops.maps.aggregate` for the formulas. All queries of all samples are R = B·M rows. Forward and
the gradient of x, a program takes a block of rows and of columns of the result; the gradient of the
weights is shared out among blocks of rows, whose sums meet in atomic additions, as the neighbors'
gradients do: their last bits depend on the order. Half precision is added in float32.

A neighbor's index outside x is not followed: the results it belongs to are not numbers.

Symbols: B batch, M queries, N keys, C channels, K neighbors, O output channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.rows import contiguous, index_step
from ops.triton.launch import next_power, on_device, precision, tuned, widens

__all__ = ["aggregate", "aggregate_backward"]

_PARTS = 64  # blocks of rows whose sums are gradients of weights


@triton.jit
def _neighbor(indices_ptr, step, row, mask, k, M, N, K):
    """Row numbers among all keys (BM,) of the k-th neighbors, and which of them exist."""
    b = row // M
    index = tl.load(indices_ptr + b * step + (row % M) * K + k, mask=mask, other=-1)
    exists = (index >= 0) & (index < N)
    return b * N + tl.where(exists, index, 0), exists


@tuned(
    ["C", "O", "K"],
    {"BM": 16, "BO": 16, "BC": 16},
    {"BM": 64, "BO": 64, "BC": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 128, "BO": 64, "BC": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 128, "BO": 128, "BC": 32, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BO": 64, "BC": 64, "num_warps": 4, "num_stages": 2},
    {"BM": 32, "BO": 32, "BC": 32, "num_warps": 2, "num_stages": 3},
)
@triton.jit
def _forward(
    x_ptr,
    indices_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    step,
    R,
    M,
    N,
    C,
    O,  # noqa: E741
    K,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
):
    """Weights are (K, C, O)."""
    columns = tl.cdiv(O, BO)
    row = (tl.program_id(0) // columns).to(tl.int64) * BM + tl.arange(0, BM)
    o = tl.program_id(0) % columns * BO + tl.arange(0, BO)
    mask = row < R
    acc = tl.zeros((BM, BO), tl.float32)
    bad = tl.zeros((BM,), tl.int32)
    for k in range(K):
        at, exists = _neighbor(indices_ptr, step, row, mask, k, M, N, K)
        bad = bad | (mask & ~exists).to(tl.int32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            inside = c < C
            x = tl.load(
                x_ptr + at[:, None] * C + c[None, :],
                mask=exists[:, None] & inside[None, :],
                other=0.0,
            )
            w = tl.load(
                w_ptr + (k * C + c).to(tl.int64)[:, None] * O + o[None, :],
                mask=inside[:, None] & (o < O)[None, :],
                other=0.0,
            )
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(bad[:, None] > 0, float("nan"), acc)
    at_y = y_ptr + row[:, None] * O + o[None, :]
    tl.store(at_y, acc.to(y_ptr.dtype.element_ty), mask=mask[:, None] & (o < O)[None, :])


@tuned(
    ["C", "O", "K"],
    {"BM": 16, "BO": 16, "BC": 16},
    {"BM": 64, "BO": 32, "BC": 64, "num_warps": 4, "num_stages": 3},
    {"BM": 128, "BO": 32, "BC": 64, "num_warps": 4, "num_stages": 3},
    {"BM": 128, "BO": 32, "BC": 128, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BO": 64, "BC": 64, "num_warps": 4, "num_stages": 2},
    {"BM": 32, "BO": 32, "BC": 32, "num_warps": 2, "num_stages": 3},
    reset_to_zero=["gx_ptr"],
)
@triton.jit
def _input_gradient(
    gy_ptr,
    indices_ptr,
    w_ptr,
    gx_ptr,
    step,
    R,
    M,
    N,
    C,
    O,  # noqa: E741
    K,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
):
    """Weights are (K, O, C); gx is float32 and zero."""
    columns = tl.cdiv(C, BC)
    row = (tl.program_id(0) // columns // K).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.program_id(0) // columns % K
    c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    mask, inside = row < R, c < C
    acc = tl.zeros((BM, BC), tl.float32)
    for o0 in range(0, O, BO):
        o = o0 + tl.arange(0, BO)
        gy = tl.load(
            gy_ptr + row[:, None] * O + o[None, :],
            mask=mask[:, None] & (o < O)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + (k * O + o).to(tl.int64)[:, None] * C + c[None, :],
            mask=(o < O)[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            gy = gy.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(gy, w, acc, input_precision=PRECISION)
    at, exists = _neighbor(indices_ptr, step, row, mask, k, M, N, K)
    tl.atomic_add(
        gx_ptr + at[:, None] * C + c[None, :],
        acc,
        mask=exists[:, None] & inside[None, :],
        sem="relaxed",
    )


@tuned(
    ["C", "O", "K"],
    {"BM": 16, "BO": 16, "BC": 16},
    {"BM": 32, "BO": 64, "BC": 64, "num_warps": 4, "num_stages": 3},
    {"BM": 64, "BO": 64, "BC": 64, "num_warps": 4, "num_stages": 2},
    {"BM": 32, "BO": 128, "BC": 64, "num_warps": 8, "num_stages": 3},
    {"BM": 32, "BO": 32, "BC": 32, "num_warps": 2, "num_stages": 3},
    reset_to_zero=["gw_ptr"],
)
@triton.jit
def _weight_gradient(
    gy_ptr,
    x_ptr,
    indices_ptr,
    gw_ptr,
    step,
    part,
    R,
    M,
    N,
    C,
    O,  # noqa: E741
    K,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
):
    """Add what `part` rows give; gw is (K, O, C), float32 and zero."""
    across, down = tl.cdiv(C, BC), tl.cdiv(O, BO)
    c = tl.program_id(0) % across * BC + tl.arange(0, BC)
    o = tl.program_id(0) // across % down * BO + tl.arange(0, BO)
    k = tl.program_id(0) // (across * down)
    inside = c < C
    begin = tl.program_id(1).to(tl.int64) * part
    acc = tl.zeros((BO, BC), tl.float32)
    for r in range(0, part, BM):
        more = r + tl.arange(0, BM)
        row = begin + more
        mask = (more < part) & (row < R)
        at, exists = _neighbor(indices_ptr, step, row, mask, k, M, N, K)
        gy = tl.load(
            gy_ptr + row[None, :] * O + o[:, None],
            mask=exists[None, :] & (o < O)[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + at[:, None] * C + c[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            gy = gy.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(gy, x, acc, input_precision=PRECISION)
    tl.atomic_add(
        gw_ptr + (k * O + o).to(tl.int64)[:, None] * C + c[None, :],
        acc,
        mask=(o < O)[:, None] & inside[None, :],
        sem="relaxed",
    )


@on_device
def aggregate(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Aggregate as `ops.maps.aggregate.aggregate_neighbors` does; all of one type."""
    x, indices, bias = contiguous(x, indices, bias)
    (b, n, c), (m, K), o = x.shape, indices.shape[-2:], weight.shape[0]
    y = x.new_empty(b, m, o)
    taps = weight.permute(2, 1, 0).contiguous()
    _forward[lambda size: (triton.cdiv(b * m, size["BM"]) * triton.cdiv(o, size["BO"]),)](
        *(x, indices, taps, bias, y, index_step(indices, 2), b * m, m, n, c, o, K),
        PRECISION=precision(),
        WIDEN=widens(x.dtype),
    )
    return y


@on_device
def aggregate_backward(
    gy: Tensor, x: Tensor, indices: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, empty where they are not needed."""
    gy, x, indices = contiguous(gy, x, indices)
    (b, n, c), (m, K), o = x.shape, indices.shape[-2:], weight.shape[0]
    step, sizes = index_step(indices, 2), (b * m, m, n, c, o, K)
    options = {"PRECISION": precision(), "WIDEN": widens(x.dtype)}
    gx = x.new_zeros((b, n, c) if need_x else 0, dtype=torch.float32)
    gw = x.new_zeros((K, o, c) if need_weight else (0, 0, 0), dtype=torch.float32)
    if need_x:
        taps = weight.permute(2, 0, 1).contiguous()
        _input_gradient[
            lambda size: (triton.cdiv(b * m, size["BM"]) * triton.cdiv(c, size["BC"]) * K,)
        ](gy, indices, taps, gx, step, *sizes, **options)
    if need_weight:
        part = next_power(max(16, triton.cdiv(b * m, _PARTS)))
        _weight_gradient[
            lambda size: (
                triton.cdiv(c, size["BC"]) * triton.cdiv(o, size["BO"]) * K,
                triton.cdiv(b * m, part),
            )
        ](gy, x, indices, gw, step, part, *sizes, **options)
    gw = gw.permute(1, 2, 0).contiguous() if need_weight else gw.view(0)
    return gx.to(x.dtype), gw.to(weight.dtype)
