import csv
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_n3 import TINY, published_shapes

from main import build_parser, main, parse_arguments
from models import N3Net

close = torch.testing.assert_close
TINY_FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


# The command line


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of pictures: three to train on, two of odd sizes to test on."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, sizes in (("train", [(40, 50)] * 3), ("test", [(41, 37), (30, 52)])):
        (tmp_path / folder).mkdir()
        for i, (height, width) in enumerate(sizes):
            row = np.linspace(0, 200, width) + rng.uniform(0, 50, (height, 1))
            Image.fromarray(row.astype(np.uint8)).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def denoise(*flags):
    argv = ["--model", "n3net", "--dataset", "denoise", "--device", "cpu", "--num_workers", "0"]
    argv += ["--train_dir", "train", "--test_dir", "test", "--crop_size", "35"]
    argv += ["--crops_per_image", "2", "--batch_size", "3", "--num_epochs", "2"]
    return main([*argv, *TINY_FLAGS, *map(str, flags)])


def test_train_test_and_use(folders, capsys):
    trained = denoise("--output_dir", "run", "--save_images")
    assert set(trained["history"][0]) >= {"train_loss", "test_psnr", "test_ssim"}
    text = Path("run/train_eval_results.txt").read_text()
    assert "PSNR" in text
    assert "Average of test (2 images): PSNR:" in text
    pictures = sorted(p.name for p in Path("run/images").iterdir())
    assert pictures == ["001_0.png", "002_1.png"]
    assert Image.open("run/images/001_0.png").size == (3 * 37 + 8, 41 + 20)

    whole = main(["--test_only", "--output_dir", "run", "--device", "cpu"])["test"]
    text = Path("run/test_results.txt").read_text()
    assert "noise of sigma 25 on the 0-255 scale" in text
    assert "test/1.png: PSNR" in text
    rows = list(csv.DictReader(Path("run/per_image.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == ["test/0.png", "test/1.png"]
    mean = sum(float(row["psnr"]) for row in rows) / 2
    assert mean == pytest.approx(whole["psnr"], abs=1e-4)
    assert float(rows[0]["noisy_psnr"]) == pytest.approx(20.17, abs=0.5)
    tiled = main(["--test_only", "--output_dir", "run", "--device", "cpu", "--tile", "40"])["test"]
    assert tiled["psnr"] == pytest.approx(whole["psnr"], abs=0.2)

    start = ["--model", "n3net", "--test_only", "--pretrained", "run/best.pt", "--device", "cpu"]
    again = main([*start, "--dataset", "denoise", "--test_dir", "test"])["test"]
    assert again["psnr"] == pytest.approx(whole["psnr"])
    main([*start, "--input", "test/0.png", "--output", "clean/0.png"])
    assert Image.open("clean/0.png").size == (37, 41)
    capsys.readouterr()


def test_resume_equals_an_unbroken_run(folders):
    denoise("--output_dir", "part", "--num_epochs", 1, "--scheduler", "none")
    whole = denoise("--output_dir", "whole", "--scheduler", "none")
    resumed = main(["--resume", "--output_dir", "part", "--num_epochs", "2", "--device", "cpu"])
    assert resumed["history"] == whole["history"]


def test_pretrained_published_file(folders):
    net = OrderedDict((name, torch.rand(shape)) for name, shape in published_shapes().items())
    torch.save({"net": net, "epoch": 51}, "051_ckpt.t7", _use_new_zipfile_serialization=False)
    argv = ["--model", "n3net", "--dataset", "denoise", "--test_dir", "test", "--sigma", "50"]
    argv += ["--pretrained", "051_ckpt.t7", "--test_only", "--device", "cpu"]
    assert "psnr" in main(argv)["test"]


def test_photos_are_disjoint_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "n3net", *TINY_FLAGS, "--crops_per_image", "1", "--device", "cpu"]
    result = main([*argv, "--num_epochs", "1", "--color", "--dry_run"])
    assert result["test"]["psnr"] > 0


def test_color_and_layers(folders, capsys):
    result = denoise("--color", "--layer", "ConvNN", "--K", 4, "--num_epochs", 1)
    assert result["history"][0]["test_psnr"] > 0
    said = capsys.readouterr().out
    assert "--test_dir: 2 of 2 images converted to color" in said
    result = denoise("--model", "dncnn", "--depth", 3, "--dry_run", "--val_split", 0.34)
    assert result["test"]["psnr"] > 0


def test_preset_sets_defaults_and_flags_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parsed(*flags):
        return SimpleNamespace(**parse_arguments(build_parser(), flags)[0])

    args = parsed("--preset", "knn_input", "--num_volumes", "3")
    assert (args.model, args.nonlocal_block, args.match_on) == ("n3net", "knn", "input")
    assert (args.num_blocks, args.num_volumes, args.dataset) == (1, 3, "photos")
    assert (args.optimizer, args.scheduler, args.clip_grad_norm) == ("adam", "exponential", 0)
    args = parsed("--preset", "dncnn18")
    assert (args.model, args.depth, args.layer) == ("dncnn", 18, "Conv2d")


BAD = [
    (["--test_dir", "nowhere"], "--test_dir nowhere: there is no such folder"),
    (["--train_dir", "empty"], "--train_dir empty: no images in it"),
    (["--train_dir", "broken"], r"broken/x.png cannot be read as an image"),
    (["--crop_size", "45"], r"train/0.png is 40x50, too small for crops of 45x45"),
    (["--sigma", "0"], "--sigma: must be above 0 (got 0)"),
    (["--num_volumes", "30"], "K = 30 neighbors asked of 24 candidates"),
    (["--window", "4"], "--window 4 is even"),
    (["--tile", "20"], "the smallest that works is 30"),
    (["--patch_stride", "12"], "stride must be between 1 and --patch_size"),
    (["--input", "test/0.png"], "--input and --output go together"),
    (["--nonlocal_block", "knn", "--match_on", "embedding"], "knn cannot match on an embedding"),
    (["--preset", "dncnn17"], "--preset dncnn17 is a dncnn, not a n3net"),
    (["--pretrained", "none.t7"], "there is no checkpoint none.t7"),
    (["--pretrained", "other.pt"], "2 names differ"),
    (["--pretrained", "run.pt"], "--num_volumes is 3 there and 2 here"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda v: " ".join(v)[:30])
def test_bad_input(folders, capsys, flags, message):
    (folders / "empty").mkdir()
    (folders / "broken").mkdir()
    (folders / "broken" / "x.png").write_bytes(b"nothing")
    state = N3Net(**TINY).state_dict()
    state["a"] = state["b"] = torch.zeros(1)
    torch.save(state, "other.pt")
    torch.save({"model": state, "args": {"model": "n3net", "num_volumes": 3}}, "run.pt")
    with pytest.raises(SystemExit) as error:
        denoise(*flags)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert not Path("Output").exists()
