"""Largest value and sum over the neighbors of every query, by channel: what graph layers combine.

Of each maximum only where it came from is kept, never the (B, M, K, C) tensor of all neighbors.

References: Han et al., Vision GNN, NeurIPS 2022 (max-relative convolution); Wang et al., Dynamic
Graph CNN for Learning on Point Clouds, ACM TOG 2019 (edge convolution).
Symbols: B batch, M queries, N keys, C channels, K neighbors.
"""

import math

import torch
from torch import Tensor

from ops.autocast import without_autocast
from ops.flops import flop_formula
from ops.maps.aggregate import gathered_rows

__all__ = ["edge_max", "max_neighbors", "sum_neighbors"]


def _check(x: Tensor, indices: Tensor) -> Tensor:
    if (
        x.dim() != 3
        or indices.dim() not in (2, 3)
        or indices.shape[0] != (x.shape[0] if indices.dim() == 3 else indices.shape[0])
    ):
        raise ValueError(
            "expected x (B, N, C) and indices (B, M, K) or (M, K); got "
            f"{tuple(x.shape)} and {tuple(indices.shape)}"
        )
    return indices.expand(x.shape[0], -1, -1)


def max_neighbors(x: Tensor, indices: Tensor) -> Tensor:
    """Return y[b, m, c] = max_k x[b, indices[b, m, k], c]; of equal values the first one counts.

    Args:
        x: (B, N, C).
        indices: (B, M, K), or (M, K) for all samples.

    Returns:
        (B, M, C), with gradients for x.
    """
    return torch.ops.neighbors.max_rows(x, _check(x, indices))[0]


def sum_neighbors(x: Tensor, indices: Tensor) -> Tensor:
    """Return y[b, m] = Σ_k x[b, indices[b, m, k]]; arguments as in `max_neighbors`."""
    return torch.ops.neighbors.sum_rows(x, _check(x, indices))


def edge_max(
    a: Tensor,
    b: Tensor,
    indices: Tensor,
    norm: torch.nn.BatchNorm1d | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Return max_k norm(a[m] + b[indices[m, k]]) by channel: an edge convolution before its ReLU.

    h(x_i, x_j − x_i) = W [x_i, x_j − x_i] is a[i] + b[j] with a = (W₁ − W₂) x, b = W₂ x: a product
    a node instead of one an edge. Batch norm is monotone in every channel, so it may follow the
    maximum (the minimum, where its gain is negative); its statistics over all edges follow from
    sums over nodes.

    Args:
        a: (B, M, C), of the queries.
        b: (B, N, C), of the keys.
        indices: (B, M, K).
        norm: Batch norm over the edges; its running statistics are brought up to date.
        present: (B, M) bool, the queries that are there: edges of others count in no statistics,
            and their rows become zeros. None: all.

    Returns:
        (B, M, C).
    """
    indices = _check(b, indices)
    if norm is None:
        best = a + max_neighbors(b, indices)
        return best if present is None else best * present[..., None]
    if b.dtype != torch.float64:  # sums over all edges: in float32 at least
        a, b = a.float(), b.float()
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(b.dtype)
    best = a + max_neighbors(b * sign, indices) * sign
    if norm.training or norm.running_mean is None:
        share = None if present is None else present.to(b.dtype)[..., None]
        edges = indices.numel() if share is None else int(present.sum()) * indices.shape[-1]
        mean, variance = _EdgeStatistics.apply(a, b, indices, share, edges)
        if norm.training and norm.track_running_stats:
            _track(norm, mean.detach(), variance.detach(), edges)
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight * (variance + norm.eps).rsqrt()
    y = best * scale + (norm.bias - mean * scale)
    return y if present is None else y * present[..., None]


class _EdgeStatistics(torch.autograd.Function):
    """Mean and variance (C,) of a[m] + b[j] over all edges that count; sums over nodes alone.

    Arguments: a (B, M, C), b (B, N, C), indices (B, M, K), there (B, M, 1), which is 1 for queries
    whose edges count and 0 for others (None: all count), and the number of edges that count.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, a: Tensor, b: Tensor, indices: Tensor, there: Tensor | None, edges: int):
        K = indices.shape[-1]
        counts = torch.zeros(b.shape[:2], dtype=b.dtype, device=b.device)
        ones = counts.new_ones(1, 1, 1) if there is None else there
        counts.scatter_add_(1, indices.flatten(1), ones.expand(indices.shape).flatten(1))
        counts = (counts / edges)[..., None]  # share of the edges that end in each key
        mean_a = (a if there is None else a * there).sum((0, 1)) * (K / edges)
        mean_b = (counts.mT @ b).sum((0, 1))
        ctx.save_for_backward(a, b, indices, there, counts, mean_a, mean_b)
        ctx.edges = edges
        a, b = _centered(a, mean_a, there), b - mean_b
        variance = (2 / edges) * torch.einsum("bmc,bmc->c", a, sum_neighbors(b, indices))
        variance += (K / edges) * torch.einsum("bmc,bmc->c", a, a)
        variance += (counts.mT @ b.square_()).sum((0, 1))
        return mean_a + mean_b, variance.clamp_(min=0)

    @staticmethod
    def backward(ctx, g_mean: Tensor, g_variance: Tensor):
        a, b, indices, there, counts, mean_a, mean_b = ctx.saved_tensors
        K, edges = indices.shape[-1], ctx.edges
        a, b = _centered(a, mean_a, there), b - mean_b
        # An edge's slope is 2 (a + b - mean) / edges; its sums over keys and over queries.
        ga = sum_neighbors(b, indices).add_(a, alpha=K).mul_(2 * g_variance).add_(K * g_mean)
        ga = ga.div_(edges) if there is None else ga.div_(edges).mul_(there)
        gb = torch.ops.neighbors.sum_rows_backward(a, indices, b.shape[1]).div_(edges)
        gb.addcmul_(b, counts).mul_(2 * g_variance).addcmul_(counts, g_mean)
        return ga, gb, None, None, None


