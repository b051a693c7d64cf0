"""The exact search against a float64 brute force, on every path it can take."""

import numpy as np
import pytest
import torch

from ops import METRICS
from ops.cpu import build
from ops.sets import certified
from ops.sets import index as module
from ops.sets.index import ExactIndex, exact_search

PATHS = ("compiled", "int8", "float32", "plain float32", "float64")


def compile_or_skip():
    if build.kernel("es_scan") is None:
        pytest.skip("no compiled search")


@pytest.fixture
def take(monkeypatch):
    """Make the search take one of its paths."""

    def choose(path):
        if path == "compiled":
            compile_or_skip()
            monkeypatch.setattr(module, "eight_bits", lambda: True)  # right where it is slow, too
            return
        monkeypatch.setattr(module, "eight_bits", lambda: False)
        monkeypatch.setattr(certified, "int_mm_pays", lambda: path == "int8")
        if path != "float32":
            monkeypatch.setattr(build, "kernel", lambda *_: None)
        if path == "float64":
            search = certified.search_torch
            monkeypatch.setattr(certified, "search_torch", lambda *a: search(*a[:-1], "float64"))

    return choose


def brute_force(queries, keys, metric):
    """All costs (M, N) in float64, from differences rather than expanded squares."""
    x, y = torch.as_tensor(queries).double(), torch.as_tensor(keys).double()
    if metric == "euclidean":
        return torch.stack([(row - y).square().sum(1) for row in x])
    products = x @ y.T
    if metric == "dot":
        return -products
    norms = x.norm(dim=1, keepdim=True) * y.norm(dim=1)
    return -torch.where(norms > 0, products / norms, 0.0)


def check(queries, keys, K, metric, found=None, **options):
    """Every chosen neighbor must cost what the true one of its rank costs."""
    values, indices = found or exact_search(queries, keys, K, metric, **options)
    costs = brute_force(queries, keys, metric)
    chosen = costs.gather(1, indices)
    best = costs.sort(dim=1).values[:, :K]
    size = max(1e-30, costs.abs().max().item())
    torch.testing.assert_close(chosen, best, rtol=1e-9, atol=1e-11 * size)
    shown = chosen if metric == "euclidean" else -chosen
    torch.testing.assert_close(values.double(), shown, rtol=1e-6, atol=1e-6 * size)
    assert all(len(set(row)) == K for row in indices.tolist())


