"""Runs of the denoising task: ranges, kinds of noise, pairs, maps, real pictures."""

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import load_checkpoint
from dataset import DataError, build_loader
from evaluation import Evaluation
from main import main
from models import DnCNN
from run_folder import RunFolder
from tasks.denoising import DenoisingTask
from tasks.pictures import Picture, read_picture, write_picture
from tasks.restoration import build_denoise, build_pairs, build_photos
from tasks.task import Needs


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Clean and noisy pictures to train and test on."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("clean", "noisy", "test_clean", "test_noisy"):
        Path(folder).mkdir()
    for part in ("", "test_"):
        for i in range(2):
            clean = np.linspace(20, 200, 40)[:, None] + rng.uniform(0, 30, (36, 1, 1))
            clean = np.broadcast_to(clean.transpose(1, 0, 2), (40, 36, 1)).repeat(3, 2)
            noisy = (clean + rng.normal(0, 10, clean.shape)).clip(0, 255)
            Image.fromarray(clean.astype(np.uint8)).save(f"{part}clean/{i}.png")
            Image.fromarray(noisy.astype(np.uint8)).save(f"{part}noisy/{i}.png")
    return tmp_path


def denoise(*flags, dataset="denoise"):
    argv = ["--model", "dncnn", "--depth", "3", "--features", "4", "--dataset", dataset]
    if dataset == "denoise":
        argv += ["--train_dir", "clean", "--test_dir", "test_clean"]
    argv += ["--crops_per_image", "1", "--num_epochs", "1", "--crop_size", "24", "--device", "cpu"]
    return main([*argv, "--num_workers", "0", *map(str, flags)])


