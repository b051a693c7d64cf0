"""Growing layers: identities, a slow reference for growth, storage, bad input."""

import pytest
import torch

import layers.dynamic as dynamic
from layers.dynamic import PREDICTORS, CentersFull, DynamicNeighbors
from ops.centers.distances import KERNELS, DistanceKernel


def blobs(count=400, features=20, classes=4, seed=0, noise=0.45):
    """Overlapping clouds in [0, 1]^D: some samples are always wrong."""
    generator = torch.Generator().manual_seed(seed)
    modes = torch.rand(3 * classes, features, generator=generator)
    mode = torch.randint(3 * classes, (count,), generator=generator)
    x = modes[mode] + noise * torch.randn(count, features, generator=generator)
    return (x - x.min()) / (x.max() - x.min()), mode % classes


def curve(count=300, seed=0):
    """A function of the plane with two outputs."""
    x = 30 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([(x[:, 0] / 6).sin(), (x[:, 1] / 9).cos()], dim=1)


def slow_growth(x, y, batches, kernel, *, predictor, K, target, max_count, limit, tolerance=None):
    """The algorithm in its simplest form: all recomputed in float64; returns indices of centers."""
    x, kept = x.double(), []

    def right(part):
        weights = kernel(x[kept], x[part], relative=True)
        if predictor != "interp":
            count = min(1 if predictor == "nearest" else K, len(kept))
            cut = weights.sort(dim=1, descending=True).values[:, count - 1 : count]
            weights = weights * (weights >= cut)
        if tolerance is None:
            votes = torch.zeros(len(part), int(y.max()) + 1).double()
            for k, center in enumerate(kept):
                votes[:, y[center]] += weights[:, k]
            return votes.argmax(dim=1) == y[part]
        values = weights @ y[kept].double() / weights.sum(dim=1, keepdim=True)
        return (values - y[part]).norm(dim=1) < tolerance

    for part in batches:
        if not kept:
            kept += part.tolist()
            continue
        for _ in range(max_count):
            wrong = part[~right(part)]
            if len(wrong) == 0 or len(kept) >= limit:
                break
            kept += wrong.tolist()[: limit - len(kept)]
            if right(part).double().mean() >= target:
                break
    return kept


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("kernel_type", KERNELS)
def test_growth_equals_the_slow_algorithm(kernel_type, predictor):
    x, y = blobs()
    rule = {"target_accuracy": 0.95, "max_count": 2, "max_neighbors": 230}
    kernel = DistanceKernel(kernel_type)
    kept = slow_growth(
        x,
        y,
        torch.arange(len(x)).split(32),
        kernel,
        predictor=predictor,
        K=5,
        target=0.95,
        max_count=2,
        limit=230,
    )
    layer = DynamicNeighbors(
        num_features=20, num_classes=4, kernel=kernel, predictor=predictor, K=5, **rule
    )
    events = [event for part in x.split(96) for event in layer.grow(part, _of(y, part, x), 32)[0]]
    torch.testing.assert_close(layer.centers, x[kept], rtol=0, atol=0)
    assert layer.targets.tolist() == y[kept].tolist()
    assert sum(event.added for event in events) == layer.num_centers
    assert len(events) == 13
    assert events[0].rounds == 1
    assert max(event.rounds for event in events) <= 2
    assert events[-1].total == 16


def _of(y, part, x):
    """Labels of a slice of x."""
    first = (part.storage_offset() - x.storage_offset()) // x.shape[1]
    return y[first : first + len(part)]


@pytest.mark.parametrize("kernel_type", ["euclidean", "influence_cone"])
def test_regression_growth_equals_the_slow_algorithm(kernel_type):
    x, y = curve()
    kernel = DistanceKernel(kernel_type)
    kept = slow_growth(
        x,
        y,
        torch.arange(300).split(32),
        kernel,
        predictor="interp",
        K=0,
        target=0.8,
        max_count=3,
        limit=10**6,
        tolerance=0.2,
    )
    layer = DynamicNeighbors(
        num_features=2, num_outputs=2, kernel=kernel, target_accuracy=0.8, tolerance=0.2
    )
    layer.grow(x, y, 32)
    torch.testing.assert_close(layer.centers, x[kept], rtol=0, atol=0)
    assert 40 < layer.num_centers < 300


