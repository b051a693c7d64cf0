"""Votes: what centers, counted block by block, say about each query.

An accumulator sees the distances of some queries to one block of centers after the other, and
then tells the weighted sum of the centers' values. A block may be counted for some `rows` of the
queries only, if all that are asked for together have seen the same centers.

Symbols: B queries, N centers, V columns of values, K voters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.centers.distances import DistanceKernel, power_
from ops.topk import topk_rows

__all__ = ["ConeSums", "ConeVotes", "InterpVotes", "TopKVotes"]


class InterpVotes:
    """Running Σ d^p · v over blocks of centers.

    Unless the weights are known to fit the number format (`safe`), they are taken relative to the
    nearest center so far, (d / d_min)^p, and the sums are rescaled when a nearer one comes.
    """

    def __init__(self, kernel: DistanceKernel, queries: Tensor, columns: int, safe: bool) -> None:
        self.exponent, self.safe = kernel.exponent, safe
        self.sums = queries.new_zeros(queries.shape[0], columns)
        self.nearest = queries.new_full((queries.shape[0], 1), float("inf"))

    @property
    def by_rows(self) -> tuple[Tensor, ...]:
        """What is known of each query, a row a query."""
        return (self.sums,) if self.safe else (self.sums, self.nearest)

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
    """Votes of the influence cone while centers are added: keeps every distance.

    How far a center reaches depends on the nearest one, which may come last.
    """

    by_rows = ()  # what is known of each query is too much to hand over

    def __init__(self, kernel: DistanceKernel, queries: Tensor) -> None:
        self.factor = kernel.factor
        self.nearest = queries.new_full((queries.shape[0], 1), float("inf"))
        self.blocks: list[tuple[int, slice, Tensor]] = []

    def update(self, distances: Tensor, columns: Tensor, offset: int, rows: slice) -> None:
        """Count a block of centers from number `offset` on, for some rows of the queries."""
        nearest = self.nearest[rows]
        torch.minimum(nearest, distances.amin(dim=1, keepdim=True), out=nearest)
        self.blocks.append((offset, rows, distances.clone()))

    def result(self, columns: Tensor, first: int, last: int) -> Tensor:
        """Return the weighted sums of rows first..last, (rows, V)."""
        reach = self.factor * self.nearest[first:last]
        sums = reach.new_zeros(last - first, columns.shape[1])
        for offset, rows, block in self.blocks:
            if rows.start <= first and last <= rows.stop:
                weights = reach - block[first - rows.start : last - rows.start]
                voters = columns[offset : offset + block.shape[1]]
                sums.addmm_(weights.clamp_(min=0), voters)
        return sums


class ConeSums:
    """Votes of the influence cone in two passes over a set of centers: the nearest, then the sums.

    Attributes:
        nearest: Distance to the nearest center so far, (B, 1); complete before `counting` is set.
        counting: Whether `update` counts votes, instead of looking for the nearest.
    """

    def __init__(self, kernel: DistanceKernel, queries: Tensor, columns: int) -> None:
        self.factor, self.counting = kernel.factor, False
        self.nearest = queries.new_full((queries.shape[0], 1), float("inf"))
        self.sums = queries.new_zeros(queries.shape[0], columns)

    def update(self, distances: Tensor, columns: Tensor, offset: int, rows: slice) -> None:
        """Look at a block of centers, for some rows of the queries."""
        nearest = self.nearest[rows]
        if not self.counting:
            torch.minimum(nearest, distances.amin(dim=1, keepdim=True), out=nearest)
            return
        weights = torch.sub(self.factor * nearest, distances, out=distances).clamp_(min=0)
        self.sums[rows].addmm_(weights, columns)


class TopKVotes:
    """The K largest weights only; K = 1 is the nearest center. Exact ties: the older center."""

    def __init__(self, kernel: DistanceKernel, queries: Tensor, K: int) -> None:
        self.kernel, self.K = kernel, K
        self.distances = queries.new_full((queries.shape[0], K), float("inf"))  # inf: weight 0
        self.indices = torch.zeros(self.distances.shape, dtype=torch.int64, device=queries.device)

    @property
    def by_rows(self) -> tuple[Tensor, ...]:
        """What is known of each query, a row a query."""
        return self.distances, self.indices

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
