"""The search against sorted scores in float64, on the compiled and the plain path."""

import itertools
import math

import pytest
import torch
from slow_neighbors import check_found, scores_of

from ops import METRICS
from ops.maps.aggregate import aggregate_neighbors
from ops.maps.locations import location_neighbors
from ops.maps.search import nearest_neighbors
from ops.topk import topk_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def check_search(queries, keys, K, metric, *, own=None, exclude=False, candidates=None, **options):
    """Search and compare with the sorted rows of all scores."""
    pool = {"self_index": own, "exclude_self": exclude, "candidates": candidates}
    found = nearest_neighbors(queries, keys, K, metric, **pool, **options)
    check_found(*found, queries, keys, K, metric, own, exclude, candidates)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("b", "m", "n", "c", "K"),
    [
        (1, 1, 1, 1, 1),
        (2, 7, 11, 1, 11),
        (3, 40, 37, 5, 9),
        (2, 30, 700, 16, 12),
        (1, 9, 5000, 3, 40),
    ],
)
def test_search_matches_sorted_scores(path, metric, b, m, n, c, K):
    check_search(torch.randn(b, m, c), torch.randn(b, n, c), K, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_self_and_candidates(path, metric, exclude, batched):
    b, n, c = 3, 50, 6
    keys = torch.randn(b, n, c)
    own = torch.stack([torch.randperm(n)[:20] for _ in range(b)])
    pool = torch.stack([torch.randperm(n)[:15] for _ in range(b)])
    if not batched:
        own, pool = own[0], pool[0]
    other = torch.randn(b, 20, c)
    for queries, candidates in itertools.product((None, other), (None, pool)):
        check_search(queries, keys, 9, metric, own=own, exclude=exclude, candidates=candidates)
    check_search(other, keys, 9, metric, candidates=pool)


def test_a_small_budget_changes_nothing(path):
    keys = torch.randn(3, 90, 4)
    own = torch.arange(0, 90, 2)
    for max_bytes in (1, 90 * 4 * 7, 90 * 4 * 45 * 2):
        check_search(None, keys, 9, "cosine", own=own, max_bytes=max_bytes)


def test_k_may_be_all_candidates(path):
    keys = torch.randn(2, 12, 3)
    own = torch.arange(12)
    check_search(None, keys, 12, "cosine", own=own)
    check_search(None, keys, 11, "cosine", own=own, exclude=True)
    check_search(keys[:, :4], keys, 6, "dot", own=own[:4], candidates=torch.arange(5, 10))
    with pytest.raises(ValueError, match=r"K=6 .*candidates, 5, of a query that is one of them"):
        nearest_neighbors(None, keys, 6, self_index=own, candidates=torch.arange(5, 10))


def test_float64_and_half_precision(path):
    keys = torch.randn(2, 40, 6, dtype=torch.float64)
    assert nearest_neighbors(keys, keys, 5)[0].dtype == torch.float64
    check_search(keys, keys, 5, "euclidean")
    for dtype in (torch.bfloat16, torch.float16):  # ranked in float32
        values, indices = nearest_neighbors(keys.to(dtype), keys.to(dtype), 5)
        assert values.dtype == torch.float32
        assert torch.equal(indices, nearest_neighbors(*[keys.to(dtype).float()] * 2, 5)[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("number", [900, 483, 35])
def test_ties_go_to_the_lower_index(path, metric, number):
    keys = torch.randint(0, 2, (2, number, 2)).float()  # four kinds of keys, exact scores
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]).expand(2, -1, -1)
    scores = scores_of(queries, keys, metric).float()
    expected = scores.sort(dim=2, descending=True, stable=True).indices[..., :30]
    assert torch.equal(nearest_neighbors(queries, keys, 30, metric)[1], expected)


def test_nan_still_gives_valid_distinct_indices(path):
    keys = torch.randn(2, 70, 4)
    keys[0, 3:60] = math.nan
    own = torch.arange(70)
    for metric in METRICS:
        _, indices = nearest_neighbors(None, keys, 20, metric, self_index=own)
        assert 0 <= int(indices.min()) <= int(indices.max()) < 70
        assert all(len(set(row)) == 20 for row in indices.view(-1, 20).tolist())
    _, indices = topk_rows(torch.full((2, 40), math.nan), 7)
    assert int(indices.max()) < 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nearest_neighbors(x, x, 0), r"K must be at least 1 \(got 0\)"),
        (lambda x: nearest_neighbors(x, x, 6), "K=6 is larger than the number of candidates, 5"),
        (lambda x: nearest_neighbors(x, x, 1, "manhattan"), "got 'manhattan'"),
        (lambda x: nearest_neighbors(x[:0], x[:0], 1), r"at least one sample \(got 0\)"),
        (lambda x: nearest_neighbors(x, x[..., :2], 1), "agree in batch and channels"),
        (lambda x: nearest_neighbors(x[0], x, 1), r"must be \(B, M, C\)"),
        (lambda x: nearest_neighbors(None, x, 1), "without queries"),
        (lambda x: nearest_neighbors(x, x, 1, exclude_self=True), "needs self_index"),
        (
            lambda x: nearest_neighbors(
                x, x, 5, exclude_self=True, self_index=torch.arange(5), max_bytes=1
            ),
            "K=5 is larger than the number of candidates, 4",
        ),
        (
            lambda x: aggregate_neighbors(
                x[:0], torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4, 3, 2)
            ),
            r"at least one sample \(got 0\)",
        ),
        (
            lambda x: aggregate_neighbors(
                x, torch.zeros(2, 9, dtype=torch.int64), torch.zeros(4, 3, 2)
            ),
            "do not fit",
        ),
        (lambda x: location_neighbors((3, 3), 10, "euclidean"), "K=10 .* candidates, 9"),
    ],
)
def test_refusals_name_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5, 3))
