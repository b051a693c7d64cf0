"""Networks by `torch.hub`."""

from pathlib import Path

import pytest
import torch

import hubconf
from checkpoints import save_safetensors
from layers import Conv2d_NN
from models import MODELS

ROOT = str(Path(__file__).parent.parent)
SMALL = {
    "vit": {"d_hidden": 8, "num_heads": 2, "d_mlp": 8, "num_layers": 1, "image_size": (32, 32)},
    "unet": {"channels": 4, "num_levels": 2},
    "dncnn": {"depth": 3, "features": 4},
    "n3net": {"depth": 2, "features": 4, "num_blocks": 1, "embed_features": 4},
    "nlrn": {"features": 4, "recurrences": 2, "window": 5},
    "dynamic": {"num_inputs": 4, "num_classes": 2},
}


def load(name, *args, **options):
    return torch.hub.load(ROOT, name, *args, source="local", **options)


@pytest.mark.parametrize("name", MODELS)
def test_every_network(name):
    with torch.device("cpu" if name in ("dynamic", "knn") else "meta"):
        model = load(name, **SMALL.get(name.split("_")[0], {}))
    assert isinstance(model, torch.nn.Module)
    assert getattr(hubconf, name).__doc__.startswith(f"{name}: ")


def test_options_reach_network_and_layer(tmp_path):
    options = {"layer": "ConvNN", "K": 4, "num_classes": 3, "width": 0.1, "in_channels": 1}
    model = load("resnet18", **options)
    layers = [m for m in model.modules() if isinstance(m, Conv2d_NN)]
    assert {layer.K for layer in layers} == {4}
    x = torch.randn(2, 1, 8, 8)
    y = model.eval()(x)
    assert y.shape == (2, 3)
    save_safetensors(tmp_path / "x.safetensors", model.state_dict(), {})
    again = load("resnet18", weights=str(tmp_path / "x.safetensors"), **options).eval()
    torch.testing.assert_close(again(x), y)


def test_denoisers_keep_their_own_layer():
    assert load("dncnn", depth=3, features=4).plain
    assert not load("dncnn", depth=3, features=4, layer="Branching", K=4).plain


def test_refusals():
    for name, options, message in [
        ("resnet18", {"layer": "Conv"}, "layer must be one of Conv2d, Conv2d_New"),
        ("resnet18", {"layer": "ConvNN", "k": 9}, "has no option 'k'. Did you mean K?"),
        ("resnet18", {"layer": "Conv2d", "K": 9}, "resnet18 with layer Conv2d has no option 'K'"),
        ("resnet18", {"layer": "ConvNN", "K": 0}, "K must be at least 1"),
        ("knn", {"layer": "ConvNN"}, "knn takes no layer (got 'ConvNN')"),
        ("dynamic", {}, "dynamic must be told num_inputs"),
        ("resnet18", {"weights": "nowhere.pt"}, "there is no checkpoint nowhere.pt"),
    ]:
        with pytest.raises(ValueError, match=r"(?s).*") as error:
            hubconf._network(name, **options)
        assert message in str(error.value), str(error.value)


def test_trained_networks(run):
    results = run("--layer", "ConvNN", "--K", "4", "--output_dir", "here")
    assert results["output_dir"] == "here"
    model = hubconf.trained("here")
    assert not model.training
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"there is no checkpoint nowhere/best.pt"):
        hubconf.trained("nowhere")
