"""Token layers against dense tables, written from the formulas in float64."""

import itertools

import pytest
import torch

from layers import TOKEN_LAYERS, Attention, ConvNNAttention, KvtAttention, NeighborhoodAttention
from layers.tokens import LocalAttention

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_convnn(layer, x, candidates=None):
    """Loop over samples, heads, tokens."""
    b, n, c = x.shape
    d = c // layer.num_heads
    q, k, v = (p(x) for p in (layer.W_q, layer.W_k, layer.W_v))
    line = torch.linspace(-1, 1, n, dtype=x.dtype)[:, None]
    out = torch.empty_like(x)
    for i, h in itertools.product(range(b), range(layer.num_heads)):
        qh, kh, vh = (t[i, :, h * d : (h + 1) * d] for t in (q, k, v))
        if layer.coordinate_encoding:
            qh, kh = torch.cat([qh, line], 1), torch.cat([kh, line], 1)
            vh = vh if layer.convolution_type == "depthwise" else torch.cat([vh, line], 1)
        for m in range(n):
            if layer.magnitude_type == "euclidean":
                s = -(kh[m] - qh).square().sum(1).clamp(min=1e-12).sqrt()
            elif layer.magnitude_type == "cosine":
                s = torch.cosine_similarity(kh[m : m + 1], qh)
            else:
                s = qh @ kh[m] / d**0.5
            pool = range(n) if candidates is None else [j for j in candidates if j != m]
            chosen = sorted(pool, key=lambda j, s=s: -float(s[j].detach()))
            chosen = chosen[: layer.K] if candidates is None else [m, *chosen[: layer.K - 1]]
            score = s[chosen]
            if candidates is not None:
                score = score.clone()
                score[0] = -1 if layer.magnitude_type == "euclidean" else 1
            if layer.softmax_topk_val:
                a = score.softmax(0)
            else:
                a = 1 / (-score + 1e-8) if layer.magnitude_type == "euclidean" else score
            taps = (a[:, None] * vh[chosen]).T[None]  # (1, D, K)
            out[i, m, h * d : (h + 1) * d] = layer.conv(taps)[0, :, 0]
    return layer.W_o(out)


@pytest.mark.parametrize("magnitude_type", ["matmul", "cosine", "euclidean"])
@pytest.mark.parametrize("convolution_type", ["standard", "depthwise", "depthwise-separable"])
@pytest.mark.parametrize("softmax_topk_val", [True, False])
@pytest.mark.parametrize("coordinate_encoding", [True, False])
def test_convnn_attention_matches_loops(
    magnitude_type, convolution_type, softmax_topk_val, coordinate_encoding
):
    torch.manual_seed(0)
    options = {
        "magnitude_type": magnitude_type,
        "convolution_type": convolution_type,
        "softmax_topk_val": softmax_topk_val,
        "coordinate_encoding": coordinate_encoding,
    }
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    for K in (1, 3):
        layer = ConvNNAttention(6, 2, K=K, **options).double().eval()
        torch.testing.assert_close(layer(x), slow_convnn(layer, x))
    sampled = ConvNNAttention(6, 2, K=3, sampling_type="spatial", num_samples=4, **options)
    sampled = sampled.double().eval()
    torch.testing.assert_close(sampled(x), slow_convnn(sampled, x, [0, 2, 4, 6]))


@pytest.mark.parametrize("name", TOKEN_LAYERS)
def test_gradients_and_shapes(name):
    torch.manual_seed(0)
    options = {"K": 3} if "K" in TOKEN_LAYERS[name].Options.names() else {}
    layer = TOKEN_LAYERS[name](width=8, num_heads=2, **options).double().eval()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert layer(x).shape == x.shape
    assert torch.autograd.gradcheck(layer, x)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("name", ["BranchConv", "BranchAttention"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_branch_without_channels_is_not_built(name, ratio):
    layer = TOKEN_LAYERS[name](width=8, num_heads=2, K=3, branch_ratio=ratio).eval()
    x = torch.randn(2, 5, 8)
    only = layer.convnn if ratio else getattr(layer, layer.other_name)
    assert torch.equal(layer(x), only(x))
    assert hasattr(layer, "convnn") == bool(ratio)


def test_all_neighbors_are_dense_attention():
    torch.manual_seed(0)
    x, dense = torch.randn(2, 9, 8), Attention(8, 2).eval()
    kvt = KvtAttention(8, 2, K=9).eval()
    kvt.qkv.weight.data = torch.cat([dense.W_q.weight, dense.W_k.weight, dense.W_v.weight])
    kvt.proj.weight.data = dense.W_o.weight.data
    torch.testing.assert_close(kvt(x), dense(x), rtol=1e-4, atol=1e-6)
    around = NeighborhoodAttention(8, 2, K=9).eval()
    around.load_state_dict(kvt.state_dict())
    torch.testing.assert_close(around(x), dense(x), rtol=1e-4, atol=1e-6)
    local = LocalAttention(8, 2, window_size=5).eval()
    local.to_qkv.weight.data, local.to_out.weight.data = kvt.qkv.weight.data, kvt.proj.weight.data
    torch.testing.assert_close(local(x), dense(x), rtol=1e-4, atol=1e-6)
    convnn = ConvNNAttention(8, 2, K=9).eval()
    # Rows rank by k, as published: query and key change places.
    convnn.W_q.weight.data, convnn.W_k.weight.data = dense.W_k.weight.data, dense.W_q.weight.data
    convnn.W_v.weight.data, convnn.W_o.weight.data = dense.W_v.weight.data, dense.W_o.weight.data
    torch.testing.assert_close(convnn(x), dense(x), rtol=1e-4, atol=1e-6)


def test_windows_over_the_sequence():
    torch.manual_seed(0)
    x = torch.randn(1, 11, 4)
    other = x.clone()
    other[:, 5] += 1
    near = NeighborhoodAttention(4, 1, K=3).eval()
    assert (near(x) != near(other)).any(2)[0].nonzero()[:, 0].tolist() == [4, 5, 6]
    local = LocalAttention(4, 1, window_size=2).eval()
    assert (local(x) != local(other)).any(2)[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(8, 3), "num_heads 3 does not divide a width of 8"),
        (lambda: NeighborhoodAttention(8, 2, K=4), r"K must be odd .*\(got 4\)"),
        (lambda: KvtAttention(8, 2, K=6)(torch.randn(1, 5, 8)), "K=6 is larger .* from, 5"),
        (
            lambda: ConvNNAttention(8, 2, K=4, sampling_type="random", num_samples=3)(
                torch.randn(1, 5, 8)
            ),
            "K=4 is larger .* from, 3, with sampling_type random",
        ),
        (lambda: ConvNNAttention(8, K=3, convolution_type="dense"), "got 'dense'"),
        (
            lambda: TOKEN_LAYERS["BranchConv"](8, 4, branch_ratio=0.3),
            "does not divide a width of 2",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
