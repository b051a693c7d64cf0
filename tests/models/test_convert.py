import functools
import sys

import pytest
import torch
from torch import nn

from layers import LAYERS
from main import main
from models import MODELS, model_class
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


def test_a_convolution_that_is_used_twice_is_replaced_by_one_layer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    network = nn.Sequential(conv, nn.ReLU(), conv, block, block)
    done = convert(network, "ConvNN", K=9, **LOC)
    assert done.replaced == done.copied == ["0", "3.0"]
    assert done.module[0] is done.module[2]
    assert done.module[3] is done.module[4]
    assert not any(isinstance(m, nn.Conv2d) for m in done.module.modules())
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(done.module(x), network(x), rtol=1e-4, atol=1e-4)
    kept = convert(network, "Branching", leave=["2"], K=9)  # either name says which
    assert kept.kept == {"0": "as asked"}
    assert kept.module[0] is kept.module[2]


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"ConvNN has no option 'k'. Did you mean K\?"):
        convert(nn.Conv2d(1, 1, 3), "ConvNN", k=9)
    with pytest.raises(ValueError, match=r"Conv2d has no option 'K'. There is: dilation, kernel"):
        convert(nn.Conv2d(1, 1, 3), "Conv2d", K=9)
    with pytest.raises(ValueError, match=r"layer must be one of Conv2d, .* \(got 'Conv'\)"):
        convert(nn.Conv2d(1, 1, 3), "Conv")
    with pytest.raises(ValueError, match=r"leave names 1, which is no convolution .* There is: 0"):
        convert(nn.Sequential(nn.Conv2d(1, 1, 3)), "Conv2d", leave=["1"])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet10t needs the package timm, .* pip install"):
        ForeignNetwork(layer=LAYERS["Conv2d"], source="timm", name="resnet10t")
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"no network 'resnet19'. Close to it: resnet18"):
        ForeignNetwork(layer=LAYERS["Conv2d"], source="torchvision", name="resnet19")


# ---------------------------------------------------------------------------------------------
# By --model


def meta(source, name, **sizes):
    with torch.device("meta"):
        return ForeignNetwork(layer=LAYERS["Conv2d"], source=source, name=name, **sizes)


SHORT = [
    *("--dataset", "digits", "--resize", "32", "--device", "cpu", "--limit_train", "32"),
    *("--limit_test", "16", "--batch_size", "16", "--num_epochs", "2"),
    *("--optimizer", "adam", "--lr", "1e-3"),
]


@pytest.mark.parametrize("model", ["timm:resnet10t", "torchvision:resnet18"])
def test_a_network_by_its_name_is_trained_and_tested(model, tmp_path, monkeypatch, capsys):
    package = model.partition(":")[0]
    pytest.importorskip(package, reason=f"{package} is not installed (pip install {package})")
    monkeypatch.chdir(tmp_path)
    flags = ["--layer", "Branching", "--K", "4", "--output_dir", "run"]
    history = main(["--model", model, *SHORT, *flags])["history"]
    said = capsys.readouterr().out
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert said.count("3 left as they are: 1x1 (3).") == 1
    assert "layer2.0.downsample" in (tmp_path / "run" / "model.txt").read_text()
    again = main(["--test_only", "--output_dir", "run", "--device", "cpu"])
    best = max(history, key=lambda row: row["test_top1"])
    assert again["test"]["loss"] == best["test_loss"]


def test_every_name_of_a_known_package_is_a_model(capsys):
    for name in ("timm:some", "torchvision:some"):
        assert name in MODELS
        assert model_class(name) is ForeignNetwork
    for name in ("timm:", "keras:some", "some", "timm", None):
        assert name not in MODELS
    with pytest.raises(KeyError, match="keras:some"):
        MODELS["keras:some"]
    with pytest.raises(SystemExit) as stop:
        main(["--help", "timm:some"])
    assert stop.value.code == 0
    assert "--model timm:some: A network of torchvision or timm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:resnet10x", "timm has no network 'resnet10x'. Close to it: resnet10t"),
        ("timm:resnet18.a1_in1k", "timm has no network 'resnet18.a1_in1k'. Close to it: resnet18,"),
        ("timm:zzzzzzz", "timm has no network 'zzzzzzz'. timm.list_models() lists them."),
        (
            "timm:swin_tiny_patch4_window7_224",
            "can replace: kernel 4x4 (1: patch_embed.proj). Choose another",
        ),
        ("timm:levit_128", "takes no images of 32x32 with 1 channel"),
        ("timm:levit_128", "made for images of 224x224: try --resize 224"),
        ("timm:", "--model: invalid choice: 'timm:'"),
    ],
)
def test_names_of_timm_that_cannot_be_used(model, message, refused, tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    monkeypatch.chdir(tmp_path)
    code, text = refused(main, ["--model", model, *SHORT])
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torchvision:resnet19", "torchvision has no network 'resnet19'. Close to it: resnet18"),
        ("torchvision:fcn_resnet50", "torchvision has no network 'fcn_resnet50'"),
        ("torchvision:inception_v3", "takes no images of 32x32 with 1 channel"),
        ("torchvision:maxvit_t", "Most networks are made for images of 224x224: try --resize 224"),
    ],
)
def test_names_of_torchvision_that_cannot_be_used(model, message, refused, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    code, text = refused(main, ["--model", model, "--layer", "Conv2d", *SHORT])
    assert code == 2
    assert message in text


def test_what_layers_refuse_is_said_as_they_say_it(refused, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    words = ["--model", "torchvision:resnet18", *SHORT, "--layer", "ConvNN", "--K", "30"]
    code, text = refused(main, words)
    assert code == 2
    assert text.startswith(
        "error: K=30 is larger than the number of candidates, 16: a map of 2 x 2"
    )
    assert "takes no images" not in text


def test_images_of_the_right_size_are_not_told_to_be_so():
    pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    model = meta("timm", "levit_128")
    with pytest.raises(ValueError, match=r"of 32x32 with 3 channels .* try --resize 224"):
        model(torch.empty(1, 3, 32, 32, device="meta"))
    with pytest.raises(
        ValueError, match=r"of 224x224 with 1 channel .*\. Choose another network\."
    ):
        model(torch.empty(1, 1, 224, 224, device="meta"))


def test_a_package_that_is_not_installed_is_named_with_the_line_that_installs_it(
    refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    code, text = refused(main, ["--model", "timm:resnet10t", *SHORT])
    assert code == 2
    assert "timm:resnet10t needs the package timm, which is not installed" in text
    assert "pip install timm" in text


@pytest.mark.parametrize("name", ["regnet_x_400mf", "densenet121", "vgg11", "squeezenet1_0"])
def test_networks_of_torchvision_take_any_number_of_channels(name):
    pytest.importorskip("torchvision")
    y = meta("torchvision", name, in_channels=5, num_classes=3)(
        torch.empty(2, 5, 64, 64).to("meta")
    )
    assert y.shape == (2, 3)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 96)])
def test_networks_with_auxiliary_classifiers_give_scores_alone(name, side):
    pytest.importorskip("torchvision")
    y = meta("torchvision", name, num_classes=3).train()(torch.empty(2, 3, side, side).to("meta"))
    assert y.shape == (2, 3)


def test_what_is_left_is_listed_by_reason():
    network = nn.Sequential(
        *(nn.Conv2d(4, 4, 1) for _ in range(9)),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    text = convert(network, "Conv2d").reasons()
    assert text == "1x1 (9), 2 groups (1: 9), dilated (1: 10)"
