"""Who may import whom: main -> train_eval, dataset, models -> layers -> ops."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"main", "dataset", "train_eval", "utils", "models", "layers", "ops"}
ALLOWED = {
    "main": OURS,
    "train_eval": {"utils"},
    "dataset": {"utils"},
    "utils": set(),
    "models": {"models", "layers", "ops"},
    "layers": {"layers", "ops"},
    "ops": {"ops"},
}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("place", list(ALLOWED))
def test_imports_point_one_way(place):
    file = ROOT / f"{place}.py"
    for path in [file] if file.exists() else (ROOT / place).rglob("*.py"):
        assert imported(path) & OURS <= ALLOWED[place], path


@pytest.mark.parametrize("place", ["models", "layers", "ops"])
def test_networks_need_torch_alone(place):
    optional = {"torchvision", "sklearn", "matplotlib", "tqdm", "torchinfo", "torchmetrics", "PIL"}
    for path in (ROOT / place).rglob("*.py"):
        assert not imported(path) & optional, path


def test_importing_prints_nothing_and_seeds_nothing(tmp_path):
    code = "import torch; s = torch.get_rng_state(); import main; assert s.equal(torch.get_rng_state())"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
