"""Tiles of an image."""

import pytest
import torch
from small_n3 import TINY

from models import DnCNN, N3Net
from tasks.tiling import forward_in_tiles

close = torch.testing.assert_close


@pytest.mark.parametrize("size", [(151, 130), (90, 203)])
def test_tiles_are_seamless(size):
    torch.manual_seed(0)
    model = N3Net(**TINY).double().eval()
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x)
    close(forward_in_tiles(model, x, 105, 52), whole, rtol=0, atol=1e-2)
    close(forward_in_tiles(model, x, 300, 20), whole, rtol=0, atol=1e-12)
    large = torch.rand(1, 1, 260, 205, dtype=torch.float64)
    with torch.no_grad():
        whole = model(large)
    # A third of the overlap covers the field of view: equal everywhere.
    close(forward_in_tiles(model, large, 200, 99), whole, rtol=0, atol=1e-9)
    plain = DnCNN(depth=3, features=4).eval()
    x = torch.rand(1, 1, 50, 70)
    with torch.no_grad():
        close(forward_in_tiles(plain, x, 24, 12), plain(x), rtol=0, atol=1e-5)


def test_small_tiles_are_refused():
    with pytest.raises(ValueError, match="the smallest that works is 80"):
        forward_in_tiles(N3Net(), torch.rand(1, 1, 90, 90), 79)
    with pytest.raises(ValueError, match="overlap of tiles must lie between 0 and half a tile"):
        forward_in_tiles(N3Net(), torch.rand(1, 1, 90, 90), 80, 41)


@pytest.mark.parametrize("fold", [2, 3])
@pytest.mark.parametrize("tile", [49, 50])
def test_tiles_begin_at_the_blocks_that_pixels_are_folded_by(fold, tile):
    model = DnCNN(depth=2, features=4, fold=fold).eval()  # sees two blocks to each side
    image = torch.rand(1, 1, 83, 101)
    out = forward_in_tiles(model, image, tile=tile, overlap=24)
    torch.testing.assert_close(out, model(image).detach())
