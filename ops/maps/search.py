"""Exact nearest-neighbor search: the one place where neighbors are found.

Queries meet keys in matrix products of a bounded size, whose rows are reduced to their K best
before the next product is made: O(chunk · N) memory, never O(M · N).

Float32 tensors on a CPU go through compiled kernels where `ops.cpu` can build them, tensors on a
GPU through `ops.triton` where it can run; all else (float64, MPS, no compiler) through PyTorch,
with the same results. Every operation is a `torch.library` operator, so that compilation, export
and FLOP counting see it whole. What is done with neighbors is in `ops.maps.aggregate` and
`ops.maps.attend`, neighbors by location in `ops.maps.locations`, rows of ready-made scores in
`ops.topk`.

Many keys of many channels are first scored in 8 bits by the kernels (`ops/cpu/eightbit.h`), where
the processor has instructions for that: only keys which the error's bound cannot rule out are
scored in float32, in the order of operations of the float32 search, whose values and indices come
out bit for bit. Where too many are left, or numbers are not finite, the float32 search takes over.

Symbols: B batch, M queries, N keys, C channels, K neighbors.

Ties: of equal scores the lower index wins (with `candidates`, the one earlier among them). In
PyTorch on CUDA and MPS, where that would need another pass, equal scores may come in any order.
Scores that are equal in theory can differ in their last bits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import METRICS
from ops.autocast import without_autocast
from ops.budget import chunk_bytes, pieces
from ops.flops import flop_formula
from ops.rows import take_rows
from ops.topk import best_of_rows_torch, block_size

__all__ = ["nearest_neighbors"]


def nearest_neighbors(
    queries: Tensor | None,
    keys: Tensor,
    K: int,
    metric: str = "cosine",
    *,
    self_index: Tensor | None = None,
    exclude_self: bool = False,
    candidates: Tensor | None = None,
    max_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the K nearest keys of every query, exactly. No gradient flows.

    Scores are computed in float32 (float64 for float64 input), also under autocast. O(chunk · N)
    memory; time O(B · M · N · C).

    Args:
        queries: (B, M, C); None: the keys at `self_index`, which saves their copy.
        keys: (B, N, C).
        K: neighbors of each query, itself included if it comes first.
        metric: "cosine" similarity, squared "euclidean" distance or "dot" product.
        self_index: (M,) or (B, M), the position of each query among the keys: it comes first,
            followed by the K-1 best others.
        exclude_self: that position never appears; K others are returned.
        candidates: (N',) or (B, N') distinct positions: only these compete (self excepted).
        max_bytes: of scores held at a time by the PyTorch path; None as `ops.budget` has it.

    Returns:
        Values (B, M, K), best first (cosine and dot descend, squared distances ascend), and
        indices (B, M, K) into `keys`. Ties: see the module.

    Raises:
        ValueError: for mismatched shapes, an empty batch, another metric, K < 1, or K greater
            than the number of candidates.

    Example:
        >>> keys = torch.tensor([[[0.0], [1.0], [3.0]]])
        >>> nearest_neighbors(keys[:, :1], keys, 2, "euclidean")[1]
        tensor([[[0, 1]]])
    """
    _check(queries, keys, K, metric, self_index, exclude_self, candidates)
    return torch.ops.neighbors.search(
        None if queries is None else queries.detach(),
        keys.detach(),
        K,
        metric,
        self_index,
        exclude_self,
        candidates,
        max_bytes or 0,
    )


def _check(queries, keys, K, metric, self_index, exclude_self, candidates) -> None:
    """Refuse what `nearest_neighbors` cannot search."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)} (got {metric!r})")
    if keys.dim() != 3 or (queries is not None and queries.dim() != 3):
        shape = None if queries is None else tuple(queries.shape)
        raise ValueError(
            f"queries and keys must be (B, M, C) and (B, N, C), got {shape} and {tuple(keys.shape)}"
        )
    b, n, c = keys.shape
    if queries is None and self_index is None:
        raise ValueError("without queries, self_index says which keys they are (got None)")
    if queries is not None and (queries.shape[0] != b or queries.shape[2] != c):
        raise ValueError(
            "queries and keys must agree in batch and channels, got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if b == 0:
        raise ValueError("the batch must hold at least one sample (got 0)")
    if exclude_self and self_index is None:
        raise ValueError("exclude_self needs self_index, the positions to exclude (got None)")
    if K < 1:
        raise ValueError(f"K must be at least 1 (got {K})")
    competing = n if candidates is None else candidates.shape[-1]
    if self_index is None:
        available = competing
    elif exclude_self:
        available = competing - 1 if candidates is None else competing
    else:
        available = competing if candidates is None else competing + 1
    if available < K:
        raise ValueError(
            f"K={K} is larger than the number of candidates, {available}: there are no more "
            "neighbors to find"
        )


def prepare(
    queries: Tensor | None,
    keys: Tensor,
    K: int,
    self_index: Tensor | None,
    exclude_self: bool,
    candidates: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Bring the tensors of a search into the types it works in, contiguous and on one device."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    keys = keys.to(dtype).contiguous()
    if queries is not None:
        queries = queries.to(dtype).contiguous()
    return queries, keys, *prepare_indices(keys.device, K, self_index, exclude_self, candidates)


def prepare_indices(
    device: torch.device,
    K: int,
    self_index: Tensor | None,
    exclude_self: bool,
    candidates: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Bring self_index and candidates to the device of a search, int64 and contiguous."""
    if self_index is not None:
        self_index = self_index.to(device, torch.int64).contiguous()
    if candidates is not None:
        candidates = candidates.to(device, torch.int64).contiguous()
    if self_index is not None and candidates is not None:
        _check_candidates(self_index, candidates, K, exclude_self)
    return self_index, candidates


