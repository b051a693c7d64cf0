from functools import partial

import pytest
import torch

from layers import LAYERS
from models import MODELS, VGG, model_class

# Positions of weight layers in `features`, as published.
LAYOUT = {
    "vgg11": ([0, 4, 8, 11, 15, 18, 22, 25], 29),
    "vgg13": ([0, 3, 7, 10, 14, 17, 21, 24, 28, 31], 35),
    "vgg16": ([0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40], 44),
    "vgg19": ([0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49], 53),
}
# torchvision's counts for 1000 classes (vgg*_bn).
PARAMETERS = {
    "vgg11": 132_868_840,
    "vgg13": 133_053_736,
    "vgg16": 138_365_992,
    "vgg19": 143_678_248,
}


def meta(name, layer="Conv2d", **options):
    options = {"num_classes": 10, **options}
    with torch.device("meta"):
        return MODELS[name](layer=LAYERS[layer], **options).eval()


@pytest.mark.parametrize("name", LAYOUT)
def test_published_layout(name):
    model = meta(name, num_classes=1000)
    state = model.state_dict()
    where, length = LAYOUT[name]
    assert len(model.features) == length
    expected = {f"features.{i}.{p}" for i in where for p in ("weight", "bias")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"features.{i + 1}.{p}" for i in where for p in norm}
    expected |= {f"classifier.{i}.{p}" for i in (0, 3, 6) for p in ("weight", "bias")}
    assert set(state) == expected
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert state["classifier.0.weight"].shape == (4096, 512 * 7 * 7)
    assert [m.p for m in model.classifier if isinstance(m, torch.nn.Dropout)] == [0.5, 0.5]
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 1000)


def test_published_branching_layout():
    with torch.device("meta"):
        layer = partial(
            LAYERS["Branching"],
            branch_ratio=0.125,
            similarity_type="Loc_Col",
            aggregation_type="Loc_Col",
        )
        state = MODELS["vgg11"](layer=layer).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    channels = {0: (3, 64), 4: (64, 128), 8: (128, 256), 11: (256, 256), 15: (256, 512)}
    for i, (c, o) in channels.items():
        assert shapes[f"features.{i}.branch1.conv1d_layer.weight"] == (o // 8, c + 2, 9)
        assert shapes[f"features.{i}.branch2.weight"] == (o - o // 8, c, 3, 3)
        assert shapes[f"features.{i}.pointwise_conv.weight"] == (o, o, 1, 1)
    total = sum(v.numel() for k, v in state.items() if not k.endswith(("mean", "var", "tracked")))
    assert total == 130_021_882  # as printed in the published run folder


@pytest.mark.parametrize("name", LAYERS)
def test_trains_with_every_layer(name):
    torch.manual_seed(0)
    model = VGG(layer=LAYERS[name], in_channels=1, num_classes=3, hidden_features=8)
    x = torch.randn(2, 1, 32, 32)
    before = x.clone()
    y = model(x)
    assert y.shape == (2, 3)
    torch.nn.functional.cross_entropy(y, torch.tensor([0, 2])).backward()
    assert torch.equal(x, before)
    for key, p in model.features.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_state_dict_round_trip():
    models = [VGG(layer=LAYERS["ConvNN"], num_classes=3, hidden_features=4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(models[0].eval()(x), models[1].eval()(x))


def test_what_a_model_says_of_itself():
    for name in LAYOUT:
        assert model_class(name) is VGG
        assert model_class(name).tasks == ("classification",)
        assert model_class(name).min_input_size == 32


def test_errors():
    with pytest.raises(ValueError, match=r"depth must be one of 11, 13, 16, 19 \(got 12\)"):
        VGG(layer=LAYERS["Conv2d"], depth=12)
    with pytest.raises(ValueError, match=r"at least 32 x 32 pixels \(got 28 x 28\)"):
        meta("vgg11")(torch.empty(1, 3, 28, 28, device="meta"))


def test_too_many_neighbors_show_before_any_work():
    with torch.device("meta"):
        model = MODELS["vgg11"](layer=partial(LAYERS["ConvNN"], K=9, padding=0)).eval()
    with pytest.raises(ValueError, match=r"K=9 is larger than the number of candidates, 4\b"):
        model(torch.empty(1, 3, 32, 32, device="meta"))
