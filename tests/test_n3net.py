import csv
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from main import build_parser, main, parse_arguments
from models import DnCNN, N3Net
from models.n3net import PRESETS
from tasks.denoising import DenoisingTask
from tasks.quality import psnr, ssim
from tasks.restoration import DegradedCrops, DegradedImages
from tasks.tiling import forward_in_tiles
from trainers import build_optimizer, build_scheduler
from utils import load_pretrained, read_weights

close = torch.testing.assert_close
TINY = {
    "num_blocks": 1,
    "depth": 2,
    "features": 4,
    "block_channels": 2,
    "num_volumes": 2,
    "window": 5,
    "embed_channels": 2,
    "embed_features": 4,
    "embed_depth": 2,
}
TINY_FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


def count(model):
    return sum(p.numel() for p in model.parameters())


def published_shapes():
    """Names and shapes of the published checkpoints, as they are documented."""
    shapes = {}

    def norm(prefix, n):
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{name}"] = (n,)

    for i, (nin, nout) in enumerate([(1, 8), (64, 8), (64, 1)]):
        shapes |= {f"blocks.{i}.conv1.weight": (64, nin, 3, 3), f"blocks.{i}.conv1.bias": (64,)}
        shapes |= {f"blocks.{i}.conv2.weight": (nout, 64, 3, 3), f"blocks.{i}.conv2.bias": (nout,)}
        norm(f"blocks.{i}.bn1", 64)
        for j in (0, 3, 6, 9):
            shapes[f"blocks.{i}.layer1.{j}.weight"] = (64, 64, 3, 3)
            norm(f"blocks.{i}.layer1.{j + 1}", 64)
    for i in range(2):
        for part, last in (("embedcnn", 8), ("tempcnn", 1)):
            shapes[f"nls.{i}.{part}.0.weight"] = (64, 8, 3, 3)
            shapes[f"nls.{i}.{part}.3.weight"] = (64, 64, 3, 3)
            shapes[f"nls.{i}.{part}.6.weight"] = (last, 64, 3, 3)
            shapes[f"nls.{i}.{part}.6.bias"] = (last,)
            norm(f"nls.{i}.{part}.1", 64)
            norm(f"nls.{i}.{part}.4", 64)
        norm(f"nls.{i}.n3aggregation.aggregation.nnn.bn", 1)
    return shapes


