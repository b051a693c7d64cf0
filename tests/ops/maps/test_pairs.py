"""Pairs with bias, counts, dilation and heads, against full tables in float64."""

import pytest
import torch
from kernel_paths import leaves

from ops import METRICS
from ops.maps.pairs import join_heads, nearest_rows, pair_scores, split_heads, weigh_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


def table_of(queries, keys, metric):
    """All pairs: similarities, or squared distances."""
    q, k = queries.double(), keys.double()
    if metric == "euclidean":
        return (q[:, :, None] - k[:, None]).square().sum(-1)
    if metric == "cosine":
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    return (q[:, :, None] * k[:, None]).sum(-1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dilation", [1, 3])
def test_bias_and_dilation(path, metric, shared, dilation):
    q, k = torch.randn(2, 7, 5), torch.randn(2, 30, 5)
    bias = torch.randn(7, 30) if shared else torch.randn(2, 7, 30)
    table = table_of(q, k, metric) + bias.double()
    order = table.sort(dim=2, descending=metric != "euclidean").indices[..., : 4 * dilation]
    for max_bytes in (None, 1):
        values, indices = nearest_rows(
            q, k, 4, metric, bias=bias, dilation=dilation, max_bytes=max_bytes
        )
        assert torch.equal(indices, order[..., ::dilation])
        torch.testing.assert_close(values.double(), table.gather(2, indices), rtol=0, atol=2e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_bias_that_is_a_product_needs_no_table(path, metric):
    q, k, p, r = (torch.randn(*s) for s in ((2, 7, 5), (2, 30, 5), (7, 3), (30, 3)))
    factor = -2 if metric == "euclidean" else 1
    expected = nearest_rows(q, k, 6, metric, bias=factor * p @ r.T)
    got = nearest_rows(q, k, 6, metric, position=(p, r))
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("unequal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_every_option_with_every_other(path, metric, dilation, heads, unequal, biased, pool):
    """Pairs one by one in float64: heads, pooled keys, counts, bias, dilation."""
    x = torch.randn(2, 12, 4 * heads)
    rows = split_heads(x, heads)
    keys = rows.unflatten(1, (-1, pool)).mean(2)
    n, K = keys.shape[1], 2
    counts = torch.tensor([n, 5]).repeat_interleave(heads) if unequal else None
    bias = torch.randn(12, n) if biased else None
    got = nearest_rows(rows, keys, K, metric, bias=bias, key_counts=counts, dilation=dilation)
    for i in range(2 * heads):
        sample, head = divmod(i, heads)
        mine = x[sample, :, 4 * head : 4 * head + 4].double()
        there = mine.view(n, pool, 4).mean(1)[: n if counts is None else counts[i]]
        for m in range(12):
            pairs = []
            for j, key in enumerate(there):
                q, k = mine[m], key
                score = ((q - k) ** 2).sum() if metric == "euclidean" else q @ k
                score = float(score / (q.norm() * k.norm()) if metric == "cosine" else score)
                pairs.append((score + (float(bias[m, j]) if biased else 0.0), j))
            pairs.sort(reverse=metric != "euclidean")
            chosen = pairs[: K * dilation : dilation]
            assert got[1][i, m].tolist() == [j for _, j in chosen]
            expected = torch.tensor([s for s, _ in chosen], dtype=torch.float64)
            torch.testing.assert_close(got[0][i, m].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_samples_of_unequal_size(path, metric):
    q, k, counts = torch.randn(3, 6, 4), torch.randn(3, 20, 4), torch.tensor([20, 5, 9])
    _, indices = nearest_rows(q, k, 5, metric, key_counts=counts)
    for i, count in enumerate(counts):
        alone = nearest_rows(q[i : i + 1], k[i : i + 1, :count], 5, metric)[1]
        assert torch.equal(indices[i], alone[0])
    with pytest.raises(ValueError, match=r"K=6 is larger than the number of candidates, 5"):
        nearest_rows(q, k, 6, metric, key_counts=counts)
    _, filled = nearest_rows(q, k, 8, metric, key_counts=counts, fill=True)
    assert torch.equal(filled[1, :, 5:], filled[1, :, :1].expand(-1, 3))
    assert torch.equal(filled[0], nearest_rows(q[:1], k[:1], 8, metric)[1][0])


def test_heads_go_apart_and_come_together():
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert torch.equal(heads[4], x[1, :, 4:8])
    assert torch.equal(join_heads(heads, 3), x)


@pytest.mark.parametrize("metric", METRICS)
def test_pair_scores(metric):
    torch.manual_seed(0)
    q, k = leaves(torch.randn(2, 4, 3), torch.randn(2, 6, 3), dtype=torch.float64)
    indices = torch.randint(6, (2, 4, 5))
    expected = table_of(q, k, metric).gather(2, indices)
    torch.testing.assert_close(pair_scores(q, k, indices, metric), expected)
    assert torch.autograd.gradcheck(lambda q, k: pair_scores(q, k, indices, metric), (q, k))
    torch.testing.assert_close(
        pair_scores(q.float(), k.float(), indices, metric).double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("by_channel", [False, True])
def test_weighed_neighbors(by_channel):
    torch.manual_seed(0)
    weight = torch.randn(4, 5) if by_channel else torch.randn(3, 4, 5)
    x, scale, weight = leaves(torch.randn(2, 6, 4), torch.rand(2, 7, 5), weight, dtype=torch.double)
    indices = torch.randint(6, (2, 7, 5))
    expected = []
    for i in range(2):
        for m in range(7):
            taps = [scale[i, m, t] * x[i, indices[i, m, t]] for t in range(5)]
            rows = [
                weight[:, t] * v if by_channel else weight[:, :, t] @ v for t, v in enumerate(taps)
            ]
            expected.append(sum(rows))
    got = weigh_neighbors(x, indices, scale, weight)
    torch.testing.assert_close(got, torch.stack(expected).view(2, 7, -1))
    assert torch.autograd.gradcheck(
        lambda x, s, w: weigh_neighbors(x, indices, s, w), (x, scale, weight)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilation": 4}, r"K=3 with dilation 4 looks at 12 neighbors, .* candidates, 9"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"bias": torch.zeros(2, 2)}, r"bias must be \(M, N\) = \(5, 9\)"),
        ({"key_counts": torch.tensor([9])}, "each of 2 samples"),
        (
            {"key_counts": torch.tensor([9, 10])},
            r"between 1 and the 9 keys there are \(got 9 to 10\)",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        nearest_rows(torch.randn(2, 5, 3), torch.randn(2, 9, 3), 3, **options)
