import math

import pytest
import torch
import torch.nn.functional as F

from layers import GRAPH_LAYERS, record_neighbors
from main import main
from models import MODELS
from models.vig import Block, pool_nodes, position_features

SMALL = ["--dataset", "digits", "--resize", "16", "--device", "cpu", "--width", "0.1"]
SHORT = ["--limit_train", "300", "--limit_test", "60", "--num_epochs", "2", "--batch_size", "30"]
PYRAMID = ["--patch_size", "1", "--K", "4"]  # 16² nodes in the first stage, 2² in the last
ISOTROPIC = ["--patch_size", "4", "--K", "4"]


def build(name, layer="MaxRelative", **options):
    with torch.device("meta"):
        return MODELS[name](layer=GRAPH_LAYERS[layer], **options)


# Published: 7.1 and 10.7 million parameters.
@pytest.mark.parametrize(("name", "millions"), [("vig_tiny", 7.1), ("pvig_tiny", 10.7)])
def test_size_of_the_published_networks(name, millions):
    count = sum(p.numel() for p in build(name, num_classes=1000).parameters())
    assert abs(count / 1e6 - millions) < 0.1


def test_schedules():
    blocks = build("vig_tiny").stages[0].blocks
    assert [b.K for b in blocks] == [9, 9, 10, 11, 12, 13, 13, 14, 15, 16, 17, 18]
    assert [b.dilation for b in blocks] == [1] * 4 + [2] * 4 + [3] * 4
    pyramid = build("pvig_tiny", max_dilation=2)
    blocks = [m for m in pyramid.modules() if isinstance(m, Block)]
    assert {b.K for b in blocks} == {9}
    assert [b.dilation for b in blocks] == [1] * 4 + [2] * 8
    assert [b.pool for b in blocks] == [4] * 2 + [2] * 2 + [1] * 8
    small = build("vig_tiny", image_size=(32, 32), patch_size=8, K=8)  # 16 nodes for K·d
    assert [b.dilation for b in small.stages[0].blocks] == [1] * 12


@pytest.mark.parametrize("pool", [1, 2])
def test_position_bias_is_the_mean_product_of_sine_codes(pool):
    sides, channels = (4, 6), 16
    waves = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)

    def code(y, x):
        parts = [f(p * waves) for p in (y, x) for f in (torch.sin, torch.cos)]
        return torch.cat(parts)

    codes = torch.stack([code(y, x) for y in range(4) for x in range(6)])
    expected = codes @ pool_nodes(codes[None], sides, pool)[0].T / channels
    queries, keys = position_features(sides, channels, pool)
    torch.testing.assert_close((queries @ keys.T).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", [1, 2])
def test_a_block_against_the_table_of_all_pairs(pool):
    torch.manual_seed(0)
    sides, channels, K, dilation = (4, 4), 8, 2, 2
    block = Block(GRAPH_LAYERS["MaxRelative"], channels, K, dilation, pool, 0.0).double()
    position = position_features(sides, channels, pool)
    x = torch.randn(2, 16, channels, dtype=torch.float64, requires_grad=True)
    y = block.fc1(x)
    keys = F.avg_pool2d(y.mT.unflatten(2, sides), pool).flatten(2).mT
    scores = F.normalize(y, dim=2) @ F.normalize(keys, dim=2).mT
    scores = scores + (position[0] @ position[1].T).double()
    indices = scores.sort(dim=2, descending=True).indices[..., : K * dilation : dilation]
    neighbors = torch.stack([rows[i] for rows, i in zip(keys, indices, strict=True)])
    joined = block.graph.linear.join(y, (neighbors - y[:, :, None]).amax(2))
    z = block.graph.norm(block.graph.linear(joined).flatten(0, 1)).view(2, 16, -1)
    z = x + block.fc2(F.gelu(z))
    expected = z + block.mlp2(F.gelu(block.mlp1(z)))
    got = block(x, sides, position)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad(t, x, upstream) for t in (got, expected)), strict=True)
    for mine, plain in pairs:
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("layer", GRAPH_LAYERS)
@pytest.mark.parametrize(("model", "nodes"), [("vig_tiny", ISOTROPIC), ("pvig_tiny", PYRAMID)])
def test_every_layer_learns(model, nodes, layer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", model, "--layer", layer, "--lr", "0.003", "--output_dir", "run"]
    history = main([*SMALL, *SHORT, *nodes, *flags])["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    text = (tmp_path / "run" / "model.txt").read_text()
    assert f"(graph): {layer}(" in text
    assert "K=4, dilation=1" in text


def test_all_parameters_get_gradients():
    torch.manual_seed(0)
    model = MODELS["pvig_tiny"](
        layer=GRAPH_LAYERS["MaxRelative"], image_size=(16, 16), patch_size=1, K=4, width=0.1
    )
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch_size", "3"], "patch_size 3 is no power of two"),
        (["--patch_size", "32"], "--patch_size 32 does not divide images of 16 x 16 pixels"),
        (
            ["--patch_size", "4"],
            "K=17 is larger than the number of nodes to choose from in block 11, 16",
        ),
        (
            ["--patch_size", "4", "--K", "5", "--max_dilation", "4"],
            "with dilation 3 looks at 24 and is larger than the number of nodes",
        ),
        (
            ["--model", "pvig_tiny", "--patch_size", "4"],
            "nodes of stage 4 have 32 x 32 pixels). Try another --patch_size",
        ),
        (["--patch_size", "4", "--K", "4", "--groups", "3"], "groups 3 does not divide the"),
        (["--layer", "ConvNN"], "--layer ConvNN does not fit --model vig_tiny, which takes Max"),
        (["--dataset", "shapes3d"], "takes images, and --dataset shapes3d has points"),
    ],
)
def test_refusals(refused, flags, message):
    code, text = refused(main, ["--model", "vig_tiny", *SMALL, *flags])
    assert code == 2
    assert message in text


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"224 x 224 pixels \(got 32 x 32\)"):
        build("vig_tiny")(torch.empty(1, 3, 32, 32, device="meta"))
    assert math.prod(build("vig_tiny").stages[0].sides) == 196


@pytest.mark.parametrize("pool", [1, 2])
def test_blocks_tell_which_nodes_they_take(pool):
    torch.manual_seed(0)
    block = Block(GRAPH_LAYERS["MaxRelative"], 8, 3, 1, pool, 0.0).eval()
    x = torch.randn(2, 24, 8)
    with record_neighbors(block) as records:
        block(x, (4, 6), None)
    (record,) = records
    assert (record.map_shape, record.extent, len(record.queries)) == ((4, 6), pool, 24)
    assert record.places[-1].tolist() == [4 - (pool + 1) / 2, 6 - (pool + 1) / 2]
    y = block.fc1(x)
    keys = y if pool == 1 else pool_nodes(y, (4, 6), pool)
    distances = torch.cdist(F.normalize(y, dim=-1), F.normalize(keys, dim=-1))
    nearest = distances.topk(3, largest=False).indices
    assert torch.equal(record.indices[:, 0].sort(-1).values, nearest.sort(-1).values)
