"""Neighbors among rows with more said about the pairs: bias, masks, dilation, heads.

What has to be added to scores pair by pair goes through PyTorch in chunks and the compiled top K of
rows; all else through `ops.maps.search`. The table of all pairs never exists, unless the caller
brings one as `bias`.

Symbols: B batch, M queries, N keys, C channels, K neighbors, D dilation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.autocast import match_autocast, without_autocast
from ops.budget import chunk_bytes, pieces
from ops.flops import flop_formula
from ops.maps.aggregate import gathered_rows
from ops.maps.search import nearest_neighbors
from ops.topk import topk_rows

__all__ = ["join_heads", "nearest_rows", "pair_scores", "split_heads", "weigh_neighbors"]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give every head a sample of its own: (B, N, h·C) -> (B·h, N, C)."""
    b, n, c = x.shape
    return x.view(b, n, num_heads, c // num_heads).transpose(1, 2).reshape(b * num_heads, n, -1)


def join_heads(x: Tensor, num_heads: int) -> Tensor:
    """Put the heads' channels side by side again: (B·h, N, C) -> (B, N, h·C)."""
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def nearest_rows(
    queries: Tensor,
    keys: Tensor,
    K: int,
    metric: str = "cosine",
    *,
    bias: Tensor | None = None,
    position: tuple[Tensor, Tensor] | None = None,
    key_counts: Tensor | None = None,
    dilation: int = 1,
    fill: bool = False,
    max_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the K nearest keys of every query, exactly; every D-th of the K·D nearest.

    No gradient flows. Beside the result and `bias` memory is a chunk of scores.

    Args:
        queries: (B, M, C).
        keys: (B, N, C).
        K: Neighbors of a query.
        metric: "cosine", "euclidean" (squared distance) or "dot".
        bias: (M, N) or (B, M, N), added to similarities, or to distances.
        position: Features (M, P) and (N, P) whose inner products are added to the similarity, or
            twice whose inner products are taken from the squared distance: a bias that is a
            product, without its table.
        key_counts: (B,) only the first so many keys of each sample compete: clouds of unequal size.
        dilation: D.
        fill: Where a sample has fewer than K·D keys, its nearest key stands in for those that are
            missing; otherwise such a sample is refused.
        max_bytes: Of scores held at a time; None as `ops.budget` has it.

    Returns:
        Values (B, M, K), best first, and indices (B, M, K). A distance with a bias may be negative.

    Raises:
        ValueError: for shapes that do not fit, and for K·D beyond the keys of a sample.
    """
    n, wanted = keys.shape[1], K * dilation
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1 (got {dilation}): every so-manieth is taken")
    fewest = n
    if key_counts is not None:
        if key_counts.shape != keys.shape[:1]:
            raise ValueError(
                f"key_counts must hold a number for each of {keys.shape[0]} samples, got shape "
                f"{tuple(key_counts.shape)}"
            )
        fewest, most = int(key_counts.min()), int(key_counts.max())
        if fewest < 1 or most > n:
            raise ValueError(
                f"key_counts must lie between 1 and the {n} keys there are (got {fewest} to {most})"
            )
    if wanted > (n if fill and key_counts is not None else fewest):
        of = (
            "" if dilation == 1 else f" with dilation {dilation} looks at {wanted} neighbors, which"
        )
        raise ValueError(
            f"K={K}{of} is larger than the number of candidates, {fewest}: there are no more "
            "neighbors to find. Try a smaller K or dilation, or fill for clouds of unequal size"
        )
    squares = None
    if position is not None:
        if metric == "euclidean":
            squares = queries.detach().square().sum(-1, keepdim=True)
        queries, keys, metric = _join_position(queries, keys, metric, position)
    if bias is None and key_counts is None:
        values, indices = nearest_neighbors(queries, keys, wanted, metric, max_bytes=max_bytes)
    elif bias is None and keys.device.type == "cpu":
        values, indices = _search_each(queries, keys, wanted, metric, key_counts, max_bytes)
    else:
        _check_bias(bias, queries, keys)
        values, indices = torch.ops.neighbors.search_pairs(
            queries.detach(),
            keys.detach(),
            wanted,
            metric,
            None if bias is None else bias.detach(),
            key_counts,
            max_bytes or 0,
        )
        if fewest < wanted:
            absent = torch.arange(wanted, device=keys.device) >= key_counts.view(-1, 1, 1)
            values = torch.where(absent, values[..., :1], values)
            indices = torch.where(absent, indices[..., :1], indices)
    if squares is not None:
        values = squares - 2 * values
    return values[..., ::dilation], indices[..., ::dilation]


def _search_each(
    queries: Tensor, keys: Tensor, K: int, metric: str, counts: Tensor, max_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Search sample by sample among the keys that are there; the nearest fills what is missing."""
    found = []
    for q, k, count in zip(queries, keys, counts.tolist(), strict=True):
        take = min(K, count)
        pair = nearest_neighbors(q[None], k[None, :count], take, metric, max_bytes=max_bytes)
        if take < K:
            pair = [torch.cat([t, t[..., :1].expand(-1, -1, K - take)], -1) for t in pair]
        found.append(pair)
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, indices


def _check_bias(bias: Tensor | None, queries: Tensor, keys: Tensor) -> None:
    shape = (queries.shape[1], keys.shape[1])
    if bias is not None and bias.shape not in (shape, (keys.shape[0], *shape)):
        raise ValueError(
            f"bias must be (M, N) = {shape}, or that for each of {keys.shape[0]} samples, got "
            f"{tuple(bias.shape)}"
        )


def _join_position(
    queries: Tensor, keys: Tensor, metric: str, position: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, str]:
    """Make features whose products are similarity plus bias: the search stays a plain one."""
    b, same = keys.shape[0], queries is keys
    if metric == "euclidean":  # q·k - |k|²/2 ranks as the distance does: one more channel
        keys = torch.cat([keys, keys.square().sum(-1, keepdim=True) / -2], -1)
        queries = F.pad(queries, (0, 1), value=1.0)
    elif metric == "cosine":
        keys = F.normalize(keys.detach(), dim=-1)
        queries = keys if same else F.normalize(queries.detach(), dim=-1)
    rows = (
        torch.cat([x, p.to(x.dtype).expand(b, *p.shape)], -1)
        for x, p in zip((queries, keys), position, strict=True)
    )
    return *rows, "dot"


@without_autocast
def search_pairs_torch(
    queries: Tensor,
    keys: Tensor,
    K: int,
    metric: str,
    bias: Tensor | None,
    key_counts: Tensor | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Search in pieces, with what is added to the scores of the pairs."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    q, k = queries.to(dtype), keys.to(dtype)
    if metric == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    (b, n), m = k.shape[:2], q.shape[1]
    values, indices = k.new_empty(b, m, K), k.new_empty(b, m, K, dtype=torch.int64)
    if m == 0:
        return values, indices
    euclidean = metric == "euclidean"
    square = k.square().sum(-1)[:, None] if euclidean else None  # (B, 1, N)
    absent = None
    if key_counts is not None:
        counts = key_counts.to(k.device).view(-1, 1, 1)
        absent = torch.arange(n, device=k.device) >= counts  # (B, 1, N)
    row_bytes = n * k.element_size()
    for samples, part in pieces(b, m, chunk_bytes(k.device, max_bytes, row_bytes) // row_bytes):
        rows = q[samples, part]
        if euclidean:
            scores = torch.baddbmm(square[samples], rows, k[samples].mT, alpha=-2)
            scores = scores.add_(rows.square().sum(-1, keepdim=True)).clamp_(min=0)
        else:
            scores = rows @ k[samples].mT
        if bias is not None:
            scores += bias[part] if bias.dim() == 2 else bias[samples, part]
        if absent is not None:
            scores.masked_fill_(absent[samples], math.inf if euclidean else -math.inf)
        values[samples, part], indices[samples, part] = topk_rows(scores, K, not euclidean)
    return values, indices


search_pairs_op = torch.library.custom_op(
    "neighbors::search_pairs", search_pairs_torch, mutates_args=()
)


@search_pairs_op.register_fake
def _(queries, keys, K, metric, bias, key_counts, max_bytes):
    shape = (*queries.shape[:2], K)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return keys.new_empty(shape, dtype=dtype), keys.new_empty(shape, dtype=torch.int64)


@flop_formula(torch.ops.neighbors.search_pairs)
def _search_pairs_flops(queries, keys, *_, **__) -> int:
    return 2 * queries[0] * queries[1] * keys[1] * keys[2]


# ---------------------------------------------------------------------------------------------
# Scores of chosen pairs, with gradients


def pair_scores(queries: Tensor, keys: Tensor, indices: Tensor, metric: str = "dot") -> Tensor:
    """Score every query with its K chosen keys, with gradients; no (B, M, K, C) tensor is kept.

    Args:
        queries: (B, M, C).
        keys: (B, N, C).
        indices: (B, M, K) or (M, K).
        metric: "dot", "cosine" or "euclidean" (squared).

    Returns:
        (B, M, K), in float32 at least.
    """
    if indices.shape[-2] != queries.shape[1] or queries.shape[::2] != keys.shape[::2]:
        raise ValueError(
            "queries (B, M, C), keys (B, N, C) and indices (B, M, K) do not fit: got "
            f"{tuple(queries.shape)}, {tuple(keys.shape)}, {tuple(indices.shape)}"
        )
    if keys.dtype != torch.float64:
        queries, keys = queries.float(), keys.float()
    if metric == "cosine":
        queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    indices = indices.expand(keys.shape[0], -1, -1)
    return torch.ops.neighbors.pair_scores(queries, keys, indices, metric == "euclidean")


@without_autocast
def pair_scores_torch(q: Tensor, k: Tensor, indices: Tensor, euclidean: bool) -> Tensor:
    """See `pair_scores`."""
    q, k, indices = q.contiguous(), k.contiguous(), indices.contiguous()
    (b, m, K), c = indices.shape, q.shape[2]
    out = q.new_empty(b * m, K)
    flat_q = q.view(b * m, c)
    for r0, r1, rows, _ in gathered_rows(k, indices):
        rows, mine = rows.view(-1, K, c), flat_q[r0:r1, :, None]
        if euclidean:
            out[r0:r1] = (rows - mine.mT).square_().sum(-1)
        else:
            out[r0:r1] = (rows @ mine)[..., 0]
    return out.view(b, m, K)


pair_scores_op = torch.library.custom_op(
    "neighbors::pair_scores", pair_scores_torch, mutates_args=()
)


@pair_scores_op.register_fake
def _(q, k, indices, euclidean):
    return q.new_empty(indices.shape)


@without_autocast
def pair_scores_backward_torch(
    g: Tensor, q: Tensor, k: Tensor, indices: Tensor, euclidean: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys."""
    g, q, k, indices = (t.contiguous() for t in (g, q, k, indices))
    (b, m, K), c = indices.shape, q.shape[2]
    gq, gk = torch.zeros_like(q), torch.zeros_like(k)
    flat_g, flat_q, flat_gq = g.view(b * m, K, 1), q.view(b * m, c), gq.view(b * m, c)
    for r0, r1, rows, flat in gathered_rows(k, indices):
        rows, mine = rows.view(-1, K, c), flat_q[r0:r1, None]
        part = flat_g[r0:r1]
        if euclidean:
            pull = (rows - mine).mul_(2 * part)
            flat_gq[r0:r1] = -pull.sum(1)
        else:
            flat_gq[r0:r1] = (part.mT @ rows)[:, 0]
            pull = part * mine
        gk.view(-1, c).index_add_(0, flat, pull.view(-1, c))
    return gq, gk


pair_scores_backward_op = torch.library.custom_op(
    "neighbors::pair_scores_backward", pair_scores_backward_torch, mutates_args=()
)


@pair_scores_backward_op.register_fake
def _(g, q, k, indices, euclidean):
    return torch.empty_like(q), torch.empty_like(k)


def _pair_scores_setup(ctx, inputs, output) -> None:
    q, k, indices, ctx.euclidean = inputs
    ctx.save_for_backward(q, k, indices)


def _pair_scores_autograd(ctx, g: Tensor):
    gq, gk = torch.ops.neighbors.pair_scores_backward(g, *ctx.saved_tensors, ctx.euclidean)
    return gq, gk, None, None


pair_scores_op.register_autograd(_pair_scores_autograd, setup_context=_pair_scores_setup)


@flop_formula(torch.ops.neighbors.pair_scores)
def _pair_scores_flops(q, k, indices, *_, **__) -> int:
    return 2 * math.prod(indices) * k[2]


@flop_formula(torch.ops.neighbors.pair_scores_backward)
def _pair_scores_backward_flops(g, q, k, indices, *_, **__) -> int:
    return 4 * math.prod(indices) * k[2]


# ---------------------------------------------------------------------------------------------
# Sums of neighbors that come with a weight of their own


def weigh_neighbors(x: Tensor, indices: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Scale every neighbor by a number of its own, then weigh all as a convolution does.

    y[b, m] = Σ_k scale[b, m, k] weight[:, :, k] x[b, indices[b, m, k]], or by channel
    y[b, m, c] = Σ_k scale[b, m, k] weight[c, k] x[b, indices[b, m, k], c].

    Args:
        x: (B, N, C).
        indices: (B, M, K) or (M, K).
        scale: (B, M, K), with gradients.
        weight: (O, C, K), or (C, K) by channel.

    Returns:
        (B, M, O). Under autocast in its type.
    """
    if weight.shape[-2:] != (x.shape[2], indices.shape[-1]) or scale.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "x (B, N, C), indices and scale (B, M, K) and weight (O, C, K) do not fit: got "
            f"{tuple(x.shape)}, {tuple(indices.shape)}, {tuple(scale.shape)}, "
            f"{tuple(weight.shape)}"
        )
    x, scale, weight = match_autocast(x, scale, weight)
    indices = indices.expand(x.shape[0], -1, -1)
    return torch.ops.neighbors.weigh(x, indices, scale.to(x.dtype), weight)


def _by_tap(weight: Tensor) -> Tensor:
    """Lay weights out as the gathered rows lie: (O, K·C), or (K, C) by channel."""
    if weight.dim() == 2:
        return weight.T.contiguous()
    return weight.transpose(1, 2).reshape(weight.shape[0], -1)


@without_autocast
def weigh_torch(x: Tensor, indices: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """See `weigh_neighbors`."""
    x, indices = x.contiguous(), indices.contiguous()
    (b, m, K), c = indices.shape, x.shape[2]
    y = x.new_empty(b * m, weight.shape[0])
    taps, flat_scale = _by_tap(weight), scale.reshape(b * m, K, 1)
    for r0, r1, rows, _ in gathered_rows(x, indices):
        scaled = rows.view(-1, K, c).mul_(flat_scale[r0:r1])
        if weight.dim() == 2:
            y[r0:r1] = scaled.mul_(taps).sum(1)
        else:
            torch.mm(scaled.view(-1, K * c), taps.T, out=y[r0:r1])
    return y.view(b, m, -1)


weigh_op = torch.library.custom_op("neighbors::weigh", weigh_torch, mutates_args=())


@weigh_op.register_fake
def _(x, indices, scale, weight):
    return x.new_empty(*indices.shape[:2], weight.shape[0])


@without_autocast
def weigh_backward_torch(
    gy: Tensor, x: Tensor, indices: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and weight."""
    gy, x, indices = gy.contiguous(), x.contiguous(), indices.contiguous()
    (b, m, K), c = indices.shape, x.shape[2]
    taps, flat_scale = _by_tap(weight), scale.reshape(b * m, K, 1)
    gx, gs, gt = torch.zeros_like(x), x.new_empty(b * m, K), torch.zeros_like(taps)
    flat_gy = gy.view(b * m, -1)
    for r0, r1, rows, flat in gathered_rows(x, indices):
        rows, g, s = rows.view(-1, K, c), flat_gy[r0:r1], flat_scale[r0:r1]
        if weight.dim() == 2:
            pulled = g[:, None] * taps  # (R, K, C)
            gt += torch.einsum("rc,rk,rkc->kc", g, s[..., 0], rows)
        else:
            pulled = (g @ taps).view(-1, K, c)
        gs[r0:r1] = (pulled * rows).sum(-1)
        gx.view(-1, c).index_add_(0, flat, pulled.mul_(s).view(-1, c))
        if weight.dim() == 3:
            gt.addmm_(g.T, rows.mul_(s).view(-1, K * c))
    gw = gt.T if weight.dim() == 2 else gt.view(-1, K, c).transpose(1, 2)
    return gx, gs.view(b, m, K), gw.contiguous()


weigh_backward_op = torch.library.custom_op(
    "neighbors::weigh_backward", weigh_backward_torch, mutates_args=()
)


@weigh_backward_op.register_fake
def _(gy, x, indices, scale, weight):
    return torch.empty_like(x), x.new_empty(indices.shape), torch.empty_like(weight)


def _weigh_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _weigh_autograd(ctx, gy: Tensor):
    gx, gs, gw = torch.ops.neighbors.weigh_backward(gy, *ctx.saved_tensors)
    return gx, None, gs, gw


weigh_op.register_autograd(_weigh_autograd, setup_context=_weigh_setup)


@flop_formula(torch.ops.neighbors.weigh)
def _weigh_flops(x, indices, scale, weight, *_, **__) -> int:
    return 2 * math.prod(indices[:2]) * math.prod(weight)


@flop_formula(torch.ops.neighbors.weigh_backward)
def _weigh_backward_flops(gy, x, indices, scale, weight, *_, **__) -> int:
    return 2 * _weigh_flops(x, indices, scale, weight)
