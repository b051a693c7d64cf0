from functools import partial

import pytest
import torch

from layers import GRAPH_LAYERS, KvtAttention
from main import main
from models import DGCNN, MODELS

SMALL = ["--model", "dgcnn", "--device", "cpu", "--width", "0.1", "--num_points", "24", "--K", "5"]
SHORT = ["--num_train", "120", "--num_test", "20", "--batch_size", "20", "--num_epochs", "2"]


def build(layer="EdgeConv", **options):
    torch.manual_seed(0)
    options = {"width": 0.1, "K": 4, "num_classes": 3} | options
    return DGCNN(layer=partial(GRAPH_LAYERS[layer], groups=1), **options)


def test_size_of_the_published_network():
    count = sum(p.numel() for p in build(width=1.0, num_classes=40).parameters())
    assert count == 1_809_320  # 1.8 million are published; weights before batch norm have no bias


@pytest.mark.parametrize("layer", GRAPH_LAYERS)
@pytest.mark.parametrize("similarity_type", ["Col", "Loc"])
def test_padding_changes_nothing(layer, similarity_type):
    torch.manual_seed(1)
    options = {"similarity_type": similarity_type, "dropout": 0.0}
    whole, padded = (build(layer, in_channels=c, **options).eval() for c in (3, 4))
    clouds = [torch.randn(1, 3, n) for n in (9, 6, 4)]
    batch = torch.zeros(3, 4, 9)
    for row, cloud in zip(batch, clouds, strict=True):
        row[:3, : cloud.shape[2]], row[3, : cloud.shape[2]] = cloud[0], 1
    expected = torch.cat([whole(cloud) for cloud in clouds])
    torch.testing.assert_close(padded(batch), expected, rtol=1e-4, atol=1e-5)
    batch[1, :3, 6:] = 50.0  # whatever the padding holds
    torch.testing.assert_close(padded(batch), expected, rtol=1e-4, atol=1e-5)


def test_statistics_and_gradients_leave_padding_out():
    torch.manual_seed(1)
    models = [build(in_channels=c, dropout=0.0) for c in (3, 4)]
    for norm in (m for model in models for m in model.classifier.modules()):
        if isinstance(norm, torch.nn.BatchNorm1d):
            norm.eval()
    cloud = torch.randn(2, 3, 8)
    batch = torch.cat([cloud, torch.ones(2, 1, 8)], 1)
    batch = torch.cat([batch, torch.randn(2, 4, 5) * torch.tensor([1.0, 1, 1, 0])[:, None]], 2)
    for model, x in zip(models, (cloud, batch), strict=True):
        model(x).square().sum().backward()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())
    for mine, plain in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-3, atol=1e-4)


def test_the_order_of_points_says_nothing():
    model, x = build().eval(), torch.randn(2, 3, 12)
    torch.testing.assert_close(model(x[:, :, torch.randperm(12)]), model(x), rtol=1e-4, atol=1e-5)


def test_clouds_of_fewer_than_K_points_and_of_none():
    model = build(in_channels=4).eval()
    batch = torch.zeros(2, 4, 6)
    batch[0, :3, :2], batch[0, 3, :2] = torch.randn(3, 2), 1
    assert model(batch).isfinite().all()


@pytest.mark.parametrize("layer", GRAPH_LAYERS)
@pytest.mark.parametrize("sizes", [[], ["--fewest_points", "8", "--pad", "mask"]])
def test_every_layer_learns(layer, sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--layer", layer, "--lr", "0.003", "--dropout", "0", "--output_dir", "run"]
    history = main([*SMALL, *SHORT, *sizes, *flags])["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    again = main(["--test_only", "--output_dir", "run", "--device", "cpu"])
    assert again["test"]["loss"] == min(history, key=lambda row: -row["test_top1"])["test_loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_points", "4"], "K=5 is larger than the number of points of a cloud, 4"),
        (["--fewest_points", "9"], "clouds of unequal sizes, and nothing says what fills them"),
        (
            ["--fewest_points", "99", "--pad", "mask"],
            "--fewest_points 99 is more than --num_points 24",
        ),
        (["--dataset", "digits"], "takes points, and --dataset digits has images. Datasets for"),
        (["--layer", "Conv2d"], "--layer Conv2d does not fit --model dgcnn"),
        (["--similarity_type", "Loc_Col"], "similarity_type must be one of Col, Loc"),
        (["--model", "vgg11"], "takes images, and --dataset shapes3d has points. Datasets for"),
    ],
)
def test_refusals(refused, flags, message):
    code, text = refused(main, [*SMALL, *SHORT, "--dataset", "shapes3d", *flags])
    assert code == 2
    assert message in text


def test_shapes_that_are_no_clouds():
    with pytest.raises(ValueError, match=r"built for 3 channels \(got \(2, 4, 9\)\)"):
        build()(torch.randn(2, 4, 9))
    assert MODELS["dgcnn"] is DGCNN


def saved_numbers(module, *inputs):
    """Count the numbers that a forward pass keeps for the backward pass."""
    counts = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: counts.append(t.numel()) or t, lambda t: t
    ):
        module(*inputs)
    return sum(counts)


@pytest.mark.parametrize("layer", GRAPH_LAYERS)
def test_what_is_kept_grows_with_the_points_alone(layer):
    model = build(layer, dropout=0.0)
    one, two, four = (saved_numbers(model, torch.randn(2, 3, n)) for n in (32, 64, 128))
    assert four - two == 2 * (two - one)


def test_kvt_keeps_no_table_of_scores():
    model = KvtAttention(8, 2, K=4, attention_dropout=0.0)
    one, two, four = (saved_numbers(model, torch.randn(2, n, 8)) for n in (32, 64, 128))
    assert four - two == 2 * (two - one)
