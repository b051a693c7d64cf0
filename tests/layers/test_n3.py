import pytest
import torch
import torch.nn.functional as F
from slow_layers import autograd_rounds

from layers.n3 import ConcreteBlock, KNNBlock, N3Aggregation, N3Aggregation2d, N3Block
from layers.selection import NeuralNearestNeighbors

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_selection_in_float32(dtype):
    block = N3Block(2, K=3, window=5, embed_channels=2, embed_features=4).eval()
    x = torch.randn(1, 2, 40, 45)
    with torch.autocast("cpu", dtype=dtype):
        x.requires_grad_()
        out = block(x)
        assert block.n3aggregation.aggregation.nnn(torch.rand(4, 9)).dtype == torch.float32
    out.float().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    flat = block(torch.zeros(1, 2, 40, 45))  # all patches alike
    assert flat.isfinite().all()


def slow_block(block, x, features, log_temp):
    """Loops over patches, candidates and overlaps: what `block` makes of its parts."""
    layer, nnn = block.n3aggregation, block.n3aggregation.aggregation.nnn
    p, s, K = layer.patch_size, layer.stride, nnn.K
    b, c, height, width = x.shape
    extra = [(-(side - p)) % s if side >= p else p - side for side in (height, width)]
    pads = (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2)
    xp, ep, tp = (F.pad(t, pads) for t in (x, features, log_temp))
    n1, n2 = (xp.shape[2] - p) // s + 1, (xp.shape[3] - p) // s + 1
    s1, s2 = min(layer.window, n1), min(layer.window, n2)
    corners = [(i * s, j * s) for i in range(n1) for j in range(n2)]

    def patches(t, sample):
        return torch.stack([t[sample, :, i : i + p, j : j + p].flatten() for i, j in corners])

    candidates = []
    for i in range(n1):
        for j in range(n2):
            top = min(max(i - s1 // 2, 0), n1 - s1)
            left = min(max(j - s2 // 2, 0), n2 - s2)
            block_of = [(top + u) * n2 + left + v for u in range(s1) for v in range(s2)]
            candidates.append([m for m in block_of if m != i * n2 + j])
    values, found, temps = [], [], []
    for sample in range(b):
        values.append(patches(xp, sample))
        e, t = patches(ep, sample), patches(tp, sample).mean(1)
        found += [-(e[m] - e[rows]).square().sum(1) for m, rows in enumerate(candidates)]
        temps.append(torch.exp(t + nnn.log_bias))
    d = nnn.bn(torch.stack(found)[None].reshape(1, 1, -1)).view(len(found), -1)
    weights = autograd_rounds(d / torch.cat(temps)[:, None], K)

    images = []
    for sample in range(b):
        here = weights[sample * n1 * n2 : (sample + 1) * n1 * n2]
        z = torch.stack([here[m] @ values[sample][rows] for m, rows in enumerate(candidates)])
        z = z.view(n1 * n2, K, c, p, p)
        total, count = torch.zeros(K, c, *xp.shape[2:], dtype=x.dtype), torch.zeros(xp.shape[2:])
        for m, (i, j) in enumerate(corners):
            total = total + F.pad(z[m], (j, xp.shape[3] - j - p, i, xp.shape[2] - i - p))
            count[i : i + p, j : j + p] += 1
        z = (total / count)[:, :, pads[2] : pads[2] + height, pads[0] : pads[0] + width]
        images.append(torch.cat((x[sample], (z - x[sample]).flatten(0, 1))))
    return torch.stack(images)


def check_block(shape, *, train, **options):
    options["temp_bias"] = 0.5  # cold enough to choose, warm enough for the formulas' own 1 - w
    block = N3Block(shape[1], embed_channels=2, embed_features=3, embed_depth=2, **options)
    block = block.double().eval()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    features = block.embedcnn(x).detach().requires_grad_()
    log_temp = block.tempcnn(x).detach().requires_grad_()
    block.n3aggregation.train()
    block.n3aggregation.aggregation.nnn.bn.momentum = 1.0
    block.n3aggregation(x, features, log_temp)  # statistics to evaluate with
    block.n3aggregation.train(train)
    twin = N3Block(shape[1], **options).double()
    twin.n3aggregation.load_state_dict(block.n3aggregation.state_dict())
    twin.n3aggregation.train(train).aggregation.nnn.bn.momentum = 1.0
    want = slow_block(twin, x, features, log_temp)
    z = block.n3aggregation(x, features, log_temp)
    got = torch.cat((x, (z.unflatten(1, (-1, shape[1])) - x[:, None]).flatten(1, 2)), 1)
    close(got, want, rtol=0, atol=1e-9)
    bn, other = block.n3aggregation.aggregation.nnn.bn, twin.n3aggregation.aggregation.nnn.bn
    close(bn.running_var, other.running_var)
    close(bn.running_mean, other.running_mean)
    leaves = (x, features, log_temp, bn.weight)
    seed = torch.randn_like(want)
    gradients = torch.autograd.grad(got, leaves, seed)
    wanted = torch.autograd.grad(want, (*leaves[:3], other.weight), seed)
    for a, b in zip(gradients, wanted, strict=True):
        close(a, b, rtol=1e-6, atol=1e-8)
    if not train:
        with torch.no_grad():  # tiles in turn
            close(block.n3aggregation(x, features, log_temp), z.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 97, 103), (1, 1, 76, 200), (2, 2, 40, 40)])
def test_block_matches_slow_loop(shape):
    check_block(shape, train=False, K=3)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 80, 80), {}),
        ((1, 2, 41, 58), {"patch_size": 7, "stride": 3, "window": 7}),
        ((1, 1, 33, 30), {"patch_size": 6, "stride": 2, "window": 5}),
        ((1, 1, 31, 37), {"patch_size": 4, "stride": 4, "window": 3}),
        ((2, 1, 150, 64), {"window": 3}),
    ],
)
def test_block_training_matches_slow_loop(shape, options):
    check_block(shape, train=True, **({"K": 3} | options))


