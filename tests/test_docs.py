"""Every command and every Python example of the README and the pages works.

Commands of ``main.py`` run in an empty folder with small settings put behind their own: tiny files
under the names they give, few samples, narrow networks, two steps. Those of ``scripts/`` run where
that is a matter of a second; the rest pass their own parser. Words in capitals stand for what
`STAND_INS` says.
"""

import argparse
import contextlib
import dataclasses
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import results_tables
import torch
from pages import PAGES, ROOT, Command, commands, examples, fences, name_of, spans
from PIL import Image
from small_n3 import published_shapes

from commandline import parse_arguments
from dataset import Data, FeatureArray
from layers import LAYERS
from main import build_parser, main
from models import MODELS, model_class
from options import did_you_mean
from tasks import DATASETS, TASKS

COMMANDS = commands()
STAND_INS = {"LAYER": "ConvNN", "NAME": "n3net", "SEED": "0", "<n>": "0"}
OPTIONAL = {  # words that need a package which may be missing
    **{"--ransac": "cv2", "timm:resnet10t": "timm", "timm:vit_tiny_patch16_224": "timm"}
}
DOWNLOADED = ("mnist", "fashionmnist", "cifar10", "cifar100")

# Behind the flags of a command, by the class of its model; a later flag wins.
SMALL_MODELS = {
    "VGG": "--width 0.02 --resize 32",
    "ResNet": "--width 0.05",
    "DenseNet": "--width 0.1",
    "UNet": "--channels 4 --num_levels 2 --resize 16",
    "ConvNet": "--width 4",
    "CNN1d": "--width 4",
    "ResNet1d": "--width 0.05",
    "ViT": "--num_layers 1 --num_heads 2 --d_hidden 8 --d_mlp 8 --resize 16 --patch_size 4",
    "ViG": "--width 0.05 --K 2 --resize 16",
    "PyramidViG": "--width 0.05 --K 2 --resize 16",
    "DGCNN": "--width 0.05 --K 2",
    "DnCNN": "--features 4 --depth 3",
    "N3Net": "--features 4 --depth 3 --embed_features 4 --embed_depth 2 --window 5",
    "NLRN": "--features 4 --recurrences 2 --window 5 --K 4",
    "CNNet": "--features 8 --depth 2",
    "DynamicNetwork": "--max_neighbors 300 --learned_width 4 --learned_epochs 1",
}
SMALL_DATA = {
    "recall": "--num_train 24 --num_test 8",
    "match": "--num_train 24 --num_test 8",
    "copy": "--num_train 24 --num_test 8",
    "mnist1d": "--num_train 24 --num_test 8",
    "shapes3d": "--num_train 24 --num_test 8 --num_points 80",
    "pointcloud": "--num_points 9",
    "photos": "--crop_size 24 --crops_per_image 1",
    "denoise": "--crop_size 24 --crops_per_image 1",
    "pairs": "--crop_size 24 --crops_per_image 1",
    "scenes": "--num_scenes 4 --test_scenes 2 --num_matches 96",
    "matches": "--num_matches 96",
}
SMALL = (
    "--device cpu --limit_train 240 --limit_test 9 --batch_size 8 --num_epochs 1 --num_workers 0"
)
RUNS = {  # what --output_dir names, where a command goes on from a run
    "Output/ResNet/ConvNN": "--model resnet18 --dataset cifar10 --width 0.05",
    "Output/Dynamic/text": "--model dynamic --dataset text --text_path story.txt",
    "denoiser": "--model dncnn --dataset denoise --train_dir clean --test_dir clean",
    "enlarger": "--model dncnn --task super_resolution --scale 2 --dataset denoise "
    "--train_dir clean --test_dir clean",
    "matcher": "--model cnnet --dataset scenes",
}
NEVER_DRY = ("--seeds", "--test_only", "--resume", "--input", "--check_data", "--help", "--dry_run")


# ---------------------------------------------------------------------------------------------
# Tiny files under the names that commands give


def picture(path: Path, side: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path, format="TIFF" if path.suffix == ".tif" else "PNG")


def pictures(path: Path) -> None:
    for number in range(3):
        picture(path / f"{number}.png")


def restored(path: Path) -> None:
    """Make what --input names: one picture, or one that fits the pattern."""
    picture(path.parent / path.name.replace("*", "a"))


def story(path: Path) -> None:
    path.write_text("the cat sat on the mat and the dog sat on the cat; " * 8)


