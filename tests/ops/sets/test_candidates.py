import pytest
import torch

from ops.sets import candidates
from ops.sets.candidates import candidate_aggregate, candidate_distances


@pytest.mark.parametrize("budget", [1, 1 << 24])
def test_values_and_gradients_match_gathered_rows(budget, monkeypatch):
    monkeypatch.setattr(candidates, "CHUNK_BYTES", budget)
    torch.manual_seed(0)
    items, query = torch.randn(2, 9, 4).double(), torch.randn(2, 5, 4).double()
    weights, index = torch.randn(2, 5, 3, 6).double(), torch.randint(9, (2, 5, 6))
    leaves = [t.requires_grad_() for t in (items, query, weights)]
    rows = items[torch.arange(2)[:, None, None], index]  # (B, M, O, E)
    for got, expected in (
        (candidate_distances(query, items, index), (query[:, :, None] - rows).square().sum(-1)),
        (
            candidate_aggregate(weights, items, index),
            torch.einsum("bmko,bmoe->bmke", weights, rows),
        ),
    ):
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        grads = [
            torch.autograd.grad(t, leaves, upstream, allow_unused=True, retain_graph=True)
            for t in (got, expected)
        ]
        for a, e in zip(*grads, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a, e)
