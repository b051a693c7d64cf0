"""Aggregation and its gradients against loops in float64."""

import pytest
import torch
from kernel_paths import leaves
from slow_neighbors import slow_aggregate

from ops.triton import operators


def both_ways(device, x, indices, weight, bias, upstream):
    """y and the gradients of x and weight, on the CPU."""
    x, indices, weight, upstream = (t.to(device) for t in (x, indices, weight, upstream))
    y = operators.aggregate(x, indices, weight, None if bias is None else bias.to(device))
    gradients = operators.aggregate_backward(upstream, x, indices, weight, True, True)
    return [t.cpu() for t in (y, *gradients)]


@pytest.mark.parametrize(
    ("b", "m", "n", "c", "o", "K"),
    [(1, 1, 1, 1, 1, 1), (2, 10, 12, 5, 7, 3), (3, 7, 9, 16, 33, 4), (2, 9, 9, 37, 20, 2)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_gradients_match_loops(device, b, m, n, c, o, K, shared):
    x, weight = torch.randn(b, n, c), torch.randn(o, c, K)
    bias = None if shared else torch.randn(o)
    indices = torch.randint(n, (m, K) if shared else (b, m, K))
    upstream = torch.randn(b, m, o)
    exact = leaves(x, weight, dtype=torch.float64)
    wide = None if bias is None else bias.double()
    expected = slow_aggregate(exact[0], indices, exact[1], wide)
    want = torch.autograd.grad(expected, exact, upstream.double())
    got = both_ways(device, x, indices, weight, bias, upstream)
    for a, e in zip(got, (expected, *want), strict=True):
        scale = float(e.detach().abs().max()) + 1
        torch.testing.assert_close(a.double(), e, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_in_float32(device, dtype):
    tensors = torch.randn(2, 9, 20), torch.randn(5, 20, 3), torch.randn(5), torch.randn(2, 8, 5)
    x, weight, bias, upstream = (t.to(dtype) for t in tensors)
    indices = torch.randint(9, (2, 8, 3))
    exact = leaves(x, weight, dtype=torch.float64)
    expected = slow_aggregate(exact[0], indices, exact[1], bias.double())
    want = torch.autograd.grad(expected, exact, upstream.double())
    for a, e in zip(
        both_ways(device, x, indices, weight, bias, upstream), (expected, *want), strict=True
    ):
        assert a.dtype == dtype
        step = torch.finfo(dtype).eps * float(e.detach().abs().max())
        torch.testing.assert_close(a.double(), e, rtol=0, atol=step)


def test_strided_tensors_and_only_the_gradients_asked_for(device):
    x = torch.randn(2, 6, 9, device=device).mT
    weight = torch.randn(4, 6, 3, device=device).permute(2, 1, 0)
    indices = torch.randint(9, (4, 5), device=device).T
    y = operators.aggregate(x, indices, weight, None)
    expected = slow_aggregate(x.double().cpu(), indices.cpu(), weight.double().cpu(), None)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    gy = torch.randn(2, 3, 5, device=device).mT
    whole = operators.aggregate_backward(gy, x, indices, weight, True, True)
    for need in ((True, False), (False, True)):
        parts = operators.aggregate_backward(gy, x, indices, weight, *need)
        for part, all_of_it, asked in zip(parts, whole, need, strict=True):
            assert part.numel() == (all_of_it.numel() if asked else 0)
            if asked:
                torch.testing.assert_close(part, all_of_it)


def test_sums_over_many_blocks_of_rows(device):
    x, weight, gy = torch.randn(1, 4, 2), torch.randn(3, 2, 2), torch.randn(1, 70, 3)
    indices = torch.randint(4, (70, 2))
    got = both_ways(device, x, indices, weight, None, gy)
    exact = leaves(x, weight, dtype=torch.float64)
    expected = slow_aggregate(exact[0], indices, exact[1], None)
    for a, e in zip(got[1:], torch.autograd.grad(expected, exact, gy.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_indices_out_of_range_are_not_followed(device):
    x, weight, gy = torch.randn(1, 5, 3), torch.randn(2, 3, 2), torch.ones(1, 4, 2)
    indices = torch.tensor([[0, 1], [5, 0], [2, -1], [10**12, 4]])
    y, gx, _ = both_ways(device, x, indices, weight, None, gy)
    assert y.isnan().all(-1).tolist() == [[False, True, True, True]]
    assert gx.isfinite().all()


def test_numbers_that_are_none_stay_where_they_are(device):
    x = torch.randn(1, 5, 3)
    x[0, 2, 1] = torch.nan
    weight, indices = torch.randn(2, 3, 2), torch.tensor([[0, 1], [2, 0], [3, 4]])
    y = both_ways(device, x, indices, weight, None, torch.ones(1, 3, 2))[0]
    assert y.isnan().all(-1).tolist() == [[False, True, False]]


def test_sizes_of_zero_go_to_pytorch(device):
    x, weight = torch.randn(2, 5, 3, device=device), torch.randn(4, 3, 2, device=device)
    none = torch.empty(0, 2, dtype=torch.int64, device=device)
    assert operators.aggregate(x, none, weight, None).shape == (2, 0, 4)
    gradients = operators.aggregate_backward(x.new_empty(2, 0, 4), x, none, weight, True, True)
    assert not any(g.any() for g in gradients)


def test_gradients_in_a_fixed_order_come_from_pytorch(device, monkeypatch):
    module = operators.kernels("aggregate", torch.empty(0, device=device))
    monkeypatch.setattr(module, "aggregate_backward", None)
    x, weight, gy = torch.randn(1, 5, 3), torch.randn(2, 3, 2), torch.ones(1, 4, 2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    indices = torch.randint(5, (1, 4, 2))
    both_ways(device, x, indices, weight, None, gy)
