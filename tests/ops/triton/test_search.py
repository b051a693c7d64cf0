"""The search against sorted scores in float64, exact and certified."""

import itertools
import math

import pytest
import torch
from slow_neighbors import check_found, scores_of

from ops import METRICS
from ops.triton import operators
from ops.triton.launch import kernels

MODES = pytest.mark.parametrize("certified", [False, True], ids=["exact", "certified"])


def find(device, queries, keys, K, metric, own=None, exclude=False, candidates=None, mode=False):
    """Values and indices on the CPU."""
    tensors = [None if t is None else t.to(device) for t in (queries, keys, own, candidates)]
    queries, keys, own, candidates = tensors
    run = kernels("search", keys).search
    found = run(queries, keys, K, metric, own, exclude, candidates, mode)
    return [t.cpu() for t in found]


@MODES
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("b", "m", "n", "c", "K"), [(1, 1, 1, 1, 1), (2, 18, 37, 5, 6), (1, 3, 70, 35, 12)]
)
def test_search_matches_sorted_scores(device, metric, b, m, n, c, K, certified):
    queries, keys = torch.randn(b, m, c), torch.randn(b, n, c)
    found = find(device, queries, keys, K, metric, mode=certified)
    check_found(*found, queries, keys, K, metric)


@MODES
@pytest.mark.parametrize(
    ("metric", "exclude", "batched"),
    [
        ("cosine", False, True),
        ("euclidean", True, True),
        ("euclidean", False, False),
        ("dot", True, False),
    ],
)
def test_self_and_candidates(device, metric, exclude, batched, certified):
    b, n, c = 2, 34, 6
    keys, other = torch.randn(b, n, c), torch.randn(b, 6, c)
    own = torch.stack([torch.randperm(n)[:6] for _ in range(b)])
    pool = torch.stack([torch.randperm(n)[:9] for _ in range(b)])
    if not batched:
        own, pool = own[0], pool[0]
    for queries, candidates in itertools.product((None, other), (None, pool)):
        args = (queries, keys, 4, metric, own, exclude, candidates)
        check_found(*find(device, *args, mode=certified), *args)
    args = (other, keys, 4, metric, None, False, pool)
    check_found(*find(device, *args, mode=certified), *args)


def test_all_candidates_and_the_query_alone(device):
    keys, own = torch.randn(1, 12, 3), torch.arange(12)
    for K, exclude in ((1, False), (12, False), (11, True)):
        args = (None, keys, K, "cosine", own, exclude)
        check_found(*find(device, *args), *args)
    args = (keys[:, :4], keys, 6, "dot", own[:4], False, torch.arange(5, 10))
    check_found(*find(device, *args), *args)
    with pytest.raises(ValueError, match=r"K=6 .*candidates, 5, of a query that is one of them"):
        find(device, None, keys, 6, "dot", own, False, torch.arange(5, 10))


def test_sixty_four_neighbors(device):
    queries, keys = torch.randn(1, 2, 4), torch.randn(1, 100, 4)
    for certified in (False, True):
        found = find(device, queries, keys, 64, "euclidean", mode=certified)
        check_found(*found, queries, keys, 64, "euclidean")


@MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_is_ranked_in_float32(device, metric, dtype, certified):
    queries, keys = torch.randn(2, 9, 20).to(dtype), torch.randn(2, 50, 20).to(dtype)
    found = find(device, queries, keys, 5, metric, mode=certified)
    assert found[0].dtype == torch.float32
    check_found(*found, queries.float(), keys.float(), 5, metric)


