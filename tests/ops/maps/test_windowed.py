"""Attention within windows of a map, against loops over every position in float64."""

import pytest
import torch
from kernel_paths import leaves

from ops.maps import windowed
from ops.maps.windowed import MapWindows

pytestmark = pytest.mark.usefixtures("one_thread")
close = torch.testing.assert_close


def window_of(i, n, window):
    """The positions of an axis that position i may look at."""
    size = min(window, n)
    start = min(max(i - size // 2, 0), n - size)
    return range(start, start + size)


def slow_attention(q, k, v, shape, window, K):
    """For every position the softmax over the K largest products of its window, in a loop."""
    height, width = shape
    out = torch.zeros_like(v)
    chosen = torch.zeros(*v.shape[:2], K, dtype=torch.int64)
    for b in range(len(q)):
        for y in range(height):
            for x in range(width):
                m = y * width + x
                near = [
                    r * width + c
                    for r in window_of(y, height, window)
                    for c in window_of(x, width, window)
                ]
                scores = torch.stack([(q[b, m] * k[b, j]).sum() for j in near])
                order = scores.argsort(descending=True)[:K]
                weights = scores[order].exp() / scores[order].exp().sum()
                chosen[b, m] = torch.tensor(near)[order]
                out[b, m] = sum(w * v[b, j] for w, j in zip(weights, chosen[b, m], strict=True))
    return out, chosen


# Maps of one tile and of several, windows of any kind beside them: inside, as large, larger.
CASES = [((5, 7), 3, 4), ((6, 4), 5, 20), ((4, 5), 45, 20), ((1, 6), 3, 3), ((7, 7), 3, 9)]


@pytest.mark.parametrize("tile", [2, 16])
@pytest.mark.parametrize(("shape", "window", "K"), CASES)
@pytest.mark.parametrize(("e", "c"), [(3, 5), (5, 3)])
def test_values_and_gradients(path, monkeypatch, tile, shape, window, K, e, c):
    monkeypatch.setattr(windowed, "_TILE", tile)
    m = shape[0] * shape[1]
    pair = [torch.randn(2, m, e), torch.randn(2, m, e), torch.randn(2, m, c)]
    wanted = leaves(*pair, dtype=torch.float64)
    expected, chosen = slow_attention(*wanted, shape, window, K)
    windows = MapWindows(shape, window)
    g = torch.randn(2, m, c)
    expected.backward(g.double())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for listed in (False, True):
            got = leaves(*pair, dtype=dtype)
            y, indices, weights = windows.attend(*got, K, chosen=listed)
            assert y.dtype == dtype
            y.backward(g.to(dtype))
            close(y.double(), expected, rtol=tolerance, atol=tolerance)
            for mine, theirs in zip(got, wanted, strict=True):
                close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)
            if listed:
                assert torch.equal(indices, chosen)
                close(weights.sum(2), torch.ones(2, m, dtype=dtype))


def test_a_whole_window_of_the_whole_map_is_dense_attention(path):
    q, k, v = (torch.randn(2, 35, 4, dtype=torch.float64) for _ in range(3))
    dense = (q @ k.mT).softmax(2) @ v
    for K in (35, 45**2):
        close(MapWindows((5, 7), 45).attend(q, k, v, K)[0], dense)


def test_more_neighbors_than_a_window_has_are_all(path):
    q, k, v = (torch.randn(1, 42, 4) for _ in range(3))
    windows = MapWindows((6, 7), 3)
    close(windows.attend(q, k, v, 9)[0], windows.attend(q, k, v, 100)[0])
    close(windows.attend(q, k, v, 9)[0], windows.attend(q, k, v, 9, chosen=True)[0])


@pytest.mark.parametrize("K", [3, 9])
def test_small_pieces_give_the_same(path, monkeypatch, K):
    q, k, v = (torch.randn(3, 80, 4) for _ in range(3))
    whole = MapWindows((8, 10), 3).attend(q, k, v, K)[0]
    monkeypatch.setattr(windowed, "chunk_bytes", lambda *_: 1)
    monkeypatch.setattr(windowed, "_TILE", 3)
    close(MapWindows((8, 10), 3).attend(q, k, v, K)[0], whole)


def test_half_precision_is_compared_in_float32():
    q, k, v = (torch.randn(1, 30, 4).bfloat16() for _ in range(3))
    windows = MapWindows((5, 6), 3)
    y = windows.attend(q, k, v, 4)[0]
    assert y.dtype == torch.bfloat16
    close(y, windows.attend(q.float(), k.float(), v.float(), 4)[0].bfloat16())
