"""N3Net: published names and sizes, presets, options."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from small_n3 import TINY, published_shapes

from checkpoints import load_pretrained, read_weights
from models import N3Net, model_class
from models.n3net import PRESETS

close = torch.testing.assert_close


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_published_names_shapes_and_sizes():
    shapes = published_shapes()
    assert len(shapes) == 140
    assert sum(int(np.prod(s)) for s in shapes.values()) == 708_843
    own = {
        name: tuple(value.shape)
        for name, value in N3Net().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert own == {name: shape for name, shape in shapes.items() if ".bn1." not in name}
    assert count(N3Net()) == 705_895 - 384
    assert count(N3Net(num_blocks=1)) == 427_348


def test_published_file_loads(tmp_path):
    torch.manual_seed(0)
    net = OrderedDict((name, torch.rand(shape)) for name, shape in published_shapes().items())
    path = tmp_path / "051_ckpt.t7"
    torch.save({"net": net, "epoch": 51}, path, _use_new_zipfile_serialization=False)
    weights, arguments = read_weights(path)
    assert arguments == {}
    model = N3Net()
    dropped = load_pretrained(model, weights)
    assert len(dropped) == 12
    assert all(".bn1." in name for name in dropped)
    state = model.state_dict()
    for name, value in net.items():
        if name not in dropped:
            close(state[name], value, rtol=0, atol=0)
    wrapped = {f"module.{name}": value for name, value in net.items()}
    torch.save(wrapped, path)
    load_pretrained(model, read_weights(path)[0])


def test_differing_names_are_listed(tmp_path):
    weights = N3Net(**TINY).state_dict()
    weights["extra.weight"] = torch.zeros(3)
    del weights["blocks.0.conv1.bias"]
    with pytest.raises(ValueError, match=r"2 names differ") as error:
        load_pretrained(N3Net(**TINY), weights)
    assert "missing: blocks.0.conv1.bias (4,)" in str(error.value)
    assert "unknown: extra.weight (3,)" in str(error.value)
    with pytest.raises(ValueError, match=r"other shape: blocks.1.conv1.weight is \(4, 6, 3, 3\)"):
        load_pretrained(N3Net(**(TINY | {"num_volumes": 3})), N3Net(**TINY).state_dict())
    for name, content in (("a.pt", b"no pickle"), ("b.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 1}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        read_weights(tmp_path / "d.pt")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_build(preset):
    name, options = PRESETS[preset]
    model_type = model_class(name)
    own = model_type.Options.names()  # the others are the task's
    model = model_type(**{name: value for name, value in options.items() if name in own})
    expected = {
        "dncnn17": 556_097,
        "dncnn18": 593_089,
        "n3net_light": 427_348,
        "n3net": 705_511,
        "knn_input": 338_697,
        "knn_dncnn": 338_697,
        "nlrn": 340_099,
    }
    assert count(model) == expected.get(preset, count(model))


@pytest.mark.parametrize(
    "options",
    [
        {"nonlocal_block": "none"},
        {"nonlocal_block": "knn"},
        {"nonlocal_block": "knn", "match_on": "input"},
        {"nonlocal_block": "concrete"},
        {"match_on": "input"},
        {"match_on": "dncnn", "temperature": "learned"},
        {"num_blocks": 2, "in_channels": 3, "temperature": "fixed"},
        {"num_blocks": 0},
    ],
)
def test_options_train(options):
    torch.manual_seed(0)
    model = N3Net(**(TINY | options))
    x = torch.rand(2, options.get("in_channels", 1), 40, 35)
    out = model(x)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_options():
    with pytest.raises(ValueError, match="knn cannot match on an embedding"):
        N3Net(nonlocal_block="knn", match_on="embedding")
    with pytest.raises(ValueError, match="nonlocal_block must be"):
        N3Net(nonlocal_block="soft")
    with pytest.raises(ValueError, match="match_on must be"):
        N3Net(match_on="output")
