from functools import partial

import pytest
import torch
import torch.nn.functional as F

from layers import LAYERS
from models import DnCNN

close = torch.testing.assert_close


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_published_sizes():
    assert count(DnCNN()) == 556_097
    assert count(DnCNN(depth=18)) == 556_097 + 64 * 64 * 9 + 128
    assert set(DnCNN(depth=3).state_dict()) == {
        "conv1.weight",
        "conv1.bias",
        "layer1.0.weight",
        "layer1.1.weight",
        "layer1.1.bias",
        "layer1.1.running_mean",
        "layer1.1.running_var",
        "layer1.1.num_batches_tracked",
        "conv2.weight",
        "conv2.bias",
    }


def test_values():
    torch.manual_seed(0)
    net = DnCNN(2, 3, depth=3, features=4).eval()
    x = torch.rand(2, 2, 11, 7)
    before = x.clone()
    h = F.relu(F.conv2d(x, net.conv1.weight, net.conv1.bias, padding=1))
    h = net.layer1[1](F.conv2d(h, net.layer1[0].weight, padding=1))
    out = F.conv2d(F.relu(h), net.conv2.weight, net.conv2.bias, padding=1)
    out[:, :2] += x
    close(net(x), out)
    close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [(1, 8), (8, 1), (3, 3)])
@pytest.mark.parametrize("residual", [True, False])
def test_shared_channels_get_the_input(channels, residual):
    net = DnCNN(*channels, depth=2, features=4, residual=residual).eval()
    torch.nn.init.zeros_(net.conv2.weight)
    torch.nn.init.zeros_(net.conv2.bias)
    x = torch.rand(1, channels[0], 9, 5)
    want = torch.zeros(1, channels[1], 9, 5)
    if residual:
        want[:, : min(channels)] = x[:, : min(channels)]
    close(net(x), want)


def test_starting_values():
    torch.manual_seed(0)
    net = DnCNN(depth=6)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 4
    for bn in norms:
        assert bn.weight.min() >= 0.025
        assert bn.momentum == 0.001
    assert net.layer1[0].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_without_batch_norm_there_are_biases():
    names = set(DnCNN(depth=4, batch_norm=False).state_dict())
    assert {"layer1.0.bias", "layer1.2.bias"} <= names
    assert not any("running" in name for name in names)


@pytest.mark.parametrize("name", list(LAYERS))
def test_any_layer_inside(name):
    options = {"K": 4} if name not in ("Conv2d", "Conv2d_New") else {}
    net = DnCNN(depth=4, features=4, layer=partial(LAYERS[name], **options))
    x = torch.rand(2, 1, 8, 6)
    net(x).square().mean().backward()
    assert net(x).shape == x.shape
    assert all(p.grad is not None for p in net.parameters())


def test_bad_depth():
    with pytest.raises(ValueError, match=r"depth must be at least 2 \(got 1\)"):
        DnCNN(depth=1)
