"""Triton's kernels, compiled on a GPU or in Triton's interpreter, which tests/ops/test_triton.py
starts in a process of its own: the variable must be set before Triton is imported."""

import pytest
import torch

from ops.triton.launch import interpreted


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Where the kernels run."""
    if not interpreted() and not torch.cuda.is_available():
        pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1")
    monkeypatch.setenv("NEIGHBORS_NATIVE", "require")
    torch.manual_seed(0)
    return "cpu" if interpreted() else "cuda"