def labelled(path: Path) -> None:
    """Make folders of classes, of pictures or of point clouds, or an .npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tsv":
        for name in (path.name, path.name.replace("TRAIN", "TEST")):
            lines = (f"{i % 2}\t" + "\t".join(str(j * i % 7) for j in range(32)) for i in range(8))
            path.with_name(name).write_text("\n".join(lines))
        return
    if path.name == "clouds":
        for part in PARTS:
            for name in ("box", "ball"):
                (path / part / name).mkdir(parents=True)
                for number in range(8):
                    points = np.random.default_rng(number).random((12, 3))
                    np.savetxt(path / part / name / f"{number}.xyz", points)
        return
    if path.suffix == ".npz":
        rng = np.random.default_rng(0)
        arrays = {f"x_{part}": rng.integers(0, 256, (8, 32, 32, 3), np.uint8) for part in PARTS}
        arrays |= {f"y_{part}": np.arange(8) % 2 for part in PARTS}
        np.savez(path, **arrays)
        return
    for part in PARTS:
        for name in ("cat", "dog"):
            pictures(path / part / name)


def matches(path: Path) -> None:
    rng = np.random.default_rng(0)
    R, t = np.eye(3), np.array([-1.0, 0, 0])
    np.savez(path, xs=rng.normal(size=(40, 4)), ys=rng.random(40), R=R, t=t)


def weights(path: Path) -> None:
    """Copy weights that come along; make others in the published form."""
    if (ROOT / path).is_file():
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, path)
        return
    shapes = published_shapes()
    net = OrderedDict((name, torch.rand(shape) / 50) for name, shape in shapes.items())
    torch.save({"net": net, "epoch": 51}, path, _use_new_zipfile_serialization=False)


PARTS = ("train", "test")
MAKERS = {
    "--train_dir": pictures,
    "--test_dir": pictures,
    "--noisy_dir": pictures,
    "--clean_dir": pictures,
    "--test_noisy_dir": pictures,
    "--test_clean_dir": pictures,
    "--image_path": picture,
    "--input": restored,
    "--text_path": story,
    "--test_text_path": story,
    "--train_matches": matches,
    "--test_matches": matches,
    "--data_path": labelled,
    "--pretrained": weights,
}


def make_files(words: list[str]) -> None:
    """Make every file and folder that the flags of `MAKERS` name and that is not there yet."""
    maker = None
    for word in words:
        if word.startswith("--"):
            maker = MAKERS.get(word)
        elif maker is not None and (word == "FILE" or not Path(word).exists()):
            maker(Path(word))


def tiny(entry):
    """Return a row of `DATASETS` that downloads nothing: 240 random images of 16 x 16 or larger."""

    def build(min_side=1, **needs):
        shape = (entry.shape[0], max(16, min_side), max(16, min_side))
        labels = torch.arange(240) % entry.num_classes
        part = FeatureArray(torch.rand(240, *shape), labels)
        return Data("tiny", "classification", part, part, shape, entry.num_classes)

    return dataclasses.replace(entry, build=build, shape=(entry.shape[0], 16, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all commands run: what one makes, others find."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(autouse=True)
def reader(folder, monkeypatch):
    """A folder of a reader, who downloads nothing."""
    monkeypatch.chdir(folder)
    for name in DOWNLOADED:
        monkeypatch.setitem(DATASETS, name, tiny(DATASETS[name]))
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------
# The program


def former_run(words: list[str]) -> str:
    """Return the run of `RUNS` that RUN stands for."""
    if "--dataset" in words:
        return "matcher"
    return "enlarger" if "--scale" in words else "denoiser"


def make_run(name: str) -> None:
    """Train a run of `RUNS`, once."""
    if name in RUNS and not Path(name, "best.pt").exists():
        words = RUNS[name].split()
        make_files(words)
        main([*words, *small_settings(words), "--output_dir", name])


def small_settings(words: list[str]) -> list[str]:
    """Return the flags that make a command small, by what it chooses."""
    values, _, _ = parse_arguments(build_parser(), words)
    model = SMALL_MODELS.get(model_class(values["model"]).__name__, "")
    return f"{SMALL} {model} {SMALL_DATA.get(values['dataset'], '')}".split()


def run_main(words: list[str]) -> None:
    """Run a command line of main.py, made small."""
    words = [former_run(words) if word == "RUN" else STAND_INS.get(word, word) for word in words]
    words = [word for word in words if word != "--use_compiled"]  # a minute's work for a compiler
    make_files(words)
    for word in words:
        make_run(word)
        make_run(str(Path(word).parent))
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        return
    if set(words) & {"--test_only", "--resume", "--config", "--input"}:
        extra = ["--device", "cpu"]
    else:
        extra = small_settings(words)
    if "--config" in words:
        extra += ["--output_dir", "again"]
    if "--resume" in words:
        extra += ["--num_epochs", "1"]
    if "--val_split" in words:
        extra += ["--val_split", "0.5"]
    if not set(words) & set(NEVER_DRY):
        extra += ["--dry_run"]
    if any(word in words and find_spec(package) is None for word, package in OPTIONAL.items()):
        with pytest.raises(SystemExit) as stop:
            main([*words, *extra])
        assert stop.value.code == 2
    else:
        main([*words, *extra])


# ---------------------------------------------------------------------------------------------
# Scripts


class Parsed(Exception):
    """A parser has accepted its arguments."""


def parse_only(monkeypatch, run) -> None:
    """Call what parses a command line and stop it there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            run()


