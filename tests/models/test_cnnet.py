import pytest
import torch

from models import CNNet
from models.cnnet import MatchNeighbors
from options import OptionError

close = torch.testing.assert_close
SMALL = {"depth": 2, "features": 8, "num_volumes": 3}


@pytest.mark.parametrize("kind", ["n3", "knn", "none"])
def test_permuting_matches_permutes_logits(kind):
    torch.manual_seed(0)
    net = CNNet(nonlocal_block=kind, **SMALL).double().eval()
    matches = torch.rand(2, 30, 4, dtype=torch.float64)
    order = torch.randperm(30)
    close(net(matches[:, order]), net(matches)[:, order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["n3", "knn", "none"])
def test_everything_learns(kind):
    net = CNNet(nonlocal_block=kind, **SMALL)
    net(torch.rand(2, 20, 4)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_volumes_are_those_of_the_formula():
    torch.manual_seed(0)
    block = MatchNeighbors(4, K=2, features=8, embed_channels=3).double().eval()
    x = torch.rand(1, 4, 9, dtype=torch.float64)
    out = block(x)
    e, log_inverse = block.embed(x)[0], block.inverse_temperature(x)[0, 0]
    bn = block.nnn.bn
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).item()
    for i in range(9):
        others = [j for j in range(9) if j != i]
        distances = torch.stack([(e[:, i] - e[:, j]).square().sum() for j in others])
        alpha = -distances * scale * log_inverse[i].exp() / 0.1
        for k in range(2):
            w = torch.softmax(alpha, 0)
            volume = sum(w[n] * x[0, :, j] for n, j in enumerate(others))
            close(out[0, 4 * (k + 1) : 4 * (k + 2), i], volume - x[0, :, i])
            alpha = alpha + torch.log1p(-w)
    close(out[:, :4], x)


def test_hard_neighbors():
    x = torch.rand(1, 2, 7, dtype=torch.float64)
    out = MatchNeighbors(2, K=2, kind="knn")(x)
    distances = torch.cdist(x[0].T, x[0].T) + torch.eye(7, dtype=torch.float64) * 10
    nearest = distances.argsort(1)[:, :2]
    for k in range(2):
        close(out[0, 2 * (k + 1) : 2 * (k + 2)], x[0][:, nearest[:, k]] - x[0])


def test_gradients():
    torch.manual_seed(0)
    net = CNNet(depth=2, features=4, num_volumes=1).double().eval()
    matches = torch.rand(1, 10, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (matches,))


def test_channels_must_divide():
    with pytest.raises(OptionError, match=r"features 10 is not divided by num_volumes \+ 1 = 4"):
        CNNet(features=10)