@MODES
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lower_index(device, metric, certified):
    keys = torch.randint(0, 2, (2, 90, 2)).float()  # four kinds of keys, exact scores
    queries = torch.tensor([[[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]]).expand(2, -1, -1)
    expected = scores_of(queries, keys, metric).float()
    expected = expected.sort(dim=2, descending=True, stable=True).indices[..., :10]
    assert torch.equal(find(device, queries, keys, 10, metric, mode=certified)[1], expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@MODES
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_hostile_numbers_still_give_valid_distinct_indices(device, metric, value, certified):
    keys, own = torch.randn(1, 40, 4), torch.arange(6)
    keys[0, 3:32] = value
    _, indices = find(device, None, keys, 9, metric, own, mode=certified)
    assert 0 <= int(indices.min()) <= int(indices.max()) < 40
    assert all(len(set(row)) == 9 for row in indices.view(-1, 9).tolist())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_comes_last(device):
    keys = torch.randn(1, 40, 4)
    keys[0, 3:30] = math.nan
    numbers = torch.tensor([0, 1, 2, *range(30, 40)])
    for certified in (False, True):
        found = find(device, keys[:, :3], keys, 13, "euclidean", mode=certified)
        args = (keys[:, :3], keys[:, numbers], 13, "euclidean")
        at = torch.searchsorted(numbers, found[1])
        assert torch.equal(numbers[at.clamp(max=12)], found[1])
        check_found(found[0], at, *args)


def launches(module, monkeypatch):
    """Collect which rows the last launch of a search finds done."""
    seen, scan = [], module._scan

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                if options["FINAL"]:
                    seen.append(args[5].clone().cpu())
                return scan[grid](*args, **options)

            return launch

    monkeypatch.setattr(module, "_scan", Spy())
    return seen


def near_ties(dtype):
    """Keys among which only float32 tells the nearest; one query."""
    keys = torch.ones(1, 60, 16)
    keys[0, :, 0] += torch.randperm(60) * 2.0**-15  # TensorFloat-32 has steps of 2⁻¹⁰ here
    return torch.ones(1, 2, 16).to(dtype), keys.to(dtype)


def test_rows_without_a_certificate_are_searched_exactly(device, monkeypatch):
    queries, keys = near_ties(torch.float32)
    module = kernels("search", keys)
    seen = launches(module, monkeypatch)
    found = find(device, queries, keys, 4, "dot", mode=True)
    assert not seen[-1].any()
    check_found(*found, queries, keys, 4, "dot")
    best = keys[0, :, 0].sort(descending=True, stable=True).indices[:4]
    assert torch.equal(found[1][0, 0], best)
    # Were the bound left out, the coarse choice would stand, and it is wrong.
    monkeypatch.setattr(module, "_error_bound", lambda q, *_: torch.full_like(q, -1))
    coarse = find(device, queries, keys, 4, "dot", mode=True)
    assert seen[-1].all()
    assert not torch.equal(coarse[1][0, 0], best)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_far_apart_are_certain(device, metric, dtype, monkeypatch):
    far = torch.randn(1, 60, 16).to(dtype)
    seen = launches(kernels("search", far), monkeypatch)
    found = find(device, far[:, :8], far, 2, metric, mode=True)
    assert seen[-1].float().mean() > 0.8
    check_found(*found, far[:, :8].float(), far.float(), 2, metric)


def test_each_row_stands_for_itself(device, monkeypatch):
    _, near = near_ties(torch.float32)
    far = torch.randn(1, 60, 16)
    seen = launches(kernels("search", far), monkeypatch)
    keys = torch.cat([near, far])
    queries = torch.cat([near[:, :8], far[:, :8]])
    found = find(device, queries, keys, 2, "cosine", mode=True)
    assert not seen[-1][0].any()
    assert seen[-1][1].float().mean() > 0.9
    check_found(*found, queries, keys, 2, "cosine")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bound_covers_what_rounding_does(device, metric, dtype):
    module = kernels("search", torch.empty(0, device=device))
    rounded = dtype == torch.float32
    for scale in (1e-3, 1.0, 100.0):
        q, k = (scale * torch.randn(1, n, 33) for n in (20, 30))
        q, k = q.to(dtype).float(), k.to(dtype).float()
        coarse_q, coarse_k = (module._round_tf32(t) if rounded else t for t in (q, k))
        q2, k2 = q.square().sum(-1), k.square().sum(-1)
        inverse = module._inverse_norm(k2) if metric == "cosine" else None
        bound = module._error_bound(q2, k2, inverse, 33, metric == "euclidean", rounded)
        scores = [a.double() @ b.double().mT for a, b in ((q, k), (coarse_q, coarse_k))]
        off = (scores[0] - scores[1]).abs() * (1 if inverse is None else inverse[:, None])
        assert (off <= bound[..., None]).all()
        size = q2.sqrt()[..., None] * (k2.sqrt()[:, None] if inverse is None else 1)
        if rounded:  # and is no larger than the numbers call for
            assert (bound[..., None] < 0.002 * size.amax(-1, keepdim=True)).all()


def test_operators_choose_among_the_paths(device, monkeypatch):
    x = torch.randn(1, 80, 33, device=device)
    used = []
    module = kernels("search", x)
    search = module.search
    monkeypatch.setattr(module, "search", lambda *args: used.append(args) or search(*args))
    for keys, K in ((x, 3), (x.half(), 3), (x.double(), 3), (x, 65), (x[..., :0], 3)):
        used.clear()
        values, indices = operators.search(keys, keys, K, "cosine", None, False, None, 0)
        taken = keys.dtype != torch.float64 and K <= 64 and keys.numel() > 0
        assert len(used) == taken
        if keys.numel():
            check_found(values.cpu(), indices.cpu(), *[keys.double().cpu()] * 2, K, "cosine")
    used.clear()
    monkeypatch.setenv("NEIGHBORS_NATIVE", "0")
    operators.search(x, x, 3, "cosine", None, False, None, 0)
    assert not used
    empty = operators.search(x[:, :0], x, 3, "cosine", None, False, None, 0)
    assert [t.shape for t in empty] == [(1, 0, 3)] * 2
