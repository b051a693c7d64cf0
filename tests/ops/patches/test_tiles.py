import pytest
import torch

from ops.patches.tiles import WindowTiles, diagonal_spread, diagonal_sum

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_spread_is_the_adjoint_of_sum(ratio):
    x = torch.randn(2, 5, 6, 3, 7, 8, dtype=torch.float64)
    y = diagonal_sum(x, ratio)
    g = torch.randn_like(y)
    close((y * g).sum(), (x * diagonal_spread(g, ratio)).sum())


@pytest.mark.parametrize(("rows", "cols"), [(15, 15), (3, 40), (23, 53)])
def test_tiles_cover_every_query_and_its_window_once(rows, cols):
    tiles = WindowTiles(rows, cols, 7, 2, torch.device("cpu"))
    part = tiles.part(slice(None))
    fresh = torch.ones_like(part.query) if part.fresh is None else part.fresh
    seen = torch.zeros(rows * cols).index_add_(0, part.query.flatten(), fresh.float().flatten())
    assert (seen == 1).all()
    assert ((part.barred == 0).flatten(3).sum(3) == min(7, rows) * min(7, cols) - 1).all()
