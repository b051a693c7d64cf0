"""Exact nearest-neighbor search and aggregation: the one place where neighbors are found.

Queries meet keys in matrix products of a bounded size, whose rows are reduced to their K best
before the next product is made: O(chunk · N) memory, never O(M · N). What is aggregated is read row
by row where it lies; the (B, M, K, C) tensor of all neighbors never exists, forward or backward.

Float32 tensors on a CPU go through compiled kernels where `layers.native` can build them; all else
(float64, half precision, CUDA, MPS, no compiler) through PyTorch, with the same results. Every
operation is a `torch.library` operator, so that compilation, export and FLOP counting see it whole.

Symbols: B batch, M queries, N keys, C channels, K neighbors, O output channels.

Ties: of equal scores the lower index wins (with `candidates`, the one earlier among them). On CUDA
and MPS, where that would need another pass, equal scores may come in any order. Scores that are
equal in theory can differ in their last bits.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers import native

__all__ = [
    "DEFAULT_MAX_BYTES",
    "METRICS",
    "aggregate_neighbors",
    "attend_neighbors",
    "location_neighbors",
    "nearest_neighbors",
    "topk_rows",
]

METRICS = ("cosine", "euclidean", "dot")
# Scores held at a time by the PyTorch path: what fits a CPU's shared cache, what fills a GPU.
DEFAULT_MAX_BYTES = {"cpu": 5 << 20, "cuda": 256 << 20, "mps": 64 << 20}


def _budget(device: torch.device, max_bytes: int | None) -> int:
    return max_bytes or DEFAULT_MAX_BYTES.get(device.type, 64 << 20)


# ------------------------------------------------------------------------------------ top-K rows


def topk_rows(scores: Tensor, K: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Return the K best entries of every row, best first; no gradient.

    Args:
        scores: (..., n), any floating type; rows may be strided.
        K: from 1 to n.
        largest: whether the largest are the best.

    Returns:
        Values (..., K) and indices (..., K). Ties: lower index first on a CPU (see the module).
        Every index is valid even among NaN, whose rank is not defined.

    Raises:
        ValueError: if K < 1 or K > n.
    """
    n = scores.shape[-1]
    if not 1 <= K <= n:
        raise ValueError(f"K must be from 1 to the length of a row: got K={K} for {n}")
    return torch.ops.neighbors.topk_rows(scores, K, largest)


@torch.library.custom_op("neighbors::topk_rows", mutates_args=())
def _topk_rows(scores: Tensor, K: int, largest: bool) -> tuple[Tensor, Tensor]:
    n = scores.shape[-1]
    rows = scores.reshape(-1, n)
    values, indices = _best_of_rows(rows, K, largest)
    return values.view(*scores.shape[:-1], K), indices.view(*scores.shape[:-1], K)


