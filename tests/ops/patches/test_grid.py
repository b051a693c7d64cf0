import torch

from ops.patches.grid import PatchGrid

close = torch.testing.assert_close


def test_grid_covers_every_pixel():
    for side in (5, 10, 11, 80, 256, 321, 481, 512):
        grid = PatchGrid(side, side + 3)
        for size, n in zip(grid.padded, (grid.rows, grid.cols), strict=True):
            assert (n - 1) * 5 + 10 == size
        x = torch.rand(1, 2, side, side + 3)
        blocks = grid.to_blocks(grid.pad(x))
        summed = blocks * grid.counts(x.device, x.dtype)[:, None]
        close(grid.from_blocks(summed[:, :, None], 2), x)
    assert PatchGrid(321, 481).pads == (2, 2, 2, 2)
    assert PatchGrid(512, 512).pads == (1, 2, 1, 2)
