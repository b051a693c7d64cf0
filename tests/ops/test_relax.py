import math

import pytest
import torch
from slow_layers import autograd_rounds

from ops.relax import relaxed_selection

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow_rounds(logits, K, saturation=2.0**-53):
    """The formulas, number by number, in Python's float64."""
    out = []
    for row in logits.double().tolist():
        alpha, volumes = list(row), []
        for _ in range(K):
            top = max(alpha)
            e = [math.exp(a - top) if a > -math.inf else 0.0 for a in alpha]
            w = [x / sum(e) for x in e]
            volumes.append(w)
            for i, a in enumerate(alpha):
                left = sum(x for j, x in enumerate(e) if j != i) / sum(e)  # 1 - w_i
                alpha[i] = a + math.log(left) if left > saturation and a > -math.inf else -math.inf
        out.append(volumes)
    return torch.tensor(out, dtype=torch.float64)


TEMPERATURES = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounds_match_slow_loop(t, dtype):
    logits = (-torch.rand(12, 20, dtype=dtype) / t).to(dtype)
    logits[:3, 4] = -torch.inf
    want = slow_rounds(logits, 5)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    close(relaxed_selection(logits, 5).double(), want, rtol=0, atol=tolerance)


def test_both_ways_through_the_rounds_agree():
    for t in (0.02, 0.1, 1.0):
        logits = -torch.rand(300, 40) / t
        by_logs = relaxed_selection(logits.double(), 7).float()  # float64 takes the logarithms
        close(relaxed_selection(logits, 7), by_logs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("t", [0.05, 0.1, 1.0, 10.0])
def test_gradient_matches_autograd_of_the_formulas(t):
    logits = (-torch.rand(30, 20, dtype=torch.float64) / t).requires_grad_()
    seed = torch.randn(30, 4, 20, dtype=torch.float64)
    (want,) = torch.autograd.grad(autograd_rounds(logits, 4), logits, seed)
    (got,) = torch.autograd.grad(relaxed_selection(logits, 4), logits, seed)
    close(got, want, rtol=1e-5, atol=1e-8)
    narrow = logits.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(relaxed_selection(narrow, 4), narrow, seed.float())
    close(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_gradcheck(t):
    distances = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda d: relaxed_selection(-d / t, 3), distances, eps=1e-9 if t < 0.01 else 1e-6, atol=1e-4
    )


@pytest.mark.parametrize("saturation", [2.0**-53, 2.0**-24])
def test_no_nan_with_duplicates_and_domination(saturation):
    rows = torch.rand(6, 9) * 3
    rows[0] = 1.0  # all alike
    rows[1, :3] = 0.0  # ties at the top
    rows[2] = 1e4
    rows[2, 4] = 0.0  # one dominates
    rows[3] = torch.arange(9.0) * 25  # every weight rounds to 1 in float32
    rows[4] = torch.arange(9.0) * 1e6
    logits = (-rows).requires_grad_()
    weights = relaxed_selection(logits, 9, saturation)
    assert weights.isfinite().all()
    close(weights.sum(-1), torch.ones(6, 9), rtol=0, atol=1e-5)
    (weights * torch.randn_like(weights)).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 1e3


def test_saturation_of_plain_float32_removes_outright():
    logits = torch.tensor([[0.0, -20.0, -21.0]])
    kept = relaxed_selection(logits, 2)
    gone = relaxed_selection(logits, 2, saturation=2.0**-24)
    assert 0.4 < kept[0, 1, 0] < 0.6  # mass 1 - w of the first is what the others have together
    assert gone[0, 1, 0] == 0


def test_rounds_without_compiled_kernels(monkeypatch):
    monkeypatch.setenv("NEIGHBORS_NATIVE", "0")
    for t in (1e-4, 0.05, 1.0):
        test_rounds_match_slow_loop(t, torch.float32)
    test_gradient_matches_autograd_of_the_formulas(0.1)
    test_no_nan_with_duplicates_and_domination(2.0**-53)


def test_more_neighbors_than_candidates_are_refused():
    with pytest.raises(ValueError, match="K = 4 neighbors asked of 3"):
        relaxed_selection(torch.rand(2, 3), 4)