def test_block_in_float32():
    block = N3Block(8).eval()
    x = torch.randn(1, 8, 100, 90)
    with torch.no_grad():
        got, whole = block(x), block.double()(x.double())
    close(got.double(), whole, rtol=0, atol=1e-4)
    assert got.shape == (1, 64, 100, 90)


def test_inputs_stay_and_layouts_do_not_matter():
    block = N3Block(4, K=2, embed_features=4, window=5).eval()
    x = torch.randn(2, 4, 35, 42)
    before = x.clone()
    out = block(x)
    close(x, before, rtol=0, atol=0)
    close(block(x.to(memory_format=torch.channels_last)), out)
    close(block(x[:1]), out[:1], rtol=1e-4, atol=1e-5)


def test_temperature_is_that_of_each_query_also_for_one_sample():
    block = N3Block(1, K=2, window=5, embed_channels=0).train()
    nnn = block.n3aggregation.aggregation.nnn
    x = torch.randn(1, 1, 45, 45)
    one = block(x)
    nnn.bn.reset_running_stats()
    block.tempcnn.eval()
    two = block(x.repeat(2, 1, 1, 1))
    nnn.train()
    close(block(x), two[:1], rtol=1e-4, atol=1e-5)
    assert one.shape == x[:, :1].repeat(1, 3, 1, 1).shape


def test_pad_modes_and_center_temperature():
    x = torch.randn(1, 2, 43, 47)
    outs = [
        N3Aggregation2d(NeuralNearestNeighbors(2), window=5, pad_mode=mode, temp_pool=pool).eval()(
            x, x, x[:, :1]
        )
        for mode in ("zeros", "reflect")
        for pool in ("average", "center")
    ]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert (a - b).abs().max() > 1e-3
    close(outs[0], outs[0])


def test_aggregation_of_sets():
    items, features = torch.randn(2, 8, 2), torch.randn(2, 8, 3)
    query, log_temp = torch.randn(2, 3, 3), torch.randn(2, 3)
    indices = torch.stack([torch.randperm(8)[:4] for _ in range(3)])
    layer = N3Aggregation(NeuralNearestNeighbors(2)).eval()
    got = layer(items, features, query, indices, log_temp)
    assert got.shape == (2, 3, 2, 2)
    d = (query[:, :, None] - features[:, indices]).square().sum(-1)
    w = layer.nnn(d, log_temp)
    close(got, torch.einsum("bmko,bmof->bmfk", w, items[:, indices]), rtol=1e-4, atol=1e-5)
    leaves = [t.double().requires_grad_() for t in (items, features, query)]
    layer = layer.double()
    assert torch.autograd.gradcheck(
        lambda a, b, c: layer(a, b, c, indices, log_temp.double()), leaves
    )
    with pytest.raises(ValueError, match=r"K = 2 neighbors asked of 1 candidates"):
        layer(items, features, query, indices[:, :1])


