"""Triton's kernels beside the operators: run in its interpreter, and what is done without them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.cpu.build import NativeError
from ops.maps.search import search_torch
from ops.triton import operators

ROOT = Path(__file__).parents[2]


def test_kernels_hold_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/triton"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50
    assert "skipped" not in done.stdout


def test_without_a_gpu_pytorch_answers_and_triton_stays_unloaded(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = """
import sys, torch, ops
from ops.triton import operators
before = "triton" in sys.modules
x = torch.randn(1, 30, 4)
operators.search(x, x, 3, "cosine", None, False, None, 0)
print(before, "triton" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    monkeypatch.setenv("NEIGHBORS_NATIVE", "require")
    x = torch.randn(1, 30, 4)
    with pytest.raises(NativeError, match=r"run on CUDA devices.* on cpu|not installed"):
        operators.search(x, x, 3, "cosine", None, False, None, 0)
    monkeypatch.setenv("NEIGHBORS_NATIVE", "0")
    found = operators.search(x, x, 3, "cosine", None, False, None, 0)
    assert torch.equal(found[1], search_torch(x, x, 3, "cosine", None, False, None, 0)[1])
