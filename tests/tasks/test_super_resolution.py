import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from main import main
from models import DnCNN
from options import OptionError
from tasks.super_resolution import (
    ReducedImages,
    SuperResolutionOptions,
    SuperResolutionTask,
    enlarge,
    reduce,
    to_rgb,
    to_ycbcr,
)

close = torch.testing.assert_close


def cubic(x):
    """The kernel of Keys with a = -0.5."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x < 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


def slow_resize(row, factor):
    """MATLAB's imresize of a row: kernel stretched where it reduces, edge pixels mirrored."""
    n, stretch = len(row), min(1.0, factor)
    out = []
    for i in range(math.ceil(n * factor)):
        center = (i + 0.5) / factor - 0.5
        reach = 2 / stretch
        taps = range(math.floor(center - reach) - 1, math.ceil(center + reach) + 2)
        weights = [cubic((t - center) * stretch) for t in taps]
        total = sum(weights)
        value = 0.0
        for t, w in zip(taps, weights, strict=True):
            t %= 2 * n
            value += w / total * row[t if t < n else 2 * n - 1 - t]
        out.append(value)
    return out


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("sides", [(24, 36), (12, 12)])
def test_the_filter_is_matlabs(scale, sides):
    x = torch.rand(2, *sides, dtype=torch.float64)

    def slow(images, factor):
        rows = [[slow_resize(r, factor) for r in image] for image in images.tolist()]
        columns = torch.tensor(rows, dtype=torch.float64).transpose(-1, -2)
        done = [[slow_resize(r, factor) for r in image] for image in columns.tolist()]
        return torch.tensor(done, dtype=torch.float64).transpose(-1, -2)

    small = reduce(x, scale)
    close(small, slow(x, 1 / scale), rtol=1e-7, atol=1e-7)
    close(enlarge(small, scale), slow(small, scale), rtol=1e-7, atol=1e-7)


def test_colors_there_and_back():
    rgb = torch.rand(3, 5, 7)
    ycbcr = to_ycbcr(rgb)
    close(to_rgb(ycbcr).float(), rgb)
    white = to_ycbcr(torch.ones(3, 1, 1)).flatten() * 255
    close(white, torch.tensor([235.0, 128.0, 128.0], dtype=torch.float64), atol=1e-3, rtol=0)


def test_images_at_every_scale():
    task = SuperResolutionTask(scale=[2, 3])
    images = [torch.randint(256, (1, 31, 44), dtype=torch.uint8)] * 2
    data = ReducedImages(images, ["set/a.png", "set/b.png"], task.degrade, 0)
    assert len(data) == 4
    assert data.names == ["set x2/a.png", "set x2/b.png", "set x3/a.png", "set x3/b.png"]
    degraded, (clean, scale) = data.__getitems__([3])
    assert degraded.shape == clean.shape == (1, 1, 30, 42)
    assert scale.tolist() == [3]
    close(degraded[0], enlarge(reduce(clean[0], 3), 3))


def test_metrics_crop_the_border_and_round():
    task = SuperResolutionTask(scale=[2, 3])
    clean = torch.randint(256, (2, 1, 30, 30)) / 255
    worse = clean + 0.4 / 255  # rounds away
    worse[0, :, :2] += 0.5  # within the border of scale 2
    worse[1, :, :2] += 0.5
    worse[1, :, 15, 15] = clean[1, :, 15, 15] + 10 / 255
    found = task.metrics(worse.clamp(0, 1), (clean, torch.tensor([2, 3])))
    assert found["psnr"][0] == pytest.approx(100, abs=1)
    assert found["psnr"][1] < 70
    assert found["ssim"].shape == (2,)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("train", "test"):
        Path(folder).mkdir()
        for i in range(2):
            row = np.linspace(0, 200, 50)[:, None] + rng.uniform(0, 50, (41, 1, 3))
            Image.fromarray(row.astype(np.uint8)).save(f"{folder}/{i}.png")
    return tmp_path


def run(*flags):
    argv = ["--preset", "vdsr", "--depth", "3", "--features", "4", "--dataset", "denoise"]
    argv += ["--train_dir", "train", "--test_dir", "test", "--device", "cpu", "--crop_size", "24"]
    argv += ["--crops_per_image", "2", "--batch_size", "2", "--num_epochs", "1"]
    return main([*argv, "--num_workers", "0", *map(str, flags)])


def test_train_test_and_enlarge(folders, capsys):
    run("--output_dir", "run", "--save_images")
    rows = list(csv.DictReader(Path("run/per_image.csv").read_text().splitlines()))
    assert [r["image"] for r in rows[::2]] == ["test x2/0.png", "test x3/0.png", "test x4/0.png"]
    assert float(rows[0]["bicubic_psnr"]) > float(rows[0]["psnr"])
    assert "Average of test x4 (2 images): PSNR" in Path("run/train_eval_results.txt").read_text()
    assert Image.open("run/images/001_0.png").size == (4 * 50 + 12, 40 + 20)
    again = ["--test_only", "--output_dir", "run", "--device", "cpu"]
    assert main([*again, "--save_images"])["test"]["psnr"] > 0
    array = np.asarray(Image.open("test/0.png").convert("RGBA")).copy()
    array[:20, :, 3] = 0
    Image.fromarray(array).save("alpha.png")
    main([*again, "--scale", "3", "--input", "alpha.png", "--output", "large.png"])
    large = np.asarray(Image.open("large.png"))
    assert large.shape == (123, 150, 4)
    assert large[:50, :, 3].max() == 0
    assert large[70:, :, 3].min() == 255
    assert "colors by the bicubic filter" in capsys.readouterr().out


def test_part_of_the_test_images_one_by_one(folders):
    assert run("--limit_test", 4, "--dry_run")["test"]["psnr"] > 0


def test_held_out_images_and_another_network(folders):
    result = run("--val_split", 0.5, "--dry_run", "--preset", "vdsr", "--scale", 2)
    assert result["test"]["psnr"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale", "5"], "--scale: must"),
        (["--scale", "2", "3", "--crop_size", "50"], "--crop_size 50 is not divided by scale 3"),
        (["--scale", "2", "2"], "names a scale twice"),
        (["--color"], "--color has no place in super-resolution"),
        (
            ["--input", "test/0.png", "--output", "x.png", "--test_only", "--pretrained", "x.pt"],
            "is enlarged by one of them",
        ),
    ],
)
def test_bad_input(folders, refused, flags, message):
    torch.save(DnCNN(depth=3, features=4, batch_norm=False).state_dict(), "x.pt")
    code, said = refused(run, *flags)
    assert code == 2
    assert message in said, said


def test_options():
    with pytest.raises(OptionError, match="Try --crop_size 84"):
        SuperResolutionOptions(crop_size=85, scale=[2])
