import pytest
import torch
from torch import nn

from models import DnCNN
from tasks import tiling
from tasks.restoration import RestorationTask
from tasks.tiling import forward_in_tiles, largest_tile, peak_bytes

close = torch.testing.assert_close
CPU = torch.device("cpu")


def test_bytes_alive_at_a_time():
    x = torch.zeros(1, 4, 10, 10)
    # Each convolution: its output beside its input; the first input is the caller's.
    net = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 2, 1, bias=False))
    assert peak_bytes(net, x) == 4 * 100 * (8 + 2)


def test_bytes_grow_with_the_pixels():
    net = DnCNN(depth=4, features=8).eval()
    small, large = (peak_bytes(net, torch.zeros(1, 1, side, side)) for side in (64, 128))
    assert large == pytest.approx(4 * small, rel=0.02)


def test_the_largest_tile_fits(monkeypatch):
    net = DnCNN(depth=4, features=8).eval()
    monkeypatch.setattr(tiling, "free_memory", lambda device: 20 * 2**20)
    side = largest_tile(net, 1, CPU)
    assert 0.9 * 10 * 2**20 < peak_bytes(net, torch.zeros(1, 1, side, side)) <= 1.01 * 10 * 2**20
    monkeypatch.setattr(tiling, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="the memory that is free, 0 MB, does not hold a tile"):
        largest_tile(net, 1, CPU)


def test_auto_is_whole_where_it_fits(monkeypatch, capsys):
    net = DnCNN(depth=3, features=4).eval()
    x = torch.rand(1, 1, 70, 90)
    task = RestorationTask(tile="auto")
    close(task.predict(net, x), net(x))
    assert capsys.readouterr().out.startswith("Tiles of up to")
    task.predict(net, x)
    assert capsys.readouterr().out == ""  # said once
    monkeypatch.setattr(tiling, "free_memory", lambda device: 400_000)
    task = RestorationTask(tile="auto")
    close(task.predict(net, x), net(x))
    assert 16 <= task.tile < 70


def test_the_ensemble_is_the_mean_of_eight():
    net = DnCNN(depth=3, features=4).eval()
    x = torch.rand(2, 1, 12, 17)
    want = torch.zeros_like(x)
    for turns in range(4):
        for mirrored in (False, True):
            y = x.rot90(turns, (2, 3))
            y = y.flip(3) if mirrored else y
            y = net(y)
            y = y.flip(3) if mirrored else y
            want += y.rot90(-turns, (2, 3)) / 8
    close(RestorationTask(self_ensemble=True).predict(net, x), want)
    same = nn.Identity()
    close(RestorationTask(self_ensemble=True).predict(same, x), x)


def test_a_bar_changes_nothing():
    net = DnCNN(depth=3, features=4).eval()
    x = torch.rand(1, 1, 50, 60)
    close(forward_in_tiles(net, x, 32, 16, progress=True), net(x))