def test_knn_block_is_the_cold_limit():
    x, features = torch.randn(1, 2, 40, 52), torch.randn(1, 1, 40, 52)
    block = KNNBlock(3, window=5)
    cold = N3Aggregation2d(
        NeuralNearestNeighbors(3, temp_bias=1e-6, distance_bn=False), window=5
    ).double()
    z = cold(x.double(), features.double()).float()
    want = torch.cat((x, (z.unflatten(1, (3, 2)) - x[:, None]).flatten(1, 2)), 1)
    close(block(x, features), want, rtol=1e-4, atol=1e-5)
    close(block(x), block(x, x))
    x.requires_grad_()
    block(x, features).square().sum().backward()
    assert x.grad.isfinite().all()


def test_concrete_block():
    block = ConcreteBlock(2, K=2, window=5, embed_features=4)
    x = torch.randn(2, 2, 35, 35)
    assert (block(x) - block(x)).abs().max() > 1e-4  # drawn anew
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    block.eval()
    close(block(x), block(x), rtol=0, atol=0)


def test_state_dict_round_trip_and_compile():
    torch._dynamo.reset()
    block, other = (N3Block(2, K=2, window=5, embed_features=4).eval() for _ in range(2))
    other.load_state_dict(block.state_dict())
    x = torch.randn(1, 2, 35, 40)
    close(other(x), block(x), rtol=0, atol=0)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    close(compiled(x), block(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        close(compiled(x), block(x), rtol=1e-4, atol=1e-4)
    close(
        torch.export.export(block, (x,)).module()(x).detach(),
        block(x).detach(),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: N3Block(window=14), "window must be odd, got 14"),
        (lambda: N3Block(K=9, window=3), "K = 9 neighbors asked of 8 candidates"),
        (lambda: N3Block(stride=11), "stride must be between 1 and patch_size"),
        (lambda: N3Block(K=0), "K must be at least 1"),
        (lambda: N3Block(pad_mode="wrap"), "pad_mode must be"),
        (lambda: N3Block(temp_pool="max"), "temp_pool must be"),
        (lambda: N3Block(temperature="hot"), "temperature must be"),
        (lambda: KNNBlock()(torch.rand(1, 1, 10, 20)), "K = 7 neighbors asked of 2 candidates"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 80, 80), {}),
        ((2, 2, 131, 57), {}),
        ((1, 2, 40, 45), {"window": 3}),
        ((3, 1, 41, 37), {"patch_size": 6, "stride": 2, "window": 17}),
        ((1, 9, 22, 31), {"patch_size": 4, "stride": 4, "window": 5, "pad_mode": "reflect"}),
        ((1, 1, 44, 40), {"patch_size": 18, "stride": 18, "window": 5}),
    ],
)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_kernels_agree_with_plain_torch(shape, options, train, threads, monkeypatch):
    x, features = torch.randn(shape), 0.05 * torch.randn(shape)
    log_temp = torch.randn(shape[0], 1, *shape[2:])
    monkeypatch.setattr("layers.n3.WINDOW_BYTES", 2**16)  # some rows at a time
    K = 4 if shape[2] < 80 else 9
    before, results = torch.get_num_threads(), []
    for native in ("1", "0"):
        monkeypatch.setenv("NEIGHBORS_NATIVE", native)
        layer = N3Aggregation2d(NeuralNearestNeighbors(K), **options).train(train)
        leaves = [t.clone().requires_grad_() for t in (x, features, log_temp)]
        torch.set_num_threads(threads)
        try:
            out = layer(*leaves)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach())
            with torch.no_grad():
                results.append([out, layer(*leaves), *grads])
        finally:
            torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_tiny_weights_count_as_nothing_in_the_kernels_alone():
    layer = N3Aggregation2d(NeuralNearestNeighbors(2, distance_bn=False), window=5)
    x = torch.randn(1, 1, 40, 40, requires_grad=True)
    layer(x, 2 * x).sum().backward()  # distances of hundreds at a temperature of 0.1
    assert x.grad.isfinite().all()
    assert (torch.tensor([1e-40]) * 1.0).item() > 0  # elsewhere they are what they were
