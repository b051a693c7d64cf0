"""The scripts around the program: comparing runs, the README's flag tables, sweeps."""

import subprocess
import sys
from pathlib import Path

import compare_runs
import flag_tables
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


def test_runs_are_compared(run, capsys, tmp_path):
    run("--layer", "Conv2d", "--output_dir", "runs/a")
    run("--layer", "ConvNN", "--output_dir", "runs/b", "--lr", "0.01")
    capsys.readouterr()
    compare_runs.main(["runs/a", "runs/b", "runs", "--picture", "runs/curves.png"])
    header, _, first, second = capsys.readouterr().out.splitlines()[:4]
    assert "best test_top1" in header
    assert header.rstrip(" |").endswith("lr")
    assert {line.split()[1] for line in (first, second)} == {"runs/a", "runs/b"}
    assert Path("runs/curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_every_trainer_are_compared(run, capsys, tmp_path):
    Image.fromarray((torch.rand(12, 12, 3) * 255).byte().numpy()).save("picture.png")
    picture = ("--image_path", "picture.png", "--output_dir", "runs/picture")
    run(*picture, model="dynamic", dataset="image")
    run("--K", "1,3", "--output_dir", "runs/knn", model="knn")
    capsys.readouterr()
    for name, column, counter in (("picture", "test_within", "epoch"), ("knn", "test_top1", "K")):
        compare_runs.main([f"runs/{name}", "--picture", f"runs/{name}.png"])
        header, _, row = capsys.readouterr().out.splitlines()[:3]
        assert f"best {column}" in header
        assert f"| {counter} " in row
        assert Path(f"runs/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_runs_is_an_error(refused, tmp_path):
    code, text = refused(compare_runs.main, [str(tmp_path)])
    assert code == 2
    assert "none of these folders holds a run" in text


def test_readme_holds_the_flags_of_the_program():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert flag_tables.flag_tables() in readme, "run: python scripts/flag_tables.py --write"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_explain_themselves(script):
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
