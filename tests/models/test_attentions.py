"""Layers over tokens in place of the attention of other networks."""

import functools
import math

import pytest
import torch
from torch import nn

from layers import TOKEN_LAYERS
from main import main
from models.convert import ForeignNetwork, convert

OPTIONS = {
    "LocalAttention": {"window_size": 7},
    "NeighborhoodAttention": {"K": 7},
    "Attention": {},
}


def options_of(layer):
    return {"attention_dropout": 0.0, **OPTIONS.get(layer, {"K": 7})}


class Attend(nn.Module):
    """Attention as timm has it, from its formula."""

    def __init__(self, width=8, num_heads=2, bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        if bias:
            nn.init.zeros_(self.qkv.bias)
            nn.init.zeros_(self.proj.bias)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).chunk(3, 2)
        heads = []
        for a, b, c in zip(*(t.chunk(self.num_heads, 2) for t in (q, k, v)), strict=True):
            heads.append((a @ b.mT / math.sqrt(a.shape[2])).softmax(2) @ c)
        return self.proj(torch.cat(heads, 2))


class Encoder(nn.Module):
    """nn.MultiheadAttention, called as torchvision calls it."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


WHOLE = ["Attention", "KvtAttention", "NeighborhoodAttention", "LocalAttention", "ConvNNAttention"]


@pytest.mark.parametrize("layer", WHOLE)
@pytest.mark.parametrize("network", [Attend, Encoder])
def test_layers_that_look_at_all_tokens_give_the_outputs_of_the_original(layer, network):
    torch.manual_seed(0)
    original = network().eval()
    done = convert(original, layer, **options_of(layer))
    assert done.replaced == done.copied == ["" if network is Attend else "attention"]
    assert str(done) == "1 attention block replaced, 1 with weights."
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(done.module.eval()(x), original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", TOKEN_LAYERS)
def test_every_layer_trains_in_a_transformer_of_pytorch(layer):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    done = convert(
        nn.TransformerEncoder(block, 2, enable_nested_tensor=False), layer, **options_of(layer)
    )
    assert done.replaced == ["layers.0.self_attn", "layers.1.self_attn"]
    y = done.module(torch.randn(3, 7, 8))
    y.square().mean().backward()
    assert all(p.grad is not None for p in done.module.parameters())
    assert done.module.eval()(torch.randn(3, 7, 8)).shape == (3, 7, 8)


def test_biases_are_not_dropped_in_silence():
    original = Attend()
    nn.init.normal_(original.qkv.bias)
    assert convert(original, "Attention").copied == []
    assert convert(Attend(), "Attention", keep_weights=False).copied == []
    assert convert(Attend(bias=False), "Attention").copied == [""]


def test_what_no_layer_can_replace_is_listed():
    class More(Attend):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

    class Turned(Attend):
        def forward(self, x, rope):
            return super().forward(x)

    wide = Attend()
    wide.proj = nn.Linear(8, 4)
    network = nn.ModuleList(
        [
            *(More(), Turned(), wide, Attend(), nn.MultiheadAttention(8, 2)),
            nn.MultiheadAttention(8, 2, batch_first=True, kdim=4),
            nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        ]
    )
    done = convert(network, "KvtAttention", K=3)
    assert done.replaced == ["3"]
    assert done.kept == {
        "0": "holds norm too",
        "1": "needs rope too",
        "2": "heads of another width",
        "4": "samples come second",
        "5": "keys of another width",
        "6": "keys are added",
    }
    assert convert(network, "Attention", leave=["3"]).replaced == []


def test_refusals():
    x = torch.randn(2, 7, 8)
    mixed = convert(nn.MultiheadAttention(8, 2, batch_first=True), "KvtAttention", K=3).module
    for keywords, message in [
        ({"key": x.clone(), "value": x.clone()}, "no other keys than the tokens"),
        ({"key": x, "value": x, "attn_mask": torch.ones(7, 7)}, "take no masks"),
        ({"key": x, "value": x, "is_causal": True}, "take no masks"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixed(x, **keywords)
    with pytest.raises(ValueError, match=r"take \(B, N, C\), got \(2, 7, 8, 1\)"):
        mixed(x[..., None])
    with pytest.raises(ValueError, match="leave names 1, which is no attention block"):
        convert(nn.Sequential(Attend()), "Attention", leave=["1"])
    with pytest.raises(
        ValueError, match=r"Attention has no option 'K'. There is: attention_dropout"
    ):
        convert(Attend(), "Attention", K=3)


@pytest.mark.parametrize("name", ["torchvision:vit_b_32", "timm:vit_tiny_patch16_224"])
def test_transformers_of_other_libraries(name):
    source, _, network = name.partition(":")
    pytest.importorskip(source, reason=f"{source} is not installed (pip install {source})")
    layer = functools.partial(TOKEN_LAYERS["KvtAttention"], K=9)
    with torch.device("meta"):
        model = ForeignNetwork(layer=layer, source=source, name=network, num_classes=3)
    assert model.notes == [f"note: {name}: 12 attention blocks replaced."]
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 3)


def test_attention_of_timm_keeps_its_outputs():
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    original = timm.models.VisionTransformer(**sizes, num_classes=3).eval()
    done = convert(original, "KvtAttention", K=17, attention_dropout=0.0)
    assert len(done.copied) == len(done.replaced) == 2
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(done.module(x), original(x), rtol=1e-4, atol=1e-4)


def test_a_transformer_of_timm_is_tried(refused, tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    monkeypatch.chdir(tmp_path)
    few = "--dataset digits --resize 224 --limit_train 8 --limit_test 4 --batch_size 4 --device cpu"
    words = ["--model", "timm:vit_tiny_patch16_224", *few.split(), "--dry_run"]
    main([*words, "--layer", "KvtAttention", "--K", "5"])
    assert "12 attention blocks replaced." in capsys.readouterr().out
    code, text = refused(main, [*words, "--layer", "KvtAttention", "--K", "500"])
    assert code == 2
    assert "K=500 is larger than the number of tokens to choose from, 197" in text
    code, text = refused(main, [*words, "--layer", "Branching"])
    assert "no convolution that a layer can replace: kernel 16x16" in text
    assert "Choose another network, or a layer that replaces attention" in text
    code, text = refused(main, [*words, "--layer", "GIN"])
    assert "--layer GIN does not fit --model timm:vit_tiny_patch16_224" in text
    code, text = refused(main, ["--model", "timm:resnet10t", *words[2:], "--layer", "Attention"])
    assert "has no attention block that a layer can replace. Choose another network" in text
