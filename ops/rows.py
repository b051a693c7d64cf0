"""Rows of every sample, named by their positions: taken, and added to.

Symbols: B batch, N rows of a sample, C numbers in a row.
"""

import torch
from torch import Tensor

__all__ = ["add_rows", "contiguous", "flat_index", "index_step", "take_rows"]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors, and None, as kernels read them."""
    return [None if t is None else t.contiguous() for t in tensors]


def index_step(index: Tensor | None, shared: int) -> int:
    """How far apart the indices of two samples lie: 0 where all share them, `shared` dimensions."""
    return 0 if index is None or index.dim() == shared else index[0].numel()


def flat_index(index: Tensor, n: int, first: int = 0) -> Tensor:
    """Positions (B, …) in samples of n rows as positions among all rows, one dimension.

    Args:
        index: Positions in each sample.
        n: Rows of a sample.
        first: The sample that comes first in `index`.
    """
    samples = torch.arange(first, first + len(index), device=index.device) * n
    return (index + samples.view(-1, *[1] * (index.dim() - 1))).reshape(-1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: (B, N, C) at positions (B, …) -> (B, …, C)."""
    b, n, c = x.shape
    rows = x.reshape(b * n, c).index_select(0, flat_index(index, n))
    return rows.view(*index.shape, c)


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values (B, …, C) to the rows of each sample of `out` (B, N, C) at positions (B, …)."""
    b, n, c = out.shape
    out.view(b * n, c).index_add_(0, flat_index(index, n), values.reshape(-1, c))