def _check_candidates(self_index: Tensor, candidates: Tensor, K: int, exclude_self: bool) -> None:
    """Refuse K where a query that is itself a candidate would be left with too few others."""
    others = K if exclude_self else K - 1
    count = candidates.shape[-1]
    if others < count:
        return
    own = self_index.expand(candidates.shape[:-1] + self_index.shape[-1:])
    own = own.reshape(-1, own.shape[-1])
    pool = candidates.expand(own.shape[0], count)
    if any(torch.isin(a, p).any() for a, p in zip(own, pool, strict=True)):
        raise ValueError(
            f"K={K} is larger than the number of candidates, "
            f"{count - 1 if exclude_self else count}, of a query that is one of them"
        )


@without_autocast
def search_torch(
    queries: Tensor | None,
    keys: Tensor,
    K: int,
    metric: str,
    self_index: Tensor | None,
    exclude_self: bool,
    candidates: Tensor | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Search in pieces: whole samples, or a part of one sample's queries."""
    queries, keys, self_index, candidates = prepare(
        queries, keys, K, self_index, exclude_self, candidates
    )
    b, n, c = keys.shape
    m = self_index.shape[-1] if queries is None else queries.shape[1]
    count = n if candidates is None else candidates.shape[-1]
    first = 1 if self_index is not None and not exclude_self else 0
    values = keys.new_empty(b, m, K)
    indices = keys.new_empty(b, m, K, dtype=torch.int64)
    if m == 0:
        return values, indices
    k = F.normalize(keys, dim=-1) if metric == "cosine" else keys
    own = own_keys = names = None
    if self_index is not None:
        own = self_index.expand(b, m)
        own_keys = take_rows(k, own) if queries is None or first else None
    if queries is None:
        q = own_keys
    else:
        q = F.normalize(queries, dim=-1) if metric == "cosine" else queries
    if first:
        indices[..., 0] = own
    if candidates is not None:
        names = candidates.expand(b, count)
        k = take_rows(k, names)
        own = None if own is None else places(own, names, n)
    half_square = k.square().sum(-1)[:, None] / -2 if metric == "euclidean" else None
    # Rows of scores are laid out with the length their top-K likes best; what is added is -inf.
    block = block_size(count, K - first + 1)
    width = -(-count // block) * block
    buffer = None
    row_bytes = width * keys.element_size()
    for samples, part in pieces(b, m, chunk_bytes(k.device, max_bytes, row_bytes) // row_bytes):
        rows = q[samples, part]
        if first:
            values[samples, part, 0] = _pair_scores(rows, own_keys[samples, part], metric)
        if first == K:
            continue
        if buffer is None:
            buffer = keys.new_full((*rows.shape[:2], width), -math.inf)
        table = buffer[: len(rows), : rows.shape[1]]
        _score(rows, k[samples], None if half_square is None else half_square[samples], table)
        if own is not None:
            _mask_own(table[..., :count], own[samples, part], candidates is not None)
        v, j = best_of_rows_torch(table.reshape(-1, width), K - first)
        v, j = v.view(*rows.shape[:2], -1), j.view(*rows.shape[:2], -1)
        if half_square is not None:
            v = (rows.square().sum(-1, keepdim=True) - 2 * v).clamp_(min=0)
        if names is not None:
            j = names[samples].gather(1, j.flatten(1)).view_as(j)
        values[samples, part, first:] = v
        indices[samples, part, first:] = j
    return values, indices


search_op = torch.library.custom_op("neighbors::search", search_torch, mutates_args=())


@search_op.register_fake
def _(queries, keys, K, metric, self_index, exclude_self, candidates, max_bytes):
    m = self_index.shape[-1] if queries is None else queries.shape[1]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    shape = (keys.shape[0], m, K)
    return keys.new_empty(shape, dtype=dtype), keys.new_empty(shape, dtype=torch.int64)


def places(own: Tensor, names: Tensor, n: int) -> Tensor:
    """Where each of n keys named by `own` (B, M) stands among the candidates; N' for nowhere."""
    count = names.shape[1]
    places = names.new_full((len(names), n), count)
    places.scatter_(1, names, torch.arange(count, device=names.device).expand_as(names))
    return places.gather(1, own)


def _score(rows: Tensor, keys: Tensor, half_square: Tensor | None, table: Tensor) -> None:
    """Write the scores of rows (B, M, C) and keys (B, N, C) into the first N columns of a table."""
    s = table[..., : keys.shape[1]]
    if half_square is not None:  # q·k - |k|²/2 ranks as the distance does
        torch.baddbmm(half_square, rows, keys.mT, out=s)
    elif len(rows) == 1:
        torch.mm(rows[0], keys[0].T, out=s[0])
    else:
        torch.bmm(rows, keys.mT, out=s)


def _mask_own(s: Tensor, own: Tensor, may_be_absent: bool) -> None:
    """Take each query itself, at column `own` if that exists, out of the scores (B, M, N)."""
    own = own[..., None]
    if may_be_absent:
        n = s.shape[-1]
        inside = own.clamp(max=n - 1)
        s.scatter_(2, inside, s.gather(2, inside).masked_fill_(own < n, -math.inf))
    else:
        s.scatter_(2, own, -math.inf)


def _pair_scores(a: Tensor, b: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return (a - b).square().sum(-1)
    return (a * b).sum(-1)


@flop_formula(torch.ops.neighbors.search)
def _search_flops(queries, keys, K, metric, self_index, exclude_self, candidates, *_, **__) -> int:
    b, n, c = keys
    m = self_index[-1] if queries is None else queries[1]
    return 2 * b * m * c * (n if candidates is None else candidates[-1])
