import pytest
import torch
from kernel_paths import leaves
from slow_neighbors import slow_aggregate

from ops.maps.aggregate import aggregate_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("b", "m", "n", "c", "o", "K"),
    [(1, 1, 1, 1, 1, 1), (2, 30, 40, 5, 7, 3), (3, 20, 25, 16, 33, 9), (2, 9, 9, 67, 20, 4)],
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_aggregation_and_gradients_match_loops(path, b, m, n, c, o, K, shared, has_bias):
    x, weight, bias = torch.randn(b, n, c), torch.randn(o, c, K), torch.randn(o)
    indices = torch.randint(n, (m, K) if shared else (b, m, K))
    upstream = torch.randn(b, m, o)
    count = 3 if has_bias else 2
    exact = leaves(x, weight, bias, dtype=torch.float64)[:count]
    expected = slow_aggregate(exact[0], indices, exact[1], exact[2] if has_bias else None)
    want = torch.autograd.grad(expected, exact, upstream.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        mine = leaves(x, weight, bias, dtype=dtype)[:count]
        y = aggregate_neighbors(mine[0], indices, *mine[1:])
        got = torch.autograd.grad(y, mine, upstream.to(dtype))
        for a, e in zip((y, *got), (expected, *want), strict=True):
            scale = float(e.detach().abs().max()) + 1
            torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * scale)


def test_large_kernels_leave_the_fused_path(path):
    x, weight = torch.randn(3, 30, 300), torch.randn(260, 300, 9)
    indices = torch.randint(30, (3, 20, 9))
    mine, exact = leaves(x, weight), leaves(x, weight, dtype=torch.float64)
    y = aggregate_neighbors(mine[0], indices, mine[1])
    rows = exact[0][torch.arange(3)[:, None, None], indices]  # (B, M, K, C)
    expected = torch.einsum("bmkc,ock->bmo", rows, exact[1])
    got = torch.autograd.grad(y.square().sum(), mine)
    want = torch.autograd.grad(expected.square().sum(), exact)
    for a, e in zip((y, *got), (expected, *want), strict=True):
        assert float((a - e).detach().abs().max() / e.detach().abs().max()) < 1e-5


def test_only_the_gradients_asked_for(path):
    x, weight, bias = torch.randn(2, 9, 16), torch.randn(4, 16, 3), torch.randn(4)
    indices = torch.randint(9, (2, 5, 3))
    for asked in range(3):
        tensors = [x.clone(), weight.clone(), bias.clone()]
        tensors[asked].requires_grad_()
        aggregate_neighbors(tensors[0], indices, *tensors[1:]).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == asked for i in range(3)]


def test_gradcheck():
    torch.manual_seed(0)
    x, weight, bias = leaves(
        torch.randn(2, 6, 3), torch.randn(2, 3, 4), torch.randn(2), dtype=torch.float64
    )
    indices = torch.randint(6, (2, 5, 4))
    assert torch.autograd.gradcheck(
        lambda x, w, b: aggregate_neighbors(x, indices, w, b), (x, weight, bias)
    )
