import pytest
import slow_layers
import torch

from layers import (
    Conv1d_Attn_Branching,
    Conv1d_Branching,
    Conv2d_Attn_Branching,
    Conv2d_Branching,
)

PLAIN = {1: Conv1d_Branching, 2: Conv2d_Branching}
ATTN = {1: Conv1d_Attn_Branching, 2: Conv2d_Attn_Branching}
SLOW = {"plain": slow_layers.convnn, "attn": slow_layers.attention}


def build(kind, dims, **options):
    if kind == "attn":
        options = {"attention_dropout": 0.0, **options}
    return {"plain": PLAIN, "attn": ATTN}[kind][dims](in_channels=2, out_channels=4, **options)


def sample(dims):
    return torch.randn(2, 2, *((4, 6) if dims == 2 else (6,)), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["plain", "attn"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("ratio", [0, 0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "kernel_size": 5, "magnitude_type": "euclidean"},
        {"shuffle_pattern": "BA", "shuffle_scale": 2, "aggregation_type": "Loc_Col"},
    ],
)
def test_equals_the_slow_loops(kind, dims, ratio, options):
    torch.manual_seed(0)
    layer = build(kind, dims, K=3, branch_ratio=ratio, **options).double()
    made = int(4 * ratio)
    assert (layer.branch1 is None) == (made == 0)
    assert (layer.branch2 is None) == (made == 4)

    def slow(x):
        parts = []
        if layer.branch1 is not None:
            parts.append(SLOW[kind](layer.branch1, x))
        if layer.branch2 is not None:
            conv = layer.branch2
            padding = (options.get("kernel_size", 3) - 1) // 2
            stride = options.get("stride", 1)
            parts.append(slow_layers.conv(x, conv.weight, conv.bias, padding, stride))
        return slow_layers.conv(
            torch.cat(parts, 1), layer.pointwise_conv.weight, layer.pointwise_conv.bias, 0, 1
        )

    slow_layers.assert_same(layer, sample(dims), slow)


@pytest.mark.parametrize("kind", ["plain", "attn"])
@pytest.mark.parametrize("dims", [1, 2])
def test_ratio_zero_and_one_are_the_plain_layers(kind, dims):
    x = sample(dims)
    conv = build(kind, dims, branch_ratio=0, K=4).double()
    torch.testing.assert_close(conv(x), conv.pointwise_conv(conv.branch2(x)))
    names = {"branch2.weight", "branch2.bias", "pointwise_conv.weight", "pointwise_conv.bias"}
    assert set(conv.state_dict()) == names
    neighbors = build(kind, dims, branch_ratio=1, K=4).double()
    torch.testing.assert_close(neighbors(x), neighbors.pointwise_conv(neighbors.branch1(x)))
    assert not any(name.startswith("branch2") for name in neighbors.state_dict())


@pytest.mark.parametrize("dims", [1, 2])
def test_published_names_load(dims):
    ones = (1,) * dims
    layer = PLAIN[dims](in_channels=3, out_channels=64, branch_ratio=0.125, K=9)
    published = {
        "branch1.conv1d_layer.weight": (8, 3, 9),
        "branch1.conv1d_layer.bias": (8,),
        "branch2.weight": (56, 3, *[3] * dims),
        "branch2.bias": (56,),
        "pointwise_conv.weight": (64, 64, *ones),
        "pointwise_conv.bias": (64,),
    }
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == published
    layer.load_state_dict({k: torch.randn(s) for k, s in published.items()}, strict=True)
    attn = ATTN[dims](in_channels=3, out_channels=64)
    assert "branch1.w_q.weight" in attn.state_dict()
    attn.load_state_dict(attn.state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["plain", "attn"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branch_ratio": 1.1}, r"branch_ratio must lie in \[0, 1\] \(got 1.1\)"),
        ({"branch_ratio": -0.1}, r"branch_ratio must lie in \[0, 1\] \(got -0.1\)"),
        ({"kernel_size": 4}, r"kernel_size must be odd and at least 1 \(got 4\)"),
        ({"kernel_size": 0}, r"kernel_size must be at least 1 \(got 0\)"),
        ({"K": 0}, r"K must be at least 1 \(got 0\)"),
        ({"K": 0, "branch_ratio": 0}, r"K must be at least 1 \(got 0\)"),
        ({"num_samples": 3}, r"sampling_type all needs num_samples -1 \(got 3\)"),
        (
            {"shuffle_pattern": "B", "shuffle_scale": 2},
            r"shuffle_pattern B cannot be used with branch_ratio 0.5.*Try shuffle_pattern BA or NA",
        ),
    ],
)
def test_bad_options_are_named(kind, dims, options, message):
    with pytest.raises(ValueError, match=message):
        build(kind, dims, **options)


def test_single_branch_may_change_the_size():
    layer = build("plain", 2, branch_ratio=1, shuffle_pattern="A", shuffle_scale=2)
    assert layer(torch.randn(1, 2, 4, 4)).shape == (1, 4, 8, 8)


def test_input_stays_compiles_and_runs_in_mixed_precision():
    torch._dynamo.reset()
    layer = build("plain", 2, K=4)
    x = torch.randn(2, 2, 6, 6)
    before = x.clone()
    expected = layer(x)
    assert torch.equal(x, before)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.1, atol=0.1)
    assert "branch_ratio=0.5" in repr(layer)
