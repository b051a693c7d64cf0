"""Who may import whom, in every folder, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "options": set(),
    "ops": {"ops"},
    "utils": set(),
    "checkpoints": {"utils"},
    "run_folder": {"utils", "checkpoints"},
    "files": {"utils"},
    "dataset": {"options", "utils", "files"},
    "tasks": {"tasks", "dataset", "files", "run_folder", "utils", "options"},
    "trackers": set(),
    "faults": set(),
    "ranks": set(),
    "environment": {"utils", "checkpoints", "run_folder"},
    "evaluation": {"utils", "ranks", "faults", "run_folder"},
    "resuming": {"utils", "checkpoints", "run_folder", "ranks", "evaluation"},
    "train_eval": {
        *("utils", "checkpoints", "run_folder", "faults", "ranks", "evaluation", "resuming"),
    },
    "trainers": {"trainers", "utils", "checkpoints", "run_folder", "options", "ranks"},
    "layers": {"layers", "ops", "options"},
    "models": {"models", "layers", "ops", "options"},
    "builders": {
        *("checkpoints", "dataset", "layers", "models", "ops", "options", "ranks", "run_folder"),
        *("tasks", "trainers", "utils"),
    },
}
ALLOWED["commandline"] = {"builders", *ALLOWED["builders"], "environment", "trackers"}
ALLOWED["main"] = {*ALLOWED}
ALLOWED["hubconf"] = {"builders", "checkpoints", "layers", "models", "options"}
OURS = set(ALLOWED)


def files_of(place):
    path = ROOT / f"{place}.py"
    return [path] if path.exists() else sorted((ROOT / place).rglob("*.py"))


def imported(path):
    """Modules a file imports, anywhere in it, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names):
    return {name.split(".")[0] for name in names}


def test_every_file_has_a_place():
    here = {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert here | folders == OURS


@pytest.mark.parametrize("place", list(ALLOWED))
def test_imports_point_one_way(place):
    for path in files_of(place):
        assert roots(imported(path)) & OURS <= ALLOWED[place], path


def test_no_circles():
    modules = {}
    for place in OURS:
        for path in files_of(place):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    edges = {name: imported(path) & set(modules) - {name} for name, path in modules.items()}
    for package in [name for name in modules if modules[name].name == "__init__.py"]:
        # A file may import its own package, which then must not need it to begin with.
        for name in edges:
            if name.startswith(f"{package}."):
                edges[name].discard(package)
    done, walking = set(), []

    def visit(name):
        assert name not in walking, " -> ".join([*walking[walking.index(name) :], name])
        if name not in done:
            walking.append(name)
            for other in edges[name]:
                visit(other)
            walking.pop()
            done.add(name)

    for name in modules:
        visit(name)


def test_nothing_below_the_command_line_sees_an_argparse_namespace():
    for place in OURS - {"main", "commandline"}:
        for path in files_of(place):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    assert node.attr not in ("Namespace", "parse_args"), path
                if isinstance(node, ast.arg):
                    annotation = ast.unparse(node.annotation) if node.annotation else ""
                    assert "Namespace" not in annotation, path


@pytest.mark.parametrize("place", ["models", "layers", "ops"])
def test_networks_need_torch_alone(place):
    optional = {"torchvision", "sklearn", "matplotlib", "tqdm", "torchinfo", "torchmetrics", "PIL"}
    estimators = ROOT / "models" / "neighbors.py"  # scikit-learn's by nature; no network imports it
    for path in set(files_of(place)) - {estimators}:
        assert not roots(imported(path)) & optional, path
        assert "models.neighbors" not in imported(path), path


def test_triton_is_imported_by_its_kernels_alone():
    kernels = ROOT / "ops" / "triton"
    for place in OURS:
        for path in files_of(place):
            assert path.parent == kernels or "triton" not in roots(imported(path)), path


def run_python(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_prints_nothing_and_seeds_nothing(tmp_path):
    code = "import torch; s = torch.get_rng_state(); import main; assert s.equal(torch.get_rng_state())"  # noqa: E501
    assert run_python(code, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_refusing_a_command_line_loads_nothing_it_does_not_use(tmp_path):
    slow = ["torchvision", "sklearn", "matplotlib", "torchmetrics", "torchinfo", "PIL"]
    # What PyTorch's own kernels for the meta device load takes as long as PyTorch itself.
    slow += ["torch.utils.flop_counter", "torch._meta_registrations", "torch._dynamo", "triton"]
    for flags in (
        ["--help"],
        ["--K", "100000"],
        ["--shuffle_pattern", "BA", "--shuffle_scale", "7"],
        ["--model", "dncnn", "--dataset", "denoise", "--train_dir", "no", "--test_dir", "no"],
    ):
        code = f"""
import contextlib, io, sys
import torch
before = set(sys.modules)
import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
        main.main({flags!r})
    except SystemExit:
        pass
print([name for name in {slow!r} if name in set(sys.modules) - before])
"""
        assert run_python(code, tmp_path).strip() == "[]", flags
