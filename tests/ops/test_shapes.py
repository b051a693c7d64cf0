"""Shapes alone: the rehearsal agrees with what networks really do, for every model and layer."""

from functools import partial

import pytest
import torch
from torch import nn

from layers import LAYERS
from models import MODELS
from ops.shapes import _SHAPE_RULES, rehearse


def shapes_of(network, x, run):
    """Output shapes of all modules in the order of their calls."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
        for module in network.modules()
    ]
    run(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_every_module_has_the_shape_it_really_has(name, layer):
    options = {"hidden_features": 8} if name == "vgg11" else {}
    build = partial(MODELS[name], layer=LAYERS[layer], in_channels=3, num_classes=5, **options)
    with torch.device("meta"):
        network = build()
    rehearsed = shapes_of(network, None, lambda _: rehearse(network, (3, 32, 32)))
    network = build().eval()
    with torch.no_grad():
        real = shapes_of(network, torch.zeros(1, 3, 32, 32), network)
    assert rehearsed == real


class Mixed(nn.Module):
    """The functions of the table, by operators and methods."""

    def forward(self, x):
        x = nn.functional.pixel_unshuffle(x, 2) + 1
        x = nn.functional.max_pool2d(x, 3, 2)
        y = nn.functional.adaptive_avg_pool2d(x, (3, 5))
        return nn.functional.pixel_shuffle(y + y[:, :1], 2)


def test_functions_without_a_rule_are_left_to_torch():
    rehearse(nn.Sequential(nn.Conv2d(1, 2, 3, device="meta"), nn.Tanh()), (1, 5, 5))


def test_rules_match():
    network, x = Mixed(), torch.zeros(1, 4, 12, 16)
    seen = shapes_of(network, x, lambda x: rehearse(network, tuple(x.shape[1:])))
    assert seen == [tuple(network(x).shape)]
    assert set(_SHAPE_RULES) >= {"conv2d", "batch_norm", "linear", "relu"}


def test_what_cannot_work_is_said_by_the_layer():
    with torch.device("meta"):
        network = LAYERS["ConvNN"](in_channels=3, out_channels=4, K=200)
    with pytest.raises(ValueError, match="K=200 is larger than the number of candidates, 144"):
        rehearse(network, (3, 10, 10))
