import pytest
import torch

from layers import TOKEN_LAYERS
from main import main
from models import MODELS, ViT

SMALL = ["--model", "vit_tiny", "--dataset", "digits", "--resize", "16", "--patch_size", "4"]
SMALL += ["--num_layers", "2", "--d_hidden", "24", "--d_mlp", "32", "--device", "cpu"]
SHORT = ["--limit_train", "300", "--limit_test", "60", "--num_epochs", "2", "--batch_size", "30"]

BLOCK = {
    "Attention": ["W_k", "W_o", "W_q", "W_v"],
    "ConvNNAttention": ["W_k", "W_o", "W_q", "W_v", "conv"],
    "KvtAttention": ["proj", "qkv"],
    "BranchConv": [
        *(f"conv1d.{n}" for n in ("W_o", "W_x", "conv")),
        *(f"convnn.{n}" for n in ("W_k", "W_o", "W_q", "W_v", "conv")),
        "pointwise_linear",
    ],
    "BranchAttention": [
        *(f"attention.{n}" for n in ("W_k", "W_o", "W_q", "W_v")),
        *(f"convnn.{n}" for n in ("W_k", "W_o", "W_q", "W_v", "conv")),
        "pointwise_linear",
    ],
}


def build(layer, **options):
    with torch.device("meta"):
        return MODELS["vit_tiny"](layer=TOKEN_LAYERS[layer], **options)


@pytest.mark.parametrize("layer", BLOCK)
def test_published_names(layer):
    state = build(layer, num_classes=100).state_dict()
    biased = ("conv1d.", "pointwise")
    expected = {
        "patch_embedding.linear_projection.weight",
        "patch_embedding.linear_projection.bias",
    }
    expected |= {"patch_embedding.norm.weight", "patch_embedding.norm.bias"}
    expected |= {"positional_encoding.cls_tokens", "positional_encoding.pe"}
    expected |= {"classifier.weight", "classifier.bias"}
    for i in range(12):
        block = f"transformer_encoder.{i}."
        expected |= {f"{block}{n}.{p}" for n in ("norm1", "norm2") for p in ("weight", "bias")}
        expected |= {f"{block}mlp.{n}.{p}" for n in (0, 3) for p in ("weight", "bias")}
        for name in BLOCK[layer]:
            expected.add(f"{block}attention.{name}.weight")
            if name.startswith(biased):
                expected.add(f"{block}attention.{name}.bias")
    assert set(state) == expected
    assert state["positional_encoding.pe"].shape == (1, 197, 192)
    assert state["patch_embedding.linear_projection.weight"].shape == (192, 3, 16, 16)


def published_state(layer, width=192, heads=3, hidden=768, blocks=2, K=9, tokens=197, classes=10):
    """Weights under the published names (ours where there are none), with the published shapes."""
    d, half = width // heads, width // 2
    square = (width, width)

    def convnn(prefix, w):
        parts = {f"{prefix}W_{n}.weight": (w, w) for n in "qkvo"}
        return {**parts, f"{prefix}conv.weight": (w // heads, 1, K)}

    dense = {f"W_{n}.weight": square for n in "qkvo"}
    branch = {"pointwise_linear.weight": square, "pointwise_linear.bias": (width,)}
    attention = {
        "Attention": dense,
        "ConvNNAttention": convnn("", width),
        "KvtAttention": {"qkv.weight": (3 * width, width), "proj.weight": square},
        "LocalAttention": {"to_qkv.weight": (3 * width, width), "to_out.weight": square},
        "NeighborhoodAttention": {"qkv.weight": (3 * width, width), "proj.weight": square},
        "BranchConv": {
            **convnn("convnn.", half),
            **{f"conv1d.W_{n}.weight": (half, half) for n in "xo"},
            **{f"conv1d.W_{n}.bias": (half,) for n in "xo"},
            **{"conv1d.conv.weight": (d // 2, d // 2, 9), "conv1d.conv.bias": (d // 2,)},
            **branch,
        },
        "BranchAttention": {
            **convnn("convnn.", half),
            **{f"attention.W_{n}.weight": (half, half) for n in "qkvo"},
            **branch,
        },
    }[layer]
    shapes = {
        "patch_embedding.linear_projection.weight": (width, 3, 16, 16),
        "patch_embedding.linear_projection.bias": (width,),
        **{f"patch_embedding.norm.{p}": (width,) for p in ("weight", "bias")},
        "positional_encoding.cls_tokens": (1, 1, width),
        "positional_encoding.pe": (1, tokens, width),
        "classifier.weight": (classes, width),
        "classifier.bias": (classes,),
    }
    for i in range(blocks):
        block = {f"attention.{name}": shape for name, shape in attention.items()}
        block |= {f"norm{n}.{p}": (width,) for n in (1, 2) for p in ("weight", "bias")}
        block |= {"mlp.0.weight": (hidden, width), "mlp.0.bias": (hidden,)}
        block |= {"mlp.3.weight": (width, hidden), "mlp.3.bias": (width,)}
        shapes |= {f"transformer_encoder.{i}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("layer", TOKEN_LAYERS)
def test_published_weights_load(layer):
    state = published_state(layer)
    model = MODELS["vit_tiny"](layer=TOKEN_LAYERS[layer], num_layers=2)
    model.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_size_of_the_published_network():
    count = sum(p.numel() for p in build("Attention", num_classes=1000).parameters())
    blocks = 12 * (4 * 192**2 + 2 * 192 * 768 + 768 + 192 + 4 * 192)
    assert count == blocks + 3 * 256 * 192 + 192 + 2 * 192 + 192 + 1000 * 193


@pytest.mark.parametrize("layer", TOKEN_LAYERS)
def test_every_layer_learns(layer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--layer", layer, "--lr", "0.003", "--output_dir", "run"]
    history = main([*SMALL, *SHORT, *flags])["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_options_of_the_transformer():
    model = build("Attention", pos_encoding="learned", final_norm=True, num_layers=1)
    names = dict(model.named_parameters())
    assert "positional_encoding.pe" in names
    assert "final_norm.weight" in names
    assert not list(build("Attention").final_norm.parameters())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch_size", "5"], "--patch_size 5 does not divide images of 16 x 16 pixels"),
        (["--num_heads", "5"], "--num_heads 5 does not divide a width of 24"),
        (["--K", "20"], "K=20 is larger than the number of tokens to choose from, 17"),
        (
            ["--layer", "ConvNN"],
            "--layer ConvNN does not fit --model vit_tiny, which takes Attention",
        ),
        (
            ["--model", "vgg11", "--layer", "KvtAttention"],
            "--layer KvtAttention does not fit --model vgg11, which takes Conv2d, Conv2d_New",
        ),
    ],
)
def test_refusals(refused, flags, message):
    code, text = refused(main, [*SMALL, *flags])
    assert code == 2
    assert message in text


def test_images_of_another_size():
    model = build("Attention", num_layers=1)
    with pytest.raises(ValueError, match=r"224 x 224 pixels \(got 32 x 32\)"):
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert ViT.layer_kind == "tokens"
