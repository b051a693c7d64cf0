"""Votes: what centers, counted block by block, say about each query.

An accumulator sees the distances of some queries to one block of centers after the other, and
then tells the weighted sum of the centers' values. A block may be counted for some `rows` of the
queries only, if all that are asked for together have seen the same centers.

Symbols: B queries, N centers, V columns of values, K voters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.distance_kernels import DistanceKernel, power_
from layers.neighbors import topk_rows

__all__ = ["ConeVotes", "InterpVotes", "TopKVotes"]


class InterpVotes:
    """Running Σ d^p · v over blocks of centers.

    Unless the weights are known to fit the number format (`safe`), they are taken relative to the
    nearest center so far, (d / d_min)^p, and the sums are rescaled when a nearer one comes.
    """

    def __init__(self, kernel: DistanceKernel, queries: Tensor, columns: int, safe: bool) -> None:
        self.exponent, self.safe = kernel.exponent, safe
        self.sums = queries.new_zeros(queries.shape[0], columns)
        self.nearest = queries.new_full((queries.shape[0], 1), float("inf"))

    def update(self, distances: Tensor, columns: Tensor, offset: int, rows: slice) -> None:
        """Count a block of centers from number `offset` on, for some rows of the queries."""
        if self.safe:
            self.sums[rows].addmm_(power_(distances, self.exponent), columns)
            return
        nearest = torch.minimum(self.nearest[rows], distances.amin(dim=1, keepdim=True))
        self.sums[rows].mul_(power_(self.nearest[rows] / nearest, self.exponent))
        self.sums[rows].addmm_(power_(distances.div_(nearest), self.exponent), columns)
        self.nearest[rows] = nearest

    def result(self, columns: Tensor, first: int, last: int) -> Tensor:
        """Return the sums of rows first..last, (rows, V)."""
        return self.sums[first:last]


class ConeVotes:
    """The influence cone needs the minimum over all centers first: keeps every distance."""

    def __init__(self, kernel: DistanceKernel) -> None:
        self.kernel = kernel
        self.blocks: list[tuple[int, slice, Tensor]] = []

    def update(self, distances: Tensor, columns: Tensor, offset: int, rows: slice) -> None:
        """Count a block of centers from number `offset` on, for some rows of the queries."""
        self.blocks.append((offset, rows, distances.clone()))

    def weights(self, first: int, last: int) -> Tensor:
        """Return the weights of all centers that were counted for some rows."""
        blocks = [
            block[first - rows.start : last - rows.start]
            for _, rows, block in self.blocks
            if rows.start <= first and last <= rows.stop
        ]
        return self.kernel.weights(torch.cat(blocks, dim=1))

    def result(self, columns: Tensor, first: int, last: int) -> Tensor:
        """Return the weighted sums of rows first..last, (rows, V)."""
        start, weights = self.blocks[0][0], self.weights(first, last)
        return weights @ columns[start : start + weights.shape[1]]


class TopKVotes:
    """The K largest weights only; K = 1 is the nearest center. Exact ties: the older center."""

    def __init__(self, kernel: DistanceKernel, queries: Tensor, K: int) -> None:
        self.kernel, self.K = kernel, K
        self.distances = queries.new_full((queries.shape[0], K), float("inf"))  # inf: weight 0
        self.indices = torch.zeros(self.distances.shape, dtype=torch.int64, device=queries.device)

    def update(self, distances: Tensor, columns: Tensor, offset: int, rows: slice) -> None:
        """Count a block of centers from number `offset` on, for some rows of the queries."""
        if self.K == 1:
            best, where = distances.min(dim=1, keepdim=True)
        else:
            best, where = topk_rows(distances, min(self.K, distances.shape[1]), largest=False)
        best = torch.cat([self.distances[rows], best], dim=1)
        where = torch.cat([self.indices[rows], where + offset], dim=1)
        best, order = best.sort(dim=1, stable=True)
        self.distances[rows] = best[:, : self.K]
        self.indices[rows] = where.gather(1, order[:, : self.K])

    def result(self, columns: Tensor, first: int, last: int) -> Tensor:
        """Return the weighted sums of rows first..last, (rows, V)."""
        weights = self.kernel.weights(self.distances[first:last], relative=True)
        return torch.einsum("bk,bkv->bv", weights, columns[self.indices[first:last]])
