"""Neighbors found among several sets of keys, merged: parts of a file, ranks of a run.

Symbols: M queries, K neighbors.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["merge_neighbors", "merge_over_ranks"]


def merge_neighbors(values: Tensor, indices: Tensor, K: int, metric: str) -> tuple[Tensor, Tensor]:
    """Merge neighbors found among several sets of keys: (M, any) -> the best K, (M, K).

    Equal values are ordered by index. Places without a neighbor have index -1.
    """
    by_index = indices.argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    largest = metric != "euclidean"
    worst = -math.inf if largest else math.inf
    order = values.masked_fill(indices < 0, worst).argsort(dim=1, descending=largest, stable=True)
    return values.gather(1, order)[:, :K], indices.gather(1, order)[:, :K]


def merge_over_ranks(values: Tensor, indices: Tensor, K: int, metric: str) -> tuple[Tensor, Tensor]:
    """Merge the neighbors that every rank of a distributed run found among its own keys.

    All ranks pass the same queries and get the same answer.

    Args:
        values: (M, k) of this rank, k <= K.
        indices: (M, k), positions in the whole set of keys.
        K: Number of neighbors over all ranks.
        metric: Says whether small or large values are best.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values[:, :K], indices[:, :K]
    missing = K - values.shape[1]
    if missing > 0:  # all ranks must send equal shapes
        values = torch.cat([values, values.new_zeros(len(values), missing)], 1)
        indices = torch.cat([indices, indices.new_full((len(indices), missing), -1)], 1)
    parts = []
    for mine in (values.contiguous(), indices.contiguous()):
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine)
        parts.append(torch.cat(theirs, 1))
    return merge_neighbors(*parts, K, metric)
