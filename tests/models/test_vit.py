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
