"""Weighted sums over chosen neighbors: a convolution whose taps are neighbors.

Neighbors are read row by row where they lie: the (B, M, K, C) tensor of all of them never exists,
forward or backward. Float32 tensors on a CPU go through compiled kernels (`ops.cpu`), tensors on a
GPU through `ops.triton`, where there are any, all else through PyTorch in chunks.

Symbols: B batch, M queries, N keys, C channels, K neighbors, O output channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.autocast import match_autocast, without_autocast
from ops.budget import chunk_bytes, pieces
from ops.flops import flop_formula
from ops.rows import flat_index

__all__ = ["aggregate_neighbors", "gathered_rows"]


def aggregate_neighbors(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Weigh the K neighbors of every query.

    y[b, m] = Σ_k weight[:, :, k] x[b, indices[b, m, k]] + bias.
    Memory beside the result: a chunk of neighbors; gradients are written by hand and gather again.

    Args:
        x: (B, N, C).
        indices: (B, M, K), or (M, K) for all samples; no gradient.
        weight: (O, C, K).
        bias: (O,).

    Returns:
        (B, M, O). Under autocast in its type.

    Raises:
        ValueError: for shapes that do not fit or an empty batch.
        IndexError: for an index outside `x`, where the compiled kernels run; Triton's make what
            belongs to it no number.
    """
    if x.dim() != 3 or weight.dim() != 3 or indices.dim() not in (2, 3):
        raise ValueError(
            "expected x (B, N, C), indices (B, M, K) or (M, K), weight (O, C, K); got "
            f"{tuple(x.shape)}, {tuple(indices.shape)}, {tuple(weight.shape)}"
        )
    if x.shape[0] == 0:
        raise ValueError("the batch must hold at least one sample (got 0)")
    if (
        x.shape[2] != weight.shape[1]
        or indices.shape[-1] != weight.shape[2]
        or (indices.dim() == 3 and indices.shape[0] != x.shape[0])
    ):
        raise ValueError(
            "x (B, N, C), indices (B, M, K) and weight (O, C, K) do not fit: got "
            f"{tuple(x.shape)}, {tuple(indices.shape)}, {tuple(weight.shape)}"
        )
    x, weight, bias = match_autocast(x, weight, bias)
    return torch.ops.neighbors.aggregate(x, indices, weight, bias)


@without_autocast
def aggregate_torch(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `aggregate_neighbors`."""
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    o = weight.shape[0]
    x, indices = x.contiguous(), indices.contiguous()
    y = x.new_empty(b, m, o)
    if m == 0:
        return y
    matrix = weight.transpose(1, 2).reshape(o, K * c).T  # (K·C, O)
    flat = y.view(b * m, o)
    for r0, r1, rows, _ in gathered_rows(x, indices):
        if bias is None:
            torch.mm(rows, matrix, out=flat[r0:r1])
        else:
            torch.addmm(bias, rows, matrix, out=flat[r0:r1])
    return y


aggregate_op = torch.library.custom_op("neighbors::aggregate", aggregate_torch, mutates_args=())


@aggregate_op.register_fake
def _(x, indices, weight, bias):
    return x.new_empty(x.shape[0], indices.shape[-2], weight.shape[0])


def gathered_rows(x: Tensor, indices: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield r0, r1, rows (r1 - r0, K·C) and their numbers: the neighbors of queries r0 to r1.

    Queries count through all samples, and so do the numbers (r1 - r0)·K. The rows lie in one
    buffer, overwritten each time, which the caller may write to.
    """
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    table, indices = x.view(b * n, c), indices.expand(b, m, K)
    budget = chunk_bytes(x.device) // 2  # the rest of the cache: weights and results
    buffer = None
    for samples, part in pieces(b, m, budget // (K * c * x.element_size())):
        flat = flat_index(indices[samples, part], n, samples.start)
        if buffer is None:
            buffer = x.new_empty(len(flat), c)
        rows = torch.index_select(table, 0, flat, out=buffer[: len(flat)]).view(-1, K * c)
        r0 = samples.start * m + part.start
        yield r0, r0 + len(rows), rows, flat


@without_autocast
def aggregate_backward_torch(
    gy: Tensor, x: Tensor, indices: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, empty where they are not needed."""
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    o = weight.shape[0]
    gy, x, indices = gy.contiguous(), x.contiguous(), indices.contiguous()
    # Sums of many rows: in float32 at least.
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    gx = x.new_zeros((b, n, c) if need_x else 0, dtype=wide)
    if m == 0:
        return gx.to(x.dtype), torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    matrix = weight.transpose(1, 2).reshape(o, K * c)
    gw = weight.new_zeros((o, K * c) if need_weight else 0, dtype=wide)
    flat_gy, flat_gx = gy.view(b * m, o), gx.view(-1, c)
    for r0, r1, rows, flat in gathered_rows(x, indices):
        if need_weight:
            if gw.dtype == x.dtype:
                gw.addmm_(flat_gy[r0:r1].T, rows)
            else:
                gw += flat_gy[r0:r1].T @ rows
        if need_x:
            g = torch.mm(flat_gy[r0:r1], matrix, out=rows)  # in place of the neighbors
            flat_gx.index_add_(0, flat, g.view(-1, c).to(wide))
    if need_weight:
        gw = gw.view(o, K, c).transpose(1, 2).to(weight.dtype).contiguous()
    else:
        gw = gw.to(weight.dtype)
    return gx.to(x.dtype), gw


aggregate_backward_op = torch.library.custom_op(
    "neighbors::aggregate_backward", aggregate_backward_torch, mutates_args=()
)


@aggregate_backward_op.register_fake
def _(gy, x, indices, weight, need_x, need_weight):
    gx = x.new_empty(x.shape if need_x else (0,))
    return gx, weight.new_empty(weight.shape if need_weight else (0,))


def _aggregate_setup(ctx, inputs, output) -> None:
    x, indices, weight, _bias = inputs
    ctx.save_for_backward(x, indices, weight)


def _aggregate_autograd(ctx, gy: Tensor):
    x, indices, weight = ctx.saved_tensors
    need_x, _, need_weight, need_bias = ctx.needs_input_grad
    gx = gw = None
    if need_x or need_weight:
        gx, gw = torch.ops.neighbors.aggregate_backward(gy, x, indices, weight, need_x, need_weight)
    gb = gy.sum((0, 1)) if need_bias else None
    return gx if need_x else None, None, gw if need_weight else None, gb


aggregate_op.register_autograd(_aggregate_autograd, setup_context=_aggregate_setup)


@flop_formula(torch.ops.neighbors.aggregate)
def _aggregate_flops(x, indices, weight, *_, **__) -> int:
    o, c, K = weight
    return 2 * x[0] * indices[-2] * K * c * o


@flop_formula(torch.ops.neighbors.aggregate_backward)
def _aggregate_backward_flops(gy, x, indices, weight, need_x, need_weight, *_, **__) -> int:
    return (int(need_x) + int(need_weight)) * _aggregate_flops(x, indices, weight)
