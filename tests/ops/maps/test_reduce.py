"""Maxima, sums and edge convolutions against the tensor of all neighbors, in float64."""

import pytest
import torch
from kernel_paths import leaves
from torch import nn

from ops.maps.reduce import edge_max, max_neighbors, sum_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


def gathered(x, indices):
    """All neighbors (B, M, K, C)."""
    return torch.stack([rows[i] for rows, i in zip(x, indices, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maximum_and_sum(dtype):
    torch.manual_seed(0)
    (x,) = leaves(torch.randn(3, 11, 5), dtype=dtype)
    indices, upstream = torch.randint(11, (3, 8, 4)), torch.randn(3, 8, 5, dtype=dtype)
    for mine, plain in (
        (max_neighbors(x, indices), gathered(x, indices).amax(2)),
        (sum_neighbors(x, indices), gathered(x, indices).sum(2)),
    ):
        torch.testing.assert_close(mine, plain)
    # A neighbor may be chosen twice: `amax` would share its gradient, which comes to the same.
    for mine, plain in (
        (max_neighbors, lambda x, i: gathered(x, i).amax(2)),
        (sum_neighbors, lambda x, i: gathered(x, i).sum(2)),
    ):
        got, want = (torch.autograd.grad(f(x, indices), x, upstream)[0] for f in (mine, plain))
        torch.testing.assert_close(got, want)


def test_gradcheck():
    torch.manual_seed(0)
    (x,) = leaves(torch.randn(2, 6, 3), dtype=torch.float64)
    indices = torch.randint(6, (2, 5, 4))
    assert torch.autograd.gradcheck(lambda x: max_neighbors(x, indices), x)
    assert torch.autograd.gradcheck(lambda x: sum_neighbors(x, indices), x)


@pytest.mark.parametrize("training", [True, False])
def test_edge_convolution_with_batch_norm_over_edges(training):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(5).double().train(training) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3], dtype=torch.float64)
        norm.bias.data = torch.arange(5.0).double()
        norm.running_mean.fill_(0.2)
    a, b = leaves(torch.randn(2, 7, 5), torch.randn(2, 9, 5), dtype=torch.float64)
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(14)]).view(2, 7, 4)
    edges = a[:, :, None] + gathered(b, indices)
    expected = norms[0](edges.flatten(0, 2)).view_as(edges).amax(2)
    got = edge_max(a, b, indices, norms[1])
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    mine = torch.autograd.grad(got, [a, b, *norms[1].parameters()], upstream)
    want = torch.autograd.grad(expected, [a, b, *norms[0].parameters()], upstream)
    for m, w in zip(mine, want, strict=True):
        torch.testing.assert_close(m, w)
    torch.testing.assert_close(norms[1].state_dict(), norms[0].state_dict())
    assert torch.autograd.gradcheck(lambda a, b: edge_max(a, b, indices, norms[1]), (a, b))


def test_memory_holds_no_table_of_neighbors():
    saved = []
    x = torch.randn(1, 50, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        max_neighbors(x, torch.randint(50, (1, 50, 16)))
    assert sum(saved) == 50 * 8


def test_refusals():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(3, 3, 2\)"):
        max_neighbors(torch.randn(2, 3, 4), torch.zeros(3, 3, 2, dtype=torch.int64))