def test_a_run_with_held_out_images_ends_with_a_table_of_the_test_images(folders):
    Path("other").mkdir()
    Image.open("test_clean/0.png").rotate(90).save("other/7.png")
    flags = ["--test_dir", "test_clean", "other", "--val_split", 0.5, "--sigma", 25]
    result = denoise(*flags, "--output_dir", "a")
    rows = list(csv.DictReader(Path("a/per_image.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == ["test_clean/0.png", "test_clean/1.png", "other/7.png"]
    mean = sum(float(row["psnr"]) for row in rows) / 3
    assert result["test"]["psnr"] == pytest.approx(mean, abs=1e-4)
    text = Path("a/train_eval_results.txt").read_text()
    folders = re.findall(r"Average of (\w+) \((\d images?)\)", text)
    assert folders == [("test_clean", "2 images"), ("other", "1 image")]
    again = main(["--test_only", "--output_dir", "a", "--device", "cpu"])["test"]
    assert again == result["test"]
    assert not Path("a/per_image.1.csv").exists(), "the same table is there once"
    first = Path("a/per_image.csv").read_text()
    for sigma in ("15", "50"):
        main(["--test_only", "--output_dir", "a", "--device", "cpu", "--sigma", sigma])
    assert Path("a/per_image.1.csv").read_text() == first
    assert len({Path(f"a/per_image{n}.csv").read_text() for n in ("", ".1", ".2")}) == 3


PAIRS = ["--noisy_dir", "noisy", "--clean_dir", "clean"]
TEST_PAIRS = ["--test_noisy_dir", "test_noisy", "--test_clean_dir", "test_clean"]


def test_a_range_is_kept_and_drawn_from(folders):
    result = denoise("--sigma", 5, 55, "--output_dir", "a")
    assert load_checkpoint("a/best.pt")["args"]["sigma"] == [5.0, 55.0]
    assert "sigma: [5.0, 55.0]\n" in Path("a/args.txt").read_text()
    again = denoise("--config", "a/args.txt", "--output_dir", "b")
    assert again["history"] == result["history"]
    at = {
        s: main(["--test_only", "--output_dir", "a", "--device", "cpu", "--sigma", s])["test"]
        for s in ("15", "50")
    }
    assert at["15"]["psnr"] > at["50"]["psnr"]
    assert "noise of sigma 50 on the 0-255 scale" in Path("a/test_results.txt").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        ["--noise_type", "poisson_gaussian", "--peak", 30],
        ["--noise_type", "uniform", "--sigma", 5, 20],
        ["--noise_type", "salt_pepper", "--noise_amount", 0.1, 0.3],
        ["--noise_type", "jpeg", "--jpeg_quality", 10, 40, "--color"],
        ["--sigma_map", "--sigma", 5, 55, "--color"],
        ["--sigma", 5, 55, "--loss", "psnr"],
        ["--loss", "l1"],
        ["--sigma_map", "--model", "n3net", "--num_blocks", 0],
    ],
)
def test_kinds_of_noise(folders, flags):
    assert denoise(*flags, "--output_dir", "a", "--save_images")["history"][0]["test_psnr"] > 0
    assert len(list(Path("a/images").iterdir())) == 2


def test_a_network_that_is_told_the_level(folders, capsys, refused):
    denoise("--sigma_map", "--sigma", 5, 55, "--output_dir", "a")
    use = ["--test_only", "--output_dir", "a", "--device", "cpu", "--input", "noisy/0.png"]
    main([*use, "--output", "x.png", "--estimate_sigma"])
    assert "Noise: sigma" in capsys.readouterr().out
    main([*use, "--output", "y.png", "--sigma", "50"])
    assert Path("x.png").read_bytes() != Path("y.png").read_bytes()
    code, said = refused(main, [*use, "--output", "z.png"])
    assert code == 2
    assert "--sigma_map: the network wants to be told the level" in said


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_any_network_treats_any_picture(folders, color, bits):
    denoise("--output_dir", "a", *(["--color"] if color else []))
    use = ["--test_only", "--output_dir", "a", "--device", "cpu", "--input"]
    for channels in (1, 3):
        picture = Picture(torch.rand(channels, 30, 34), torch.rand(1, 30, 34), bits)
        write_picture("x.png", picture)
        main([*use, "x.png", "--output", "y.png"])
        after = read_picture("y.png")
        assert (after.bits, tuple(after.pixels.shape)) == (bits, (channels, 30, 34))
        torch.testing.assert_close(after.alpha, read_picture("x.png").alpha)


def test_real_noise(folders):
    result = denoise(*PAIRS, *TEST_PAIRS, "--color", "--output_dir", "a", dataset="pairs")
    text = Path("a/train_eval_results.txt").read_text()
    assert result["history"][0]["test_psnr"] > 0
    use = ["--test_only", "--output_dir", "a", "--device", "cpu"]
    main(use)
    assert "Protocol: pictures as they were taken; color" in Path("a/test_results.txt").read_text()
    rows = Path("a/per_image.csv").read_text().splitlines()
    assert float(rows[1].split(",")[1]) == pytest.approx(28.1, abs=0.6)  # sigma 10
    assert "nan" not in text
    held = denoise(*PAIRS, *TEST_PAIRS, "--val_split", 0.5, "--dry_run", dataset="pairs")
    assert held["test"]["psnr"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sigma", "55", "5"], "--sigma 55 5 is the wrong way round"),
        (["--sigma", "5", "10", "20"], "--sigma takes one value or the two ends of a range"),
        (["--sigma", "5", "-1"], "must be above 0 (got -1)"),
        (["--noise_type", "snow"], "invalid choice: 'snow'"),
        (["--noise_type", "jpeg", "--jpeg_quality", "101"], "must be at most 100 (got 101)"),
        (["--noise_type", "jpeg", "--sigma_map"], "sigma_map shows the network a standard"),
        (["--estimate_sigma"], "--estimate_sigma is for --input"),
        (["--tile", "big"], "--tile: invalid"),
        (["--fold", "0"], "--fold: must be at least 1"),
        (["--loss", "l1", "--loss_reduction", "mean"], "--loss_reduction mean is of --loss mse"),
    ],
)
def test_bad_input(folders, refused, flags, message):
    code, said = refused(denoise, *flags)
    assert code == 2
    assert message in said, said
    assert not Path("Output").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (PAIRS, "--dataset pairs needs --test_noisy_dir and --test_clean_dir"),
        (TEST_PAIRS, "--dataset pairs needs --noisy_dir and --clean_dir"),
        ([*TEST_PAIRS, "--noisy_dir", "noisy"], "--noisy_dir and --clean_dir go together"),
        ([*PAIRS, *TEST_PAIRS, "--sigma_map"], "that of --dataset pairs is not known"),
        (
            [*PAIRS, "--test_noisy_dir", "test_noisy", "--test_clean_dir", "lonely"],
            "--test_noisy_dir holds test_noisy/1.png, and --test_clean_dir no picture of that",
        ),
        (
            [*PAIRS, "--test_noisy_dir", "test_noisy", "--test_clean_dir", "wide"],
            "test_noisy/0.png is 40x36 and its clean twin wide/0.png is 30x30",
        ),
        (
            [*TEST_PAIRS, "--noisy_dir", "noisy", "test_noisy", "--clean_dir", "clean"],
            "--noisy_dir holds two pictures of the name 0",
        ),
    ],
)
def test_bad_pairs(folders, refused, flags, message):
    for folder, count, side in (("lonely", 1, 36), ("wide", 2, 30)):
        Path(folder).mkdir()
        for i in range(count):
            Image.new("L", (side, side)).save(f"{folder}/{i}.png")
    code, said = refused(denoise, *flags, dataset="pairs")
    assert code == 2
    assert message in said, said


