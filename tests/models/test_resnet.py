from functools import partial

import pytest
import torch
from torch import nn

from layers import LAYERS
from models import MODELS, ResBlock, ResNet, model_class

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def meta(name, layer=LAYERS["Conv2d"], **options):
    with torch.device("meta"):
        return MODELS[name](layer=layer, **options).eval()


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", [2, 2, 2, 2]), ("resnet34", [3, 4, 6, 3])]
)
@pytest.mark.parametrize("downsample", ["stride", "none"])
def test_published_layout(name, blocks, downsample):
    model = meta(name, downsample=downsample)
    expected = {"first_conv.0.weight", "classifier.2.weight", "classifier.2.bias"}
    expected |= {f"first_conv.1.{p}" for p in NORM}
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            block = f"layer{stage}.{i}"
            expected |= {f"{block}.{c}.weight" for c in ("conv1", "conv2")}
            expected |= {f"{block}.conv_layer.{c}.weight" for c in (0, 3)}
            expected |= {f"{block}.conv_layer.{n}.{p}" for n in (1, 4) for p in NORM}
            if stage > 1 and i == 0 and downsample == "none":
                expected.add(f"{block}.identity.weight")
            elif stage > 1 and i == 0:
                expected.add(f"{block}.identity.0.weight")
                expected |= {f"{block}.identity.1.{p}" for p in NORM}
    assert set(model.state_dict()) == expected
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    sides = (32, 16, 8, 4) if downsample == "stride" else (32,) * 4
    assert sizes == [(w, s, s) for w, s in zip((64, 128, 256, 512), sides, strict=True)]


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_parameters_are_the_classic_ones_but_for_the_stem(name, count):
    model = meta(name, num_classes=1000)
    stem = 64 * 3 * (49 - 9)
    assert sum(p.numel() for p in model.parameters()) == count - stem


@pytest.mark.parametrize("name", LAYERS)
def test_trains_with_every_layer(name):
    torch.manual_seed(0)
    model = MODELS["resnet18"](layer=LAYERS[name], in_channels=1, num_classes=3)
    x = torch.randn(2, 1, 8, 8)
    before = x.clone()
    y = model(x)
    assert y.shape == (2, 3)
    nn.functional.cross_entropy(y, torch.tensor([0, 2])).backward()
    assert torch.equal(x, before)
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["ConvNN", "ConvNN_Attn"])
def test_full_resolution_with_neighbors(name):
    model = meta("resnet34", LAYERS[name], downsample="none")
    assert model(torch.empty(1, 3, 16, 16, device="meta")).shape == (1, 10)


def test_block_is_the_residual_formula():
    block = ResBlock(LAYERS["ConvNN"], 3, 5, stride=2).eval()
    x = torch.randn(2, 3, 7, 8)
    first, norm1, _, second, norm2 = block.conv_layer
    assert first is block.conv1
    assert second is block.conv2
    expected = (norm2(second(norm1(first(x)).relu())) + block.identity(x)).relu()
    torch.testing.assert_close(block(x), expected)
    assert block(x).shape == (2, 5, 4, 4)
    assert isinstance(ResBlock(LAYERS["ConvNN"], 3, 3).identity, nn.Identity)


@pytest.mark.parametrize("kept", [("conv1", "conv2"), ("conv_layer.0", "conv_layer.3")])
def test_checkpoints_with_one_of_two_names_load(kept):
    models = [MODELS["resnet18"](layer=LAYERS["ConvNN"], num_classes=3).eval() for _ in range(2)]
    dropped = ({"conv1", "conv2", "conv_layer.0", "conv_layer.3"}) - set(kept)
    state = {
        k: v for k, v in models[0].state_dict().items() if not any(f".{d}." in k for d in dropped)
    }
    before = dict(state)
    models[1].load_state_dict(state, strict=True)
    assert state.keys() == before.keys()
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(models[0](x), models[1](x))


def test_shortcuts_see_channels_first():
    # Where channels come last, oneDNN spoils memory in strided 1x1 convolutions (their gradient).
    block, seen = ResBlock(LAYERS["ConvNN"], 4, 8, stride=2).eval(), []
    block.identity.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    y = block(x)
    assert seen[0].is_contiguous()
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(y, block(x.contiguous()))


def test_errors():
    with pytest.raises(ValueError, match=r"depth must be one of 18, 34 \(got 50\)"):
        ResNet(layer=LAYERS["Conv2d"], depth=50)
    with pytest.raises(ValueError, match=r"downsample must be one of stride, none \(got 'pool'\)"):
        ResNet(layer=LAYERS["Conv2d"], downsample="pool")
    with pytest.raises(ValueError, match=r"at least 8 positions along every side \(got 4 x 4\)"):
        meta("resnet18")(torch.empty(1, 3, 4, 4, device="meta"))
    layer = partial(LAYERS["ConvNN"], shuffle_pattern="A", shuffle_scale=2)
    with pytest.raises(ValueError, match=r"cannot be added.*Try shuffle_pattern BA or NA"):
        meta("resnet18", layer)(torch.empty(1, 3, 16, 16, device="meta"))


def test_what_a_model_says_of_itself():
    assert model_class("resnet18") is ResNet
    assert ResNet.tasks == ("classification",)
    assert ResNet.min_input_size == 8
