import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import leaves
from slow_neighbors import slow_attend

from ops import METRICS
from ops.maps.attend import attend_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("self_score", [None, 1.1])
@pytest.mark.parametrize(("c", "shared"), [(1, False), (5, True), (37, False)])
def test_attention_and_gradients_match_loops(path, metric, self_score, c, shared):
    b, m, n, K = 2, 8, 11, 4
    tensors = [0.5 * torch.randn(b, s, c) for s in (n, m, n)] + [torch.randn(c, K), torch.randn(c)]
    indices = torch.randint(n, (m, K) if shared else (b, m, K))
    options = {"metric": metric, "self_score": self_score}
    for p in (0.0, 0.4):
        torch.manual_seed(3)
        keep = F.dropout(torch.ones(b, m, K), p)
        exact = leaves(*tensors, dtype=torch.float64)
        q, k, v, w, bias = exact
        expected = slow_attend(q, k, v, indices, w, bias, metric, self_score, keep.double())
        want = torch.autograd.grad(expected.sin().sum(), exact)
        mine = leaves(*tensors)
        torch.manual_seed(3)
        y = attend_neighbors(*mine[:3], indices, *mine[3:], dropout_p=p, training=True, **options)
        got = torch.autograd.grad(y.sin().sum(), mine)
        for a, e in zip((y, *got), (expected, *want), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_autocast_attention_scores_in_float32(path):
    q, v = torch.randn(2, 2, 9, 8)
    indices, weight = torch.randint(9, (2, 9, 4)), torch.randn(8, 4)
    options = {"metric": "cosine", "self_score": 1.1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attend_neighbors(q, q, v, indices, weight, **options)
    assert y.dtype == torch.bfloat16
    q, v, weight = (t.bfloat16().float() for t in (q, v, weight))
    expected = attend_neighbors(q, q, v, indices, weight, **options)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0.01, atol=1e-3)


def test_gradcheck():
    torch.manual_seed(0)
    indices = torch.randint(6, (2, 5, 4))
    for metric, self_score in itertools.product(METRICS, (None, 1.1)):
        q, k, v, w, b = leaves(
            *(torch.randn(2, n, 3) for n in (6, 5, 6)),
            torch.randn(3, 4),
            torch.randn(3),
            dtype=torch.float64,
        )
        assert torch.autograd.gradcheck(
            lambda q, k, v, w, b, metric=metric, self_score=self_score: attend_neighbors(
                q, k, v, indices, w, b, metric=metric, self_score=self_score
            ),
            (q, k, v, w, b),
        )