def test_one_call_equals_a_call_a_batch():
    x, y = blobs(seed=3)
    together = DynamicNeighbors(num_features=20, num_classes=4)
    apart = DynamicNeighbors(num_features=20, num_classes=4)
    events, outputs = together.grow(x, y, batch_size=50)
    assert [
        e for a, b in zip(x.split(50), y.split(50), strict=True) for e in apart.grow(a, b)[0]
    ] == (events)
    torch.testing.assert_close(together.centers, apart.centers, rtol=0, atol=0)
    assert outputs.shape == (400, 4)
    right = (outputs.argmax(dim=1) == y).split(50)
    assert [int(part.sum()) for part in right] == [event.correct for event in events]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("kernel_type", KERNELS)
def test_identities(kernel_type, predictor):
    x, y = blobs(120)
    layer = DynamicNeighbors(
        num_features=20, num_classes=4, kernel=DistanceKernel(kernel_type), predictor=predictor, K=3
    )
    layer.grow(x[:1], y[:1])
    assert (layer(x).argmax(dim=1) == y[0]).all(), "one center predicts its class everywhere"
    layer.grow(x[1:], y[1:])
    scores = layer(x)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(120))
    assert (scores >= 0).all()
    if kernel_type not in ("dot", "influence_cone"):
        found = layer(layer.centers).argmax(dim=1)
        assert found.tolist() == layer.targets.tolist(), "a duplicate has its center's class"
    order = torch.randperm(layer.num_centers)
    shuffled = DynamicNeighbors(
        num_features=20, num_classes=4, kernel=layer.kernel, predictor=predictor, K=3
    )
    shuffled.load_state_dict({"centers": layer.centers[order], "targets": layer.targets[order]})
    torch.testing.assert_close(shuffled(x), scores, rtol=1e-4, atol=1e-5)


def test_exponent_minus_eight_and_zero_vectors():
    x, y = blobs(90)
    x[::9] = 0
    for kernel_type in KERNELS:
        kernel = DistanceKernel(kernel_type, exponent=-8.0)
        layer = DynamicNeighbors(num_features=20, num_classes=4, kernel=kernel)
        layer.grow(x, y, 30)
        scores = layer(torch.cat([x, torch.zeros(1, 20), 1e4 * x[:1]]))
        assert scores.isfinite().all()
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(92))


