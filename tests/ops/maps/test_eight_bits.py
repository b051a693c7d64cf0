"""The compiled search by 8-bit scores against the one in float32: the same numbers, bit for bit.

Fewer than 64 queries are always searched in float32, so the same queries in small parts are what
many at once must equal. Where there are no kernels both are the PyTorch path.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import METRICS
from ops.maps.search import nearest_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")

PART = 40


def smooth(b, n, c):
    """Rows that change little from one to the next, as those of a trained network."""
    return (torch.randn(b, n, 8).cumsum(1) * 0.1 @ torch.randn(8, c)).add(
        0.05 * torch.randn(b, n, c)
    )


def spread(b, n, c):
    return torch.randn(b, n, c)


DATA = {
    "normal": spread,
    "trained": lambda *size: smooth(*size).relu(),
    "near equal": lambda b, n, c: spread(b, 1, c) + 1e-5 * spread(b, n, c),
    "groups": lambda b, n, c: (
        spread(b, 7, c)[:, torch.randint(7, (n,))]
        + 1e-4 * spread(b, n, c) * (torch.rand(b, n, 1) < 0.5)
    ),
    "digits": lambda b, n, c: (torch.rand(b, n, 1) < 0.2) * spread(b, n, c) + spread(b, 1, c),
    "constant": lambda b, n, c: torch.full((b, n, c), 0.7),
    "zeros": lambda b, n, c: torch.zeros(b, n, c),
    "half zeros": lambda b, n, c: spread(b, n, c) * (torch.rand(b, n, 1) < 0.5),
    "heavy tails": lambda b, n, c: spread(b, n, c) / spread(b, n, c).abs().clamp(min=1e-4),
    "long and short rows": lambda b, n, c: spread(b, n, c) / spread(b, n, 1).abs().clamp(min=1e-6),
    "one hot channel": lambda b, n, c: torch.cat([1e3 * spread(b, n, 1), spread(b, n, c - 1)], 2),
    "ties": lambda b, n, c: torch.randint(0, 2, (b, n, c)).float(),
    "tiny": lambda b, n, c: 1e-20 * spread(b, n, c),
    "subnormal": lambda b, n, c: 1e-40 * spread(b, n, c),
    "huge": lambda b, n, c: 1e18 * spread(b, n, c),
    "far from zero": lambda b, n, c: 100 + spread(b, n, c),
}


def same_in_parts(queries, keys, K, metric, own=None, exclude=False, candidates=None):
    """Compare the search of all queries with that of PART at a time."""

    def search(rows):
        return nearest_neighbors(
            None if queries is None else queries[:, rows],
            keys,
            K,
            metric,
            self_index=None if own is None else own[..., rows],
            exclude_self=exclude,
            candidates=candidates,
        )

    m = own.shape[-1] if queries is None else queries.shape[1]
    parts = [search(slice(r, r + PART)) for r in range(0, m, PART)]
    values, indices = search(slice(None))
    assert torch.equal(indices, torch.cat([part[1] for part in parts], 1))
    assert torch.equal(
        values.view(torch.int32), torch.cat([part[0] for part in parts], 1).view(torch.int32)
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", DATA)
def test_all_at_once_equals_in_parts(name, metric):
    torch.manual_seed(0)
    for b, n, c, K in ((2, 300, 17, 9), (1, 700, 64, 12), (1, 389, 33, 40), (1, 5000, 16, 9)):
        keys = DATA[name](b, n, c)
        same_in_parts(None, keys, K, metric, own=torch.arange(0, n, max(2, n // 200)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("K", [1, 2, 8, 17, 64])
def test_every_mode(metric, K):
    torch.manual_seed(1)
    b, n, c = 2, 501, 21
    keys, other = smooth(b, n, c), torch.randn(b, 99, c)
    own = torch.stack([torch.randperm(n)[:99] for _ in range(b)])
    pool = torch.stack([torch.randperm(n)[:400] for _ in range(b)])
    for queries in (None, other):
        for candidates in (None, pool, pool[0]):
            for exclude in (False, True):
                same_in_parts(queries, keys, K, metric, own, exclude, candidates)
    same_in_parts(other, keys, K, metric)
    same_in_parts(other, keys, K, metric, own=own[0], candidates=pool)


@pytest.mark.parametrize("metric", METRICS)
def test_numbers_without_a_bound_are_left_to_float32(metric):
    torch.manual_seed(2)
    keys = torch.randn(3, 400, 16)
    keys[0, 5, 3], keys[1, 9, 2] = math.inf, math.nan
    same_in_parts(keys[2:], keys[2:], 9, metric)  # one bad sample leaves the others alone
    indices = nearest_neighbors(None, keys, 9, metric, self_index=torch.arange(400))[1]
    assert 0 <= int(indices.min()) <= int(indices.max()) < 400
    good = nearest_neighbors(None, keys[2:], 9, metric, self_index=torch.arange(400))[1]
    assert torch.equal(indices[2:], good)


def test_a_layer_on_digits_finds_what_float64_finds():
    """Maps of a few bright pixels: most positions look nearly the same."""
    torch.manual_seed(3)
    image = (torch.rand(1, 1, 28, 28) < 0.15).float()
    maps = F.conv2d(image, torch.randn(32, 1, 3, 3), padding=1).relu()
    keys = maps.flatten(2).mT.contiguous() + 1e-3 * torch.randn(1, 784, 32)
    own = torch.arange(784)
    values, indices = nearest_neighbors(None, keys, 9, "euclidean", self_index=own)
    exact = torch.cdist(keys.double(), keys.double()).square()
    torch.testing.assert_close(values.double(), exact.gather(2, indices), rtol=0, atol=1e-4)
    best = exact.sort(2).values[..., :9]
    torch.testing.assert_close(exact.gather(2, indices).sort(2).values, best, rtol=0, atol=1e-4)
