import itertools

import pytest
import slow_layers
import torch
from torch import nn

from layers import LAYERS, Conv1d_NN, Conv2d_NN, add_coordinates, coordinate_channels

SAMPLING = [
    {"sampling_type": "all"},
    {"sampling_type": "random", "num_samples": 7},
    {"sampling_type": "spatial", "num_samples": 3, "sample_padding": 0},
]
# Varied along the combinations above, so that each meets each.
SHAPES = [
    {"shuffle_pattern": "NA", "padding": 1, "stride": 1},
    {"shuffle_pattern": "BA", "shuffle_scale": 2, "padding": 0, "stride": 1},
    {"shuffle_pattern": "A", "shuffle_scale": 2, "padding": 1, "stride": 2},
    {"shuffle_pattern": "B", "shuffle_scale": 2, "padding": 2, "stride": 1},
    {"shuffle_pattern": "NA", "shuffle_scale": 3, "padding": 0, "stride": 2},
]
COMBINATIONS = list(
    itertools.product(
        ("cosine", "euclidean"), ("Loc", "Col", "Loc_Col"), ("Col", "Loc_Col"), SAMPLING
    )
)


def sample(dims, batch=2, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = (6, 8) if dims == 2 else (8,)
    return torch.randn(batch, channels, *sides, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("case", range(len(COMBINATIONS)))
def test_every_choice_equals_the_slow_loops(dims, case):
    magnitude, similarity, aggregation, sampling = COMBINATIONS[case]
    torch.manual_seed(case)
    layer = (Conv1d_NN, Conv2d_NN)[dims - 1](
        in_channels=2,
        out_channels=2,
        K=3,
        magnitude_type=magnitude,
        similarity_type=similarity,
        aggregation_type=aggregation,
        lambda_param=0.3,
        **sampling,
        **SHAPES[case % len(SHAPES)],
    ).double()
    x = sample(dims, batch=1 + case % 2, seed=case)
    candidates = None
    if sampling["sampling_type"] == "random":
        layer.train(case % 4 < 2)
        shape = layer.pad_and_flatten(x)[1]
        state = torch.get_rng_state()
        drawn = layer.candidates(shape, x.device)
        torch.set_rng_state(state)
        if drawn is not None:
            candidates = drawn.tolist()
            assert len(set(candidates)) == 7
    slow_layers.assert_same(layer, x, lambda x: slow_layers.convnn(layer, x, candidates))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_every_shape_option_equals_the_slow_loops(shape, dims, sampling):
    torch.manual_seed(1)
    layer = (Conv1d_NN, Conv2d_NN)[dims - 1](2, 1, K=2, **shape, **sampling).double().eval()
    x = sample(dims)
    candidates = layer.candidates(layer.pad_and_flatten(x)[1], x.device)
    candidates = None if candidates is None else candidates.tolist()
    slow_layers.assert_same(layer, x, lambda x: slow_layers.convnn(layer, x, candidates))


@pytest.mark.parametrize("sample_padding", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 7, 8])
def test_sampling_grid(sample_padding, num_samples):
    layer = Conv2d_NN(
        1,
        1,
        K=1,
        padding=1,
        sampling_type="spatial",
        num_samples=num_samples,
        sample_padding=sample_padding,
    )
    x = torch.randn(1, 1, 7, 9)
    expected = slow_layers.Grid(x, 1, 1).spatial(num_samples, sample_padding)
    got = layer.candidates((9, 11), x.device)
    assert (None if got is None else got.tolist()) == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_location_neighbors_are_a_convolution(kernel, batch, stride):
    torch.manual_seed(kernel)
    padding = (kernel - 1) // 2
    for side in (1, 2, 5, 8, 13):
        conv = nn.Conv2d(3, 4, kernel, stride=stride, padding=padding)
        layer = Conv2d_NN(
            in_channels=3,
            out_channels=4,
            K=kernel**2,
            padding=padding,
            stride=stride,
            similarity_type="Loc",
            magnitude_type="euclidean",
        )
        with torch.no_grad():
            layer.conv1d_layer.weight.copy_(conv.weight.flatten(2))
            layer.conv1d_layer.bias.copy_(conv.bias)
        x = torch.randn(batch, 3, side, side, requires_grad=True)
        y, expected = layer(x), conv(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        upstream = torch.randn_like(y)
        grads = torch.autograd.grad((y * upstream).sum(), [x, *layer.parameters()])
        want = torch.autograd.grad((expected * upstream).sum(), [x, *conv.parameters()])
        for g, w in zip(grads, want, strict=True):
            # Sums of up to 676 products in float32.
            torch.testing.assert_close(g, w.reshape(g.shape), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
def test_one_neighbor_is_a_pointwise_convolution(dims, similarity):
    layer = (Conv1d_NN, Conv2d_NN)[dims - 1](2, 3, K=1, similarity_type=similarity).double()
    x = sample(dims)
    weight = layer.conv1d_layer.weight.reshape(3, 2, *[1] * dims)
    conv = nn.functional.conv1d if dims == 1 else nn.functional.conv2d
    expected = conv(x, weight, layer.conv1d_layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("magnitude", ["cosine", "euclidean"])
@pytest.mark.parametrize("padding", [0, 1])
def test_permuting_positions_permutes_outputs(magnitude, padding):
    layer = Conv2d_NN(3, 4, K=5, padding=padding, magnitude_type=magnitude).double()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    order = torch.randperm(30)
    moved = layer(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(moved.flatten(2), layer(x).flatten(2)[..., order])


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
@pytest.mark.parametrize("sampling", [("random", 120), ("random", 500), ("spatial", 9)])
def test_more_samples_than_positions_are_all(dims, similarity, sampling):
    layers = [
        (Conv1d_NN, Conv2d_NN)[dims - 1](
            2, 3, K=5, similarity_type=similarity, sampling_type=kind, num_samples=count
        ).double()
        for kind, count in (("all", -1), sampling)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = sample(dims)
    torch.testing.assert_close(layers[0](x), layers[1](x))


def test_random_sampling_follows_the_seed_in_training_and_is_fixed_in_evaluation():
    layer = Conv2d_NN(2, 3, K=4, sampling_type="random", num_samples=12).double()
    x = sample(2)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), first)
    layer.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("total", [2, 10, 100, 1156])
def test_fixed_random_order_is_a_permutation_without_pattern(total):
    layer = Conv2d_NN(1, 1, K=1, sampling_type="random", num_samples=total - 1).eval()
    drawn = layer.candidates((1, total), torch.device("cpu"))
    assert len(set(drawn.tolist())) == total - 1
    if total == 1156:
        layer.num_samples = 100
        drawn = layer.candidates((1, total), torch.device("cpu")).double()
        assert 450 < float(drawn.mean()) < 710
        assert len(set(drawn.diff().tolist())) > 30


def test_stride_keeps_every_second_query():
    layer, strided = (Conv2d_NN(2, 3, K=4, stride=s).double() for s in (1, 2))
    strided.load_state_dict(layer.state_dict())
    x = sample(2)[..., :7]
    torch.testing.assert_close(strided(x), layer(x)[..., ::2, ::2])


def test_coordinates_are_x_then_y():
    grid = coordinate_channels((2, 3))
    assert grid.tolist() == [[[-1, 0, 1], [-1, 0, 1]], [[-1, -1, -1], [1, 1, 1]]]
    assert coordinate_channels((1,)).tolist() == [[-1]]
    assert add_coordinates(torch.zeros(2, 3, 4)).shape == (2, 4, 4)
    assert add_coordinates(torch.zeros(2, 3, 4, 5)).shape == (2, 5, 4, 5)


@pytest.mark.parametrize("similarity", ["Col", "Loc", "Loc_Col"])
def test_gradcheck(similarity):
    torch.manual_seed(0)
    layer = Conv2d_NN(2, 2, K=3, similarity_type=similarity, aggregation_type="Loc_Col").double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_input_stays_and_layout_does_not_matter():
    layer = Conv2d_NN(2, 3, K=4, similarity_type="Loc_Col", aggregation_type="Loc_Col").double()
    x = sample(2)
    before = x.clone()
    y = layer(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y)
    crooked = x.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(layer(crooked), y)


@pytest.mark.parametrize("dims", [1, 2])
def test_state_dict_round_trip_and_published_names(dims):
    make = (Conv1d_NN, Conv2d_NN)[dims - 1]
    layer, other = make(2, 3, K=4), make(2, 3, K=4)
    assert set(layer.state_dict()) == {"conv1d_layer.weight", "conv1d_layer.bias"}
    assert layer.conv1d_layer.weight.shape == (3, 2, 4)
    other.load_state_dict(layer.state_dict(), strict=True)
    x = sample(dims).float()
    torch.testing.assert_close(layer(x), other(x))


def test_published_weights_without_bias_load():
    layer = Conv2d_NN(2, 3, K=4)
    layer.load_state_dict({"conv1d_layer.weight": torch.ones(3, 2, 4)}, strict=True)
    assert layer.conv1d_layer.bias.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1d_layer\.weight"):
        layer.load_state_dict({}, strict=True)


COMPILED = [
    {},
    {"similarity_type": "Loc", "magnitude_type": "euclidean"},
    {"sampling_type": "random", "num_samples": 20, "shuffle_pattern": "BA", "shuffle_scale": 2},
    {"sampling_type": "spatial", "num_samples": 4, "similarity_type": "Loc_Col"},
]


@pytest.mark.parametrize("options", COMPILED)
def test_compiles_whole_and_exports(options):
    torch._dynamo.reset()
    layer = Conv2d_NN(2, 3, K=4, aggregation_type="Loc_Col", **options)
    x = torch.randn(2, 2, 8, 8)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("options", COMPILED)
def test_mixed_precision_keeps_the_choice(options):
    layer = Conv2d_NN(2, 3, K=4, **options).eval()
    x = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


BAD = [
    ({"K": 0}, r"K must be at least 1 \(got 0\)"),
    ({"stride": 0}, r"stride must be at least 1 \(got 0\)"),
    ({"padding": -1}, r"padding must be at least 0 \(got -1\)"),
    ({"in_channels": 0}, r"in_channels must be at least 1 \(got 0\)"),
    ({"out_channels": 0}, r"out_channels must be at least 1 \(got 0\)"),
    ({"num_samples": 4}, r"sampling_type all needs num_samples -1 \(got 4\).*Leave num_samples"),
    ({"sampling_type": "random"}, r"random needs num_samples >= 1 \(got -1\).*number of candid"),
    ({"sampling_type": "spatial"}, r"spatial needs num_samples >= 1 \(got -1\).*side of the samp"),
    ({"sampling_type": "spatial", "num_samples": 0}, r"needs num_samples >= 1 \(got 0\)"),
    (
        {"sampling_type": "spatial", "num_samples": 2, "sample_padding": -1},
        r"sample_padding must be at least 0 \(got -1\)",
    ),
    ({"sampling_type": "some"}, r"sampling_type must be one of all, random, spatial \(got 'some'"),
    ({"magnitude_type": "dot"}, r"magnitude_type must be one of cosine, euclidean \(got 'dot'\)"),
    ({"similarity_type": "x"}, r"similarity_type must be one of Loc, Col, Loc_Col \(got 'x'\)"),
    ({"aggregation_type": "x"}, r"aggregation_type must be one of Col, Loc_Col \(got 'x'\)"),
    ({"shuffle_pattern": "AB"}, r"shuffle_pattern must be one of BA, NA, B, A \(got 'AB'\)"),
    ({"shuffle_pattern": "BA"}, r"shuffle_pattern BA needs shuffle_scale >= 1 \(got 0\)"),
    ({"shuffle_scale": -1}, r"shuffle_scale must be at least 0 \(got -1\)"),
    ({"lambda_param": 1.5}, r"lambda_param must lie in \[0, 1\] \(got 1.5\)"),
    ({"lambda_param": -0.1}, r"lambda_param must lie in \[0, 1\] \(got -0.1\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("make", [Conv1d_NN, Conv2d_NN])
def test_bad_options_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"in_channels": 2, "out_channels": 3, **options})


TOO_FEW = [
    ({"K": 10, "padding": 0}, (3, 3), 9),
    ({"K": 26, "padding": 1}, (3, 3), 25),
    ({"K": 5, "sampling_type": "random", "num_samples": 4}, (3, 3), 4),
    ({"K": 5, "sampling_type": "spatial", "num_samples": 2}, (3, 3), 4),
    ({"K": 2, "sampling_type": "spatial", "num_samples": 3, "sample_padding": 1}, (3, 3), 1),
]


@pytest.mark.parametrize(("options", "sides", "available"), TOO_FEW)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("similarity", ["Loc", "Col"])
def test_more_neighbors_than_candidates(options, sides, available, device, similarity):
    layer = Conv2d_NN(2, 3, similarity_type=similarity, **options).to(device)
    message = rf"K={options['K']} is larger than the number of candidates, {available}\b.*3 x 3"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(1, 2, *sides, device=device))
    layer = Conv2d_NN(2, 3, similarity_type=similarity, **{**options, "K": available}).to(device)
    assert layer(torch.ones(1, 2, *sides, device=device)).shape == (1, 3, 3, 3)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expects \(B, 2, H, W\), got \(1, 3, 4, 4\)"):
        Conv2d_NN(2, 3)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"expects \(B, 2, L\), got \(1, 2, 4, 4\)"):
        Conv1d_NN(2, 3)(torch.zeros(1, 2, 4, 4))
    layer = Conv2d_NN(2, 3, shuffle_pattern="BA", shuffle_scale=3)
    with pytest.raises(ValueError, match="shuffle_scale=3 does not divide the map of 4 x 6"):
        layer(torch.zeros(1, 2, 4, 6))


def test_module_text_shows_the_options():
    layer = Conv2d_NN(2, 3, K=4, sampling_type="spatial", num_samples=5, similarity_type="Loc_Col")
    text = repr(layer)
    for part in ("K=4", "spatial", "num_samples=5", "cosine", "Loc_Col", "lambda_param=0.5"):
        assert part in text


@pytest.mark.parametrize("name", LAYERS)
def test_table_builds_layers_from_channels_and_stride(name):
    layer = LAYERS[name](in_channels=3, out_channels=4, stride=2)
    assert layer(torch.randn(1, 3, 7, 6)).shape == (1, 4, 4, 3)