def test_published_names_shapes_and_sizes():
    shapes = published_shapes()
    assert len(shapes) == 140
    assert sum(int(np.prod(s)) for s in shapes.values()) == 708_843
    own = {
        name: tuple(value.shape)
        for name, value in N3Net().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert own == {name: shape for name, shape in shapes.items() if ".bn1." not in name}
    assert count(N3Net()) == 705_895 - 384
    assert count(N3Net(num_blocks=1)) == 427_348


def test_published_file_loads(tmp_path):
    torch.manual_seed(0)
    net = OrderedDict((name, torch.rand(shape)) for name, shape in published_shapes().items())
    path = tmp_path / "051_ckpt.t7"
    torch.save({"net": net, "epoch": 51}, path, _use_new_zipfile_serialization=False)
    weights, arguments = read_weights(path)
    assert arguments == {}
    model = N3Net()
    dropped = load_pretrained(model, weights)
    assert len(dropped) == 12
    assert all(".bn1." in name for name in dropped)
    state = model.state_dict()
    for name, value in net.items():
        if name not in dropped:
            close(state[name], value, rtol=0, atol=0)
    wrapped = {f"module.{name}": value for name, value in net.items()}
    torch.save(wrapped, path)
    load_pretrained(model, read_weights(path)[0])


def test_differing_names_are_listed(tmp_path):
    weights = N3Net(**TINY).state_dict()
    weights["extra.weight"] = torch.zeros(3)
    del weights["blocks.0.conv1.bias"]
    with pytest.raises(ValueError, match=r"2 names differ") as error:
        load_pretrained(N3Net(**TINY), weights)
    assert "missing: blocks.0.conv1.bias (4,)" in str(error.value)
    assert "unknown: extra.weight (3,)" in str(error.value)
    with pytest.raises(ValueError, match=r"other shape: blocks.1.conv1.weight is \(4, 6, 3, 3\)"):
        load_pretrained(N3Net(**(TINY | {"num_volumes": 3})), N3Net(**TINY).state_dict())
    for name, content in (("a.pt", b"no pickle"), ("b.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 1}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        read_weights(tmp_path / "d.pt")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_build(preset):
    name, options = PRESETS[preset]
    model = {"dncnn": DnCNN, "n3net": N3Net}[name](**options)
    expected = {
        "dncnn17": 556_097,
        "dncnn18": 593_089,
        "n3net_light": 427_348,
        "n3net": 705_511,
        "knn_input": 338_697,
        "knn_dncnn": 338_697,
    }
    assert count(model) == expected.get(preset, count(model))


@pytest.mark.parametrize(
    "options",
    [
        {"nonlocal_block": "none"},
        {"nonlocal_block": "knn"},
        {"nonlocal_block": "knn", "match_on": "input"},
        {"nonlocal_block": "concrete"},
        {"match_on": "input"},
        {"match_on": "dncnn", "temperature": "learned"},
        {"num_blocks": 2, "in_channels": 3, "temperature": "fixed"},
        {"num_blocks": 0},
    ],
)
def test_options_train(options):
    torch.manual_seed(0)
    model = N3Net(**(TINY | options))
    x = torch.rand(2, options.get("in_channels", 1), 40, 35)
    out = model(x)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_options():
    with pytest.raises(ValueError, match="knn cannot match on an embedding"):
        N3Net(nonlocal_block="knn", match_on="embedding")
    with pytest.raises(ValueError, match="nonlocal_block must be"):
        N3Net(nonlocal_block="soft")
    with pytest.raises(ValueError, match="match_on must be"):
        N3Net(match_on="output")


@pytest.mark.parametrize("size", [(151, 130), (90, 203)])
def test_tiles_are_seamless(size):
    torch.manual_seed(0)
    model = N3Net(**TINY).double().eval()
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x)
    close(forward_in_tiles(model, x, 105, 52), whole, rtol=0, atol=1e-2)
    close(forward_in_tiles(model, x, 300, 20), whole, rtol=0, atol=1e-12)
    large = torch.rand(1, 1, 260, 205, dtype=torch.float64)
    with torch.no_grad():
        whole = model(large)
    # A third of the overlap covers the field of view: equal everywhere.
    close(forward_in_tiles(model, large, 200, 99), whole, rtol=0, atol=1e-9)
    plain = DnCNN(depth=3, features=4).eval()
    x = torch.rand(1, 1, 50, 70)
    with torch.no_grad():
        close(forward_in_tiles(plain, x, 24, 12), plain(x), rtol=0, atol=1e-5)


def test_small_tiles_are_refused():
    with pytest.raises(ValueError, match="the smallest that works is 80"):
        forward_in_tiles(N3Net(), torch.rand(1, 1, 90, 90), 79)
    with pytest.raises(ValueError, match="overlap of tiles must lie between 0 and half a tile"):
        forward_in_tiles(N3Net(), torch.rand(1, 1, 90, 90), 80, 41)


def test_quality():
    torch.manual_seed(0)
    clean = torch.rand(3, 2, 40, 31)
    noisy = clean + 0.1 * torch.randn(clean.shape)
    want = 10 * np.log10(1 / ((noisy - clean) ** 2).mean((1, 2, 3)).double().numpy())
    close(psnr(noisy, clean).double().numpy(), want, rtol=1e-5, atol=1e-4)
    assert psnr(clean, clean)[0] == pytest.approx(100)
    flat = torch.zeros(1, 1, 5, 5)
    assert psnr(flat + 0.1, flat).item() == pytest.approx(20, abs=1e-4)
    reference = structural_similarity_index_measure(noisy, clean, data_range=1.0, reduction="none")
    mirrored = (torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect") for x in (noisy, clean))
    close(ssim(*mirrored, border="valid"), reference, rtol=1e-4, atol=1e-5)
    assert ssim(clean, clean)[0] == pytest.approx(1)


def test_loss_optimizer_and_schedule():
    task = DenoisingTask()
    a, b = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    close(task.loss(a, b), 0.25 * 0.5 * (a - b).square().sum((1, 2, 3)).mean())
    close(DenoisingTask(loss_reduction="mean").loss(a, b), (a - b).square().mean())
    model = N3Net(**TINY)
    options = {"lr": 1e-3, "weight_decay": 1e-4, "momentum": 0.9}
    optimizer = build_optimizer(model, "adam", decay_bias=False, **options)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    schedule = build_scheduler(
        optimizer, "exponential", num_epochs=51, lr_step=1, lr_gamma=1, lr_final=1e-3
    )
    factor = schedule.lr_lambdas[0]
    assert factor(0) == 1
    assert factor(50) == pytest.approx(1e-3)
    assert factor(10) == pytest.approx(10 ** (-3 * 10 / 50))


def test_crops_are_of_every_orientation_and_noise_is_fresh():
    torch.manual_seed(0)
    image = torch.arange(12 * 9, dtype=torch.uint8).view(1, 12, 9)
    data = DegradedCrops(
        [image], ["a"], crop=9, degrade=DenoisingTask(sigma=25).degrade, repeat=200
    )
    noisy, clean = data.__getitems__(range(200))
    assert len({tuple(c.flatten().tolist()) for c in clean}) == 4 * 8  # places × orientations
    assert (noisy - clean).std().item() == pytest.approx(25 / 255, rel=0.05)
    assert (data[0][0] - data[0][1] != data[0][0] - data[0][1]).any()
    test = DegradedImages(
        [image, image], ["a", "b"], degrade=DenoisingTask(sigma=25).degrade, seed=3
    )
    close(test[1][0], test[1][0], rtol=0, atol=0)
    assert (test[0][0] != test[1][0]).any()
    assert test[0][0].min() < 0  # not clipped


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
