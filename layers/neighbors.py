"""Exact nearest-neighbor search and aggregation, the one place where neighbors are found.

Symbols: B batch, M queries, N keys, C channels, K neighbors, O output channels.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DEFAULT_MAX_BYTES",
    "aggregate_neighbors",
    "attend_neighbors",
    "location_neighbors",
    "nearest_neighbors",
    "topk_rows",
]

DEFAULT_MAX_BYTES = 1 << 23
METRICS = ("cosine", "euclidean", "dot")


def topk_rows(scores: Tensor, K: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Return the K best entries of every row, best first."""
    return scores.topk(K, dim=-1, largest=largest, sorted=True)


def _check_search(queries: Tensor, keys: Tensor, K: int, metric: str, available: int) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)} (got {metric!r})")
    if queries.dim() != 3 or keys.dim() != 3:
        raise ValueError(
            "queries and keys must be (B, M, C) and (B, N, C), got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if queries.shape[0] != keys.shape[0] or queries.shape[2] != keys.shape[2]:
        raise ValueError(
            "queries and keys must agree in batch and channels, got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if queries.shape[0] == 0:
        raise ValueError("the batch must hold at least one sample (got 0)")
    if K < 1:
        raise ValueError(f"K must be at least 1 (got {K})")
    if available < K:
        raise ValueError(f"K must be at most the number of candidates: got K={K} for {available}")


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    K: int,
    metric: str = "cosine",
    *,
    self_index: Tensor | None = None,
    exclude_self: bool = False,
    candidates: Tensor | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> tuple[Tensor, Tensor]:
    """Find the K nearest keys of every query, exactly."""
    b, m, c = queries.shape
    n = keys.shape[1] if candidates is None else candidates.shape[-1]
    has_self = self_index is not None
    extra = 0 if not has_self else (-1 if exclude_self else 0)
    if has_self and candidates is not None:
        extra = -1 if exclude_self else 1
        if not exclude_self and K > n:
            extra = 1
    _check_search(queries, keys, K, metric, n + extra if candidates is not None else n + extra)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=queries.device.type, enabled=False):
        q, k = queries.to(dtype), keys.to(dtype)
        if metric == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        self_rows = None
        if has_self:
            self_index = self_index.to(q.device).expand(b, m)
            self_rows = k.gather(1, self_index[..., None].expand(b, m, c))
        if candidates is not None:
            candidates = candidates.to(q.device).expand(b, n)
            k = k.gather(1, candidates[..., None].expand(b, n, c))
        k_sq = k.square().sum(-1)[:, None] if metric == "euclidean" else None
        take = K - 1 if has_self and not exclude_self else K
        rows = max(1, min(m, max_bytes // max(1, n * q.element_size())))
        values, indices = [], []
        for i in range(b):
            for start in range(0, m, rows):
                stop = min(m, start + rows)
                s = q[i, start:stop] @ k[i].T
                if metric == "euclidean":
                    q_sq = q[i, start:stop].square().sum(-1, keepdim=True)
                    s = (q_sq + k_sq[i] - 2 * s).clamp_(min=0).neg_()
                if has_self:
                    own = self_index[i, start:stop, None]
                    if candidates is None:
                        s.scatter_(1, own, -math.inf)
                    else:
                        s.masked_fill_(candidates[i][None] == own, -math.inf)
                v, j = topk_rows(s, take)
                if candidates is not None:
                    j = candidates[i][j]
                if has_self and not exclude_self:
                    qs, ks = q[i, start:stop], self_rows[i, start:stop]
                    if metric == "euclidean":
                        own_v = -(qs - ks).square().sum(-1, keepdim=True)
                    else:
                        own_v = (qs * ks).sum(-1, keepdim=True)
                    v, j = torch.cat([own_v, v], 1), torch.cat([own, j], 1)
                values.append(-v if metric == "euclidean" else v)
                indices.append(j)
    return torch.cat(values).view(b, m, K), torch.cat(indices).view(b, m, K)


_LOCATION_CACHE: OrderedDict = OrderedDict()


@torch.no_grad()
def location_neighbors(
    key_shape: tuple[int, ...],
    K: int,
    metric: str,
    *,
    padding: int = 0,
    stride: int = 1,
    candidates: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find neighbors by coordinates on a padded grid; indices (M, K), ascending in each row."""
    key_shape = tuple(key_shape)
    n = math.prod(key_shape)
    pool = n if candidates is None else candidates.numel() + 1
    if K < 1 or pool < K:
        raise ValueError(f"K must be between 1 and the number of candidates: got K={K} for {pool}")
    grid = torch.arange(n).view(key_shape)
    axes = [torch.linspace(-1, 1, side, dtype=torch.float64) for side in key_shape]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(n, -1)
    inner = grid
    for d, side in enumerate(key_shape):
        inner = inner.narrow(d, padding, side - 2 * padding)
    inner = inner[tuple(slice(None, None, stride) for _ in key_shape)].reshape(-1)
    if metric == "cosine":
        coords = F.normalize(coords, dim=-1)
    out = []
    for own in inner.split(max(1, DEFAULT_MAX_BYTES // (8 * n))):
        if metric == "cosine":
            s = 1 - coords[own] @ coords.T
        else:
            s = (coords[own, None] - coords[None]).square().sum(-1)
        s = (s * 1e10).round_()
        if candidates is not None:
            keep = torch.ones(n, dtype=torch.bool)
            keep[candidates.cpu()] = False
            s.masked_fill_(keep, math.inf)
        s.scatter_(1, own[:, None], -math.inf)
        out.append(s.sort(dim=1, stable=True).indices[:, :K].sort(dim=1).values)
    return torch.cat(out).to(device)


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    flat = indices.expand(b, m, K).reshape(b, m * K, 1).expand(b, m * K, c)
    return x.gather(1, flat).view(b, m, K, c)


def aggregate_neighbors(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Weigh the K neighbors of every position: (B, N, C), (B, M, K), (O, C, K) -> (B, M, O)."""
    gathered = _gather(x, indices)  # (B, M, K, C)
    return F.linear(gathered.flatten(2), weight.transpose(1, 2).flatten(1), bias)


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
    """Attend over the K chosen neighbors: q, v (B, N, C), k (B, M, C) -> (B, M, C)."""
    rows = _gather(q, indices)  # (B, M, K, C)
    if metric == "euclidean":
        scores = -(k[:, :, None] - rows).square().sum(-1)
    elif metric == "cosine":
        scores = (F.normalize(k, dim=-1)[:, :, None] * F.normalize(rows, dim=-1)).sum(-1)
    else:
        scores = (k[:, :, None] * rows).sum(-1)
    if self_score is not None:
        scores = torch.cat([torch.full_like(scores[..., :1], self_score), scores[..., 1:]], -1)
    attn = F.dropout(scores.softmax(-1), dropout_p, training)
    y = torch.einsum("bmk,bmkc,ck->bmc", attn, _gather(v, indices), weight)
    return y if bias is None else y + bias
