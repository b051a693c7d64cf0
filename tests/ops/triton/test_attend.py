"""Attention within neighbors and its gradients against loops in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import leaves
from slow_neighbors import slow_attend

from ops.triton import operators


def both_ways(device, tensors, indices, keep, upstream, euclidean, fixed, score):
    """y and the gradients of q, k, v and weight, on the CPU."""
    q, k, v, weight, bias = (None if t is None else t.to(device) for t in tensors)
    indices, upstream = indices.to(device), upstream.to(device)
    keep = None if keep is None else keep.to(device)
    options = (euclidean, fixed)
    y, attention = operators.attend(q, k, v, indices, weight, bias, *options, score, keep)
    gradients = operators.attend_backward(
        upstream, attention, q, k, v, indices, weight, *options, keep
    )
    return [t.cpu() for t in (y, *gradients)]


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("score", [None, 1.1])
@pytest.mark.parametrize(
    ("b", "m", "n", "c", "K", "shared", "p"),
    [(1, 1, 1, 1, 1, False, 0.0), (2, 5, 7, 5, 4, True, 0.0), (2, 6, 5, 19, 5, False, 0.4)],
)
def test_values_and_gradients_match_loops(device, metric, score, b, m, n, c, K, shared, p):
    tensors = [0.5 * torch.randn(b, s, c) for s in (n, m, n)] + [torch.randn(c, K), torch.randn(c)]
    indices = torch.randint(n, (m, K) if shared else (b, m, K))
    upstream, keep = torch.randn(b, m, c), F.dropout(torch.ones(b, m, K), p)
    exact = leaves(*tensors, dtype=torch.float64)
    q, k, v, w, bias = exact
    expected = slow_attend(q, k, v, indices, w, bias, metric, score, keep.double())
    want = torch.autograd.grad(expected, exact[:4], upstream.double(), allow_unused=True)
    want = [torch.zeros_like(t) if g is None else g for g, t in zip(want, exact[:4], strict=True)]
    kept = keep if p else None
    fixed = (metric == "euclidean", score is not None, score or 0.0)
    got = both_ways(device, tensors, indices, kept, upstream, *fixed)
    for a, e in zip(got, (expected, *want), strict=True):
        torch.testing.assert_close(a.double(), e.detach(), rtol=1e-4, atol=1e-5)


def test_strided_tensors_without_a_bias(device):
    q, k, v = torch.randn(3, 2, 7, 6).mT
    weight = torch.randn(4, 7).T
    indices = torch.randint(6, (4, 6)).T
    upstream = torch.randn(2, 7, 6).mT
    got = both_ways(device, (q, k, v, weight, None), indices, None, upstream, False, False, 0.0)
    exact = leaves(q, k, v, weight, dtype=torch.float64)
    keep = torch.ones(2, 6, 4)
    expected = slow_attend(*exact[:3], indices, exact[3], 0, "dot", None, keep.double())
    want = torch.autograd.grad(expected, exact, upstream.double())
    for a, e in zip(got, (expected, *want), strict=True):
        torch.testing.assert_close(a.double(), e.detach(), rtol=1e-4, atol=1e-5)


def test_large_scores_and_many_blocks_of_rows(device):
    tensors = [5 * torch.randn(1, n, 3) for n in (4, 40, 4)] + [torch.randn(3, 2), None]
    indices, upstream = torch.randint(4, (40, 2)), torch.randn(1, 40, 3)
    got = both_ways(device, tensors, indices, None, upstream, False, False, 0.0)
    exact = leaves(*tensors[:4], dtype=torch.float64)
    keep = torch.ones(1, 40, 2)
    expected = slow_attend(*exact[:3], indices, exact[3], 0, "dot", None, keep.double())
    want = torch.autograd.grad(expected, exact, upstream.double())
    for a, e in zip(got, (expected, *want), strict=True):
        torch.testing.assert_close(a.double(), e.detach(), rtol=1e-3, atol=1e-3)


def test_indices_out_of_range_are_not_followed(device):
    tensors = [torch.randn(1, n, 3) for n in (5, 3, 5)] + [torch.randn(3, 2), None]
    indices = torch.tensor([[0, 1], [5, 0], [2, -1]])
    y, gq, _, gv, _ = both_ways(
        device, tensors, indices, None, torch.ones(1, 3, 3), True, False, 0.0
    )
    assert y.isnan().all(-1).tolist() == [[False, True, True]]
    assert gq.shape == gv.shape == (1, 5, 3)


def test_what_the_kernels_do_not_take_goes_to_pytorch(device):
    for dtype, K, m in ((torch.float64, 2, 3), (torch.float32, 65, 3), (torch.float32, 2, 0)):
        q, v = torch.randn(2, 1, 70, 3, dtype=dtype, device=device)
        k, weight = q[:, :m], torch.randn(3, K, dtype=dtype, device=device)
        indices = torch.stack([torch.randperm(70)[:K] for _ in range(m)]) if m else None
        indices = torch.empty(0, K, dtype=torch.int64) if indices is None else indices
        indices = indices.to(device)
        y, attention = operators.attend(q, k, v, indices, weight, None, False, False, 0.0, None)
        assert attention.shape == (1, m, K)
        gradients = operators.attend_backward(
            torch.ones_like(y), attention, q, k, v, indices, weight, False, False, None
        )
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape, weight.shape]
