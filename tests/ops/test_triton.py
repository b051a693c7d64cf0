"""Triton's kernels beside the operators: run in its interpreter, and what is done without them."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.cpu.build import NativeError
from ops.maps.aggregate import aggregate_neighbors
from ops.maps.attend import attend_neighbors
from ops.maps.search import nearest_neighbors, search_torch
from ops.triton import launch, operators

ROOT = Path(__file__).parents[2]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@needs_triton
def test_kernels_hold_in_the_interpreter():
    # Counting the lines that the interpreter runs would take half as long again.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_PROCESS")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/triton"],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50
    assert "skipped" not in done.stdout


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_kernels.py", "90"],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    compiled = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    for path in (ROOT / "ops" / "triton").glob("*.py"):
        for function in re.findall(r"^def (\w+)\((?=\n    \w+_ptr)", path.read_text(), re.M):
            assert (path.stem, function) in compiled


@needs_triton
def test_a_gpu_that_cannot_run_them_is_told_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = launch._problem_of_gpu.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert "capability 7.0 or more (this GPU has 6.1)" in problem(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def probe(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(importlib.import_module("ops.triton.search"), "probe", probe)
    assert problem(0) == "Triton does not run here: Failed to find C compiler"
    assert launch.status(torch.device("cpu")).startswith("absent: Triton's kernels run on CUDA")
    monkeypatch.setenv("NEIGHBORS_NATIVE", "0")
    assert launch.status(torch.device("cpu")) == "switched off"


def test_without_a_gpu_pytorch_answers_and_triton_stays_unloaded(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = """
import sys, torch, ops
from ops.triton import launch, operators
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


@needs_triton
def test_the_probe_runs_a_kernel(monkeypatch):
    code = "import torch; from ops.triton.search import probe; probe(torch.device('cpu'))"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_answers_as_the_cpu_does_in_float64(monkeypatch):
    monkeypatch.setenv("NEIGHBORS_NATIVE", "require")
    torch.manual_seed(0)
    x, weight = torch.randn(2, 300, 40), torch.randn(24, 40, 9)
    by_channel, bias = torch.randn(40, 9), torch.randn(24)
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        tensors = [t.to(device, dtype).requires_grad_() for t in (x, weight, bias, by_channel)]
        own = torch.arange(300, device=device)
        _, indices = nearest_neighbors(None, tensors[0], 9, self_index=own)
        y = aggregate_neighbors(tensors[0], indices, *tensors[1:3])
        a = attend_neighbors(*[tensors[0]] * 3, indices, tensors[3], metric="dot", self_score=None)
        gradients = torch.autograd.grad(y.sin().sum() + a.sin().sum(), tensors)
        results.append([t.detach().cpu().double() for t in (indices, y, a, *gradients)])
    for got, expected in zip(*results, strict=True):
        size = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * size)
