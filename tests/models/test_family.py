"""Width, DenseNet and U-Net with every layer."""

import numpy as np
import pytest
import torch
from PIL import Image

from layers import LAYERS
from main import main
from models import MODELS, VGG, DenseNet, ResNet, UNet


def count(model):
    return sum(p.numel() for p in model.parameters())


def meta(name, layer="Conv2d", **options):
    with torch.device("meta"):
        return MODELS[name](layer=LAYERS[layer], **options)


# The stem is 3x3 instead of 7x7 and has no norm of its own; the layers' convolutions have biases.
@pytest.mark.parametrize(("name", "layers"), [("densenet121", 121), ("densenet201", 201)])
def test_dense_layers(name, layers):
    model = meta(name, num_classes=1000)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) + 1 == layers
    if layers == 121:  # the classic network has 7,978,856
        biases = sum(m.bias.numel() for m in convs if m.bias is not None)
        assert count(model) - biases == 7_978_856 - 3 * 64 * (49 - 9) - 2 * 64


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_trains(name):
    torch.manual_seed(0)
    models = [
        DenseNet(layer=LAYERS[name], in_channels=1, num_classes=3, width=0.05),
        UNet(layer=LAYERS[name], channels=4, num_levels=2),
        VGG(layer=LAYERS[name], in_channels=1, num_classes=3, width=0.05, classifier="gap"),
        ResNet(layer=LAYERS[name], in_channels=1, num_classes=3, width=0.05),
    ]
    for model in models:
        x = torch.randn(2, 1, 32, 32) if isinstance(model, VGG) else torch.randn(2, 1, 8, 8)
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters()), type(model)


SHORT_UNET = ["--model", "unet", "--dataset", "denoise", "--train_dir", ".", "--test_dir", "."]
SHORT_UNET += ["--channels", "4", "--num_levels", "1", "--crop_size", "16"]
SHORT_UNET += ["--crops_per_image", "64"]
SHORT_DENSE = ["--model", "densenet121", "--dataset", "digits", "--width", "0.05"]
SHORT_DENSE += ["--limit_train", "96", "--limit_test", "20"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("flags", [SHORT_UNET, SHORT_DENSE], ids=["unet", "densenet121"])
def test_two_epochs_lower_the_loss(layer, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 3), np.uint8)
    Image.fromarray(pixels).resize((24, 24)).save("smooth.png")
    short = ["--layer", layer, "--device", "cpu", "--num_epochs", "2", "--batch_size", "32"]
    history = main([*flags, *short, "--lr", "0.003", "--output_dir", "run"])["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_width_and_head():
    assert count(meta("vgg11", classifier="gap")) < 1e7
    assert meta("vgg11", width=0.25).features[0].out_channels == 16
    assert meta("resnet18", width=0.25).classifier[2].in_features == 128
    assert meta("unet", width=0.5).bottom[0].out_channels == 256
    assert meta("vgg11", width=1e-9).features[0].out_channels == 1


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (31, 16)])
def test_unet_keeps_any_size(size):
    x = torch.randn(1, 2, *size)
    assert UNet(layer=LAYERS["Conv2d"], in_channels=2, channels=2)(x).shape == x.shape


def test_refusals():
    with pytest.raises(ValueError, match=r"at least 16 x 16 pixels \(got 16 x 15\)"):
        UNet(layer=LAYERS["Conv2d"], channels=2)(torch.randn(1, 1, 16, 15))
    with pytest.raises(ValueError, match=r"one of 121, 169, 201, 264 \(got 100\)"):
        DenseNet(layer=LAYERS["Conv2d"], depth=100)
    with pytest.raises(ValueError, match="classifier must be one of published, gap"):
        VGG(layer=LAYERS["Conv2d"], classifier="none")


def test_from_the_command_line(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    small = ["--device", "cpu", "--layer", "Conv2d", "--dry_run"]
    main(["--model", "unet", "--channels", "4", "--num_levels", "2", *small])
    main(["--model", "densenet121", "--dataset", "digits", "--width", "0.1", *small])
    code, text = refused(main, ["--model", "vgg11", "--width", "0"])
    assert code == 2
    assert "--width must be above 0" in text
