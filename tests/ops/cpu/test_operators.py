import pytest
import torch
from kernel_paths import leaves, needs_compiler

from ops.maps.aggregate import aggregate_neighbors
from ops.maps.search import nearest_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


@needs_compiler
def test_indices_out_of_range_are_refused_not_followed():
    x, w = torch.randn(1, 5, 3), torch.randn(2, 3, 2)
    for bad in (5, -1):
        with pytest.raises(IndexError):
            aggregate_neighbors(x, torch.full((1, 4, 2), bad), w)
        with pytest.raises(IndexError):
            nearest_neighbors(None, x, 2, self_index=torch.tensor([bad]))


def test_operators_pass_torchs_own_checks(path):
    x = torch.randn(2, 9, 4, requires_grad=True)
    weight = torch.randn(3, 4, 2, requires_grad=True)
    indices, own = torch.randint(9, (2, 5, 2)), torch.arange(5)
    ops = torch.ops.neighbors
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for op, args in (
        (ops.search, (None, x.detach(), 3, "cosine", own, False, None, 0)),
        (ops.topk_rows, (torch.randn(3, 8), 2, True)),
        (ops.aggregate, (x, indices, weight, None)),
        (ops.location, (torch.empty(0), [4, 4], 3, "euclidean", 1, [1, 1], False)),
    ):
        torch.library.opcheck(op.default, args, test_utils=utilities)


@needs_compiler
def test_threads_change_nothing_but_rounding(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 600, 16), torch.randn(20, 16, 5)
    own, runs = torch.arange(600), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        (a, w) = leaves(x, weight)
        values, indices = nearest_neighbors(None, a, 5, self_index=own)
        y = aggregate_neighbors(a, indices, w)
        y.square().sum().backward()
        runs.append([values, indices, y.detach(), a.grad, w.grad])
    for run in runs[1:]:
        assert torch.equal(run[1], runs[0][1])
        for got, expected in zip(run, runs[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
