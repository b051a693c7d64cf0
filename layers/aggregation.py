"""What becomes of chosen neighbors: weighted sums over them, and attention within them.

Neighbors are read row by row where they lie: the (B, M, K, C) tensor of all of them never exists,
forward or backward. Float32 tensors on a CPU go through the compiled kernels of `layers.native`
where there are any, all else through PyTorch in chunks.

Symbols: B batch, M queries, N keys, C channels, K neighbors, O output channels.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers import native
from layers.chunking import chunk_bytes, pieces

__all__ = ["aggregate_neighbors", "attend_neighbors"]

METRICS = ("cosine", "euclidean", "dot")


def _without_autocast(function: Callable) -> Callable:
    """Let an operator's own products run in the types it was given."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.autocast(device_type=args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def _match_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as torch does for a convolution under autocast (float64 stays)."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


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
        IndexError: for an index outside `x`, where the compiled kernels run.
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
    x, weight, bias = _match_autocast(x, weight, bias)
    return torch.ops.neighbors.aggregate(x, indices, weight, bias)


@torch.library.custom_op("neighbors::aggregate", mutates_args=())
@_without_autocast
def _aggregate(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    o = weight.shape[0]
    x, indices = x.contiguous(), indices.contiguous()
    y = x.new_empty(b, m, o)
    if m == 0:
        return y
    if native.usable(x, indices, weight, bias) and _fused_pays(c, o, K):
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        step = _step_of(indices)
        native.run(
            native.library().nn_aggregate, x, indices, step, weight, bias, y, b, m, n, c, o, K
        )
        return y
    matrix = weight.transpose(1, 2).reshape(o, K * c).T  # (K·C, O)
    flat = y.view(b * m, o)
    for r0, r1, rows, _ in _gathered(x, indices):
        if bias is None:
            torch.mm(rows, matrix, out=flat[r0:r1])
        else:
            torch.addmm(bias, rows, matrix, out=flat[r0:r1])
    return y


@_aggregate.register_fake
def _(x, indices, weight, bias):
    return x.new_empty(x.shape[0], indices.shape[-2], weight.shape[0])


def _fused_pays(c: int, o: int, K: int) -> bool:
    """Whether the register tiles beat a library's matrix product on gathered rows."""
    return K * c * o <= 9 * 256 * 256


def _gathered(x: Tensor, indices: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield r0, r1, rows (r1 - r0, K·C) and their numbers: the neighbors of queries r0 to r1.

    Queries count through all samples, and so do the numbers (r1 - r0)·K. The rows lie in one
    buffer, overwritten each time, which the caller may write to.
    """
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    table, indices = x.view(b * n, c), indices.expand(b, m, K)
    starts = torch.arange(0, b * n, n, device=x.device)[:, None, None]
    budget = chunk_bytes(x.device) // 2  # the rest of the cache: weights and results
    buffer = None
    for samples, part in pieces(b, m, budget // (K * c * x.element_size())):
        flat = (indices[samples, part] + starts[samples]).view(-1)
        if buffer is None:
            buffer = x.new_empty(len(flat), c)
        rows = torch.index_select(table, 0, flat, out=buffer[: len(flat)]).view(-1, K * c)
        r0 = samples.start * m + part.start
        yield r0, r0 + len(rows), rows, flat


@torch.library.custom_op("neighbors::aggregate_backward", mutates_args=())
@_without_autocast
def _aggregate_backward(
    gy: Tensor, x: Tensor, indices: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    o = weight.shape[0]
    gy, x, indices = gy.contiguous(), x.contiguous(), indices.contiguous()
    # Sums of many rows: in float32 at least.
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    gx = x.new_zeros((b, n, c) if need_x else 0, dtype=wide)
    if m == 0:
        return gx.to(x.dtype), torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    if native.usable(x, indices, weight, gy) and _fused_pays(c, o, K):
        lib, weight = native.library(), weight.contiguous()
        step = _step_of(indices)
        sizes = (b, m, n, c, o, K)
        gw = weight.new_empty((o, c, K) if need_weight else 0)
        if need_x:
            native.run(lib.nn_aggregate_grad_input, gy, indices, step, weight, gx, *sizes)
        if need_weight:
            native.run(lib.nn_aggregate_grad_weight, gy, x, indices, step, gw, *sizes)
        return gx, gw
    matrix = weight.transpose(1, 2).reshape(o, K * c)
    gw = weight.new_zeros((o, K * c) if need_weight else 0, dtype=wide)
    flat_gy, flat_gx = gy.view(b * m, o), gx.view(-1, c)
    for r0, r1, rows, flat in _gathered(x, indices):
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


@_aggregate_backward.register_fake
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


torch.library.register_autograd(
    "neighbors::aggregate", _aggregate_autograd, setup_context=_aggregate_setup
)


def attend_neighbors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    metric: str,
    self_score: float | None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Attend over the K chosen neighbors, then weigh them by channel.

    s[m, j] = similarity(k[m], q[indices[m, j]]), minus the squared distance for "euclidean";
    a = dropout(softmax_j(s)); y[m, c] = Σ_j weight[c, j] a[m, j] v[indices[m, j], c] + bias[c].
    Gradients reach q and k through these K scores only.

    Args:
        q: (B, N, C), the rows that are ranked.
        k: (B, M, C), the rows that rank.
        v: (B, N, C).
        indices: (B, M, K) or (M, K); the first is the row itself where `self_score` is given.
        weight: (C, K).
        bias: (C,).
        metric: "cosine", "euclidean" (squared) or "dot".
        self_score: fixed score of the first neighbor; None for its own.
        dropout_p: probability of dropping an attention weight.
        training: whether dropout acts.

    Returns:
        (B, M, C). Under autocast in its type; scores are computed in float32.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)} (got {metric!r})")
    if v.shape != q.shape or k.shape[::2] != q.shape[::2] or weight.shape[0] != q.shape[2]:
        raise ValueError(
            "q and v (B, N, C), k (B, M, C) and weight (C, K) do not fit: got "
            f"{tuple(q.shape)}, {tuple(v.shape)}, {tuple(k.shape)}, {tuple(weight.shape)}"
        )
    if q.shape[0] == 0:
        raise ValueError("the batch must hold at least one sample (got 0)")
    if indices.shape[-2:] != (k.shape[1], weight.shape[1]):
        raise ValueError(
            f"indices must end in (M, K) = {(k.shape[1], weight.shape[1])}, got "
            f"{tuple(indices.shape)}"
        )
    q, k, v, weight, bias = _match_autocast(q, k, v, weight, bias)
    out_dtype = v.dtype
    if out_dtype != torch.float64:  # half precision: softmax and sums in float32
        q, k, v, weight = q.float(), k.float(), v.float(), weight.float()
        bias = None if bias is None else bias.float()
    if metric == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    keep = None
    if training and dropout_p > 0:
        keep = F.dropout(q.new_ones(q.shape[0], *indices.shape[-2:]), dropout_p)
    y, _ = torch.ops.neighbors.attend(
        q,
        k,
        v,
        indices,
        weight,
        bias,
        metric == "euclidean",
        self_score is not None,
        0.0 if self_score is None else self_score,
        keep,
    )
    return y.to(out_dtype)


@torch.library.custom_op("neighbors::attend", mutates_args=())
@_without_autocast
def _attend(
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
    """Return y and the attention (B, M, K) before dropout."""
    q, k, v, indices = (t.contiguous() for t in (q, k, v, indices))
    b, n, c = q.shape
    m, K = indices.shape[-2:]
    y, attention = v.new_empty(b, m, c), v.new_empty(b, m, K)
    if m == 0:
        return y, attention
    if native.usable(q, k, v, indices, weight, bias, keep):
        bias = None if bias is None else bias.contiguous()
        keep = None if keep is None else keep.contiguous()
        native.run(
            native.library().nn_attend,
            *(q, k, v, indices, _step_of(indices), weight.T.contiguous(), bias, keep),
            *(int(euclidean), int(fixed), self_score, attention, y, b, m, n, c, K),
        )
        return y, attention
    flat_k, flat_y, flat_a = k.view(b * m, c), y.view(b * m, c), attention.view(b * m, K)
    flat_keep = None if keep is None else keep.reshape(b * m, K)
    for r0, r1, rows, others, _ in _attended(q, v, indices):
        mine = flat_k[r0:r1, None]
        s = -(mine - rows).square().sum(-1) if euclidean else (rows @ mine.mT)[..., 0]
        if fixed:
            s[:, 0] = self_score
        a = s.softmax(-1)
        flat_a[r0:r1] = a
        if flat_keep is not None:
            a = a * flat_keep[r0:r1]
        flat_y[r0:r1] = torch.einsum("rk,rkc,ck->rc", a, others, weight)
    return (y if bias is None else y.add_(bias)), attention


@_attend.register_fake
def _(q, k, v, indices, weight, bias, euclidean, fixed, self_score, keep):
    return torch.empty_like(k, memory_format=torch.contiguous_format), k.new_empty(
        k.shape[0], k.shape[1], indices.shape[-1]
    )


def _step_of(indices: Tensor) -> int:
    """How far apart the neighbors of two samples lie: 0 where all share them."""
    return 0 if indices.dim() == 2 else indices.shape[1] * indices.shape[2]


def _attended(q: Tensor, v: Tensor, indices: Tensor):
    """Yield r0, r1, the q and v rows (R, K, C) of these queries' neighbors, and their numbers."""
    c, K = q.shape[2], indices.shape[-1]
    table = v.view(-1, c)
    for r0, r1, rows, flat in _gathered(q, indices):
        yield r0, r1, rows.view(-1, K, c), table.index_select(0, flat).view(-1, K, c), flat


@torch.library.custom_op("neighbors::attend_backward", mutates_args=())
@_without_autocast
def _attend_backward(
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
    """Return the gradients of q, k, v and weight; scores and rows are computed again."""
    gy, q, k, v, indices = (t.contiguous() for t in (gy, q, k, v, indices))
    b, n, c = q.shape
    m, K = indices.shape[-2:]
    gq, gv = torch.zeros_like(q), torch.zeros_like(v)
    if m and native.usable(gy, q, k, v, indices, weight, keep):
        gk, gw = torch.empty_like(k), weight.new_empty(K, c)
        keep = None if keep is None else keep.contiguous()
        native.run(
            native.library().nn_attend_backward,
            *(gy, attention.contiguous(), q, k, v, indices, _step_of(indices)),
            *(weight.T.contiguous(), keep, int(euclidean), int(fixed)),
            *(gq, gk, gv, gw, b, m, n, c, K),
        )
        return gq, gk, gv, gw.T.contiguous()
    gk, gw = torch.zeros_like(k), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if m == 0:
        return gq, gk, gv, gw
    flat_gy, flat_k, flat_gk = gy.view(b * m, c), k.view(b * m, c), gk.view(b * m, c)
    flat_a = attention.reshape(b * m, K)
    flat_keep = torch.ones_like(flat_a) if keep is None else keep.reshape(b * m, K)
    flat_gq, flat_gv = gq.view(b * n, c), gv.view(b * n, c)
    by_tap = weight.T.contiguous()  # (K, C)
    for r0, r1, rows, others, flat in _attended(q, v, indices):
        g, a, kept = flat_gy[r0:r1, None], flat_a[r0:r1], flat_keep[r0:r1]
        weighted = g * by_tap  # (R, K, C)
        ga = (weighted * others).sum(-1) * kept
        share = (a * kept)[..., None]
        flat_gv.index_add_(0, flat, (weighted * share).view(-1, c))
        gw += torch.einsum("rc,rk,rkc->ck", g[:, 0], share[..., 0], others)
        gs = a * (ga - (a * ga).sum(-1, keepdim=True))
        if fixed:
            gs[:, 0] = 0
        gs = gs[..., None]
        mine = flat_k[r0:r1, None]
        if euclidean:
            pull = 2 * gs * (mine - rows)
            flat_gk[r0:r1] = -pull.sum(1)
        else:
            pull = gs * mine
            flat_gk[r0:r1] = (gs * rows).sum(1)
        flat_gq.index_add_(0, flat, pull.reshape(-1, c))
    return gq, gk, gv, gw


@_attend_backward.register_fake
def _(gy, attention, q, k, v, indices, weight, euclidean, fixed, keep):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, weight)
    )


def _attend_setup(ctx, inputs, output) -> None:
    q, k, v, indices, weight, _bias, euclidean, fixed, _self_score, keep = inputs
    ctx.save_for_backward(q, k, v, indices, weight, keep, output[1])
    ctx.set_materialize_grads(False)
    ctx.flags = (euclidean, fixed)


def _attend_autograd(ctx, gy: Tensor, _attention):
    q, k, v, indices, weight, keep, attention = ctx.saved_tensors
    if gy is None:
        return (None,) * 10
    gq, gk, gv, gw = torch.ops.neighbors.attend_backward(
        gy, attention, q, k, v, indices, weight, *ctx.flags, keep
    )
    gb = gy.sum((0, 1)) if ctx.needs_input_grad[5] else None
    return gq, gk, gv, None, gw, gb, None, None, None, None


torch.library.register_autograd("neighbors::attend", _attend_autograd, setup_context=_attend_setup)


@register_flop_formula(torch.ops.neighbors.aggregate)
def _aggregate_flops(x, indices, weight, *_, **__) -> int:
    o, c, K = weight
    return 2 * x[0] * indices[-2] * K * c * o


@register_flop_formula(torch.ops.neighbors.aggregate_backward)
def _aggregate_backward_flops(gy, x, indices, weight, need_x, need_weight, *_, **__) -> int:
    return (int(need_x) + int(need_weight)) * _aggregate_flops(x, indices, weight)


@register_flop_formula(torch.ops.neighbors.attend)
def _attend_flops(q, k, v, indices, *_, **__) -> int:
    return 4 * k[0] * k[1] * indices[-1] * k[2]


@register_flop_formula(torch.ops.neighbors.attend_backward)
def _attend_backward_flops(gy, attention, q, k, *_, **__) -> int:
    return 8 * k[0] * k[1] * attention[-1] * k[2]