@_topk_rows.register_fake
def _(scores: Tensor, K: int, largest: bool) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:-1], K)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def _best_of_rows(rows: Tensor, K: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Top K of (R, n): values and indices (R, K), new tensors."""
    lib = native.library() if native.usable(rows) else None
    if lib is None:
        return _best_of_rows_torch(rows, K, largest)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, n = rows.shape
    values = rows.new_empty(count, K)
    indices = rows.new_empty(count, K, dtype=torch.int64)
    stride, sign = rows.stride(0), 1.0 if largest else -1.0
    if count:
        _call(lib.nn_topk, rows, count, n, stride, K, sign, values, indices)
    return values, indices


def _best_of_rows_torch(rows: Tensor, K: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    n = rows.shape[1]
    on_cpu = rows.device.type == "cpu"
    take = min(K + 1, n) if on_cpu else K  # one more shows whether the last place is shared
    block = _block_size(n, take) if on_cpu else 1
    if block > 1:
        values, indices = _two_stage_topk(rows, take, largest, block)
    else:
        values, indices = rows.topk(take, dim=1, largest=largest)
    if not on_cpu:
        return values, indices
    tied = values[:, 1:] == values[:, :-1]
    values, indices = values[:, :K], indices[:, :K]
    if tied.any():
        redo = (tied.any(1) & ~values.isnan().any(1)).nonzero()[:, 0]
        indices[redo] = _break_ties(rows[redo], values[redo, K - 1 :], K, largest)
        values[redo] = rows[redo].gather(1, indices[redo])
    return values, indices


def _block_size(n: int, K: int) -> int:
    """Length of the blocks of a row whose maxima are taken first; 1 where that does not pay.

    The maxima and the entries of the chosen blocks are equally many where block² = n / K.
    """
    block = max(8, 2 ** round(math.log2(math.sqrt(n / K))))
    return block if n >= max(600, 4 * K * block) else 1


def _two_stage_topk(rows: Tensor, K: int, largest: bool, block: int) -> tuple[Tensor, Tensor]:
    """Top K of long rows: K blocks by their best entry, then the entries of those blocks."""
    count, n = rows.shape
    blocks = n // block
    head = rows[:, : blocks * block].unflatten(1, (block, blocks))  # block j: columns j + i·blocks
    best = head.amax(1) if largest else head.amin(1)
    chosen = best.topk(K, dim=1, largest=largest, sorted=False).indices  # (R, K)
    steps = torch.arange(0, blocks * block, blocks, device=rows.device)
    columns = (chosen[:, :, None] + steps).flatten(1)
    if n > blocks * block:
        rest = torch.arange(blocks * block, n, device=rows.device).expand(count, -1)
        columns = torch.cat([columns, rest], 1)
    values, at = rows.gather(1, columns).topk(K, dim=1, largest=largest)
    return values, columns.gather(1, at)


def _break_ties(rows: Tensor, last: Tensor, K: int, largest: bool) -> Tensor:
    """Choose again, lower index first, given the K-th best value `last` (R, 1); indices (R, K)."""
    out = []
    for part, kth in zip(rows.split(4096), last.split(4096), strict=True):
        above = part > kth if largest else part < kth
        equal = part == kth
        room = K - above.sum(1, keepdim=True)
        keep = above | (equal & (equal.cumsum(1) <= room))
        found = keep.nonzero()[:, 1].view(-1, K)
        order = part.gather(1, found).sort(dim=1, descending=largest, stable=True).indices
        out.append(found.gather(1, order))
    return torch.cat(out)


def _call(function, *args) -> None:
    """Run a kernel on tensors (contiguous, kept alive here) and numbers, on torch's threads."""
    raw = [native.pointer(a) if isinstance(a, Tensor) else a for a in args]
    code = function(*raw, torch.get_num_threads())
    if code == 2:
        raise IndexError("a neighbor index is out of range")
    if code:
        raise MemoryError("a neighbor kernel ran out of memory")


# ---------------------------------------------------------------------------------------- search


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
        max_bytes: of scores held at a time by the PyTorch path; None for the device's default.

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


@torch.library.custom_op("neighbors::search", mutates_args=())
def _search(
    queries: Tensor | None,
    keys: Tensor,
    K: int,
    metric: str,
    self_index: Tensor | None,
    exclude_self: bool,
    candidates: Tensor | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(device_type=keys.device.type, enabled=False):
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        keys = keys.to(dtype).contiguous()
        b, n, _ = keys.shape
        if self_index is not None:
            self_index = self_index.to(keys.device, torch.int64).contiguous()
        if candidates is not None:
            candidates = candidates.to(keys.device, torch.int64).contiguous()
        if queries is not None:
            queries = queries.to(dtype).contiguous()
        m = self_index.shape[-1] if queries is None else queries.shape[1]
        if (self_index is not None) and candidates is not None:
            _check_candidates(self_index, candidates, K, exclude_self)
        args = (queries, keys, K, metric, self_index, exclude_self, candidates)
        if m == 0 or not native.usable(queries, keys):
            return _search_torch(*args, _budget(keys.device, max_bytes))
        return _search_native(*args)


@_search.register_fake
def _(queries, keys, K, metric, self_index, exclude_self, candidates, max_bytes):
    m = self_index.shape[-1] if queries is None else queries.shape[1]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    shape = (keys.shape[0], m, K)
    return keys.new_empty(shape, dtype=dtype), keys.new_empty(shape, dtype=torch.int64)


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


def _step(index: Tensor | None) -> int:
    """How far apart the rows of two samples lie: 0 where they share one."""
    return 0 if index is None or index.dim() == 1 else index.shape[-1]


def _search_native(queries, keys, K, metric, self_index, exclude_self, candidates):
    b, n, c = keys.shape
    m = self_index.shape[-1] if queries is None else queries.shape[1]
    values = keys.new_empty(b, m, K)
    indices = keys.new_empty(b, m, K, dtype=torch.int64)
    _call(
        native.library().nn_search,
        *(queries, keys, b, m, n, c, K, METRICS.index(metric)),
        *(self_index, _step(self_index), int(exclude_self)),
        *(candidates, _step(candidates), n if candidates is None else candidates.shape[-1]),
        *(values, indices),
    )
    return values, indices


def _search_torch(queries, keys, K, metric, self_index, exclude_self, candidates, max_bytes):
    """Search in groups of whole samples, or in chunks of one sample's queries."""
    b, n, c = keys.shape
    m = self_index.shape[-1] if queries is None else queries.shape[1]
    count = n if candidates is None else candidates.shape[-1]
    first = 1 if self_index is not None and not exclude_self else 0
    values = keys.new_empty(b, m, K)
    indices = keys.new_empty(b, m, K, dtype=torch.int64)
    if m == 0:
        return values, indices
    # Rows of scores are laid out with the length their top-K likes best; what is added is -inf.
    block = _block_size(count, K - first + 1)
    width = -(-count // block) * block
    row_bytes = width * keys.element_size()
    group = max(1, min(b, max_bytes // (m * row_bytes)))
    chunk = max(1, min(m, max_bytes // row_bytes))
    chunk = -(-m // -(-m // chunk))  # even pieces
    buffer = keys.new_full((group, chunk, width), -math.inf)
    for b0 in range(0, b, group):
        b1 = min(b, b0 + group)
        k = keys[b0:b1]
        if metric == "cosine":
            k = F.normalize(k, dim=-1)
        own = None
        if self_index is not None:
            own = self_index.expand(b, m)[b0:b1]
            own_keys = _rows(k, own) if queries is None or first else None
        q = own_keys if queries is None else queries[b0:b1]
        if metric == "cosine" and queries is not None:
            q = F.normalize(q, dim=-1)
        if first:
            values[b0:b1, :, 0] = _pair_scores(q, own_keys, metric)
            indices[b0:b1, :, 0] = own
        if first == K:
            continue
        names = None
        if candidates is not None:
            names = candidates.expand(b, count)[b0:b1]
            k = _rows(k, names)
            if own is not None:  # where each query stands among the candidates; count: nowhere
                places = names.new_full((b1 - b0, n), count)
                places.scatter_(1, names, torch.arange(count, device=k.device).expand_as(names))
                own = places.gather(1, own)
        half_square = k.square().sum(-1)[:, None] / -2 if metric == "euclidean" else None
        for m0 in range(0, m, chunk):
            m1 = min(m, m0 + chunk)
            table = buffer[: b1 - b0, : m1 - m0]
            s = table[..., :count]
            rows = q[:, m0:m1]
            if half_square is not None:  # q·k - |k|²/2 ranks as the distance does
                torch.baddbmm(half_square, rows, k.mT, out=s)
            elif len(s) == 1:
                torch.mm(rows[0], k[0].T, out=s[0])
            else:
                torch.bmm(rows, k.mT, out=s)
            if own is not None:
                _mask_own(s, own[:, m0:m1], candidates is not None)
            v, j = _best_of_rows(table.reshape(-1, width), K - first)
            v, j = v.view(b1 - b0, m1 - m0, -1), j.view(b1 - b0, m1 - m0, -1)
            if half_square is not None:
                v = (rows.square().sum(-1, keepdim=True) - 2 * v).clamp_(min=0)
            if names is not None:
                j = names.gather(1, j.flatten(1)).view_as(j)
            values[b0:b1, m0:m1, first:] = v
            indices[b0:b1, m0:m1, first:] = j
    return values, indices


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


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: (B, N, C), (B, M) -> (B, M, C)."""
    b, n, c = x.shape
    flat = index + torch.arange(b, device=x.device)[:, None] * n
    return x.reshape(b * n, c).index_select(0, flat.reshape(-1)).view(b, -1, c)


# -------------------------------------------------------------------------- neighbors by location


class _BoundedCache:
    """Tensors by key; the least recently used go once their total size passes a bound."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.items: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, key: tuple) -> Tensor | None:
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: tuple, tensor: Tensor) -> None:
        self.items[key] = tensor
        while len(self.items) > 1 and self.nbytes() > self.max_bytes:
            self.items.popitem(last=False)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.items.values())


_LOCATIONS = _BoundedCache(64 << 20)


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
    """Find the neighbors of positions of a grid by their coordinates, -1 to 1 along each axis.

    The indices depend on the shape alone; without candidates they are kept in a bounded cache.
    Equal distances are recognised exactly ("euclidean") or to 1e-12 ("cosine").

    Args:
        key_shape: (L,) or (H, W) of the padded grid.
        K: neighbors of each query; the query itself is always one.
        metric: "euclidean" or "cosine".
        padding: width of the border; queries are the positions inside it.
        stride: queries are every stride-th of them along each axis.
        candidates: (N',) positions: only these compete (self excepted).
        device: of the result.

    Returns:
        Indices (M, K). Ties are broken by lower index; each row is then in ascending order.

    Raises:
        ValueError: for another metric, K < 1, or K greater than the number of candidates.
    """
    key_shape = tuple(key_shape)
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be cosine or euclidean (got {metric!r})")
    competing = math.prod(key_shape) if candidates is None else candidates.numel() + 1
    if K < 1:
        raise ValueError(f"K must be at least 1 (got {K})")
    if competing < K:
        raise ValueError(
            f"K={K} is larger than the number of candidates, {competing}: there are no more "
            "neighbors to find"
        )
    like = torch.empty(0, device=device) if candidates is None else candidates
    out = torch.ops.neighbors.location(
        like, list(key_shape), K, metric, padding, stride, candidates is not None
    )
    return out if device is None else out.to(device)


@torch.library.custom_op("neighbors::location", mutates_args=())
def _location(
    like: Tensor,
    key_shape: list[int],
    K: int,
    metric: str,
    padding: int,
    stride: int,
    sampled: bool,
) -> Tensor:
    if sampled:
        chosen = _locate(tuple(key_shape), K, metric, padding, stride, like.cpu().sort().values)
        return chosen.to(like.device)
    key = (*key_shape, K, metric, padding, stride, like.device)
    cached = _LOCATIONS.get(key)
    if cached is None:
        cached = _locate(tuple(key_shape), K, metric, padding, stride, None).to(like.device)
        _LOCATIONS.put(key, cached)
    return cached.clone()  # an operator may not hand out what it keeps


@_location.register_fake
def _(like, key_shape, K, metric, padding, stride, sampled):
    m = 1
    for side in key_shape:
        m = m * ((side - 2 * padding + stride - 1) // stride)
    return like.new_empty((m, K), dtype=torch.int64)


def _lattice(key_shape: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """Coordinates of a grid times a common factor, whole numbers: (N, axes), the axes' steps."""
    spans = [max(1, side - 1) for side in key_shape]
    scales = [math.prod(spans) // span for span in spans]
    axes = []
    for side, scale in zip(key_shape, scales, strict=True):
        steps = 2 * torch.arange(side) - (side - 1) if side > 1 else torch.tensor([-1])
        axes.append(steps.double() * scale)
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return coords, [2 * scale for scale in scales]


def _locate(
    key_shape: tuple[int, ...],
    K: int,
    metric: str,
    padding: int,
    stride: int,
    candidates: Tensor | None,
) -> Tensor:
    coords, steps = _lattice(key_shape)
    n = len(coords)
    axes = [torch.arange(padding, side - padding, stride) for side in key_shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (M, axes)
    own = places[:, 0]
    for d in range(1, len(key_shape)):
        own = own * key_shape[d] + places[:, d]
    window = None
    if metric == "euclidean" and candidates is None:
        window = _window(key_shape, K, steps)
        if math.prod(len(offsets) for offsets in window) >= n:
            window = None
    if metric == "cosine":
        coords = F.normalize(coords, dim=-1)
    pool = coords if candidates is None else coords[candidates]
    width = len(pool) if window is None else math.prod(len(offsets) for offsets in window)
    out = []
    for rows in torch.arange(len(own)).split(max(1, (4 << 20) // (8 * width))):
        mine = own[rows, None]
        if window is not None:
            names, inside = _around(places[rows], window, key_shape)
            s = (coords[mine] - coords[names]).square().sum(-1).masked_fill_(~inside, math.inf)
        else:
            names = torch.arange(n) if candidates is None else candidates
            names = names.expand(len(rows), -1)
            if metric == "cosine":
                s = ((1 - coords[own[rows]] @ pool.T) * 1e12).round_()
            else:
                s = sum(
                    (coords[own[rows], d, None] - pool[:, d]).square_()
                    for d in range(len(key_shape))
                )
        s = s.masked_fill_(names == mine, math.inf)
        if K > 1:
            best = _best_of_rows_torch(s, K - 1, largest=False)[1]
            mine = torch.cat([mine, names.gather(1, best)], 1)
        out.append(mine.sort(dim=1).values)
    return torch.cat(out)


def _window(key_shape: tuple[int, ...], K: int, steps: list[int]) -> list[Tensor]:
    """Offsets along each axis among which the K nearest positions of any position lie.

    A corner has the fewest positions near it: if K of them lie within some radius of a corner,
    every position has K within that radius.
    """
    axes = [
        (torch.arange(side).double() * step) for side, step in zip(key_shape, steps, strict=True)
    ]
    squares = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).square().sum(-1).flatten()
    radius = squares.kthvalue(K).values
    reach = [int((axis.square() <= radius).sum()) - 1 for axis in axes]
    return [torch.arange(-r, r + 1) for r in reach]


def _around(
    places: Tensor, window: list[Tensor], key_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Positions around each place, ascending, and whether they exist: (M, width) each."""
    names = torch.zeros(len(places), 1, dtype=torch.int64)
    inside = torch.ones(len(places), 1, dtype=torch.bool)
    for d, side in enumerate(key_shape):
        at = places[:, d, None] + window[d]
        fits = (at >= 0) & (at < side)
        names = (names[:, :, None] * side + at.clamp(0, side - 1)[:, None]).flatten(1)
        inside = (inside[:, :, None] & fits[:, None]).flatten(1)
    return names, inside


# ----------------------------------------------------------------------------------- aggregation


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
        _call(native.library().nn_aggregate, x, indices, step, weight, bias, y, b, m, n, c, o, K)
        return y
    matrix = weight.transpose(1, 2).reshape(o, K * c).T  # (K·C, O)
    flat = y.view(b * m, o)
    for r0, r1, rows in _gathered(x, indices):
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


def _gathered(x: Tensor, indices: Tensor, with_index: bool = False):
    """Yield the neighbors of a chunk of queries at a time: r0, r1, rows (r1 - r0, K·C) and more.

    Queries count through all samples; the rows lie in one buffer, overwritten each time.
    """
    b, n, c = x.shape
    m, K = indices.shape[-2:]
    table = x.view(b * n, c)
    step = max(1, min(b * m, _budget(x.device, None) // (K * c * x.element_size())))
    buffer = x.new_empty(step * K, c)
    offsets = torch.arange(b, device=x.device) * n
    for r0 in range(0, b * m, step):
        r1 = min(b * m, r0 + step)
        sample = torch.arange(r0, r1, device=x.device)
        query = sample % m
        sample = sample.div_(m, rounding_mode="floor")
        taps = indices[query] if indices.dim() == 2 else indices.view(b * m, K)[r0:r1]
        flat = (taps + offsets[sample][:, None]).view(-1)
        rows = torch.index_select(table, 0, flat, out=buffer[: (r1 - r0) * K]).view(r1 - r0, K * c)
        yield (r0, r1, rows, flat) if with_index else (r0, r1, rows)


@torch.library.custom_op("neighbors::aggregate_backward", mutates_args=())
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
            _call(lib.nn_aggregate_grad_input, gy, indices, step, weight, gx, *sizes)
        if need_weight:
            _call(lib.nn_aggregate_grad_weight, gy, x, indices, step, gw, *sizes)
        return gx, gw
    matrix = weight.transpose(1, 2).reshape(o, K * c)
    gw = weight.new_zeros((o, K * c) if need_weight else 0, dtype=wide)
    flat_gy, flat_gx = gy.view(b * m, o), gx.view(-1, c)
    spare = None
    for r0, r1, rows, flat in _gathered(x, indices, with_index=True):
        if need_weight:
            if gw.dtype == x.dtype:
                gw.addmm_(flat_gy[r0:r1].T, rows)
            else:
                gw += flat_gy[r0:r1].T @ rows
        if need_x:
            spare = rows.new_empty(rows.shape) if spare is None else spare
            g = torch.mm(flat_gy[r0:r1], matrix, out=spare[: r1 - r0])
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


# ------------------------------------------------------------------------------------- attention


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
        _call(
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
    for r0, r1, rows, flat in _gathered(q, indices, with_index=True):
        yield r0, r1, rows.view(-1, K, c), table.index_select(0, flat).view(-1, K, c), flat


@torch.library.custom_op("neighbors::attend_backward", mutates_args=())
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
        _call(
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


# ---------------------------------------------------------------------------------- FLOP counting


@register_flop_formula(torch.ops.neighbors.search)
def _search_flops(queries, keys, K, metric, self_index, exclude_self, candidates, *_, **__) -> int:
    b, n, c = keys
    m = self_index[-1] if queries is None else queries[1]
    return 2 * b * m * c * (n if candidates is None else candidates[-1])


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
