"""The progressive search against a float64 brute force, and its bounds against their formulas."""

import math

import numpy as np
import pytest
import torch

from ops import METRICS
from ops.sets import index as module
from ops.sets import progressive
from ops.sets.index import ExactIndex
from ops.sets.keys import Keys

pytestmark = pytest.mark.skipif(
    not progressive.supported(), reason="no compiler, or no processor with AVX2"
)
KINDS = (
    "smooth",
    "normal",
    "clustered",
    "duplicated",
    "near ties",
    "heavy tails",
    "hot axis",
    "zeros",
    "low rank",
    "far away",
)


@pytest.fixture
def always(monkeypatch):
    """Take the progressive way however few the keys, and whether it pays or not."""
    for name in ("MIN_KEYS", "MIN_QUERIES", "MIN_FEATURES"):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(progressive, "hangs_together", lambda sample: True)
    monkeypatch.setattr(progressive, "prunes", lambda *_: True)


def draw(kind, rows, features, generator):
    """Rows of one kind."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "smooth":  # neighboring features hang together
        return normal(rows, features).cumsum(1)
    if kind == "normal":
        return normal(rows, features)
    if kind == "clustered":
        centers = 100 * normal(5, features)
        return centers[torch.randint(5, (rows,), generator=generator)] + 1e-3 * normal(
            rows, features
        )
    if kind == "duplicated":
        return normal(7, features)[torch.randint(7, (rows,), generator=generator)]
    if kind == "near ties":
        base = normal(1, features).expand(rows, -1)
        return base * (1 + 1e-7 * (torch.arange(rows).view(-1, 1) % 5))
    if kind == "heavy tails":
        return normal(rows, features) * torch.exp(4 * normal(rows, 1))
    if kind == "hot axis":
        data = 1e-3 * normal(rows, features)
        data[:, features // 2] += 1000 * normal(rows)
        return data
    if kind == "zeros":
        data = normal(rows, features).cumsum(1)
        data[::3] = 0
        return data
    if kind == "low rank":  # nothing is left beside a few axes: the rest cancels
        return normal(rows, 3) @ normal(3, features)
    if kind == "far away":
        return normal(rows, features).cumsum(1) + 1e4
    raise AssertionError(kind)


def costs_of(queries, keys, metric):
    """All costs (M, N) in float64, from differences rather than expanded squares."""
    x, y = queries.double(), keys.double()
    if metric == "euclidean":
        return torch.stack([(row - y).square().sum(1) for row in x])
    products = x @ y.T
    if metric == "dot":
        return -products
    norms = x.norm(dim=1, keepdim=True) * y.norm(dim=1)
    return -torch.where(norms > 0, products / norms, 0.0)


def check(index, queries, keys, K, metric):
    """Neighbors must cost what the true ones cost, be different, and lower indices win ties."""
    values, indices = index.search(queries, K)
    assert "principal axes" in index.path
    costs = costs_of(queries, keys, metric)
    chosen = costs.gather(1, indices)
    size = max(1e-30, costs.abs().max().item())
    torch.testing.assert_close(
        chosen, costs.sort(dim=1).values[:, :K], rtol=1e-9, atol=1e-11 * size
    )
    assert all(len(set(row)) == K for row in indices.tolist())
    shown = chosen if metric == "euclidean" else -chosen
    torch.testing.assert_close(values.double(), shown, rtol=1e-6, atol=1e-6 * size)
    return values, indices


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("features", [5, 70, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_a_float64_brute_force(kind, features, metric, always):
    generator = torch.Generator().manual_seed(len(kind) * 7 + features)
    keys, queries = (draw(kind, n, features, generator) for n in (1301, 37))
    queries[:3] = keys[[5, 100, 1300]]
    for K in (1, 10):
        check(ExactIndex(keys, metric), queries, keys, K, metric)
    whole = ExactIndex(keys, metric)  # by products of whole rows
    whole._rotation = lambda *_: None
    found = ExactIndex(keys, metric).search(queries, 20)
    expected = whole.search(queries, 20)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float64, torch.float16])
def test_every_dtype_and_a_strided_layout(dtype, metric, always):
    generator = torch.Generator().manual_seed(1)
    keys, queries = (draw("smooth", n, 200, generator) for n in (900, 30))
    scale = 100 / keys.abs().max() if not dtype.is_floating_point else 1.0
    keys, queries = ((x * scale).clamp(-100, 100) for x in (keys, queries))
    if dtype == torch.uint8:
        keys, queries = keys + 100, queries + 100
    keys, queries = (x.to(dtype) for x in (keys, queries))
    check(ExactIndex(keys, metric), queries, keys, 7, metric)
    check(ExactIndex(keys.T.contiguous().T, metric), queries, keys, 7, metric)


def test_integers_with_many_ties_give_the_lower_indices(always):
    generator = torch.Generator().manual_seed(2)
    keys = torch.randint(0, 3, (2000, 6), generator=generator).to(torch.uint8)
    queries = torch.randint(0, 3, (50, 6), generator=generator).to(torch.uint8)
    expected = costs_of(queries, keys, "euclidean").sort(dim=1, stable=True)
    values, indices = ExactIndex(keys).search(queries, 25)
    assert torch.equal(values.double(), expected.values[:, :25])
    assert torch.equal(indices, expected.indices[:, :25])


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_that_are_not_kept_mapped_files_and_sorted_keys(tmp_path, metric, always):
    generator = torch.Generator().manual_seed(3)
    keys, queries = (draw("smooth", n, 140, generator) for n in (5000, 40))
    keys = keys[keys[:, -1].argsort()]
    found = check(ExactIndex(keys, metric), queries, keys, 9, metric)
    np.save(tmp_path / "keys.npy", keys.numpy())
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    for rows in (keys, mapped):
        index = ExactIndex(rows, metric, max_bytes=1 << 18)  # several chunks
        again = check(index, queries, keys, 9, metric)
        assert not index._sketched
        assert torch.equal(again[1], found[1])


@pytest.mark.parametrize("many", [1, 40])
def test_a_few_queries_that_tie_with_every_key_meet_all_and_more_are_left(
    many, always, monkeypatch
):
    generator = torch.Generator().manual_seed(4)
    keys, queries = (draw("smooth", n, 150, generator) for n in (3000, 60))
    queries[7 : 7 + many] = 0
    asked = []
    everything = ExactIndex._search_everything
    monkeypatch.setattr(
        ExactIndex,
        "_search_everything",
        lambda self, rows, *rest: asked.append(rows) or everything(self, rows, *rest),
    )
    _, indices = check(ExactIndex(keys, "cosine"), queries, keys, 4, "cosine")
    assert indices[7 : 7 + many].tolist() == [[0, 1, 2, 3]] * many
    patience = progressive._PATIENCE
    assert [len(rows) for rows in asked] == ([many - patience] if many > patience else [])
    chunks = ExactIndex(keys, "cosine", max_bytes=1 << 18)  # several stretches of keys
    assert torch.equal(chunks.search(queries, 4)[1], indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_sketches_never_promise_too_much(kind, metric, always):
    """unit (|p - q| - slip_x - slip_y) <= |x - y|, which is what all else rests on."""
    generator = torch.Generator().manual_seed(5)
    keys, queries = (draw(kind, n, 300, generator) for n in (400, 50))
    longest = keys.double().norm(dim=1).max().item() * (1 + 1e-12)
    rows = Keys(keys, torch.float32, torch.device("cpu"))
    rotation = progressive.fit_rotation(rows, metric, longest)
    mine, squares = rotation.sketch(queries, rotation.stages, keys=False)
    theirs, _ = rotation.sketch(keys, rotation.stages, keys=True)
    costs = costs_of(queries, keys, metric)
    true = {
        "euclidean": costs,
        "cosine": 2 + 2 * costs,
        "dot": squares[:, None] + longest**2 + 2 * costs,
    }[metric]
    true = true.clamp(min=0).sqrt()
    for stage, (p, p_square, p_slip), (q, q_square, q_slip) in zip(
        rotation.stages, mine, theirs, strict=True
    ):
        p, q = p.double(), q.double()
        assert torch.equal(p.square().sum(1), p_square.double())
        assert torch.equal(q.square().sum(1), q_square.double())
        slip = p_slip.double()[:, None] + q_slip.double()
        bound = stage.unit * (torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist") - slip)
        tolerance = 1e-7 * (true.max() if metric == "euclidean" else max(1.0, longest))
        assert (bound <= true + tolerance).all()


def test_smooth_data_take_it_of_themselves_and_noise_does_not():
    generator = torch.Generator().manual_seed(6)
    keys, queries = (draw("smooth", n, 512, generator) for n in (9000, 2100))
    index = ExactIndex(keys)
    index.search(queries[:50], 3)
    assert "principal axes" not in index.path  # too few queries to fit for
    values, indices = index.search(queries, 3)
    assert "principal axes" in index.path
    again = index.search(queries[:50], 3)  # sketches are there by now
    assert "principal axes" in index.path
    assert torch.equal(again[1], indices[:50])
    torch.testing.assert_close(
        values[:40].double(), costs_of(queries[:40], keys, "euclidean").sort(1).values[:, :3]
    )
    noise = ExactIndex(draw("normal", 9000, 512, generator))
    noise.search(queries, 3)
    assert "principal axes" not in noise.path
    exact = ExactIndex(keys, precision="float32")
    exact.search(queries, 3)
    assert "float32" in exact.path


@pytest.mark.parametrize("metric", METRICS)
def test_constant_keys_fall_back(metric):
    keys, queries = torch.ones(9000, 130), torch.zeros(2100, 130)
    index = ExactIndex(keys, metric)
    _, indices = index.search(queries, 2)
    assert indices.tolist() == [[0, 1]] * 2100
    assert "principal axes" not in index.path


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_must_be_finite(bad, always):
    generator = torch.Generator().manual_seed(7)
    keys, queries = (draw("smooth", n, 130, generator) for n in (6000, 20))
    for rows in (keys, queries):
        saved = rows[11, 5].item()
        rows[11, 5] = bad
        with pytest.raises(ValueError, match="finite"):
            ExactIndex(keys).search(queries, 3)
        rows[11, 5] = saved


def test_the_stride_visits_every_key():
    for n in (1, 2, 3, 48, 97, 1000, 5041):
        step = progressive._stride(n)
        assert sorted(place * step % n for place in range(n)) == list(range(n))
