"""The layers on top of the operators: layouts, types, compilers, memory."""

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import leaves, needs_compiler

from layers import Conv2d_NN
from ops.flops import register_flop_formulas
from ops.maps.search import nearest_neighbors

pytestmark = pytest.mark.usefixtures("one_thread")


def test_layouts_agree_and_the_input_stays(path):
    layer = Conv2d_NN(5, 6, K=4)
    wide = torch.randn(2, 5, 9, 14)
    for x in (wide, wide[..., ::2], wide.to(memory_format=torch.channels_last), wide.mT):
        before = x.clone()
        (a,) = leaves(x)
        (b,) = leaves(x.contiguous())
        ya, yb = layer(x), layer(x.contiguous())
        torch.testing.assert_close(ya, yb)
        layer(a).square().sum().backward()
        layer(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        assert torch.equal(x, before)


def test_autocast_ranks_in_float32(path):
    layer = Conv2d_NN(8, 8, K=5)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.conv1d_layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
    keys, _ = layer.pad_and_flatten(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.find_neighbors(keys, (9, 9)), layer.find_neighbors(keys, (9, 9)))
        values, _ = nearest_neighbors(keys, keys, 3)
    assert torch.equal(values, nearest_neighbors(keys, keys, 3)[0])


OPTIONS = [
    {},
    {"magnitude_type": "euclidean", "stride": 2},
    {"sampling_type": "spatial", "num_samples": 3},
    {"similarity_type": "Loc", "magnitude_type": "euclidean"},
    {"similarity_type": "Loc_Col", "aggregation_type": "Loc_Col"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_export_gives_the_eager_answer(options):
    torch.manual_seed(0)
    layer, x = Conv2d_NN(4, 6, K=5, **options).eval(), torch.randn(2, 4, 8, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compile_fullgraph_gives_the_eager_answer(backend):
    torch.manual_seed(0)
    layer, x = Conv2d_NN(4, 6, K=5), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    (a,), (b,) = leaves(x), leaves(x)
    ya, yb = compiled(a), layer(b)
    torch.testing.assert_close(ya, yb)
    ya.square().sum().backward()
    yb.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    layer, x = Conv2d_NN(4, 6, K=5), torch.randn(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 64 * 100 * 4 + 2 * 2 * 64 * 5 * 4 * 6


class MaterializedNN(Conv2d_NN):
    """The layer step by step: all similarities at once, the input expanded K-fold."""

    def forward(self, x):
        b, c, h, w = x.shape
        keys = F.pad(x, [self.padding] * 4).flatten(2)  # (B, C, N)
        own = self.self_index((h + 2, w + 2), x.device)
        features = F.normalize(keys.detach(), dim=1)
        similarity = features.mT @ features
        similarity.diagonal(dim1=1, dim2=2).fill_(2.0)
        indices = similarity.topk(self.K, dim=2).indices[:, own]  # (B, M, K)
        at = indices[:, None].expand(-1, c, -1, -1)
        taps = keys.unsqueeze(3).expand(-1, -1, -1, self.K).gather(2, at).flatten(2)
        return self.conv1d_layer(taps).view(b, -1, h, w)


def test_training_gives_the_losses_of_the_materialized_layer(path):
    losses = []
    for layer in (MaterializedNN, Conv2d_NN):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            layer(3, 16, K=4),
            torch.nn.Tanh(),
            layer(16, 4, K=4),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        x, target = torch.randn(16, 3, 6, 6), torch.randint(4, (16,))
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    expected, got = map(torch.stack, losses)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_the_same_sums_again(path):
    layer, x = Conv2d_NN(16, 20, K=9), torch.randn(5, 16, 12, 12)
    runs = []
    for _ in range(3):
        (a,) = leaves(x)
        layer.zero_grad()
        y = layer(a)
        y.square().sum().backward()
        runs.append([y.detach(), a.grad, layer.conv1d_layer.weight.grad.clone()])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def test_memory_does_not_grow_with_changing_sizes(path):
    try:
        resident_mib()
    except OSError:
        pytest.skip("resident memory is read from /proc")
    layers = [Conv2d_NN(8, 8, K=9), Conv2d_NN(8, 8, K=9, similarity_type="Loc")]

    def steps(count):
        for i in range(count):
            x = torch.randn(2, 8, 6 + i % 17, 6 + i * 5 % 19, requires_grad=True)
            layers[i % 2](x).sum().backward()

    steps(60)
    before = resident_mib()
    steps(200)
    assert resident_mib() - before < 24
