"""Queries and their listed candidates in a set: squared distances, and weighted sums.

Candidates are gathered a chunk of queries at a time, forward and backward: memory O(B·M·O) beside a
chunk, never M × N.

Symbols: B batch, M queries, N items, O candidates of a query, K volumes, E features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.budget import CHUNK_BYTES

__all__ = ["candidate_aggregate", "candidate_distances"]


class _CandidateDistances(torch.autograd.Function):
    """Squared distances of queries and their candidates, a chunk of queries at a time."""

    @staticmethod
    def forward(ctx, query: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(query, items, index)
        out = query.new_empty(index.shape)
        for s in _query_chunks(index, items):
            keys = _take_items(items, index[:, s])  # (B, m, O, E)
            products = torch.matmul(keys, query[:, s, :, None])[..., 0]
            norms = keys.square().sum(-1) + query[:, s].square().sum(-1, keepdim=True)
            out[:, s] = (norms - 2 * products).clamp_(min=0)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, items, index = ctx.saved_tensors
        grad_query, grad_items = torch.empty_like(query), torch.zeros_like(items)
        for s in _query_chunks(index, items):
            steps = query[:, s, None] - _take_items(items, index[:, s])
            steps *= 2 * grad[:, s, :, None]
            grad_query[:, s] = steps.sum(2)
            _add_items(grad_items, index[:, s], -steps)
        return grad_query, grad_items, None


class _CandidateAggregate(torch.autograd.Function):
    """Weighted sums of candidates, a chunk of queries at a time."""

    @staticmethod
    def forward(ctx, weights: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, items, index)
        b, m, k, _ = weights.shape
        out = items.new_empty(b, m, k, items.shape[-1])
        for s in _query_chunks(index, items):
            out[:, s] = weights[:, s] @ _take_items(items, index[:, s])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, items, index = ctx.saved_tensors
        grad_weights, grad_items = torch.empty_like(weights), torch.zeros_like(items)
        for s in _query_chunks(index, items):
            keys = _take_items(items, index[:, s])
            grad_weights[:, s] = grad[:, s] @ keys.transpose(-1, -2)
            _add_items(grad_items, index[:, s], weights[:, s].transpose(-1, -2) @ grad[:, s])
        return grad_weights, grad_items, None


def _query_chunks(index: Tensor, items: Tensor) -> Iterator[slice]:
    """Slices of queries whose gathered candidates stay within the byte budget."""
    b, m, o = index.shape
    step = max(1, CHUNK_BYTES // (b * o * items.shape[-1] * items.element_size()))
    return (slice(i, min(i + step, m)) for i in range(0, m, step))


def _take_items(items: Tensor, index: Tensor) -> Tensor:
    """Items (B, N, E) at positions (B, m, O) -> (B, m, O, E)."""
    batch = torch.arange(items.shape[0], device=items.device)[:, None, None]
    return items[batch, index]


def _add_items(out: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values (B, m, O, E) to rows of `out` (B, N, E)."""
    b, n, e = out.shape
    offset = torch.arange(b, device=out.device)[:, None, None] * n
    out.view(-1, e).index_add_(0, (index + offset).flatten(), values.reshape(-1, e))


def candidate_distances(query: Tensor, items: Tensor, index: Tensor) -> Tensor:
    """Squared distances of queries (B, M, E) and their candidates among items (B, N, E).

    Args:
        query: What is compared.
        items: What it is compared with.
        index: Candidates of each query, positions among the items (B, M, O).

    Returns:
        Squared distances (B, M, O), >= 0.
    """
    return _CandidateDistances.apply(query, items, index)


def candidate_aggregate(weights: Tensor, items: Tensor, index: Tensor) -> Tensor:
    """Sum the candidates of every query under weights (B, M, K, O), items (B, N, E).

    Args:
        weights: A weight of every candidate, volume by volume.
        items: What is summed.
        index: Candidates of each query, positions among the items (B, M, O).

    Returns:
        Volumes (B, M, K, E).
    """
    return _CandidateAggregate.apply(weights, items, index)
