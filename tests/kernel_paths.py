"""The two paths of an operator, compiled and PyTorch, for tests that take both."""

import pytest
import torch

from ops.cpu import build

needs_compiler = pytest.mark.skipif(
    build.library() is None, reason=f"no compiled kernels: {build.status()}"
)
PATHS = ["0", pytest.param("1", marks=needs_compiler)]


@pytest.fixture
def one_thread():
    """Tiny tensors gain nothing from threads, and wait for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PATHS, ids=lambda p: {"0": "torch", "1": "compiled"}[p])
def path(request, monkeypatch):
    """Run a test on each path, with a seed."""
    monkeypatch.setenv("NEIGHBORS_NATIVE", request.param)
    torch.manual_seed(0)
    return request.param


def leaves(*tensors, dtype=None):
    """Copies that want gradients."""
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
