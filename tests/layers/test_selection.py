import pytest
import torch
import torch.nn.functional as F

from layers.selection import HardNeighbors, NeuralNearestNeighbors
from ops.relax import relaxed_selection

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cold_limit_is_hard_choice(dtype):
    distances = torch.stack([torch.randperm(30) for _ in range(8)]).to(dtype)
    hard = HardNeighbors(7)(distances)
    close(relaxed_selection(-distances / 1e-4, 7), hard, rtol=0, atol=1e-6)
    close(hard.argmax(-1), distances.argsort(-1)[:, :7])


def test_scale_of_distances():
    nnn = NeuralNearestNeighbors(3)
    distances = torch.rand(4, 6, 9)
    log_temp = torch.randn(4, 6)
    got = nnn(distances, log_temp)
    scaled = F.batch_norm(-distances.reshape(1, 1, -1), None, None, training=True).view_as(
        distances
    )
    want = relaxed_selection(scaled / (log_temp.exp() * 0.1)[..., None], 3)
    close(got, want, rtol=1e-4, atol=1e-5)
    close(nnn.bn.running_mean, -0.1 * distances.mean()[None])
    close(nnn.bn.running_var, 0.9 + 0.1 * distances.var()[None])
    nnn.eval()
    var = nnn.bn.running_var + nnn.bn.eps
    want = relaxed_selection(-distances / var.sqrt() / (log_temp.exp() * 0.1)[..., None], 3)
    close(nnn(distances, log_temp), want, rtol=1e-4, atol=1e-5)
    nnn.train()(distances, log_temp).square().sum().backward()
    assert nnn.bn.bias.grad is not None
    learned = NeuralNearestNeighbors(2, temperature="learned", temp_bias=0, distance_bn=False)
    assert [n for n, _ in learned.named_parameters()] == ["log_temp"]
    close(learned(distances), relaxed_selection(-distances, 2))
