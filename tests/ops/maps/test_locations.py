import math

import pytest
import torch
import torch.nn.functional as F

from ops.maps import locations
from ops.maps.locations import location_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


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
