"""The K-nearest-neighbor classifier against slow votes, and as a module."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.knn import KNNClassifier, as_levels, count_votes

METRICS = ("cosine", "euclidean", "dot")


def draw(rows, features=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    return x, torch.randint(classes, (rows,), generator=generator)


def slow_predict(x, y, queries, K, metric, vote, num_classes):
    """One query after the other, from the definition."""
    classes = []
    for q in queries.double():
        keys = x.double()
        if metric == "euclidean":
            distance = (keys - q).square().sum(1).sqrt()
        elif metric == "cosine":
            distance = 1 - keys @ q / (keys.norm(dim=1) * q.norm())
        else:
            distance = -(keys @ q)
        order = distance.argsort(stable=True)[:K].tolist()
        if vote == "majority":
            weights = [1.0] * K
        elif metric == "dot":
            weights = [max(0.0, -distance[i].item()) for i in order]
        else:
            weights = [1 / distance[i].item() for i in order]
        sums = [0.0] * num_classes
        for i, w in zip(order, weights, strict=True):
            sums[y[i]] += w
        top = max(sums)
        tied = [c for c in range(num_classes) if abs(sums[c] - top) < 1e-9 * max(top, 1)]
        classes.append(next(int(y[i]) for i in order if int(y[i]) in tied))
    return torch.tensor(classes)


@pytest.mark.parametrize("vote", ["majority", "distance"])
@pytest.mark.parametrize("metric", METRICS)
def test_predictions_match_a_slow_vote(metric, vote):
    x, y = draw(90)
    queries, _ = draw(40, seed=1)
    model = KNNClassifier(K=(1, 2, 5, 90), metric=metric, vote=vote).fit(x, y)
    predicted = model.predict(queries, model.K)
    assert predicted.shape == (4, 40)
    for row, K in zip(predicted, model.K, strict=True):
        assert torch.equal(row, slow_predict(x, y, queries, K, metric, vote, 4)), K
        assert torch.equal(row, model.predict(queries, K))
        alone = KNNClassifier(K=K, metric=metric, vote=vote).fit(x, y)
        assert torch.equal(row, alone.predict(queries))


def test_ties_go_to_the_nearer():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y = torch.tensor([2, 0, 0, 2])
    model = KNNClassifier(K=(2, 3, 4), metric="euclidean").fit(x, y)
    assert model.predict(torch.zeros(1, 1), (2, 3, 4)).flatten().tolist() == [2, 0, 2]
    lowest = KNNClassifier(K=(2, 3, 4), metric="euclidean", vote="majority_lowest").fit(x, y)
    assert lowest.predict(torch.zeros(1, 1), (2, 3, 4)).flatten().tolist() == [0, 0, 0]
    shares = model.predict_proba(torch.zeros(1, 1), 4)
    assert shares.tolist() == [[0.5, 0, 0.5]]


def test_a_neighbor_at_distance_zero_decides_the_weighted_vote():
    x = torch.tensor([[0.0, 1.0], [0.1, 1.0], [0.2, 1.0]])
    y = torch.tensor([0, 1, 1])
    for metric in ("euclidean", "cosine"):
        model = KNNClassifier(K=3, metric=metric, vote="distance").fit(x, y)
        assert model.predict(x[:1]).item() == 0
        assert model.predict_proba(x[:1]).tolist() == [[1, 0]]


def test_dot_votes_without_a_positive_similarity_count_the_same():
    values = torch.tensor([[-1.0, -2.0, -3.0]])
    shares, scores = count_votes(values, torch.tensor([[0, 1, 1]]), 3, "dot", "distance")
    torch.testing.assert_close(shares, torch.tensor([[1 / 3, 2 / 3, 0]]))
    assert scores[0, 2] == -torch.inf


@pytest.mark.parametrize("K", [1, 3, 7])
def test_shares_sum_to_one_and_forward_gives_them(K):
    x, y = draw(50)
    queries, _ = draw(9, seed=2)
    for vote in ("majority", "distance"):
        model = KNNClassifier(K=K, metric="euclidean", vote=vote).fit(x, y, num_classes=6)
        shares = model.predict_proba(queries)
        assert shares.shape == (9, 6)
        torch.testing.assert_close(shares.sum(1), torch.ones(9))
        assert torch.equal(model(queries.view(9, 1, 2, 3)), shares)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["pixels", "integers", "half", "double", "uint8"])
def test_types_of_input(metric, kind):
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (80, 10), generator=generator)
    queries = torch.randint(0, 256, (20, 10), generator=generator)
    y = torch.randint(3, (80,), generator=generator)
    convert = {
        "pixels": lambda t: t.float() / 255,
        "integers": lambda t: t,
        "half": lambda t: (t.float() / 255).half(),
        "double": lambda t: t.double() / 255,
        "uint8": lambda t: t.to(torch.uint8),
    }[kind]
    x, q = convert(levels), convert(queries)
    model = KNNClassifier(K=5, metric=metric).fit(x, y)
    values, indices = model.kneighbors(q)
    a, b = q.double(), x.double()
    costs = {
        "euclidean": torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2,
        "dot": -a @ b.T,
        "cosine": -torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b).T,
    }[metric]
    best = costs.sort(dim=1).values[:, :5]
    torch.testing.assert_close(costs.gather(1, indices), best, rtol=1e-6, atol=1e-6)
    shown = values.double() if metric == "euclidean" else -values.double()
    torch.testing.assert_close(shown, best, rtol=1e-5, atol=1e-5)


def test_pixels_are_stored_in_eight_bits_and_other_queries_still_fit():
    levels = torch.randint(0, 256, (60, 12), generator=torch.Generator().manual_seed(4))
    y = torch.arange(60) % 5
    model = KNNClassifier(K=4, metric="euclidean").fit(levels.float() / 255, y)
    assert model.features.dtype == torch.uint8
    queries = torch.rand(15, 12, generator=torch.Generator().manual_seed(5))
    values, indices = model.kneighbors(queries)
    costs = torch.cdist(queries.double(), levels.double() / 255).square()
    expected = costs.sort(dim=1)
    assert torch.equal(indices, expected.indices[:, :4])
    torch.testing.assert_close(values.double(), expected.values[:, :4], rtol=1e-5, atol=1e-6)


def test_as_levels():
    x = torch.arange(256).float()
    for pixels, unit in (
        (x / 255, 1 / 255),
        (x, 1.0),
        (x.half(), 1.0),
        (x.double() / 255, 1 / 255),
    ):
        levels, found = as_levels(pixels[None])
        assert found == unit
        assert levels[0].tolist() == list(range(256))
    nan = torch.tensor([float("nan")])
    for other in (x / 256, x - 1, x * 1.5, (x / 255).half(), nan, torch.arange(3)):
        assert as_levels(other[None])[0] is None


def test_batches_are_stored_like_one_array():
    x, y = draw(50)
    pixels = (x.sigmoid() * 255).round() / 255
    queries, _ = draw(10, seed=6)
    for samples, dtype in ((pixels, torch.uint8), (x, torch.float32)):
        whole = KNNClassifier(K=3).fit(samples, y)
        batches = zip(samples.split(16), y.split(16), strict=True)
        parts = KNNClassifier(K=3).fit_batches(batches, 4)
        assert parts.features.dtype == dtype
        assert torch.equal(whole.kneighbors(queries)[1], parts.kneighbors(queries)[1])
    mixed = KNNClassifier(K=3).fit_batches([(pixels[:20], y[:20]), (x[20:], y[20:])], 4)
    joined = torch.cat([pixels[:20], x[20:]])
    assert torch.equal(mixed.features, joined)


def test_one_sample_and_a_class_with_one_sample():
    one = KNNClassifier(metric="euclidean").fit(torch.ones(1, 3), torch.tensor([0]))
    assert one.predict(torch.zeros(4, 3)).tolist() == [0] * 4
    x = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    model = KNNClassifier(K=(1, 3), metric="euclidean").fit(x, torch.tensor([0, 0, 0, 1]))
    assert model.predict(torch.tensor([[5.1]]), (1, 3)).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("metric", METRICS)
def test_leave_one_out(metric):
    x, y = draw(40)
    x[7] = x[3]  # a duplicate comes before the sample itself
    model = KNNClassifier(K=5, metric=metric).fit(x, y)
    _, indices = model.kneighbors()
    for i in range(40):
        rest = torch.tensor([j for j in range(40) if j != i])
        other = KNNClassifier(K=5, metric=metric).fit(x[rest], y[rest])
        values, expected = other.kneighbors(x[i : i + 1])
        assert set(indices[i].tolist()) == set(rest[expected[0]].tolist())
    with pytest.raises(ValueError, match="at most the number of other samples, 39"):
        model.kneighbors(K=40)


@pytest.mark.parametrize("pixels", [True, False])
def test_state_dict(pixels, tmp_path):
    x, y = draw(30)
    x = (x.sigmoid() * 255).round() / 255 if pixels else x
    queries, _ = draw(7, seed=8)
    model = KNNClassifier(K=(1, 5), metric="cosine").fit(x, y, num_classes=9)
    model.chosen = 5
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = KNNClassifier(K=(1, 5), metric="cosine")
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(loaded(queries), model(queries))
    assert loaded.chosen == 5
    again = KNNClassifier(K=(1, 5), metric="cosine").fit(x[:10], y[:10])
    again(queries)  # an index of other samples must not survive
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(queries), model(queries))


def test_memory_mapped_samples(tmp_path):
    x, y = draw(500, features=9)
    np.save(tmp_path / "x.npy", x.view(500, 3, 3).numpy())
    queries, _ = draw(20, features=9, seed=9)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = KNNClassifier(K=3, max_bytes=1 << 13).fit(mapped, y)
    expected = KNNClassifier(K=3).fit(x, y)
    assert torch.equal(model.predict(queries), expected.predict(queries))
    assert model.state_dict()["features"].numel() == 0
    loaded = KNNClassifier(K=3)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.predict(queries), expected.predict(queries))
    state = model.state_dict()
    (tmp_path / "x.npy").unlink()
    with pytest.raises(ValueError, match="which is not there any more"):
        KNNClassifier(K=3).load_state_dict(state)


def classify_part(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, y = draw(31)
    queries, _ = draw(12, seed=10)
    expected = KNNClassifier(K=(1, 20)).fit(x, y)
    model = KNNClassifier(K=(1, 20)).fit(x, y, shard=True)
    assert len(model.features) in (15, 16)
    assert torch.equal(model.kneighbors(queries)[1], expected.kneighbors(queries)[1])
    assert torch.equal(model.predict(queries, (1, 20)), expected.predict(queries, (1, 20)))
    dist.destroy_process_group()


def test_samples_sharded_over_two_processes(tmp_path):
    mp.spawn(classify_part, args=(2, str(tmp_path)), nprocs=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"K": 0}, "K must be one or more different numbers from 1 on"),
        ({"K": (3, 3)}, "K must be one or more different numbers from 1 on"),
        ({"metric": "l1"}, "metric must be one of"),
        ({"vote": "loud"}, "vote must be one of majority, majority_lowest, distance"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        KNNClassifier(**options)


def test_bad_samples():
    x, y = draw(10)
    model = KNNClassifier(K=3)
    with pytest.raises(ValueError, match="call fit first"):
        model.predict(x)
    with pytest.raises(ValueError, match=r"labels must be \(10,\)"):
        model.fit(x, y[:9])
    with pytest.raises(ValueError, match="labels must lie in 0 … 2, got 0 … 3"):
        model.fit(x, torch.arange(10) % 4, num_classes=3)
    with pytest.raises(ValueError, match="at least one sample"):
        model.fit(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"K must be at most the number of samples, 2 \(got 3\)"):
        model.fit(x[:2], y[:2])
    model.fit(x, y)
    with pytest.raises(ValueError, match=r"K must lie in 1 … 10, the number of samples \(got 11\)"):
        model.kneighbors(x, 11)
    with pytest.raises(ValueError, match=r"queries must be \(M, 6\)"):
        model.predict(x[:, :5])


def test_repr_shows_the_options():
    model = KNNClassifier(K=(1, 3), metric="dot").fit(*draw(10))
    assert "K=1, 3, metric=dot, vote=majority, samples=10, classes=4" in repr(model)
