"""The K best of every row: compiled, or by PyTorch in one or two stages, with the same answers.

Ties: of equal values the one with the lower index wins. On CUDA and MPS, where that would need
another pass, equal values may come in any order. Symbols: R rows, n their length, K results.
"""

import math

import torch
from torch import Tensor

__all__ = ["best_of_rows_torch", "block_size", "topk_rows", "two_stage_topk"]


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


def topk_rows_torch(scores: Tensor, K: int, largest: bool) -> tuple[Tensor, Tensor]:
    """See `topk_rows`."""
    values, indices = best_of_rows_torch(scores.reshape(-1, scores.shape[-1]), K, largest)
    shape = (*scores.shape[:-1], K)
    return values.contiguous().view(shape), indices.contiguous().view(shape)


topk_rows_op = torch.library.custom_op("neighbors::topk_rows", topk_rows_torch, mutates_args=())


@topk_rows_op.register_fake
def _(scores: Tensor, K: int, largest: bool) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:-1], K)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def best_of_rows_torch(rows: Tensor, K: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Top K of (R, n), new tensors: one or two stages of `torch.topk`, then ties in order."""
    n = rows.shape[1]
    on_cpu = rows.device.type == "cpu"
    take = min(K + 1, n) if on_cpu else K  # one more shows whether the last place is shared
    block = block_size(n, take) if on_cpu else 1
    if block > 1:
        values, indices = two_stage_topk(rows, take, largest, block)
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


def block_size(n: int, K: int) -> int:
    """Length of the blocks of a row whose maxima are taken first; 1 where that does not pay.

    The maxima and the entries of the chosen blocks are equally many where block² = n / K.
    """
    block = max(8, 2 ** round(math.log2(math.sqrt(n / K))))
    return block if n >= max(2000, 4 * K * block) else 1


def two_stage_topk(rows: Tensor, K: int, largest: bool, block: int) -> tuple[Tensor, Tensor]:
    """Top K of long rows (R, n): K blocks by their best entry, then the entries of those blocks.

    A row has at least K blocks of `block` entries. Ties come in any order.
    """
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
