"""Queries and their listed candidates in a set: squared distances, and weighted sums.

Candidates are gathered a chunk of queries at a time, forward and backward: memory O(B·M·O) beside a
chunk, never M × N.

Symbols: B batch, M queries, N items, O candidates of a query, K volumes, E features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.budget import CHUNK_BYTES, pieces
from ops.rows import add_rows, take_rows

__all__ = ["candidate_aggregate", "candidate_distances"]


def _query_pieces(index: Tensor, items: Tensor) -> list[slice]:
    """Slices of queries whose gathered candidates stay within the byte budget."""
    b, m, o = index.shape
    step = CHUNK_BYTES // (b * o * items.shape[-1] * items.element_size())
    return [part for _, part in pieces(1, m, step)]


class _CandidateDistances(torch.autograd.Function):
    """Squared distances of queries and their candidates, a chunk of queries at a time."""

    @staticmethod
    def forward(ctx, query: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(query, items, index)
        out = query.new_empty(index.shape)
        for s in _query_pieces(index, items):
            keys = take_rows(items, index[:, s])  # (B, m, O, E)
            products = torch.matmul(keys, query[:, s, :, None])[..., 0]
            norms = keys.square().sum(-1) + query[:, s].square().sum(-1, keepdim=True)
            out[:, s] = (norms - 2 * products).clamp_(min=0)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, items, index = ctx.saved_tensors
        grad_query, grad_items = torch.empty_like(query), torch.zeros_like(items)
        for s in _query_pieces(index, items):
            steps = query[:, s, None] - take_rows(items, index[:, s])
            steps *= 2 * grad[:, s, :, None]
            grad_query[:, s] = steps.sum(2)
            add_rows(grad_items, index[:, s], -steps)
        return grad_query, grad_items, None


class _CandidateAggregate(torch.autograd.Function):
    """Weighted sums of candidates, a chunk of queries at a time."""

    @staticmethod
    def forward(ctx, weights: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, items, index)
        b, m, k, _ = weights.shape
        out = items.new_empty(b, m, k, items.shape[-1])
        for s in _query_pieces(index, items):
            out[:, s] = weights[:, s] @ take_rows(items, index[:, s])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, items, index = ctx.saved_tensors
        grad_weights, grad_items = torch.empty_like(weights), torch.zeros_like(items)
        for s in _query_pieces(index, items):
            keys = take_rows(items, index[:, s])
            grad_weights[:, s] = grad[:, s] @ keys.transpose(-1, -2)
            add_rows(grad_items, index[:, s], weights[:, s].transpose(-1, -2) @ grad[:, s])
        return grad_weights, grad_items, None


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
