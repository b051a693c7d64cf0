import pytest
import torch

from tasks.eight_point import smallest_eigenvector, weighted_eight_point
from tasks.geometry import draw_scene

close = torch.testing.assert_close


def up_to_sign(a, b):
    return torch.minimum((a - b).flatten(-2).norm(dim=-1), (a + b).flatten(-2).norm(dim=-1))


def exact(seed, count=60):
    """Noise-free matches in float64: positions of a scene put through its pose."""
    generator = torch.Generator().manual_seed(seed)
    scene = draw_scene(count, 0.0, 0.0, generator)
    depth = 2 + 6 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    first = torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5
    moved = torch.cat((first * depth, depth), 1) @ scene["R"].T + scene["t"]
    return torch.cat((first, moved[:, :2] / moved[:, 2:]), 1), scene


@pytest.mark.parametrize("seed", range(20))
def test_noise_free_matches_give_the_essential_matrix(seed):
    matches, scene = exact(seed)
    weights = torch.rand(1, 60, dtype=torch.float64) + 0.1
    found = weighted_eight_point(matches[None], weights)
    assert up_to_sign(found, scene["E"][None]).item() < 1e-8


def test_weights_of_zero_leave_matches_out():
    matches, scene = exact(3)
    wrong = torch.rand(40, 4, dtype=torch.float64) - 0.5
    both = torch.cat((matches, wrong))[None]
    weights = torch.cat((torch.ones(60), torch.zeros(40)))[None].double()
    assert up_to_sign(weighted_eight_point(both, weights), scene["E"][None]).item() < 1e-8


def test_the_order_of_matches_does_not_matter():
    matches = torch.rand(2, 30, 4, dtype=torch.float64)
    weights = torch.rand(2, 30, dtype=torch.float64)
    order = torch.randperm(30)
    a = weighted_eight_point(matches, weights)
    b = weighted_eight_point(matches[:, order], weights[:, order])
    assert up_to_sign(a, b).max() < 1e-10


def test_it_is_the_smallest_singular_vector():
    matches = torch.rand(1, 12, 4, dtype=torch.float64)
    weights = torch.rand(1, 12, dtype=torch.float64)
    rows = torch.stack(
        [
            torch.stack([b * a for b in (*m[2:], torch.tensor(1.0)) for a in (*m[:2], 1.0)])
            for m in matches[0]
        ]
    )
    vector = torch.linalg.svd(rows * weights[0, :, None].sqrt())[2][-1]
    assert up_to_sign(weighted_eight_point(matches, weights), vector.view(1, 3, 3)).item() < 1e-9


def test_gradients():
    torch.manual_seed(0)
    matches = torch.rand(2, 10, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 10, dtype=torch.float64, requires_grad=True)
    other = torch.rand(2, 3, 3, dtype=torch.float64)

    def squared(m, w):  # the sign is free: square what depends on it
        return (weighted_eight_point(m, w) * other).sum((-1, -2)).square()

    assert torch.autograd.gradcheck(squared, (matches, weights))
    symmetric = torch.rand(3, 5, 5, dtype=torch.float64)
    symmetric = (symmetric @ symmetric.transpose(1, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: smallest_eigenvector(a).square(), (symmetric,))


@pytest.mark.parametrize(
    "matrix", [torch.zeros(9, 9), torch.eye(9), torch.diag(torch.arange(9) // 2)]
)
def test_equal_eigenvalues_have_finite_gradients(matrix):
    matrix = matrix.double()[None].requires_grad_()
    smallest_eigenvector(matrix).sum().backward()
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("weights", [torch.zeros(1, 9), torch.eye(9)[:1]])
def test_degenerate_weights_have_finite_gradients(weights):
    weights = weights.double().requires_grad_()
    found = weighted_eight_point(torch.rand(1, 9, 4), weights)
    found[:, 0].sum().backward()
    assert found.isfinite().all()
    assert weights.grad.isfinite().all()


def test_too_few():
    with pytest.raises(ValueError, match="needs at least 8 matches, got 7"):
        weighted_eight_point(torch.rand(1, 7, 4), torch.ones(1, 7))
