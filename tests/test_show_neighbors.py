"""Pictures of what layers take."""

import csv
from pathlib import Path

import pytest
import show_neighbors
import torch
from PIL import Image

from main import main


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def show(*words):
    show_neighbors.main([str(word) for word in words])


def test_a_generated_sample(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "convnet", "--depth", "2", "--width", "6", "--dataset", "recall"]
    words += ["--num_train", "64", "--num_test", "8", "--num_epochs", "1", "--device", "cpu"]
    main([*words, "--layer", "Branching", "--K", "5", "--output_dir", "a"])
    show("a", "--sample", "2", "--positions", "3,4", "10,12")
    assert "a/neighbors.png and a/neighbors.csv" in capsys.readouterr().out
    assert Image.open("a/neighbors.png").size[0] > 300
    rows = rows_of("a/neighbors.csv")
    assert {row["layer"] for row in rows} == {"features.0.branch1", "features.3.branch1"}
    assert {row["taken"] for row in rows} == {"Col", "Loc"}
    assert len(rows) == 2 * 2 * 2 * 5
    mine = [r for r in rows if r["layer"] == "features.0.branch1" and r["taken"] == "Col"]
    assert (mine[0]["neighbor_row"], mine[0]["neighbor_col"]) == ("3", "4")  # itself first
    show("a", "--layers", "features.3.branch1", "--output", "b.png")
    assert {row["layer"] for row in rows_of("b.csv")} == {"features.3.branch1"}
    for flags, message in [
        (["--sample", "8"], "--sample 8: there are 8 test samples, counted from 0"),
        (["--positions", "3,99"], "--positions 3,99: the picture has 20 rows and 20 columns"),
        (["--positions", "3"], "a position is its row and column, counted from 0"),
        (["--layers", "none"], "--layers none: no such layer. There is: features.0.branch1, fea"),
        (["--most", "0"], "--most must be at least 1 (got 0)"),
        (["--output", "b.jpg"], "--output b.jpg: the picture is a .png file"),
        (["--image", "none.png"], "none.png"),
    ]:
        code, said = refused(show, "a", *flags)
        assert code == 2
        assert message in said, said
    main([*words, "--layer", "Conv2d", "--output_dir", "plain"])
    code, said = refused(show, "plain")
    assert "this network has no layer that chooses neighbors on a map" in said
    code, said = refused(show, "nowhere")
    assert "there is no checkpoint nowhere/best.pt" in said


SMALL = {
    "vgg11": ["--layer", "ConvNN_Attn", "--width", "0.1", "--classifier", "gap"],
    "resnet18": ["--layer", "ConvNN", "--width", "0.1", "--similarity_type", "Loc"],
    "densenet121": ["--layer", "Branching", "--width", "0.1"],
    "vit": ["--resize", "16", "--patch_size", "4", "--num_layers", "1", "--d_hidden", "8"],
}
SMALL["vit"] += ["--num_heads", "2", "--d_mlp", "8", "--layer", "KvtAttention"]


LAYERS = {
    "vgg11": "features.0",
    "resnet18": "layer3.0.conv1",
    "densenet121": "features.0.layer.branch1",
    "vit": "transformer_encoder.0.attention",
}


@pytest.mark.parametrize("model", SMALL)
def test_classifiers(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", model, "--dataset", "digits", "--K", "4", "--device", "cpu"]
    small = ["--limit_train", "20", "--limit_test", "4", "--num_epochs", "1", "--batch_size", "10"]
    main([*flags, *small, *SMALL[model], "--output_dir", "a"])
    Image.fromarray((torch.rand(30, 40, 3) * 255).byte().numpy()).save("x.png")
    some = ["--layers", LAYERS[model]]
    rows = rows_of_run("a", "--image", "x.png", "--side", "24", *some)
    assert {row["layer"] for row in rows} == {LAYERS[model]}
    assert rows_of_run("a", "--sample", "1", "--groups", "2", *some)


def rows_of_run(*words):
    Path("x").mkdir(exist_ok=True)
    show(*words, "--output", "x/y.png")
    return rows_of("x/y.csv")


DENOISERS = {
    "dncnn": ["--depth", "3", "--features", "4", "--layer", "ConvNN_Attn", "--K", "4"],
    "unet": ["--channels", "2", "--num_levels", "1", "--layer", "ConvNN", "--K", "4"],
    "n3net": ["--depth", "2", "--features", "4", "--num_blocks", "1", "--embed_features", "4"],
    "nlrn": ["--features", "4", "--recurrences", "2", "--window", "5", "--K", "4"],
}


@pytest.mark.parametrize("model", DENOISERS)
def test_denoisers(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(2):
        Image.fromarray((torch.rand(40, 30, 3) * 255).byte().numpy()).save(f"pictures/{i}.png")
    flags = ["--model", model, "--dataset", "denoise", "--train_dir", "pictures", "--test_dir"]
    flags += ["pictures", "--crops_per_image", "1", "--crop_size", "20", "--num_epochs", "1"]
    main([*flags, *DENOISERS[model], "--device", "cpu", "--output_dir", "a"])
    rows = rows_of_run("a", "--image", "pictures/0.png", "--side", "30", "--positions", "5,6")
    weighted = model != "unet"
    assert all(bool(row["weight"]) == weighted for row in rows if row["taken"] != "Loc")
    if model == "n3net":
        assert {row["group"] for row in rows} == {str(i) for i in range(1, 8)}
        total = sum(float(row["weight"]) for row in rows if row["group"] == "1")
        assert 0 < total <= 1.0001
    assert rows_of_run("a", "--sample", "1", "--side", "30")