def test_knn_with_all_centers_is_interp():
    x, y = blobs(200)
    kernel = DistanceKernel("euclidean")
    options = {"num_features": 20, "num_classes": 4, "kernel": kernel}
    interp = DynamicNeighbors(**options)
    interp.grow(x, y, 40)
    knn = DynamicNeighbors(**options, predictor="knn", K=10_000)
    knn.load_state_dict(interp.state_dict())
    torch.testing.assert_close(knn(x), interp(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel_type", ["cosine", "influence_cone"])
def test_featurize_splits_the_centers(kernel_type):
    x, y = blobs(200)
    layer = DynamicNeighbors(num_features=20, num_classes=4, kernel=DistanceKernel(kernel_type))
    layer.grow(x, y, 40)
    features = layer.featurize(x, splits=3)
    assert features.shape == (200, 12)
    torch.testing.assert_close(layer.featurize(x, splits=1), layer(x))
    if kernel_type == "cosine":
        n = layer.num_centers
        part = DynamicNeighbors(num_features=20, num_classes=4)
        chosen = slice(n // 3, 2 * n // 3)
        part.load_state_dict({"centers": layer.centers[chosen], "targets": layer.targets[chosen]})
        torch.testing.assert_close(part(x), features[:, 4:8])
    assert layer.featurize(x, splits=2 * layer.num_centers).isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 37, 1500])
def test_state_dict_round_trip(count, tmp_path):
    x, y = torch.rand(count, 6), torch.randint(3, (count,))
    layer = DynamicNeighbors(num_features=6, num_classes=3, kernel=DistanceKernel("euclidean"))
    if count:
        layer.grow(x, y)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    size = (tmp_path / "layer.pt").stat().st_size
    assert size < 32 * count + 4000, "spare capacity is not saved"
    other = DynamicNeighbors(num_features=6, num_classes=3, kernel=DistanceKernel("euclidean"))
    other.grow(torch.rand(50, 6), torch.randint(3, (50,)))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert other.num_centers == count
    if count:
        torch.testing.assert_close(other(x[:9]), layer(x[:9]), rtol=0, atol=0)
        other.grow(x + 1, y)  # goes on growing
        torch.testing.assert_close(other.centers[:count], layer.centers)


def test_state_dict_that_does_not_fit():
    layer = DynamicNeighbors(num_features=6, num_classes=3)
    with pytest.raises(RuntimeError, match="do not fit a layer of 6 features"):
        layer.load_state_dict({"centers": torch.rand(4, 5), "targets": torch.zeros(4).long()})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"centers": torch.rand(4, 6)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(layer.state_dict() | {"weight": torch.rand(2)})


def test_capacity_grows_by_doubling_and_max_neighbors_is_kept():
    layer = DynamicNeighbors(num_features=3, num_classes=2, max_neighbors=2500, target_accuracy=1.0)
    sizes = set()
    for _ in range(80):
        layer.grow(torch.randn(64, 3), torch.randint(2, (64,)))
        sizes.add(layer._centers.shape[0])
    assert layer.num_centers == 2500
    assert layer.full
    assert sizes == {1024, 2048, 2500}
    assert layer.grow(torch.randn(64, 3), torch.randint(2, (64,)))[0][0].added == 0


def test_first_batch_is_cut_at_max_neighbors():
    layer = DynamicNeighbors(num_features=3, num_classes=2, max_neighbors=10)
    assert layer.grow(torch.randn(64, 3), torch.randint(2, (64,)))[0][0].added == 10


def test_memory_runs_out(monkeypatch):
    x, y = blobs(2000)
    layer = DynamicNeighbors(num_features=20, num_classes=4)
    layer.grow(x[:1000], y[:1000])
    before = layer(x[:50])

    def refuse(num_bytes, device):
        raise MemoryError("none left")

    monkeypatch.setattr(dynamic, "check_memory", refuse)
    with pytest.raises(CentersFull, match=r"no memory for .* centers of 20 features .*1,000\)"):
        layer.grow(torch.rand(1000, 20), torch.randint(4, (1000,)))
    assert layer.num_centers == 1000
    torch.testing.assert_close(layer(x[:50]), before, rtol=0, atol=0)


def test_keep_and_moves():
    x, y = blobs(100)
    layer = DynamicNeighbors(num_features=20, num_classes=4).double()
    layer.grow(x.double(), y)
    assert layer(x).dtype == torch.float64
    layer.float()
    selected = torch.arange(100) % 3 == 0
    layer.keep(selected)
    torch.testing.assert_close(layer.centers, x[selected])
    assert layer(x).dtype == torch.float32
    assert "centers=34" in repr(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_outputs": 2}, "either num_classes or num_outputs"),
        ({"predictor": "best"}, "predictor must be one of interp, nearest, knn, got 'best'"),
        ({"target_accuracy": 0.0}, r"target_accuracy must be in \(0, 1\], got 0.0"),
        ({"target_accuracy": 1.1}, r"target_accuracy must be in \(0, 1\], got 1.1"),
        ({"max_count": 0}, "max_count must be >= 1, got 0"),
        ({"max_neighbors": 0}, "max_neighbors must be >= 1"),
        ({"K": 0}, "K must be >= 1"),
        ({"num_classes": None, "num_outputs": 1, "tolerance": 0.0}, "tolerance must be > 0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicNeighbors(**({"num_features": 3, "num_classes": 2} | options))


def test_refused_input():
    layer = DynamicNeighbors(num_features=3, num_classes=2)
    with pytest.raises(ValueError, match="no centers yet"):
        layer(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"shape \(B, 3\), got \(2, 4\)"):
        layer.grow(torch.rand(2, 4), torch.zeros(2).long())
