"""Strides and kernel sizes as one number or as one for each axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers import (
    LAYERS,
    TOKEN_LAYERS,
    Conv1d_Branching,
    Conv1d_New,
    Conv1d_NN,
    Conv1d_NN_Attn,
    Conv2d_Branching,
    Conv2d_New,
    Conv2d_NN,
    record_neighbors,
    same_conv,
)
from layers.n3 import KNNBlock

close = torch.testing.assert_close
LOC = {"similarity_type": "Loc", "magnitude_type": "euclidean"}


@pytest.mark.parametrize("shape", [(7, 10), (8, 9), (5, 5)])
@pytest.mark.parametrize("stride", [(2, 1), (1, 3), [3, 2], (2, 2), 2])
def test_neighbors_by_location_are_the_strided_convolution(stride, shape):
    torch.manual_seed(0)
    layer = Conv2d_NN(3, 4, K=9, padding=1, stride=stride, **LOC)
    conv = nn.Conv2d(3, 4, (3, 3), stride=stride, padding=1)
    with torch.no_grad():
        conv.weight.copy_(layer.conv1d_layer.weight.view_as(conv.weight))
        conv.bias.copy_(layer.conv1d_layer.bias)
    results = []
    for module in (layer, conv):
        x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
        y = module(x.requires_grad_())
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, grad))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_stride_of_each_axis_takes_rows_and_columns(name):
    torch.manual_seed(0)
    layer = LAYERS[name](3, 6, stride=1).eval()
    strided = LAYERS[name](3, 6, stride=(2, 3)).eval()
    strided.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8, 10)
    close(strided(x), layer(x)[:, :, ::2, ::3])
    with torch.device("meta"):
        assert LAYERS[name](3, 6, stride=(2, 3))(torch.empty(2, 3, 8, 10)).shape == (2, 6, 4, 4)


def test_kernels_of_each_axis():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 10)
    conv = same_conv(3, 4, (3, 5), (2, 1), dilation=(1, 2))
    close(
        conv(x),
        F.conv2d(x, conv.weight, conv.bias, stride=(2, 1), padding=(1, 4), dilation=(1, 2)),
    )
    new = Conv2d_New(3, 4, kernel_size=(1, 3), stride=(1, 2))
    inner = new.conv2d_layer
    close(new(x), F.conv2d(x, inner.weight, inner.bias, stride=(1, 2), padding=(0, 1)))
    even = Conv2d_New(3, 4, kernel_size=(2, 4), padding=(0, 1))
    assert even(x).shape == (2, 4, 7, 9)
    both = Conv2d_Branching(3, 4, kernel_size=(5, 3), stride=(1, 2), K=4)
    assert both.branch2.kernel_size == (5, 3)
    assert both(x).shape == (2, 4, 8, 5)


def test_sequences_take_a_tuple_of_one():
    x = torch.randn(2, 3, 9)
    for make in (Conv1d_NN, Conv1d_NN_Attn, Conv1d_Branching, Conv1d_New):
        torch.manual_seed(0)
        plain = make(3, 4, stride=2).eval()
        tupled = make(3, 4, stride=(2,)).eval()
        tupled.load_state_dict(plain.state_dict())
        close(tupled(x), plain(x))
        assert "stride=(2,)" in repr(tupled) or "stride=2" in repr(tupled)
    assert same_conv(3, 4, (5,), (2,), ndim=1)(x).shape == (2, 4, 5)


def test_what_is_recorded_is_the_strided_query():
    layer = Conv2d_NN(3, 4, K=3, stride=(2, 3))
    with record_neighbors(layer) as records:
        layer(torch.randn(1, 3, 5, 7))
    assert records[0].queries.tolist() == [[i, j] for i in (0, 2, 4) for j in (0, 3, 6)]


@pytest.mark.parametrize("mode", ["compile", "export"])
@pytest.mark.parametrize("similarity", ["Col", "Loc"])
def test_tuples_compile_and_export(mode, similarity):
    layer = Conv2d_NN(3, 4, K=5, stride=(2, 1), similarity_type=similarity).eval()
    x = torch.randn(2, 3, 6, 7)
    if mode == "compile":
        other = torch.compile(layer, fullgraph=True, backend="aot_eager")
    else:
        other = torch.export.export(layer, (x,)).module()
    close(other(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d_NN(3, 4, stride=(1, 2, 3)), r"stride takes one whole number, or 2, one "),
        (lambda: Conv1d_NN(3, 4, stride=(1, 2)), r"stride takes one whole number, or 1, one for"),
        (lambda: Conv2d_NN(3, 4, stride=(0, 2)), r"stride must be at least 1 \(got 0\)"),
        (lambda: Conv2d_NN(3, 4, stride=1.5), r"stride takes one whole number.* \(got 1.5\)"),
        (lambda: Conv2d_NN(3, 4, K=(3, 3)), r"K takes one value \(got \(3, 3\)\): number of neig"),
        (lambda: Conv2d_NN(3, 4, padding=(1, 0)), r"padding takes one value \(got \(1, 0\)\)"),
        (lambda: same_conv(3, 4, (3, 4)), r"kernel_size must be odd and at least 1 \(got 4\)"),
        (lambda: Conv2d_New(3, 4, (3, 3, 3)), r"kernel_size takes one whole number, or 2"),
        (lambda: Conv2d_Branching(3, 4, (3, 2)), r"kernel_size must be odd .* \(got 2\)"),
        (lambda: KNNBlock(patch_size=(10, 5)), r"patch_size takes one whole number \(got \(10, 5"),
        (lambda: TOKEN_LAYERS["KvtAttention"](8, 2, K=(3, 3)), r"K takes one value \(got"),
        (lambda: TOKEN_LAYERS["BranchConv"](8, 2, kernel_size=(3, 3)), r"kernel_size takes one"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
