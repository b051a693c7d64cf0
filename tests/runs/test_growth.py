"""Growing networks through the command line: classes, pictures, text; deep, pruned, resumed."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import layers.dynamic as dynamic
import main as program
from checkpoints import load_checkpoint
from models.dynamic import DynamicNetwork

TEXT = "the cat sat on the mat and the dog sat on the cat; " * 12


@pytest.fixture
def grow(tmp_path, monkeypatch):
    """Run main() with a growing network on digits, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, dataset="digits"):
        argv = ["--model", "dynamic", "--dataset", dataset, "--device", "cpu"]
        return program.main([*argv, *map(str, flags)])

    return call


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def picture(tmp_path):
    rows, columns = np.mgrid[0:24, 0:32]
    pixels = np.stack([rows * 10, columns * 7, 255 * (rows > 11)], axis=-1).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def rows(folder, name):
    with open(Path(folder, name), newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------
# Classification


def test_digits(grow):
    results = grow()
    assert results["best"] > 95
    folder = Path(results["output_dir"])
    assert folder == Path("Output/Dynamic/digits")
    growth = rows(folder, "growth.csv")
    assert len(growth) == -(-1438 // 64)
    assert int(growth[-1]["centers"]) == results["centers"][0] < 300
    assert float(growth[0]["seen"]) == 0
    row = rows(folder, "metrics.csv")[-1]
    assert float(row["centers"]) == results["centers"][0]
    assert float(row["train_top1"]) > 98
    for name in ("growth.png", "curves.png", "args.txt", "model.txt", "best.pt"):
        assert (folder / name).stat().st_size > 0
    assert "batch_size: 64" in (folder / "args.txt").read_text()
    again = grow("--test_only", "--output_dir", folder)
    assert again["test"]["top1"] == pytest.approx(results["best"])


def test_passes_and_resuming(grow):
    whole = grow("--num_epochs", 3, "--output_dir", "whole", "--limit_train", 600)
    first = grow("--num_epochs", 1, "--output_dir", "parts", "--limit_train", 600)
    assert len(first["history"]) == 1
    second = grow("--resume", "--num_epochs", 3, "--output_dir", "parts")
    assert second["history"] == whole["history"]
    assert rows("parts", "growth.csv") == rows("whole", "growth.csv")
    one, other = (load_checkpoint(Path(f, "last.pt"))["model"] for f in ("whole", "parts"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    counts = [row["centers"] for row in whole["history"]]
    assert counts == sorted(counts)


def test_a_pass_that_adds_nothing_is_the_last(grow, capsys):
    results = grow("--num_epochs", 30, "--target_accuracy", 1, "--limit_train", 200)
    assert 1 < len(results["history"]) < 30
    assert "Nothing left to learn" in capsys.readouterr().out
    assert results["history"][-1]["train_top1"] == 100


def test_growing_without_room_says_so(grow, capsys):
    grow("--num_epochs", 3, "--max_neighbors", 70, "--limit_train", 400)
    said = capsys.readouterr().out
    assert "Growing stopped after epoch 1: there is no room for further centers" in said
    assert "Nothing left to learn" not in said


def test_deep(grow):
    results = grow("--num_layers", 3, "--splits", 2, "--num_epochs", 1)
    assert len(results["history"]) == 3
    assert len(results["centers"]) == 3
    assert all(count > 0 for count in results["centers"])
    layers = [int(row["layer"]) for row in rows(results["output_dir"], "growth.csv")]
    assert sorted(set(layers)) == [1, 2, 3]
    again = grow(
        "--test_only",
        "--output_dir",
        results["output_dir"],
        "--checkpoint",
        "Output/Dynamic/digits/last.pt",
    )
    assert again["test"]["top1"] == pytest.approx(results["history"][-1]["test_top1"])


def test_deep_is_resumed_in_the_middle(grow):
    flags = ("--num_layers", 2, "--limit_train", 400, "--splits", 2)
    whole = grow(*flags, "--output_dir", "whole")
    model = DynamicNetwork(num_inputs=64, num_classes=10, num_layers=2, splits=2)
    assert model.num_stages == 2
    stopped = load_checkpoint("whole/last.pt")
    assert stopped["model"]["stage"].tolist()[0] == 1
    assert whole["history"][0]["centers"] == stopped["model"]["layers.0.targets"].shape[0]


def test_pca(grow):
    results = grow("--dynamic_features", "pca:20")
    assert results["best"] > 94
    checkpoint = load_checkpoint(Path(results["output_dir"], "best.pt"))
    assert checkpoint["model"]["layers.0.centers"].shape[1] == 20
    again = grow("--test_only", "--output_dir", results["output_dir"])
    assert again["test"]["top1"] == pytest.approx(results["best"])


def test_learned_features(grow, tiny_model):
    flags = ["--device", "cpu", "--dataset", "digits", "--limit_train", "300", "--layer", "Conv2d"]
    argv = ["--model", tiny_model, *flags, "--num_epochs", "1", "--output_dir", "net"]
    program.main(argv)
    results = grow("--dynamic_features", "net/best.pt", "--limit_train", 300)
    checkpoint = load_checkpoint(Path(results["output_dir"], "best.pt"))
    assert checkpoint["model"]["layers.0.centers"].shape[1] < 64
    assert results["best"] > 30


@pytest.mark.parametrize(
    "model",
    [
        "torchvision:resnet18 --layer Conv2d --resize 32",
        "convnet --layer Conv2d --width 4",
        "vit_tiny --resize 8 --patch_size 4 --num_layers 1 --num_heads 2 --d_hidden 8 --d_mlp 8 "
        "--layer Attention",
    ],
)
def test_features_of_other_networks(grow, model):
    pytest.importorskip("torchvision")
    short = "--dataset digits --limit_train 64 --limit_test 16 --batch_size 16 --num_epochs 1"
    program.main(f"--model {model} {short} --device cpu --output_dir net".split())
    results = grow("--dynamic_features", "net/best.pt", "--limit_train", 64, "--limit_test", 16)
    features = {"torchvision:resnet18": 512, "convnet": 4, "vit_tiny": 8}[model.split()[0]]
    centers = load_checkpoint(Path(results["output_dir"], "best.pt"))["model"]["layers.0.centers"]
    assert centers.shape[1] == features


@pytest.mark.parametrize(
    "flags",
    [
        ["--kernel_type", "euclidean", "--exponent", "-8"],
        ["--kernel_type", "euclidean_pyramid", "--scales", "2"],
        ["--kernel_type", "dot"],
        ["--kernel_type", "influence_cone", "--influence_cone_factor", "3"],
        ["--predictor", "nearest"],
        ["--predictor", "knn", "--K", "5"],
        ["--balanced_first_batch", "--no-eval_train"],
    ],
)
def test_choices(grow, flags):
    results = grow(*flags, "--limit_train", 500, "--limit_test", 200)
    if "dot" not in flags:  # on raw pixels the formula prefers the least similar
        assert results["best"] > 70


def test_balanced_first_batch(grow):
    grow("--balanced_first_batch", "--batch_size", 50, "--output_dir", "run")
    checkpoint = load_checkpoint("run/last.pt")
    first = checkpoint["model"]["layers.0.targets"][:50]
    assert first.bincount().tolist() == [5] * 10


def test_full_memory_keeps_what_was_learnt(grow, monkeypatch, capsys):
    def refuse(num_bytes, device, free=25_000):
        if num_bytes > free:
            raise MemoryError("none left")

    monkeypatch.setattr(dynamic, "check_memory", refuse)
    monkeypatch.setattr(dynamic, "_MIN_CAPACITY", 64)
    results = grow("--target_accuracy", 1, "--batch_size", 32)
    assert "Growing stopped: no memory for" in capsys.readouterr().out
    assert results["best"] > 50
    assert Path(results["output_dir"], "last.pt").exists()


# ---------------------------------------------------------------------------------------------
# Pruning


def test_prune(grow):
    results = grow("--prune", "--predictor", "interp", "--exponent", "-2", "--limit_train", 700)
    assert 0 < results["pruned"] <= results["centers"][0]
    text = Path(results["output_dir"], "train_eval_results.txt").read_text()
    assert f"-> {results['pruned']} centers" in text
    path = Path(results["output_dir"], "pruned.pt")
    again = grow("--test_only", "--checkpoint", path, "--output_dir", results["output_dir"])
    assert again["test"]["top1"] == pytest.approx(results["pruned_test"]["top1"])


# ---------------------------------------------------------------------------------------------
# Pictures


def test_image(grow, picture):
    results = grow("--image_path", picture, "--tolerance", 0.1, dataset="image")
    folder = Path(results["output_dir"])
    assert 0 < results["share"] < 60
    assert results["psnr"] > 18
    assert results["history"][-1]["train_within"] > 80
    assert Image.open(folder / "image.png").size[0] > 3 * 32
    assert "PSNR of the picture" in (folder / "train_eval_results.txt").read_text()
    assert "kernel_type: euclidean" in (folder / "args.txt").read_text()
    again = grow("--test_only", "--output_dir", folder, dataset="image")
    assert again["test"]["within"] == pytest.approx(results["best"])


def test_image_finer_tolerance_keeps_more(grow, picture):
    coarse, fine = (
        grow("--image_path", picture, "--tolerance", t, dataset="image") for t in (0.3, 0.05)
    )
    assert coarse["share"] < fine["share"]
    assert coarse["psnr"] < fine["psnr"]


def test_image_by_default_is_a_photograph(grow, capsys):
    grow("--dry_run", dataset="image")
    assert "china.jpg" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("encoding", ["ascii", "onehot"])
def test_text(grow, story, encoding):
    flags = ("--text_path", story, "--text_encoding", encoding, "--num_features", 6)
    prompt = ("--text_prompt", "the dog", "--text_temperature", 0)
    results = grow(*flags, *prompt, dataset="text")
    assert results["best"] > 90, "a text that repeats itself is learnt"
    assert results["history"][-1]["test_bits"] < 1.5
    folder = Path(results["output_dir"])
    generated = (folder / "generated.txt").read_text()
    assert generated.startswith("the dog sat on")
    assert len(generated) == 107
    again = grow(
        "--test_only", "--output_dir", folder, "--text_prediction_length", 20, dataset="text"
    )
    assert again["test"]["top1"] == pytest.approx(results["best"])
    assert (folder / "generated.txt").read_text() == generated[:27]
    assert (folder / "generated.1.txt").read_text() == generated, "the earlier one is kept"


def test_prompt_is_padded_and_said_once(grow, story, capsys):
    grow(
        "--text_path", story, "--text_prompt", "the", "--text_prediction_length", 5, dataset="text"
    )
    out = capsys.readouterr().out
    assert out.count("blanks are put before it") == 1
    assert "Generated: 'the" in out


# ---------------------------------------------------------------------------------------------
# Features


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_accuracy", "0"], "target_accuracy must be in (0, 1], got 0.0"),
        (["--target_accuracy", "1.5"], "target_accuracy must be in (0, 1], got 1.5"),
        (["--exponent", "4"], "exponent must be < 0 for the cosine kernel, got 4.0"),
        (["--epsilon", "0"], "epsilon must be a finite number > 0"),
        (["--max_neighbors", "50"], "--max_neighbors 50 is less than the first batch"),
        (["--max_count", "0"], "max_count must be >= 1"),
        (["--num_layers", "0"], "num_layers and splits must be >= 1"),
        (["--kernel_type", "manhattan"], "invalid choice: 'manhattan'"),
        (["--prune", "--predictor", "nearest"], "--prune works with --predictor interp"),
        (["--dynamic_features", "pca:x"], "after pca: comes the number of components"),
        (["--dynamic_features", "pca:900"], "PCA to 900 components needs at least as many"),
        (["--dynamic_features", "none.pt"], "raw, pca:N, learned nor an existing checkpoint"),
        (["--test_only"], "needs a checkpoint"),
    ],
)
def test_refused(grow, refused, flags, message):
    code, text = refused(grow, *flags)
    assert code == 2
    assert message in text


@pytest.mark.parametrize(
    ("dataset", "flags", "message"),
    [
        ("image", ["--image_path", "nowhere.png"], "nowhere.png cannot be read as an image"),
        ("image", ["--num_layers", "2"], "num_layers must be 1, got 2"),
        ("image", ["--tolerance", "0"], "tolerance must be > 0"),
        ("image", ["--balanced_first_batch"], "needs classes"),
        ("text", ["--text_path", "nowhere.txt"], "nowhere.txt cannot be read"),
        ("text", ["--text_prompt", "naïve"], "characters outside the alphabet"),
        ("text", ["--dynamic_features", "pca:5"], "is for classification"),
        ("text", ["--test_only", "--text_prompt", "Once upon a time"], "needs a checkpoint"),
    ],
)
def test_refused_pictures_and_texts(grow, refused, dataset, flags, message):
    code, text = refused(grow, *flags, dataset=dataset)
    assert code == 2
    assert message in text


def test_unreadable_files(grow, refused, tmp_path):
    (tmp_path / "short.txt").write_text("ten chars.")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)) * 9)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for dataset, flag, name, message in (
        ("text", "--text_path", "short.txt", "not enough to look at 10"),
        ("text", "--text_path", "binary.txt", "is no UTF-8 text"),
        ("image", "--image_path", "broken.png", "cannot be read as an image"),
    ):
        code, text = refused(grow, flag, name, dataset=dataset)
        assert code == 2
        assert message in text


def test_a_checkpoint_without_features_is_refused(grow, refused):
    first = grow("--limit_train", 200)
    path = Path(first["output_dir"], "best.pt")
    code, text = refused(grow, "--dynamic_features", path)
    assert code == 2
    assert "holds a dynamic, which is no network that classifies by gradients" in text


def test_flags_of_other_datasets_are_noted(grow, capsys):
    grow("--dry_run", "--text_path", "a.txt", "--lr", 1)
    out = capsys.readouterr().out
    assert "note: no effect with --model dynamic: --lr, --text_path." in out


def test_a_full_layer_ends_its_pass(grow):
    results = grow("--max_neighbors", 64, "--num_layers", 2, "--splits", 2)
    assert results["centers"] == [64, 64]
    assert len(rows(results["output_dir"], "growth.csv")) == 2 * 1024 // 64
    assert len(results["history"]) == 2