def draw(kind, rows, features, generator):
    """Data that are random, clustered, duplicated, constant, nearly tied, ..."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "normal":
        return normal(rows, features)
    if kind == "uniform":
        return torch.rand(rows, features, generator=generator) + 3
    if kind == "clustered":  # far from 0 and from each other, tight inside
        centers = 100 * normal(5, features)
        return centers[torch.randint(5, (rows,), generator=generator)] + 1e-3 * normal(
            rows, features
        )
    if kind == "duplicated":
        few = normal(7, features)
        return few[torch.randint(7, (rows,), generator=generator)]
    if kind == "constant":
        return torch.full((rows, features), 0.7)
    if kind == "near ties":  # distances that differ in the last bits of float32
        base = normal(1, features).expand(rows, -1)
        return base * (1 + 1e-7 * torch.arange(rows).view(-1, 1) % 5)
    if kind == "heavy tails":
        return normal(rows, features) * torch.exp(4 * normal(rows, 1))
    if kind == "zeros":
        data = normal(rows, features)
        data[::3] = 0
        return data
    if kind == "sparse":
        return normal(rows, features) * (torch.rand(rows, features, generator=generator) < 0.1)
    raise AssertionError(kind)


KINDS = (
    "normal",
    "uniform",
    "clustered",
    "duplicated",
    "constant",
    "near ties",
    "heavy tails",
    "zeros",
    "sparse",
)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_agrees_with_a_float64_brute_force(path, kind, metric, take):
    take(path)
    generator = torch.Generator().manual_seed(len(kind) * 7 + len(metric))
    keys, queries = draw(kind, 311, 19, generator), draw(kind, 21, 19, generator)
    queries[:3] = keys[[5, 100, 310]]
    check(queries, keys, 7, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_every_dtype(path, dtype, metric, take):
    take(path)
    generator = torch.Generator().manual_seed(1)
    if dtype.is_floating_point:
        keys, queries = (torch.randn(n, 13, generator=generator).to(dtype) for n in (150, 20))
    else:
        low, high = {
            torch.uint8: (0, 256),
            torch.int8: (-128, 128),
            torch.int64: (-(2**40), 2**40),
            torch.int16: (-999, 999),
            torch.bool: (0, 2),
        }[dtype]
        keys, queries = (
            torch.randint(low, high, (n, 13), generator=generator).to(dtype) for n in (150, 20)
        )
    check(queries, keys, 5, metric)
    values, _ = exact_search(queries, keys, 5, metric)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_integers_are_exact_and_ties_go_to_the_lower_index(take):
    generator = torch.Generator().manual_seed(2)
    keys = torch.randint(0, 3, (500, 4), generator=generator).to(torch.uint8)  # many ties
    queries = torch.randint(0, 3, (50, 4), generator=generator).to(torch.uint8)
    costs = brute_force(queries, keys, "euclidean")
    expected = costs.sort(dim=1, stable=True)
    for path in PATHS:
        take(path)
        for rows in (keys, keys.float()):
            values, indices = exact_search(queries.to(rows.dtype), rows, 40)
            assert torch.equal(values.double(), expected.values[:, :40]), path
            assert torch.equal(indices, expected.indices[:, :40]), path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("m", "n", "d", "K"),
    [(1, 1, 1, 1), (5, 1, 3, 1), (3, 48, 4, 48), (9, 97, 5, 97), (130, 49, 1, 2), (2, 700, 260, 3)],
)
def test_shapes(path, m, n, d, K, take):
    take(path)
    generator = torch.Generator().manual_seed(3)
    keys, queries = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    check(queries, keys, K, "euclidean")
    check(*((255 * x.sigmoid()).to(torch.uint8) for x in (queries, keys)), K, "cosine")


@pytest.mark.parametrize("path", PATHS)
def test_a_small_budget_gives_the_same_answer(path, take):
    take(path)
    generator = torch.Generator().manual_seed(4)
    keys, queries = (torch.randn(n, 24, generator=generator) for n in (900, 100))
    values, indices = exact_search(queries, keys, 12)
    small_values, small_indices = exact_search(queries, keys, 12, max_bytes=1 << 14)
    assert torch.equal(indices, small_indices)
    torch.testing.assert_close(values, small_values)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_very_small_and_very_large_numbers(path, size, take):
    take(path)
    generator = torch.Generator().manual_seed(5)
    keys, queries = (torch.randn(n, 9, generator=generator) * size for n in (200, 10))
    for metric in METRICS:
        _, indices = exact_search(queries.double(), keys.double(), 4, metric)
        check(queries, keys, 4, metric, exact_search(queries.double(), keys.double(), 4, metric))
        assert torch.equal(exact_search(queries, keys, 4, metric)[1], indices)


def test_float32_precision_gives_the_same_neighbors():
    generator = torch.Generator().manual_seed(6)
    keys, queries = (torch.randn(n, 40, generator=generator) for n in (900, 50))
    index = ExactIndex(keys, precision="float32")
    values, indices = index.search(queries, 9)
    assert "float32" in index.path
    expected = exact_search(queries, keys, 9)
    assert torch.equal(indices, expected[1])
    assert torch.equal(values, expected[0])


def test_low_matmul_precision_of_the_user_does_not_matter_and_is_left_alone():
    torch.set_float32_matmul_precision("medium")
    try:
        generator = torch.Generator().manual_seed(7)
        keys, queries = (torch.randn(n, 64, generator=generator) for n in (400, 30))
        check(queries, keys, 5, "dot", precision="float32")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_index_is_searched_again():
    generator = torch.Generator().manual_seed(8)
    keys = torch.randn(300, 16, generator=generator)
    index = ExactIndex(keys, "cosine")
    for K in (1, 5, 300):
        queries = torch.randn(40, 16, generator=generator)
        check(queries, keys, K, "cosine", index.search(queries, K))


def test_data_that_eight_bits_do_not_separate_fall_back(monkeypatch):
    compile_or_skip()
    monkeypatch.setattr(module, "eight_bits", lambda: True)
    generator = torch.Generator().manual_seed(9)
    keys = 100 * torch.randn(2, 12, generator=generator)
    keys = keys[torch.arange(9000) % 2] + 0.3 * torch.randn(9000, 12, generator=generator)
    index = ExactIndex(keys)
    found = index.search(keys[:1100], 2)
    assert "float32" in index.path
    check(keys[:40], keys, 2, "euclidean", tuple(part[:40] for part in found))


def test_strided_rows_and_untouched_input():
    generator = torch.Generator().manual_seed(10)
    keys, queries = (torch.randn(8, n, generator=generator).T for n in (90, 11))
    before = keys.clone(), queries.clone()
    check(queries, keys, 6, "euclidean")
    assert torch.equal(keys, before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float16])
def test_memory_mapped_keys(tmp_path, dtype):
    rng = np.random.default_rng(0)
    keys = (rng.random((2000, 8)) * 250).astype(dtype)
    queries = (rng.random((60, 8)) * 250).astype(dtype)
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    found = exact_search(queries, mapped, 10, max_bytes=1 << 14)  # many chunks
    check(queries.astype(np.float64), keys.astype(np.float64), 10, "euclidean", found)


def test_no_queries():
    values, indices = exact_search(torch.empty(0, 3), torch.randn(5, 3), 2)
    assert values.shape == indices.shape == (0, 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_must_be_finite(path, bad, take):
    take(path)
    keys, queries = torch.randn(50, 4), torch.randn(20, 4)
    keys[20, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        exact_search(queries, keys, 3)
    with pytest.raises(ValueError, match="finite"):
        exact_search(keys, queries, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"K": 0}, r"K must lie in 1 … 6, the number of keys \(got 0\)"),
        ({"K": 7}, r"K must lie in 1 … 6, the number of keys \(got 7\)"),
        ({"metric": "l1"}, "metric must be one of cosine, euclidean, dot"),
        ({"precision": "half"}, "precision must be one of auto, float32"),
        ({"queries": torch.zeros(2, 5)}, r"queries must be \(M, 3\) like the keys, got \(2, 5\)"),
        ({"keys": torch.zeros(0, 3)}, r"keys must be \(N, D\), not empty"),
    ],
)
def test_bad_arguments(arguments, words):
    defaults = {"queries": torch.zeros(2, 3), "keys": torch.zeros(6, 3), "K": 1}
    with pytest.raises(ValueError, match=words):
        exact_search(**(defaults | arguments))