def test_folding_is_the_network_on_blocks():
    torch.manual_seed(0)
    net = DnCNN(2, 1, depth=3, features=4, fold=2).eval()
    inner = DnCNN(8, 4, depth=3, features=4, residual=False).eval()
    inner.load_state_dict(net.state_dict())
    x = torch.rand(1, 2, 7, 9)
    wide = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    blocks = torch.nn.functional.pixel_unshuffle(wide, 2)
    want = torch.nn.functional.pixel_shuffle(inner(blocks), 2)[..., :7, :9] + x[:, :1]
    torch.testing.assert_close(net(x), want)


def test_a_run_with_held_out_images_is_tested(folders):
    denoise("--val_split", 0.5, "--output_dir", "a")
    assert main(["--test_only", "--output_dir", "a", "--device", "cpu"])["test"]["psnr"] > 0


@pytest.mark.parametrize(("kept", "share"), [(1.0, "0 %"), (0.9, "10 %"), (0.5, None)])
def test_a_network_that_returns_its_input_is_told_of(kept, share):
    class Remover(torch.nn.Module):
        def forward(self, x):
            return clean + kept * (x - clean)

    data = build_photos(**DenoisingTask(sigma=30.0).data_options(Needs()), seed=0)
    clean = data.test.images[0][None, :, :48, :48].float() / 255
    data.test.images[0] = data.test.images[0][:, :48, :48]
    task, run = DenoisingTask(sigma=30.0), RunFolder("nowhere", writes=False)
    evaluation = Evaluation(
        Remover(), task, torch.device("cpu"), partial(build_loader, batch_size=1)
    )
    _, found = task.examine(evaluation.model, data, run, evaluation)
    notes = [line for line in found.lines if line.startswith("note: the network all but returns")]
    assert len(notes) == (share is not None)
    assert all(f"what it changes is {share} of the damage" in line for line in notes)


DEEP = {"task": "denoising", "degrade": lambda clean, generator: clean, "crop_size": 8}
DEEP |= {"crops_per_image": 1, "seed": 0, "evaluation_only": False}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("color", [False, True])
def test_folders_of_sixteen_bits_are_read_at_full_depth(tmp_path, suffix, channels, color):
    if suffix == ".tif" and channels == 3:
        pytest.importorskip("tifffile")
    # Levels between two neighbors of 8 bits: rounded to those, nothing of it is left.
    ramp = (30000 + torch.arange(64).view(1, 8, 8)) * torch.ones(channels, 1, 1)
    write_picture(tmp_path / f"a{suffix}", Picture(ramp / 65535, None, 16))
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(tmp_path / "b.png")  # mixed with 8 bits
    data = build_denoise(train_dir=[str(tmp_path)], test_dir=[str(tmp_path)], color=color, **DEEP)
    # The weights of the luma add up to 0.9999; a level is 1.5e-5.
    expected = ramp[:1] / 65535 * (0.9999 if channels == 3 and not color else 1)
    expected = expected.expand(3 if color else 1, -1, -1)
    order = sorted(data.test.names).index(f"{tmp_path.name}/a{suffix}")
    _, clean = data.test[order]
    close = partial(torch.testing.assert_close, rtol=0, atol=1.1e-5)
    close(clean, expected)
    noisy, crops = data.train.__getitems__([0, 1])
    assert crops.dtype == noisy.dtype == torch.float32
    close(crops[0].flatten(1).sort().values, expected.flatten(1))
    close(crops[1], torch.full_like(crops[1], 100 / 255))


def test_a_pair_of_two_depths_is_on_one_scale(tmp_path):
    for folder, bits in (("noisy", 8), ("clean", 16)):
        (tmp_path / folder).mkdir()
        pixels = torch.arange(64.0).view(1, 8, 8) / 255
        write_picture(tmp_path / folder / "a.png", Picture(pixels, None, bits))
    where = [str(tmp_path / "noisy")], [str(tmp_path / "clean")]
    data = build_pairs(
        noisy_dir=where[0],
        clean_dir=where[1],
        test_noisy_dir=where[0],
        test_clean_dir=where[1],
        color=False,
        **DEEP,
    )
    for part in (data.train, data.test):
        noisy, clean = part[0]
        torch.testing.assert_close(noisy, clean)
        assert noisy.max() == 63 / 255


def test_values_whose_white_is_unknown_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="where white lies among them is not known"):
        build_denoise(train_dir=None, test_dir=[str(tmp_path)], color=False, **DEEP)
