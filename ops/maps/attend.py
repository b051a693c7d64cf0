"""Attention within the chosen neighbors of every query, then a weighted sum of them by channel.

Neighbors are read row by row where they lie, as in `ops.maps.aggregate`.

Symbols: B batch, M queries, N keys, C channels, K neighbors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import METRICS
from ops.autocast import match_autocast, without_autocast
from ops.flops import flop_formula
from ops.maps.aggregate import gathered_rows

__all__ = ["attend_neighbors"]


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
    with_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        with_attention: return the attention, too.

    Returns:
        y (B, M, C). Under autocast in its type; scores are computed in float32. And, if wanted,
        softmax_j(s) (B, M, K) before dropout; no gradient flows through it.
    """
    _check(q, k, v, indices, weight, metric)
    q, k, v, weight, bias = match_autocast(q, k, v, weight, bias)
    out_dtype = v.dtype
    if out_dtype != torch.float64:  # half precision: softmax and sums in float32
        q, k, v, weight = q.float(), k.float(), v.float(), weight.float()
        bias = None if bias is None else bias.float()
    if metric == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    keep = None
    if training and dropout_p > 0:
        keep = F.dropout(q.new_ones(q.shape[0], *indices.shape[-2:]), dropout_p)
    fixed, score = self_score is not None, self_score or 0.0
    y, attention = torch.ops.neighbors.attend(
        q, k, v, indices, weight, bias, metric == "euclidean", fixed, score, keep
    )
    y = y.to(out_dtype)
    return (y, attention.detach()) if with_attention else y


def _check(q, k, v, indices, weight, metric: str) -> None:
    """Refuse what `attend_neighbors` cannot attend over."""
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


@without_autocast
def attend_torch(
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


attend_op = torch.library.custom_op("neighbors::attend", attend_torch, mutates_args=())


@attend_op.register_fake
def _(q, k, v, indices, weight, bias, euclidean, fixed, self_score, keep):
    return torch.empty_like(k, memory_format=torch.contiguous_format), k.new_empty(
        k.shape[0], k.shape[1], indices.shape[-1]
    )


def _attended(q: Tensor, v: Tensor, indices: Tensor):
    """Yield r0, r1, the q and v rows (R, K, C) of these queries' neighbors, and their numbers."""
    c, K = q.shape[2], indices.shape[-1]
    table = v.view(-1, c)
    for r0, r1, rows, flat in gathered_rows(q, indices):
        yield r0, r1, rows.view(-1, K, c), table.index_select(0, flat).view(-1, K, c), flat


@without_autocast
def attend_backward_torch(
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


attend_backward_op = torch.library.custom_op(
    "neighbors::attend_backward", attend_backward_torch, mutates_args=()
)


@attend_backward_op.register_fake
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


attend_op.register_autograd(_attend_autograd, setup_context=_attend_setup)


@flop_formula(torch.ops.neighbors.attend)
def _attend_flops(q, k, v, indices, *_, **__) -> int:
    return 4 * k[0] * k[1] * indices[-1] * k[2]


@flop_formula(torch.ops.neighbors.attend_backward)
def _attend_backward_flops(gy, attention, q, k, *_, **__) -> int:
    return 8 * k[0] * k[1] * attention[-1] * k[2]
