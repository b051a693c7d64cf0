import functools
import sys

import pytest
import torch
from torch import nn

from layers import LAYERS
from models.convert import ForeignNetwork, convert

LOC = {"similarity_type": "Loc", "magnitude_type": "euclidean"}


def test_neighbors_by_location_give_the_outputs_of_resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    original = torchvision.models.resnet18(num_classes=10).eval()
    done = convert(original, "ConvNN", K=9, **LOC)
    assert len(done.replaced) == 17  # the 7x7 stem too, for which K = 9 is another layer
    assert "conv1" not in done.copied
    assert done.module.conv1.stride == 2
    done = convert(original, "ConvNN", leave=["conv1"], K=9, **LOC)
    assert done.kept.pop("conv1") == "as asked"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(done.module(x), original(x), rtol=1e-4, atol=1e-4)
    assert len(done.copied) == len(done.replaced) == 16
    assert set(done.kept.values()) == {"1x1"}


def test_branching_trains_in_resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = convert(
        torchvision.models.resnet18(num_classes=4), layer="Branching", K=9
    ).module.train()
    y = torch.arange(8) % 4  # each class of its own colour
    x = torch.randn(4, 3, 1, 1)[y] + 0.3 * torch.randn(8, 3, 64, 64)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(7):
        loss = nn.functional.cross_entropy(network(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses) < losses[0] / 2
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "replaced"), [("resnet10t", 11), ("regnetx_002", 1), ("vgg11_bn", 8)]
)
def test_networks_of_timm(name, replaced):
    pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    torch.manual_seed(0)
    layer = functools.partial(LAYERS["Branching"], K=4)
    model = ForeignNetwork(layer=layer, source="timm", name=name, in_channels=1, num_classes=3)
    assert len(model.conversion.replaced) == replaced
    y = model(torch.randn(2, 1, 32, 32))
    assert y.shape == (2, 3)
    y.square().mean().backward()


def test_neighbors_by_location_give_the_outputs_of_a_timm_network():
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    torch.manual_seed(0)
    original = timm.create_model("resnet10t", num_classes=3).eval()
    done = convert(original, "ConvNN", K=9, **LOC)
    assert len(done.copied) == len(done.replaced) == 11
    x = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(done.module(x), original(x), rtol=1e-4, atol=1e-4)


def test_a_network_without_such_convolutions_is_refused():
    pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    with pytest.raises(ValueError, match=r"no convolution that a layer can replace: kernel 16x16"):
        ForeignNetwork(layer=LAYERS["ConvNN"], source="timm", name="vit_tiny_patch16_224")


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_trains_in_a_foreign_network(layer):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    )
    done = convert(network, layer)
    assert done.replaced == ["0"]
    assert isinstance(network[0], nn.Conv2d)  # the original is left alone
    y = done.module(torch.randn(2, 3, 8, 8))
    assert y.shape == (2, 4, 4, 4)
    y.square().mean().backward()
    assert all(p.grad is not None for p in done.module.parameters())


def test_what_no_layer_can_replace_is_listed():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2)),
        nn.Conv1d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    done = convert(network, "Conv2d")
    assert done.replaced == done.copied == ["4", "6"]
    assert list(done.kept) == ["0", "1", "2", "3", "5"]
    assert "left as they are: 0 (2 groups), 1 (dilated), 2 (kernel 2x2)" in str(done)
    assert torch.equal(done.module[6].weight, network[6].weight)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"layer must be one of Conv2d, .* \(got 'Conv'\)"):
        convert(nn.Conv2d(1, 1, 3), "Conv")
    with pytest.raises(ValueError, match=r"leave names 1, which is no convolution .* There is: 0"):
        convert(nn.Sequential(nn.Conv2d(1, 1, 3)), "Conv2d", leave=["1"])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet10t needs the package timm, .* pip install"):
        ForeignNetwork(layer=LAYERS["Conv2d"], source="timm", name="resnet10t")
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"no network 'resnet19'. Close to it: resnet101"):
        ForeignNetwork(layer=LAYERS["Conv2d"], source="torchvision", name="resnet19")
    with pytest.raises(ValueError, match=r"take 3 channels \(got 1\)"):
        ForeignNetwork(layer=LAYERS["Conv2d"], source="torchvision", name="resnet18", in_channels=1)
