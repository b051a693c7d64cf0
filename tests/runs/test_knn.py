"""K-nearest-neighbor classification through the command line."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import main
from tasks import classification

FLAGS = ["--model", "knn", "--dataset", "digits", "--device", "cpu"]


def run(*flags):
    return main.main([*FLAGS, *map(str, flags)])


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_many_classes_are_not_drawn_as_a_square(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classification, "MOST_DRAWN", 9)
    run("--limit_train", 40, "--limit_test", 9, "--output_dir", tmp_path / "run")
    assert "note: 10 classes are too many to draw a confusion.png of" in capsys.readouterr().out
    assert not (tmp_path / "run/confusion.png").exists()


def test_several_k_from_one_run(tmp_path, capsys):
    folder = tmp_path / "run"
    results = run("--K", "1,3,5,9", "--magnitude_type", "euclidean", "--output_dir", folder)
    assert set(results["accuracy"]) == {1, 3, 5, 9}
    assert results["accuracy"][results["K"]] == max(results["accuracy"].values()) > 98
    text = (folder / "train_eval_results.txt").read_text()
    for K, accuracy in results["accuracy"].items():
        assert f"[K {K:03d}] [Test] Accuracy: Top1: {accuracy:.4f}%" in text
    assert "359 test samples" in text
    assert "queries/s; euclidean, majority vote; " in text
    assert f"at K {results['K']}" in text
    assert "K was chosen on the test set" in text
    rows = read_rows(folder / "metrics.csv")
    assert [int(row["K"]) for row in rows] == [1, 3, 5, 9]
    assert float(rows[1]["test_top1"]) == results["accuracy"][3]
    assert read_rows(folder / "timing.csv")[0]["set"] == "test"
    assert "samples=1438" in (folder / "model.txt").read_text()
    for picture in ("confusion.png", "neighbors.png"):
        assert (folder / picture).stat().st_size > 1000
    # One search for all: each K alone gives the same.
    alone = run("--K", 5, "--magnitude_type", "euclidean", "--output_dir", tmp_path / "five")
    assert alone["accuracy"][5] == results["accuracy"][5]

    again = run("--test_only", "--output_dir", folder)
    assert again["test"]["top1"] == results["accuracy"][results["K"]]
    assert "[K 009]" in (folder / "test_results.txt").read_text()
    other = run("--test_only", "--output_dir", folder, "--K", 9, "--vote", "distance")
    assert other["test"]["top1"] > 97
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("--test_only", "--output_dir", folder, "--resize", 4)
    assert "queries must be (M, 64)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--resume", "--output_dir", folder)
    assert "nothing to go on" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flags", [["--val_split", "0.2"], ["--leave_one_out"]])
def test_k_is_chosen_on_training_data(tmp_path, flags):
    results = run("--K", "1,40", *flags, "--limit_test", 50, "--output_dir", tmp_path / "run")
    text = (tmp_path / "run" / "train_eval_results.txt").read_text()
    assert results["K"] == 1
    assert ("[Val]" in text) == ("--val_split" in flags)
    assert ("[Leave-one-out]" in text) == ("--leave_one_out" in flags)
    assert "on the test set" not in text
    column = "val_top1" if "--val_split" in flags else "leave_one_out_top1"
    assert column in read_rows(tmp_path / "run" / "metrics.csv")[0]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_precision_does_not_change_the_answer(tmp_path, metric):
    options = ["--K", "3,4", "--magnitude_type", metric, "--noise", "0.1"]
    first = run(*options, "--output_dir", tmp_path / "a")
    second = run(*options, "--output_dir", tmp_path / "b", "--knn_precision", "float32")
    assert first["accuracy"] == second["accuracy"]
    assert "float32 products" in (tmp_path / "b" / "train_eval_results.txt").read_text()


def test_features(tmp_path):
    results = run("--knn_features", "pca:16", "--K", 3, "--output_dir", tmp_path / "run")
    assert results["test"]["top1"] > 96
    assert (tmp_path / "run" / "neighbors.png").exists()
    again = run("--test_only", "--output_dir", tmp_path / "run")
    assert again["test"] == results["test"]


def test_dry_run_writes_nothing(tmp_path):
    results = run("--dry_run", "--batch_size", 100, "--output_dir", tmp_path / "run")
    assert results["output_dir"] is None
    assert not (tmp_path / "run").exists()


def test_flags_without_effect_are_noted(tmp_path, capsys):
    run("--augment", "--lr", "1", "--dry_run", "--output_dir", tmp_path / "run")
    assert "no effect with --model knn: --augment, --lr." in capsys.readouterr().out
    small = ["--limit_train", "4", "--limit_test", "2", "--batch_size", "2"]
    run("--model", "resnet18", "--layer", "Conv2d", "--vote", "distance", "--dry_run", *small)
    assert "--vote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--K", "0"], "--K: must be at least 1 (got 0)"),
        (["--K", "3,3"], "K must be one or more different numbers from 1 on"),
        (["--K", "11", "--limit_train", "10"], "at most the number of samples, 10 (got 11)"),
        (["--leave_one_out", "--val_split", "0.1"], "two ways to choose"),
        (["--knn_features", "pca:0"], "--knn_features pca:0"),
        (["--knn_features", "no.pt"], "--knn_features no.pt"),
        (["--dataset", "photos"], "--model knn cannot do denoising"),
        (
            ["--model", "vgg11", "--magnitude_type", "dot"],
            "magnitude_type must be one of cosine, euclidean",
        ),
        (["--model", "vgg11", "--K", "1,3"], "--K takes one number"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        run(*flags, "--output_dir", tmp_path / "new")
    assert error.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_under_torchrun_two_processes_share_the_samples(tmp_path):
    expected = run("--K", "1,7", "--output_dir", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(20000 + os.getpid() % 20000), "main.py", *FLAGS]
    command += ["--K", "1,7", "--output_dir", str(tmp_path / "two")]
    root = Path(main.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "two" / "metrics.csv")
    assert {int(row["K"]): float(row["test_top1"]) for row in rows} == expected["accuracy"]
    assert "No checkpoint" in (tmp_path / "two" / "train_eval_results.txt").read_text()


def test_npz_pixels_are_compared_as_integers(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 5, 5), dtype=np.uint8)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    options = ["--data_path", tmp_path / "d.npz", "--output_dir", tmp_path / "run"]
    results = run("--dataset", "npz", "--magnitude_type", "euclidean", *options)
    assert results["test"]["top1"] == 100
