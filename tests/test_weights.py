"""Weights in files without code, and pictures treated by those that come along."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export import main as export
from PIL import Image

import commandline
from checkpoints import read_safetensors, read_weights, save_safetensors
from main import main

close = torch.testing.assert_close


def test_round_trip(tmp_path):
    tensors = {"a": torch.rand(2, 3), "b": torch.arange(3), "c": torch.tensor(1.5).double()}
    save_safetensors(tmp_path / "x.safetensors", tensors, {"model": "dncnn", "sigma": [5.0, 55.0]})
    weights, args = read_weights(tmp_path / "x.safetensors")
    assert args == {"model": "dncnn", "sigma": [5.0, 55.0]}
    for name, value in tensors.items():
        close(weights[name], value, rtol=0, atol=0)
    size = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert size % 8 == 0  # as the format asks


def test_the_format_is_that_of_the_library(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    close(safetensors.load_file(tmp_path / "x.safetensors")["a"], torch.ones(2))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 40,
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little")
        + json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}})
        .encode()
        .ljust(60)
        + b"\0" * 8,
    ],
)
def test_damaged_files(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        read_safetensors(tmp_path / "none.safetensors")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A trained denoiser and enlarger, exported where the program looks; pictures to treat."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commandline, "WEIGHTS", tmp_path / "weights")
    rng = np.random.default_rng(0)
    for folder in ("train", "photos", "weights", "empty"):
        Path(folder).mkdir()
    for i in range(2):
        array = np.linspace(0, 200, 40)[:, None, None] + rng.uniform(0, 50, (36, 3))
        Image.fromarray(array.astype(np.uint8)).save(f"train/{i}.png")
        Image.fromarray(array.astype(np.uint8)).save(f"photos/{i}.png")
    start = ["--model", "dncnn", "--depth", "3", "--features", "4", "--fold", "2", "--device"]
    start += ["cpu", "--dataset", "denoise", "--train_dir", "train", "--test_dir", "train"]
    start += ["--crops_per_image", "1", "--num_epochs", "1", "--crop_size", "24"]
    main([*start, "--sigma", "5", "55", "--output_dir", "a"])
    main([*start, "--task", "super_resolution", "--output_dir", "b"])
    export(["a", "weights/denoise_gray.safetensors"])
    export(["b", "weights/enlarge_x2.safetensors"])
    return tmp_path


def test_pictures_without_naming_a_network(pictures, capsys, refused):
    main(["--input", "photos/0.png", "--output", "clean.png", "--estimate_sigma"])
    assert Image.open("clean.png").size == (36, 40)
    assert "channel by channel by a network for gray" in capsys.readouterr().out
    main(["--input", "photos", "--output", "clean", "--self_ensemble", "--tile", "auto"])
    assert sorted(p.name for p in Path("clean").iterdir()) == ["0.png", "1.png"]
    main(["--input", "photos/*.png", "--output", "large", "--scale", "2"])
    assert Image.open("large/1.png").size == (72, 80)
    same = ["--test_only", "--output_dir", "a", "--device", "cpu"]
    main([*same, "--input", "photos/0.png", "--output", "again.png"])
    assert Path("again.png").read_bytes() == Path("clean.png").read_bytes()

    for flags, message in [
        (["--color"], "no weights for pictures in color come along"),
        (["--scale", "3"], "enlarge_x3.safetensors is not among denoise_gray, enlarge_x2"),
    ]:
        code, said = refused(main, ["--input", "photos", "--output", "x", *flags])
        assert code == 2
        assert message in said, said
    for words, message in [
        (["--input", "empty", "--output", "x"], "--input empty is a folder without images"),
        (["--input", "nowhere.png", "--output", "x.png"], "nowhere.png: there is no such file"),
        (["--input", "photos/0.png"], "--input and --output go together"),
        (["--input", "photos/0.png", "--output", "x.xyz"], "names no format of pictures"),
        (["--input", "photos", "--output", "x.png"], "name a folder"),
    ]:
        code, said = refused(main, words)
        assert code == 2
        assert message in said, said
    assert not Path("x").exists()


def test_export_needs_a_run(pictures, refused):
    code, said = refused(export, ["nowhere", "x.safetensors"])
    assert code == 2
    assert "there is no checkpoint nowhere/best.pt" in said
