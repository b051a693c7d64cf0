import pytest
import slow_layers
import torch
from torch import nn

from layers import Conv1d_New, Conv2d_New, PixelShuffle1D, PixelUnshuffle1D, same_conv


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_one_axis_equals_one_row_of_an_image(scale):
    x = torch.randn(2, 4 * scale, 5)
    y = PixelShuffle1D(scale)(x)
    assert y.shape == (2, 4, 5 * scale)
    for c in range(4):
        for a in range(scale):
            assert torch.equal(y[:, c, a::scale], x[:, c * scale + a])
    assert torch.equal(y, slow_layers.shuffle(x, scale))
    assert torch.equal(PixelUnshuffle1D(scale)(y), x)
    assert torch.equal(PixelUnshuffle1D(scale)(y), slow_layers.unshuffle(y, scale))


def test_slow_shuffle_is_that_of_torch():
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(slow_layers.shuffle(x, 2), nn.PixelShuffle(2)(x))
    assert torch.equal(
        slow_layers.unshuffle(x[..., :2, :4], 2), nn.PixelUnshuffle(2)(x[..., :2, :4])
    )


def test_shuffle_errors():
    with pytest.raises(ValueError, match="4 channels cannot be shuffled by a scale of 3"):
        PixelShuffle1D(3)(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="shuffle_scale=3 does not divide the map of 4 pos"):
        PixelUnshuffle1D(3)(torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r"upscale_factor must be at least 1 \(got 0\)"):
        PixelShuffle1D(0)
    with pytest.raises(ValueError, match=r"downscale_factor must be at least 1 \(got 0\)"):
        PixelUnshuffle1D(0)
    with pytest.raises(ValueError, match=r"expects \(B, C, L\)"):
        PixelShuffle1D(2)(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"expects \(B, C, L\)"):
        PixelUnshuffle1D(2)(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("pattern", ["NA", "B", "A", "BA"])
@pytest.mark.parametrize("aggregation", ["Col", "Loc_Col"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_new_equals_the_slow_loops(dims, pattern, aggregation, stride):
    torch.manual_seed(0)
    layer = (Conv1d_New, Conv2d_New)[dims - 1](
        in_channels=2,
        out_channels=3,
        kernel_size=3,
        stride=stride,
        shuffle_pattern=pattern,
        shuffle_scale=2,
        aggregation_type=aggregation,
    ).double()
    assert set(layer.state_dict()) == {"conv2d_layer.weight", "conv2d_layer.bias"}

    def slow(x):
        if "B" in pattern:
            x = slow_layers.unshuffle(x, 2)
        if aggregation == "Loc_Col":
            grid = slow_layers.Grid(x, 0, 1)
            coords = torch.stack([grid.coordinates(p) for p in grid.positions], 1)
            coords = coords.view(1, dims, *x.shape[2:]).expand(x.shape[0], *[-1] * (dims + 1))
            x = torch.cat([x, coords], 1)
        y = slow_layers.conv(x, layer.conv2d_layer.weight, layer.conv2d_layer.bias, 1, stride)
        return slow_layers.shuffle(y, 2) if pattern in ("A", "BA") else y

    x = torch.randn(2, 2, *((4, 6) if dims == 2 else (6,)), dtype=torch.float64)
    slow_layers.assert_same(layer, x, slow)


def test_conv_new_without_options_is_a_convolution():
    layer = Conv2d_New(3, 4, kernel_size=5)
    assert "Col" in repr(layer)
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(layer(x), layer.conv2d_layer(x))
    assert layer(x).shape == (2, 4, 6, 7)
    assert Conv2d_New(3, 4, kernel_size=3, padding=0)(x).shape == (2, 4, 4, 5)


@pytest.mark.parametrize("kernel_size", [-1, 0, 2, 4])
@pytest.mark.parametrize("make", [same_conv, Conv1d_New, Conv2d_New])
def test_kernels_without_a_middle_are_refused(make, kernel_size):
    with pytest.raises(
        ValueError, match=rf"kernel_size must be (odd|at least 1).*\(got {kernel_size}\)"
    ):
        make(3, 4, kernel_size=kernel_size)


def test_conv_new_errors():
    with pytest.raises(ValueError, match="shuffle_pattern B needs shuffle_scale"):
        Conv2d_New(3, 4, shuffle_pattern="B")
    with pytest.raises(ValueError, match="aggregation_type must be one of Col, Loc_Col"):
        Conv2d_New(3, 4, aggregation_type="Loc")
    with pytest.raises(ValueError, match=r"stride must be at least 1 \(got 0\)"):
        Conv2d_New(3, 4, stride=0)
    with pytest.raises(ValueError, match="shuffle_scale=2 does not divide the map of 3 x 4"):
        Conv2d_New(3, 4, shuffle_pattern="BA", shuffle_scale=2)(torch.zeros(1, 3, 3, 4))
