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
@pytest.mark.parametrize("channels", [5, 16, 70])
def test_maximum_and_sum(path, dtype, channels):
    (x,) = leaves(torch.randn(3, 11, channels), dtype=dtype)
    indices, upstream = torch.randint(11, (3, 8, 4)), torch.randn(3, 8, channels, dtype=dtype)
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


@pytest.mark.parametrize("channels", [3, 20])
def test_of_equal_values_the_first_counts_and_nan_is_largest(path, channels):
    x = torch.zeros(1, 4, channels)
    x[0, 1] = torch.nan
    indices = torch.tensor([[[2, 0], [0, 1], [1, 3]]])
    y, origin = torch.ops.neighbors.max_rows(x, indices)
    assert origin[0, :, 0].tolist() == [2, 1, 1]
    assert y[0, :, 0].isnan().tolist() == [False, True, True]


def test_an_index_outside_is_refused(path):
    if path == "1":
        for reduce in (max_neighbors, sum_neighbors):
            with pytest.raises(IndexError, match="out of range"):
                reduce(torch.randn(1, 4, 3), torch.full((1, 2, 2), 4))


def test_gradcheck():
    torch.manual_seed(0)
    (x,) = leaves(torch.randn(2, 6, 3), dtype=torch.float64)
    indices = torch.randint(6, (2, 5, 4))
    assert torch.autograd.gradcheck(lambda x: max_neighbors(x, indices), x)
    assert torch.autograd.gradcheck(lambda x: sum_neighbors(x, indices), x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_edge_convolution_with_batch_norm_over_edges(training, masked):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(5).double().train(training) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3], dtype=torch.float64)
        norm.bias.data = torch.arange(5.0).double()
        norm.running_mean.fill_(0.2)
    a, b = leaves(torch.randn(2, 7, 5), torch.randn(2, 9, 5), dtype=torch.float64)
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(14)]).view(2, 7, 4)
    edges = a[:, :, None] + gathered(b, indices)
    there = torch.rand(2, 7) < 0.6 if masked else torch.ones(2, 7, dtype=torch.bool)
    present = there if masked else None
    kept = norms[0](edges[there].flatten(0, 1)).view(-1, 4, 5).amax(1)
    expected = torch.zeros_like(a).masked_scatter(there[..., None].expand_as(a), kept)
    got = edge_max(a, b, indices, norms[1], present)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    mine = torch.autograd.grad(got, [a, b, *norms[1].parameters()], upstream)
    want = torch.autograd.grad(expected, [a, b, *norms[0].parameters()], upstream)
    for m, w in zip(mine, want, strict=True):
        torch.testing.assert_close(m, w)
    torch.testing.assert_close(norms[1].state_dict(), norms[0].state_dict())
    assert torch.autograd.gradcheck(lambda a, b: edge_max(a, b, indices, norms[1], present), (a, b))


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
