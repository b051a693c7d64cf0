import pytest
import torch
from torch import nn

from layers import LAYERS
from layers.conv import same_conv
from models import ConvNet


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameters_are_those_of_the_formula():
    conv = ConvNet(layer=LAYERS["Conv2d"], in_channels=3, num_classes=4)
    norm, last = 4 * 2 * 24, 24 * 4 + 4
    assert count(conv) == (3 * 9 + 1) * 24 + 3 * (24 * 9 + 1) * 24 + norm + last == 16_588
    branching = ConvNet(layer=LAYERS["Branching"], in_channels=3, num_classes=4, width=22)
    assert count(branching) == 16_042


@pytest.mark.parametrize(
    ("pool_after", "order"),
    [(0, "LNRLNRLNR"), (2, "LNRLNRMLNR"), ([1, 3], "LNRMLNRLNRM"), ((2, 2), "LNRLNRMLNR")],
)
def test_poolings_follow_their_layers(pool_after, order):
    model = ConvNet(layer=LAYERS["Conv2d"], depth=3, width=4, pool_after=pool_after)
    kinds = {nn.Conv2d: "L", nn.BatchNorm2d: "N", nn.ReLU: "R", nn.MaxPool2d: "M"}
    assert "".join(kinds[type(m)] for m in model.features) == order


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_fits(name):
    torch.manual_seed(0)
    model = ConvNet(layer=LAYERS[name], in_channels=2, num_classes=3, depth=2, width=6)
    y = model(torch.randn(2, 2, 7, 9))
    assert y.shape == (2, 3)
    torch.nn.functional.cross_entropy(y, torch.tensor([0, 2])).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_cannot_be_pooled_is_refused():
    with pytest.raises(ValueError, match=r"pool_after 5 .* depth is 4"):
        ConvNet(layer=LAYERS["Conv2d"], pool_after=5)
    model = ConvNet(layer=LAYERS["Conv2d"], pool_after=[1, 2])
    with pytest.raises(ValueError, match=r"1/4 of every side.*3 x 8"):
        model(torch.randn(1, 3, 3, 8))


@pytest.mark.parametrize(("kernel_size", "dilation", "stride"), [(3, 2, 1), (5, 3, 2), (1, 4, 1)])
def test_dilated_taps_are_those_of_a_hollow_kernel(kernel_size, dilation, stride):
    torch.manual_seed(0)
    conv = same_conv(2, 3, kernel_size, stride, dilation=dilation).double()
    side = dilation * (kernel_size - 1) + 1
    hollow = same_conv(2, 3, side, stride).double()
    with torch.no_grad():
        hollow.weight.zero_()
        hollow.weight[:, :, ::dilation, ::dilation] = conv.weight
        hollow.bias.copy_(conv.bias)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), hollow(x))
