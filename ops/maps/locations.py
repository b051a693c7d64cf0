"""Neighbors by location on a grid: the choice depends on shapes alone.

Symbols: N positions of the padded grid, M queries, K neighbors.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.topk import best_of_rows_torch

__all__ = ["location_neighbors"]


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
    stride: int | Sequence[int] = 1,
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
        stride: queries are every stride-th of them along each axis; a number for all, or for each.
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
    steps = list(stride) if isinstance(stride, Sequence) else [stride] * len(key_shape)
    out = torch.ops.neighbors.location(
        like, list(key_shape), K, metric, padding, steps, candidates is not None
    )
    return out if device is None else out.to(device)


@torch.library.custom_op(
    "neighbors::location",
    mutates_args=(),
    # In words: torch 2.6 does not know what `list[int]` means.
    schema="(Tensor like, SymInt[] key_shape, SymInt K, str metric, SymInt padding, "
    "SymInt[] stride, bool sampled) -> Tensor",
)
def _location(
    like: Tensor,
    key_shape: list[int],
    K: int,
    metric: str,
    padding: int,
    stride: list[int],
    sampled: bool,
) -> Tensor:
    if sampled:
        chosen = _locate(tuple(key_shape), K, metric, padding, stride, like.cpu().sort().values)
        return chosen.to(like.device)
    key = (*key_shape, K, metric, padding, *stride, like.device)
    cached = _LOCATIONS.get(key)
    if cached is None:
        cached = _locate(tuple(key_shape), K, metric, padding, stride, None).to(like.device)
        _LOCATIONS.put(key, cached)
    return cached.clone()  # an operator may not hand out what it keeps


@_location.register_fake
def _(like, key_shape, K, metric, padding, stride, sampled):
    m = 1
    for side, step in zip(key_shape, stride, strict=True):
        m = m * ((side - 2 * padding + step - 1) // step)
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
    stride: Sequence[int],
    candidates: Tensor | None,
) -> Tensor:
    coords, steps = _lattice(key_shape)
    n = len(coords)
    axes = [
        torch.arange(padding, side - padding, step)
        for side, step in zip(key_shape, stride, strict=True)
    ]
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
            best = best_of_rows_torch(s, K - 1, largest=False)[1]
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
