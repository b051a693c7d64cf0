import itertools

import pytest
import slow_layers
import torch

from layers import Conv1d_NN_Attn, Conv2d_NN_Attn

SAMPLING = [
    {"sampling_type": "all"},
    {"sampling_type": "random", "num_samples": 7},
    {"sampling_type": "spatial", "num_samples": 3},
]
SHAPES = [
    {"shuffle_pattern": "NA", "padding": 1, "stride": 1},
    {"shuffle_pattern": "BA", "shuffle_scale": 2, "padding": 0, "stride": 1},
    {"shuffle_pattern": "A", "shuffle_scale": 2, "padding": 1, "stride": 2},
    {"shuffle_pattern": "B", "shuffle_scale": 2, "padding": 2, "stride": 1},
    {"shuffle_pattern": "NA", "shuffle_scale": 3, "padding": 0, "stride": 2},
]
COMBINATIONS = list(
    itertools.product(("cosine", "euclidean"), ("Col", "Loc_Col"), SAMPLING, (False, True))
)


def sample(dims, batch=2, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (6, 4) if dims == 2 else (8,)
    return torch.randn(batch, channels, *sides, generator=generator, dtype=torch.float64)


def make(dims, **options):
    layer = (Conv1d_NN_Attn, Conv2d_NN_Attn)[dims - 1](in_channels=2, out_channels=3, **options)
    torch.nn.init.normal_(layer.conv1d_layer.weight)  # away from all ones
    torch.nn.init.normal_(layer.conv1d_layer.bias)
    return layer.double()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("case", range(len(COMBINATIONS)))
def test_every_choice_equals_the_slow_loops(dims, case):
    magnitude, aggregation, sampling, training = COMBINATIONS[case]
    torch.manual_seed(case)
    layer = make(
        dims,
        K=3,
        magnitude_type=magnitude,
        aggregation_type=aggregation,
        attention_dropout=0.0,
        **sampling,
        **SHAPES[case % len(SHAPES)],
    ).train(training)
    x = sample(dims, batch=1 + case % 2, seed=case)
    state = torch.get_rng_state()
    drawn = layer.candidates(layer.pad_and_flatten(x)[1], x.device)
    torch.set_rng_state(state)
    candidates = None if drawn is None else drawn.tolist()
    slow_layers.assert_same(layer, x, lambda x: slow_layers.attention(layer, x, candidates))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dims", [1, 2])
def test_every_shape_option_equals_the_slow_loops(shape, dims):
    torch.manual_seed(1)
    layer = make(dims, K=2, **shape).eval()
    slow_layers.assert_same(layer, sample(dims), lambda x: slow_layers.attention(layer, x))


@pytest.mark.parametrize("magnitude", ["cosine", "euclidean"])
def test_all_positions_as_neighbors_are_dense_attention(magnitude):
    torch.manual_seed(0)
    layer = Conv1d_NN_Attn(4, 4, K=6, padding=0, magnitude_type=magnitude).double().eval()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    q, k, v = (w(x).transpose(1, 2) for w in (layer.w_q, layer.w_k, layer.w_v))
    if magnitude == "cosine":
        unit = torch.nn.functional.normalize
        scores, own = unit(k, dim=-1) @ unit(q, dim=-1).transpose(1, 2), 1.1
    else:
        scores, own = -torch.cdist(k, q).square(), 0.1
    scores = torch.where(torch.eye(6, dtype=torch.bool), own, scores)
    y = scores.softmax(-1) @ v
    expected = layer.w_o(layer.pointwise_conv(y.transpose(1, 2)))
    torch.testing.assert_close(layer(x), expected)


def test_nearer_neighbors_weigh_more():
    layer = Conv1d_NN_Attn(1, 1, K=3, padding=0, magnitude_type="euclidean").double().eval()
    with torch.no_grad():
        for w in (layer.w_q, layer.w_k, layer.w_v, layer.pointwise_conv, layer.w_o):
            w.weight.fill_(1)
        layer.pointwise_conv.bias.zero_()
    x = torch.tensor([[[0.0, 1.0, 3.0]]], dtype=torch.float64)
    weights = torch.tensor([0.1, -1.0, -9.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(layer(x)[0, 0, 0], weights @ x[0, 0])


@pytest.mark.parametrize("dims", [1, 2])
def test_one_neighbor_is_a_chain_of_pointwise_convolutions(dims):
    layer = make(dims, K=1).eval()
    x = sample(dims)
    rows = layer.w_v(x.flatten(2))
    rows = rows * layer.conv1d_layer.weight[:, :, 0] + layer.conv1d_layer.bias[:, None]
    expected = layer.w_o(layer.pointwise_conv(rows)).view(2, 3, *x.shape[2:])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("padding", [0, 1])
def test_permuting_positions_permutes_outputs(padding):
    layer = make(2, K=5, padding=padding).eval()
    x = sample(2)
    order = torch.randperm(24)
    moved = layer(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(moved.flatten(2), layer(x).flatten(2)[..., order])


@pytest.mark.parametrize("sampling", [("random", 48), ("random", 500), ("spatial", 7)])
def test_more_samples_than_positions_are_all(sampling):
    everyone = make(2, K=5).eval()
    layer = make(2, K=5, sampling_type=sampling[0], num_samples=sampling[1]).eval()
    layer.load_state_dict(everyone.state_dict())
    torch.testing.assert_close(layer(sample(2)), everyone(sample(2)))


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = make(2, K=5, attention_dropout=0.5)
    x = sample(2)
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (mean - layer(x)).abs().mean() < 0.1 * layer(x).abs().mean()


def test_weights_start_at_one_and_gradients_reach_all_projections():
    layer = Conv2d_NN_Attn(3, 4, K=5)
    assert layer.conv1d_layer.weight.eq(1).all()
    assert layer.conv1d_layer.bias.eq(0).all()
    layer(torch.randn(2, 3, 5, 5)).square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("magnitude", ["cosine", "euclidean"])
def test_gradcheck(magnitude):
    torch.manual_seed(0)
    layer = make(2, K=3, magnitude_type=magnitude).eval()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("dims", [1, 2])
def test_published_names_load(dims):
    published = {
        "w_q.weight": (4, 4, 1),
        "w_k.weight": (4, 4, 1),
        "w_v.weight": (4, 4, 1),
        "conv1d_layer.weight": (4, 1, 9),
        "conv1d_layer.bias": (4,),
        "pointwise_conv.weight": (6, 4, 1),
        "pointwise_conv.bias": (6,),
        "w_o.weight": (6, 6, 1),
    }
    layer = (Conv1d_NN_Attn, Conv2d_NN_Attn)[dims - 1](in_channels=4, out_channels=6)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == published
    state = {k: torch.randn(s) for k, s in published.items()}
    layer.load_state_dict(state, strict=True)
    other = (Conv1d_NN_Attn, Conv2d_NN_Attn)[dims - 1](in_channels=4, out_channels=6).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    x = sample(dims, channels=4).float()
    torch.testing.assert_close(other(x), layer.eval()(x))
    layer.load_state_dict({k: v for k, v in state.items() if "bias" not in k}, strict=True)
    assert layer.pointwise_conv.bias.eq(0).all()


def test_input_stays_and_layout_does_not_matter():
    layer = make(2, K=4, aggregation_type="Loc_Col").eval()
    x = sample(2)
    before = x.clone()
    y = layer(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("magnitude", ["cosine", "euclidean"])
def test_compiles_whole(magnitude):
    torch._dynamo.reset()
    layer = Conv2d_NN_Attn(2, 3, K=4, magnitude_type=magnitude)
    x = torch.randn(2, 2, 6, 6)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_mixed_precision():
    layer = Conv2d_NN_Attn(2, 3, K=36, padding=0, attention_dropout=0.0)
    x = torch.randn(2, 2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("make_layer", [Conv1d_NN_Attn, Conv2d_NN_Attn])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_dropout": 1.5}, r"attention_dropout must lie in \[0, 1\] \(got 1.5\)"),
        ({"K": 0}, r"K must be at least 1 \(got 0\)"),
        ({"num_samples": 4}, r"sampling_type all needs num_samples -1 \(got 4\)"),
        ({"sampling_type": "random"}, r"sampling_type random needs num_samples >= 1"),
        ({"shuffle_pattern": "BA"}, r"shuffle_pattern BA needs shuffle_scale >= 1"),
    ],
)
def test_bad_options_are_named(make_layer, options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(2, 3, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_more_neighbors_than_candidates(device):
    layer = Conv2d_NN_Attn(2, 3, K=10, padding=0).to(device)
    with pytest.raises(ValueError, match=r"K=10 is larger than the number of candidates, 9\b"):
        layer(torch.zeros(1, 2, 3, 3, device=device))
    assert layer(torch.zeros(1, 2, 4, 3, device=device)).shape == (1, 3, 4, 3)


def test_module_text_shows_the_options():
    assert "attention_dropout=0.25" in repr(Conv2d_NN_Attn(2, 3, attention_dropout=0.25))
