"""The search and the aggregation against loops in float64, on the compiled and the plain path."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from layers import Conv2d_NN
from ops import METRICS
from ops.budget import DEFAULT_MAX_BYTES, chunk_bytes
from ops.cpu import build
from ops.maps import locations
from ops.maps.aggregate import aggregate_neighbors
from ops.maps.attend import attend_neighbors
from ops.maps.locations import location_neighbors
from ops.maps.search import nearest_neighbors
from ops.topk import topk_rows

needs_compiler = pytest.mark.skipif(
    build.library() is None, reason=f"no compiled kernels: {build.status()}"
)
PATHS = ["0", pytest.param("1", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and wait for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PATHS, ids=lambda p: {"0": "torch", "1": "compiled"}[p])
def path(request, monkeypatch):
    monkeypatch.setenv("NEIGHBORS_NATIVE", request.param)
    torch.manual_seed(0)
    return request.param


def scores_of(queries, keys, metric):
    """All pairs in float64, larger is nearer."""
    q, k = queries.double(), keys.double()
    if metric == "euclidean":
        return -(q[:, :, None] - k[:, None]).square().sum(-1)
    if metric == "cosine":
        q, k = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q, k))
    return (q[:, :, None] * k[:, None]).sum(-1)


def check_search(queries, keys, K, metric, *, own=None, exclude=False, candidates=None, **options):
    """Compare with the sorted rows of all scores: best first, each within 1e-6 of its rank."""
    values, indices = nearest_neighbors(
        queries,
        keys,
        K,
        metric,
        self_index=own,
        exclude_self=exclude,
        candidates=candidates,
        **options,
    )
    b, n, c = keys.shape
    rows = queries
    if queries is None:
        rows = keys.gather(1, own.expand(b, -1)[..., None].expand(-1, -1, c))
    m = rows.shape[1]
    assert values.shape == indices.shape == (b, m, K)
    assert indices.dtype == torch.int64
    scores = scores_of(rows, keys, metric)
    tolerance = 1e-6 * max(1.0, float(scores.abs().max()))
    signed = -values.double() if metric == "euclidean" else values.double()
    torch.testing.assert_close(signed, scores.gather(2, indices), rtol=0, atol=4 * tolerance)
    assert all(len(set(row)) == K for row in indices.view(-1, K).tolist())
    allowed = torch.full((b, m, n), -math.inf, dtype=torch.float64)
    pool = torch.arange(n) if candidates is None else candidates
    pool = pool.expand(b, -1)[:, None].expand(-1, m, -1)
    allowed.scatter_(2, pool, scores.gather(2, pool))
    first = 0
    if own is not None:
        allowed.scatter_(2, own.expand(b, m)[..., None], -math.inf)
        if not exclude:
            first = 1
            assert torch.equal(indices[..., 0], own.expand(b, m))
    best = allowed.sort(dim=2, descending=True).values[..., : K - first]
    got = allowed.gather(2, indices[..., first:])
    torch.testing.assert_close(got, best, rtol=0, atol=tolerance)


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


def test_long_rows_get_more_room_but_not_without_bound():
    cpu = torch.device("cpu")
    assert chunk_bytes(cpu, row_bytes=400) == DEFAULT_MAX_BYTES["cpu"]
    assert chunk_bytes(cpu, row_bytes=60_000) == 512 * 60_000
    assert chunk_bytes(cpu, row_bytes=1 << 30) == 64 << 20
    assert chunk_bytes(cpu, max_bytes=7, row_bytes=60_000) == 7


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
def test_ties_go_to_the_lower_index(path, metric):
    keys = torch.randint(0, 2, (2, 900, 2)).float()  # four kinds of keys, exact scores
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]).expand(2, -1, -1)
    scores = scores_of(queries, keys, metric).float()
    expected = scores.sort(dim=2, descending=True, stable=True).indices[..., :30]
    assert torch.equal(nearest_neighbors(queries, keys, 30, metric)[1], expected)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("n", "K"), [(1, 1), (9, 9), (100, 3), (1156, 9), (6000, 100), (9000, 1)])
def test_topk_rows_is_a_stable_sort(path, n, K, largest):
    for rows in (torch.randn(6, n), torch.randn(6, n).mul(3).round(), torch.zeros(6, n)):
        ordered = rows.sort(dim=1, descending=largest, stable=True)
        values, indices = topk_rows(rows, K, largest)
        assert torch.equal(values, ordered.values[:, :K])
        assert torch.equal(indices, ordered.indices[:, :K])


def test_topk_rows_takes_views_and_any_leading_shape(path):
    s = torch.randn(3, 4, 200)
    for view in (s, s[..., ::2], s.transpose(0, 1), s[..., 50:], s[0]):
        values, indices = topk_rows(view, 5)
        torch.testing.assert_close(values, view.topk(5).values)
        torch.testing.assert_close(view.gather(-1, indices), values)
    with pytest.raises(ValueError, match="K=201 for 200"):
        topk_rows(s, 201)


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


@needs_compiler
def test_indices_out_of_range_are_refused_not_followed():
    x, w = torch.randn(1, 5, 3), torch.randn(2, 3, 2)
    for bad in (5, -1):
        with pytest.raises(IndexError):
            aggregate_neighbors(x, torch.full((1, 4, 2), bad), w)
        with pytest.raises(IndexError):
            nearest_neighbors(None, x, 2, self_index=torch.tensor([bad]))


# ---------------------------------------------------------------------------------------- location


def slow_locations(shape, K, metric, padding, stride, candidates):
    axes = [-1 + 2 * torch.arange(s).double() / max(1, s - 1) for s in shape]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    grid = torch.arange(len(coords)).view(shape)
    inner = grid[tuple(slice(padding, s - padding, stride) for s in shape)].flatten()
    rows = []
    for i in inner.tolist():
        if metric == "euclidean":
            s = -(coords - coords[i]).square().sum(1)
        else:
            s = F.normalize(coords, dim=1) @ F.normalize(coords[i], dim=0)
        pool = set(range(len(coords)) if candidates is None else candidates.tolist()) - {i}
        order = sorted(pool, key=lambda j: (-round(float(s[j]), 9), j))
        rows.append(sorted([i, *order[: K - 1]]))
    return torch.tensor(rows)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("shape", "padding", "stride"),
    [
        ((7,), 1, 1),
        ((6, 6), 1, 1),
        ((9, 5), 2, 2),
        ((1, 4), 0, 1),
        ((3, 30), 0, 1),
        ((12, 13), 1, 3),
    ],
)
def test_locations_match_the_formula(metric, shape, padding, stride):
    n = math.prod(shape)
    for K, candidates in ((min(4, n), None), (min(9, n), None), (3, torch.arange(0, n, 2))):
        if candidates is not None and len(candidates) < 3:
            continue
        got = location_neighbors(
            shape, K, metric, padding=padding, stride=stride, candidates=candidates
        )
        assert torch.equal(got, slow_locations(shape, K, metric, padding, stride, candidates))


def test_locations_are_kept_and_bounded(monkeypatch):
    cache = locations._BoundedCache(20_000)
    monkeypatch.setattr(locations, "_LOCATIONS", cache)
    for side in range(5, 25):
        first = location_neighbors((side, side), 9, "euclidean")
        first.zero_()  # what is handed out is a copy
        assert location_neighbors((side, side), 9, "euclidean").any()
        assert cache.nbytes() <= 20_000 or len(cache.items) == 1


# ------------------------------------------------------------------------------------- aggregation


def slow_aggregate(x, indices, weight, bias):
    b, m, K = x.shape[0], *indices.shape[-2:]
    indices = indices.expand(b, m, K)
    rows = []
    for i, j in itertools.product(range(b), range(m)):
        taps = [weight[:, :, t] @ x[i, indices[i, j, t]] for t in range(K)]
        rows.append(sum(taps) + (0 if bias is None else bias))
    return torch.stack(rows).view(b, m, -1)


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


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


# --------------------------------------------------------------------------------------- attention


def slow_attend(q, k, v, indices, weight, bias, metric, self_score, keep):
    b, m, K = k.shape[0], *indices.shape[-2:]
    out = []
    for i, j in itertools.product(range(b), range(m)):
        chosen = indices.expand(b, m, K)[i, j].tolist()
        pairs = [(k[i, j], q[i, t]) for t in chosen]
        if metric == "euclidean":
            s = [-(a - c).square().sum() for a, c in pairs]
        elif metric == "cosine":
            s = [F.cosine_similarity(a, c, dim=0) for a, c in pairs]
        else:
            s = [a @ c for a, c in pairs]
        if self_score is not None:
            s[0] = torch.full_like(s[0], self_score)
        a = torch.stack(s).softmax(0) * keep[i, j]
        out.append(sum(a[t] * weight[:, t] * v[i, chosen[t]] for t in range(K)) + bias)
    return torch.stack(out).view(b, m, -1)


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


# ----------------------------------------------------------------------- layers on top of all this


def test_layouts_agree_and_the_input_stays(path):
    layer = Conv2d_NN(5, 6, K=4)
    wide = torch.randn(2, 5, 9, 14)
    for x in (wide, wide[..., ::2], wide.to(memory_format=torch.channels_last), wide.mT):
        before = x.clone()
        (a,) = leaves(x)
        (b,) = leaves(x.contiguous())
        ya, yb = layer(x), layer(x.contiguous())
        torch.testing.assert_close(ya, yb)
        layer(a).square().sum().backward()
        layer(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        assert torch.equal(x, before)


def test_autocast_ranks_in_float32(path):
    layer = Conv2d_NN(8, 8, K=5)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.conv1d_layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
    keys, _ = layer.pad_and_flatten(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.find_neighbors(keys, (9, 9)), layer.find_neighbors(keys, (9, 9)))
        values, _ = nearest_neighbors(keys, keys, 3)
    assert torch.equal(values, nearest_neighbors(keys, keys, 3)[0])


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


OPTIONS = [
    {},
    {"magnitude_type": "euclidean", "stride": 2},
    {"sampling_type": "spatial", "num_samples": 3},
    {"similarity_type": "Loc", "magnitude_type": "euclidean"},
    {"similarity_type": "Loc_Col", "aggregation_type": "Loc_Col"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_export_gives_the_eager_answer(options):
    torch.manual_seed(0)
    layer, x = Conv2d_NN(4, 6, K=5, **options).eval(), torch.randn(2, 4, 8, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compile_fullgraph_gives_the_eager_answer(backend):
    torch.manual_seed(0)
    layer, x = Conv2d_NN(4, 6, K=5), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    (a,), (b,) = leaves(x), leaves(x)
    ya, yb = compiled(a), layer(b)
    torch.testing.assert_close(ya, yb)
    ya.square().sum().backward()
    yb.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


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
        (ops.location, (torch.empty(0), [4, 4], 3, "euclidean", 1, 1, False)),
    ):
        torch.library.opcheck(op.default, args, test_utils=utilities)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = Conv2d_NN(4, 6, K=5), torch.randn(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 64 * 100 * 4 + 2 * 2 * 64 * 5 * 4 * 6


class MaterializedNN(Conv2d_NN):
    """The layer step by step: all similarities at once, the input expanded K-fold."""

    def forward(self, x):
        b, c, h, w = x.shape
        keys = F.pad(x, [self.padding] * 4).flatten(2)  # (B, C, N)
        own = self.self_index((h + 2, w + 2), x.device)
        features = F.normalize(keys.detach(), dim=1)
        similarity = features.mT @ features
        similarity.diagonal(dim1=1, dim2=2).fill_(2.0)
        indices = similarity.topk(self.K, dim=2).indices[:, own]  # (B, M, K)
        at = indices[:, None].expand(-1, c, -1, -1)
        taps = keys.unsqueeze(3).expand(-1, -1, -1, self.K).gather(2, at).flatten(2)
        return self.conv1d_layer(taps).view(b, -1, h, w)


def test_training_gives_the_losses_of_the_materialized_layer(path):
    losses = []
    for layer in (MaterializedNN, Conv2d_NN):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            layer(3, 16, K=4),
            torch.nn.Tanh(),
            layer(16, 4, K=4),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        x, target = torch.randn(16, 3, 6, 6), torch.randint(4, (16,))
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    expected, got = map(torch.stack, losses)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


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


def test_the_same_sums_again(path):
    layer, x = Conv2d_NN(16, 20, K=9), torch.randn(5, 16, 12, 12)
    runs = []
    for _ in range(3):
        (a,) = leaves(x)
        layer.zero_grad()
        y = layer(a)
        y.square().sum().backward()
        runs.append([y.detach(), a.grad, layer.conv1d_layer.weight.grad.clone()])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def test_memory_does_not_grow_with_changing_sizes(path):
    try:
        resident_mib()
    except OSError:
        pytest.skip("resident memory is read from /proc")
    layers = [Conv2d_NN(8, 8, K=9), Conv2d_NN(8, 8, K=9, similarity_type="Loc")]

    def steps(count):
        for i in range(count):
            x = torch.randn(2, 8, 6 + i % 17, 6 + i * 5 % 19, requires_grad=True)
            layers[i % 2](x).sum().backward()

    steps(60)
    before = resident_mib()
    steps(200)
    assert resident_mib() - before < 24


# ------------------------------------------------------------------------------------ the compiler


def test_without_a_compiler_all_still_works(monkeypatch, tmp_path):
    monkeypatch.setenv("NEIGHBORS_NATIVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "_found", {})
    monkeypatch.setenv("NEIGHBORS_NATIVE", "1")
    assert build.library() is None
    assert build.status().startswith("absent: no C++ compiler")
    check_search(None, torch.randn(1, 20, 3), 4, "cosine", own=torch.arange(20))
    monkeypatch.setenv("NEIGHBORS_NATIVE", "require")
    with pytest.raises(build.NativeError, match="no C\\+\\+ compiler"):
        build.library()


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("NEIGHBORS_NATIVE_CACHE", str(cache))
    monkeypatch.setenv("NEIGHBORS_NATIVE", "1")
    monkeypatch.setattr(build, "_found", {})
    assert build.library() is None
    assert "out of order" in build.status()
    assert list(cache.iterdir()) == []