def run_python(monkeypatch, path: Path, words: list[str]) -> None:
    """Run a script, or only its parser where it would work for long."""
    monkeypatch.setattr(sys, "argv", [str(path), *words])

    def run():
        runpy.run_path(str(path), run_name="__main__")

    if path.name == "compare_runs.py":
        make_run("Output/ResNet/ConvNN")
        run()
    elif path.name == "export.py":
        words = [former_run([]) if word == "RUN" else word for word in words]
        make_run(words[0])
        target = f"out{Path(words[1]).suffix or '.safetensors'}"
        monkeypatch.setattr(sys, "argv", [str(path), words[0], target, *words[2:]])
        run()
    elif path.name == "study.py" and (words == ["--list"] or set(words) <= set(study_names())):
        monkeypatch.setenv("DRY_RUN", "1")
        run()
    else:
        parse_only(monkeypatch, run)


def study_names() -> list[str]:
    return list(importlib.import_module("study").STUDIES)


def run_shell(path: Path, words: list[str]) -> None:
    """Parse a shell script, and the flags it hands to every run."""
    subprocess.run(["bash", "-n", str(path)], check=True)
    build_parser().parse_args(words)


# ---------------------------------------------------------------------------------------------
# What is tested


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_work(command: Command, monkeypatch, capsys):
    program, *words = command.words
    if program == "torchrun":
        at = words.index("main.py")
        assert words[:at] == ["--nproc_per_node", "2"]
        program, words = "python", [w for w in words[at:] if w != "--fsdp"]  # alone here
    if Path(program).name in ("python", "python3"):
        program, *words = words
    if program == "main.py":
        run_main(words)
    elif program.startswith("scripts/") and program.endswith(".py"):
        run_python(monkeypatch, ROOT / program, words)
    elif program.startswith("scripts/"):
        run_shell(ROOT / program, words)
    elif program == "-m" and words[0].startswith("tests."):
        monkeypatch.setattr(sys, "argv", words)
        parse_only(monkeypatch, lambda: runpy.run_module(words[0], run_name="__main__"))
    elif words[:2] == ["pytest", "-q"]:
        assert all((ROOT / w).exists() for w in words if w.endswith(".py"))
    else:
        assert (Path(program).name, *words) in SET_UP, "say in tests/test_docs.py how to try this"


SET_UP = {
    ("-m", "venv", ".venv"),
    ("pip", "install", "-q", "-r", "requirements.txt"),
    ("pip", "install", "-q", "-r", "requirements.txt", "ruff"),
    ("pip", "install", "-r", "requirements-bench.txt"),
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
}


@pytest.mark.parametrize(("page", "program"), examples(), ids=lambda value: value[:20])
def test_examples_run(page, program):
    with contextlib.ExitStack() as stack:
        for table in (LAYERS, MODELS, DATASETS, TASKS):
            stack.enter_context(mock.patch.dict(table))
        small = mock.Mock(data=np.zeros((4, 32, 32, 3), np.uint8), targets=[0, 1, 2, 3])
        stack.enter_context(mock.patch("torchvision.datasets.CIFAR10", return_value=small))
        Path("Data").mkdir(exist_ok=True)
        exec(compile(program, page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_that_a_page_names_exist(page):
    known = set(build_parser()._option_string_actions)
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r"\"(--\w+)\"", script.read_text("utf-8")))
    text = page.read_text("utf-8")
    known |= {f"--{name}" for name in re.findall(r"(\w+): \w+ = option\(", text)}  # its examples
    for span in spans(text):
        for flag in re.findall(r"(?<![\w-])--[\w-]+", span):
            hint = did_you_mean(flag, sorted(known))
            assert flag in known | ELSEWHERE, f"{name_of(page)}: {flag}{hint}"


ELSEWHERE = {"--nproc_per_node", "--check", "--logdir"}  # of torchrun, ruff, tensorboard


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    for _, content in fences(text):
        text = text.replace(content, "")
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{name_of(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), f"{name_of(page)}: {target}"


def test_the_front_page_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) < 250
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text


def test_the_command_of_the_tests_is_that_of_the_automatic_check():
    command = "python -m pytest -q"
    assert f".venv/bin/{command}" in (ROOT / "README.md").read_text("utf-8")
    with contextlib.suppress(FileNotFoundError):
        assert command in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize("name", results_tables.PAGES)
def test_pages_hold_the_results_of_the_studies(name):
    table = results_tables.results_table(results_tables.PAGES[name])
    hint = "run: python scripts/results_tables.py --write"
    assert table in (ROOT / name).read_text("utf-8"), hint
