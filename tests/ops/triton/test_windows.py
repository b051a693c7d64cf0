"""Patches and their windows against the same formulas in float64 on tiles."""

import pytest
import torch
from kernel_paths import leaves

from layers.n3 import N3Aggregation2d
from layers.selection import NeuralNearestNeighbors
from ops.patches import windows as module
from ops.patches.grid import PatchGrid
from ops.patches.windows import Windows, window_aggregate, window_distances
from ops.triton.launch import kernels

SIZES = pytest.mark.parametrize(
    ("height", "width", "patch", "stride", "window", "channels"),
    [(7, 9, 4, 2, 3, 2), (5, 21, 2, 2, 5, 1), (5, 6, 3, 1, 3, 1)],
)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Take these kernels, on whatever device they run."""
    monkeypatch.setattr(module, "_on_gpu", lambda *tensors: kernels("windows", *tensors))


def patches_of(images, grid):
    """Patches (B, rows, cols, C, p, p) of padded images."""
    return (
        images.unfold(2, grid.patch, grid.stride)
        .unfold(3, grid.patch, grid.stride)
        .permute(0, 2, 3, 1, 4, 5)
    )


def window_of(i, j, grid, size):
    """Rows and columns of the candidates of a patch."""
    top = min(max(i - size[0] // 2, 0), grid.rows - size[0])
    left = min(max(j - size[1] // 2, 0), grid.cols - size[1])
    return [(r, c) for r in range(top, top + size[0]) for c in range(left, left + size[1])]


def slow_distances(images, grid, size):
    x = patches_of(images, grid)
    rows = []
    for i in range(grid.rows):
        for j in range(grid.cols):
            keys = torch.stack([x[:, r, c] for r, c in window_of(i, j, grid, size)], 1)
            rows.append((keys - x[:, None, i, j]).square().flatten(2).sum(-1))
    return torch.stack(rows, 1)


def slow_aggregate(weights, images, grid, size):
    x, k = patches_of(images, grid), weights.shape[2]
    b, c = images.shape[:2]
    sums, counts = images.new_zeros(b, k, *images.shape[1:]), images.new_zeros(images.shape[2:])
    for i in range(grid.rows):
        for j in range(grid.cols):
            keys = torch.stack([x[:, r, c] for r, c in window_of(i, j, grid, size)], 1)
            y = torch.einsum("bko,bocpq->bkcpq", weights[:, i * grid.cols + j], keys)
            at = [slice(n * grid.stride, n * grid.stride + grid.patch) for n in (i, j)]
            place = torch.zeros_like(sums)
            place[..., at[0], at[1]] = y
            sums, counts[at[0], at[1]] = sums + place, counts[at[0], at[1]] + 1
    top, _, left, _ = grid.pads
    out = (sums / counts).reshape(b, k * c, *images.shape[2:])
    return out[..., top : top + grid.height, left : left + grid.width]


def assert_close(got, want):
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), e.detach(), rtol=1e-4, atol=1e-4)


@SIZES
def test_distances_and_gradients_match_loops(
    device, height, width, patch, stride, window, channels
):
    grid = PatchGrid(height, width, patch, stride)
    windows = Windows(grid, window)
    images = torch.randn(2, channels, *grid.padded)
    (exact,), (mine,) = leaves(images, dtype=torch.float64), leaves(images.to(device))
    expected, got = slow_distances(exact, grid, windows.size), window_distances(mine, windows)
    upstream = torch.randn(got.shape)
    want = torch.autograd.grad(expected, exact, upstream.double())
    assert_close((got, *torch.autograd.grad(got, mine, upstream.to(device))), (expected, *want))
    part = windows.distances(mine.detach(), 1, 3)
    assert_close([part], [expected[:, grid.cols : 3 * grid.cols]])


@SIZES
def test_sums_and_gradients_match_loops(device, height, width, patch, stride, window, channels):
    grid = PatchGrid(height, width, patch, stride)
    windows = Windows(grid, window)
    images = torch.randn(1, channels, *grid.padded)
    K = 9 if patch == 2 else 2  # more than a program takes, and fewer
    weights = torch.rand(1, grid.rows * grid.cols, K, windows.size[0] * windows.size[1])
    exact = leaves(weights, images, dtype=torch.float64)
    mine = leaves(weights.to(device), images.to(device))
    expected = slow_aggregate(*exact, grid, windows.size)
    got = window_aggregate(*mine, windows)
    upstream = torch.randn(got.shape)
    want = torch.autograd.grad(expected, exact, upstream.double())
    assert_close((got, *torch.autograd.grad(got, mine, upstream.to(device))), (expected, *want))


def test_the_layer_takes_them_whole_and_in_pieces(device, monkeypatch):
    monkeypatch.setattr("layers.n3.WINDOW_BYTES", 4 * 4 * 4 * 9 * 2)
    monkeypatch.setattr("layers.n3.chunk_bytes", lambda _: 4 * 4 * 4 * 9 * 2)
    layer = N3Aggregation2d(NeuralNearestNeighbors(2), patch_size=4, stride=2, window=3).to(device)
    values, features = 0.2 * torch.randn(2, 1, 1, 9, 9, device=device)
    temperature = torch.randn(1, 1, 9, 9, device=device)
    calls = []
    distances = kernels("windows", values).distances
    monkeypatch.setattr(
        kernels("windows", values),
        "distances",
        lambda *args: calls.append(args) or distances(*args),
    )
    layer.eval()
    with torch.no_grad():
        pieces = layer(values, features, temperature)
    assert len(calls) > 1
    inputs = leaves(values, features, temperature)
    whole = layer(*inputs)
    got = torch.autograd.grad(whole.sin().sum(), inputs)
    exact = leaves(values, features, temperature, dtype=torch.float64)
    expected = layer.double()(*exact)
    want = torch.autograd.grad(expected.sin().sum(), exact)
    assert_close([pieces], [expected.cpu()])
    assert_close([whole, *got], [t.cpu() for t in (expected, *want)])
    first_alone = torch.autograd.grad(
        layer.float()(inputs[0], features, temperature).sum(), inputs[0]
    )
    assert first_alone[0].isfinite().all()