def _centered(a: Tensor, mean: Tensor, there: Tensor | None) -> Tensor:
    """Subtract the mean from rows that are there; the others become zeros."""
    return a - mean if there is None else (a - mean).mul_(there)


@torch.no_grad()
def _track(norm: torch.nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Bring running statistics up to date, as batch norm does."""
    norm.num_batches_tracked += 1
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = variance * (count / max(1, count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


@without_autocast
def max_rows_torch(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maxima (B, M, C) and the rows of their samples that they came from, int32."""
    x, indices = x.contiguous(), indices.contiguous()
    (b, m, K), c = indices.shape, x.shape[2]
    y, origin = x.new_empty(b * m, c), x.new_empty(b * m, c, dtype=torch.int32)
    names = indices.view(b * m, K)
    for r0, r1, rows, _ in gathered_rows(x, indices):
        best, at = rows.view(-1, K, c).max(1)
        y[r0:r1] = best
        origin[r0:r1] = names[r0:r1].gather(1, at)
    return y.view(b, m, c), origin.view(b, m, c)


max_rows_op = torch.library.custom_op("neighbors::max_rows", max_rows_torch, mutates_args=())


@max_rows_op.register_fake
def _(x, indices):
    shape = (*indices.shape[:2], x.shape[2])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


@without_autocast
def max_rows_backward_torch(gy: Tensor, origin: Tensor, n: int) -> Tensor:
    """Give every key the gradients of the maxima that it made: (B, N, C)."""
    gx = gy.new_zeros(gy.shape[0], n, gy.shape[2])
    return gx.scatter_add_(1, origin.long(), gy)


max_rows_backward_op = torch.library.custom_op(
    "neighbors::max_rows_backward", max_rows_backward_torch, mutates_args=()
)


@max_rows_backward_op.register_fake
def _(gy, origin, n):
    return gy.new_empty(gy.shape[0], n, gy.shape[2])


def _max_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.keys = inputs[0].shape[1]
    ctx.set_materialize_grads(False)


def _max_autograd(ctx, gy: Tensor | None, _origin):
    if gy is None:
        return None, None
    return torch.ops.neighbors.max_rows_backward(gy, *ctx.saved_tensors, ctx.keys), None


max_rows_op.register_autograd(_max_autograd, setup_context=_max_setup)


@without_autocast
def sum_rows_torch(x: Tensor, indices: Tensor) -> Tensor:
    """See `sum_neighbors`."""
    x, indices = x.contiguous(), indices.contiguous()
    (b, m, K), c = indices.shape, x.shape[2]
    y = x.new_empty(b * m, c)
    for r0, r1, rows, _ in gathered_rows(x, indices):
        torch.sum(rows.view(-1, K, c), 1, out=y[r0:r1])
    return y.view(b, m, c)


sum_rows_op = torch.library.custom_op("neighbors::sum_rows", sum_rows_torch, mutates_args=())


@sum_rows_op.register_fake
def _(x, indices):
    return x.new_empty(*indices.shape[:2], x.shape[2])


@without_autocast
def sum_rows_backward_torch(gy: Tensor, indices: Tensor, n: int) -> Tensor:
    """Give every neighbor the gradient of the queries it serves, one rank after the other."""
    b, m, c = gy.shape
    gx = gy.new_zeros(b * n, c)
    first = torch.arange(b, device=gy.device)[:, None] * n
    flat = gy.reshape(b * m, c)
    for rank in range(indices.shape[-1]):
        gx.index_add_(0, (indices[..., rank] + first).flatten(), flat)
    return gx.view(b, n, c)


sum_rows_backward_op = torch.library.custom_op(
    "neighbors::sum_rows_backward", sum_rows_backward_torch, mutates_args=()
)


@sum_rows_backward_op.register_fake
def _(gy, indices, n):
    return gy.new_empty(gy.shape[0], n, gy.shape[2])


def _sum_setup(ctx, inputs, output) -> None:
    x, indices = inputs
    ctx.save_for_backward(indices)
    ctx.keys = x.shape[1]


def _sum_autograd(ctx, gy: Tensor):
    (indices,) = ctx.saved_tensors
    return torch.ops.neighbors.sum_rows_backward(gy, indices, ctx.keys), None


sum_rows_op.register_autograd(_sum_autograd, setup_context=_sum_setup)


@flop_formula(torch.ops.neighbors.sum_rows)
def _sum_flops(x, indices, *_, **__) -> int:
    return math.prod(indices) * x[2]
