"""Pruning: drop the centers that no prediction on the training samples needs.

Centers are tried one after the other, oldest first. One is dropped if every training sample keeps
its predicted class without it (regression: if none leaves its tolerance). The sums behind all
predictions are kept in float64, each sample's nearest center apart from the rest: a sample that is
a center itself has a weight that would swallow all others.

Symbols: B training samples, N centers, V columns of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.dynamic import DynamicNeighbors

__all__ = ["prune_centers"]

_CHUNK_ELEMENTS = 1 << 25  # B × centers whose weights are held at a time


class _Sums:
    """Sums of weighted values for all samples, with the nearest center of each kept apart."""

    def __init__(self, layer: DynamicNeighbors, x: Tensor) -> None:
        self.layer = layer
        self.queries, self.norms = layer.kernel.prepare_queries(x)
        self.columns = layer._columns[: layer.num_centers].double()
        rows, total = x.shape[0], layer.num_centers
        self.chunk = max(1, _CHUNK_ELEMENTS // max(rows, 1))
        best = x.new_full((rows, 2), float("inf"))
        self.top = torch.zeros(rows, dtype=torch.int64, device=x.device)
        for first in range(0, total, self.chunk):
            distances = self.distances(first)
            count = min(2, distances.shape[1])
            near, where = distances.topk(count, dim=1, largest=False)
            nearer = near[:, 0] < best[:, 0]
            self.top[nearer] = where[nearer, 0] + first
            best = torch.cat([best, near], dim=1).topk(2, dim=1, largest=False).values
        # the scale of the rest is its nearest center; alone, there is no rest
        self.scale = torch.where(best[:, 1].isfinite(), best[:, 1], best[:, 0]).double()
        self.rest = x.new_zeros(rows, self.columns.shape[1], dtype=torch.float64)
        self.top_weight = self.weight(best[:, :1].double())[:, 0]
        for first in range(0, total, self.chunk):
            weights = self.weights(first)
            self.rest += weights @ self.columns[first : first + self.chunk]
        self.full = self.rest + self.top_weight[:, None] * self.columns[self.top]

    def distances(self, first: int) -> Tensor:
        layer, last = self.layer, min(first + self.chunk, self.layer.num_centers)
        keys = layer._arranged if layer._arranged.shape[0] else layer._centers
        return layer.kernel.distances(
            keys[first:last], layer._norms[first:last], self.queries, self.norms
        )

    def weight(self, distances: Tensor) -> Tensor:
        return (distances / self.scale[:, None]).pow(self.layer.kernel.exponent)

    def weights(self, first: int) -> Tensor:
        """Weights of a chunk of centers, 0 for each sample's nearest: (B, chunk) float64."""
        weights = self.weight(self.distances(first).double())
        inside = (self.top >= first) & (self.top < first + weights.shape[1])
        rows = inside.nonzero().flatten()
        weights[rows, self.top[rows] - first] = 0
        return weights


def _lost(before: Tensor, after: Tensor) -> Tensor:
    """Where a sum has lost too many digits to be trusted."""
    return after.abs() < 1e-9 * before.abs()


@torch.no_grad()
def prune_centers(layer: DynamicNeighbors, x: Tensor, y: Tensor) -> Tensor:
    """Tell which centers are needed.

    Args:
        layer: A grown layer with predictor ``interp`` and an inverse kernel.
        x: Training samples.
        y: Their classes or values.

    Shape:
        x (B, D), y (B,) or (B, O) -> (N,) bool.

    Raises:
        ValueError: For another predictor or the influence cone: their sums do not add up.
    """
    if layer.predictor != "interp" or not layer.kernel.inverse:
        raise ValueError(
            f"pruning needs predictor interp and an inverse kernel, got {layer.predictor} and "
            f"{layer.kernel.kernel_type}"
        )
    x, y = x.to(layer._centers), y.to(layer._targets)
    kept = torch.ones(layer.num_centers, dtype=torch.bool, device=x.device)
    sums = _Sums(layer, x)
    check = _ClassCheck(sums) if layer.classification else _ValueCheck(sums, y, layer.tolerance)
    owners = _groups(sums.top, layer.num_centers)
    for first in range(0, layer.num_centers, sums.chunk):
        weights = sums.weights(first).t().contiguous()  # a center a row
        for offset in range(weights.shape[0]):
            center = first + offset
            column, own = sums.columns[center], owners[center]
            if int(kept.sum()) > 1 and check.unneeded(column, weights[offset], own):
                kept[center] = False
                change = weights[offset, :, None] * column
                sums.rest -= change
                sums.full -= change
                sums.full[own] = sums.rest[own]
                check.update(column, weights[offset], own)
    return kept


def _groups(top: Tensor, count: int) -> list[Tensor]:
    """Samples by their nearest center."""
    order = top.argsort(stable=True)
    return list(order.split(torch.bincount(top, minlength=count).tolist()))


class _ClassCheck:
    """Every sample keeps the class that is predicted with all centers."""

    def __init__(self, sums: _Sums) -> None:
        self.sums = sums
        self.predicted = sums.full.argmax(dim=1)
        self.members = _groups(self.predicted, sums.full.shape[1])
        self.others = sums.full.scatter(1, self.predicted[:, None], float("-inf"))
        self.rival = self.others.amax(dim=1)

    def unneeded(self, column: Tensor, weights: Tensor, own: Tensor) -> bool:
        label = int(column.argmax())
        members = self.members[label]  # only these can lose by it
        before = self.sums.full[members, label]
        after = before - weights[members]
        if bool(((after <= self.rival[members]) | _lost(before, after)).any()):
            return False
        if len(own) == 0:
            return True
        return bool((self.sums.rest[own].argmax(dim=1) == self.predicted[own]).all())

    def update(self, column: Tensor, weights: Tensor, own: Tensor) -> None:
        self.others[:, int(column.argmax())] -= weights
        if len(own):
            self.others[own] = self.sums.rest[own].scatter(
                1, self.predicted[own][:, None], float("-inf")
            )
        self.rival = self.others.amax(dim=1)


class _ValueCheck:
    """Every sample that is within its tolerance stays there."""

    def __init__(self, sums: _Sums, y: Tensor, tolerance: float) -> None:
        self.sums, self.y, self.tolerance = sums, y.double(), tolerance
        self.within = self._right(sums.full, slice(None))

    def _right(self, full: Tensor, rows: slice | Tensor) -> Tensor:
        values = full[:, :-1] / full[:, -1:]
        return (values - self.y[rows]).norm(dim=1) < self.tolerance

    def unneeded(self, column: Tensor, weights: Tensor, own: Tensor) -> bool:
        after = self.sums.full - weights[:, None] * column
        after[own] = self.sums.rest[own]
        if bool((_lost(self.sums.full[:, -1], after[:, -1]) & (weights > 0)).any()):
            return False
        return bool((self._right(after, slice(None)) | ~self.within).all())

    def update(self, column: Tensor, weights: Tensor, own: Tensor) -> None:
        """Nothing to keep up to date."""
