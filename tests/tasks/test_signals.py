"""Signals: MNIST-1D beside a slow loop, files of the UCR archive, networks of one axis."""

import numpy as np
import pytest
import torch

from dataset import DataError
from layers import LAYERS, SIGNAL_LAYERS
from main import main
from models import MODELS
from ops.shapes import rehearse
from tasks.signals import (
    TEMPLATES,
    MNIST1DOptions,
    build_mnist1d,
    build_ucr,
    draw_mnist1d,
    read_between,
    smoothed,
)

QUIET = {
    "scale_coeff": 0.0,
    "corr_noise_scale": 0.0,
    "iid_noise_scale": 0.0,
    "shear_scale": 0.0,
    "max_translation": 1,
}


def drawn(count=200, seed=0, **changes):
    options = MNIST1DOptions(**changes)
    return draw_mnist1d(count, options, torch.Generator().manual_seed(seed))


def digit_in(label, padding, length=40):
    """A digit without noise, by the steps of the paper."""
    x = np.array(TEMPLATES[label], dtype=float)
    x = (x - x.mean()) / x.std()
    x = np.concatenate([(x - x[0]) / 6, np.zeros(padding)])
    x = np.interp(np.linspace(0, len(x) - 1, 72), np.arange(len(x)), x)
    return np.interp(np.linspace(0, 71, length), np.arange(72), x)


def test_a_quiet_signal_is_its_digit_padded_and_stretched():
    signals, labels = drawn(60, **QUIET)
    for signal, label in zip(signals[:, 0].numpy(), labels.tolist(), strict=True):
        errors = [abs(signal - digit_in(label, padding)).max() for padding in range(36, 61)]
        assert min(errors) < 1e-6


@pytest.mark.parametrize(
    ("name", "value"), [("max_translation", 48), ("scale_coeff", 0.4), ("shear_scale", 0.75)]
)
def test_one_change_at_a_time(name, value):
    options = QUIET | {name: value, "seq_length": 72}
    signals, labels = drawn(50, **options)
    plain, same = drawn(50, **(QUIET | {"seq_length": 72}))
    assert torch.equal(labels, same)
    for moved, still in zip(signals[:, 0], plain[:, 0], strict=True):
        if name == "max_translation":
            assert any(torch.allclose(still.roll(k), moved, atol=1e-6) for k in range(48))
        elif name == "scale_coeff":
            ratio = (moved @ still) / (still @ still)
            assert 0.8 <= ratio <= 1.2
            torch.testing.assert_close(moved, ratio * still, atol=1e-5, rtol=1e-4)
        else:
            slope = (still - moved).diff()
            torch.testing.assert_close(slope, slope.mean().expand(71), atol=1e-5, rtol=0)
            assert abs(slope.mean() * 71) <= 0.375


def test_noise_is_correlated_beside_the_digit_alone():
    noisy, _ = drawn(400, **(QUIET | {"corr_noise_scale": 0.25, "seq_length": 72}))
    plain, _ = drawn(400, **(QUIET | {"seq_length": 72}))
    noise = (noisy - plain)[:, 0]
    assert noise[:, :12].abs().max() < 1e-6  # max_translation 1: the digit stands first
    end = noise[:, 30:]
    near, far = (end[:, :-k] * end[:, k:] for k in (1, 12))
    assert near.mean() / end.square().mean() > 0.9
    assert abs(far.mean() / end.square().mean()) < 0.1


def test_smoothing_is_a_gaussian_of_two_samples():
    spike = torch.zeros(1, 41, dtype=torch.float64)
    spike[0, 20] = 1
    taps = smoothed(spike)[0]
    assert taps.sum() == pytest.approx(1)
    assert taps[12] / taps[14] == pytest.approx(np.exp(0.5))
    assert len(taps) == 25


def test_reading_between_samples_is_linear():
    x = torch.randn(3, 7, dtype=torch.float64)
    places = torch.rand(3, 9, dtype=torch.float64) * 6
    expected = [np.interp(p, np.arange(7), row) for p, row in zip(places, x, strict=True)]
    np.testing.assert_allclose(read_between(x, places), np.stack(expected))


def test_seeds_and_sets_differ_and_repeat():
    def build(seed):
        return build_mnist1d(seed=seed, num_train=50, num_test=50, min_side=1, normalize=True)

    one, again, other = build(3), build(3), build(4)
    assert torch.equal(one.train.features, again.train.features)
    assert not torch.equal(one.train.features, other.train.features)
    assert not torch.equal(one.train.features, one.test.features)
    assert torch.bincount(one.train.labels).tolist() == [5] * 10
    assert one.sample_shape == (1, 40)
    assert one.train.features.mean().abs() < 1e-5
    assert one.train.features.std(correction=0) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("layer", SIGNAL_LAYERS)
@pytest.mark.parametrize(("model", "width"), [("cnn1d", 6), ("resnet1d", 0.05)])
def test_every_layer_learns(run, model, width, layer):
    flags = ("--layer", layer, "--width", width, "--lr", "5e-3", "--limit_train", 200)
    history = run(*flags, "--num_epochs", 3, model=model, dataset="mnist1d")["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize(("one", "two"), [("cnn1d", "convnet"), ("resnet1d", "resnet18")])
def test_a_signal_network_has_the_parts_of_its_twin(one, two):
    """On images of one row, with kernels whose middle row alone is not zero, both agree."""
    if one == "resnet1d":
        options = {"downsample": "none", "width": 0.1}
    else:
        options = {"width": 5, "pool_after": 0}
    signal = MODELS[one](layer=SIGNAL_LAYERS["Conv1d"], in_channels=2, **options).eval()
    image = MODELS[two](layer=LAYERS["Conv2d"], in_channels=2, **options).eval()
    ours, theirs = signal.state_dict(), image.state_dict()
    assert ours.keys() <= theirs.keys()
    if one == "cnn1d":
        with torch.no_grad():
            for name, value in ours.items():
                if value.dim() == 3:
                    theirs[name].zero_()
                    theirs[name][:, :, 1] = value
                else:
                    theirs[name].copy_(value)
        x = torch.randn(2, 2, 9)
        torch.testing.assert_close(signal(x), image(x[:, :, None]))


@pytest.mark.parametrize("layer", SIGNAL_LAYERS)
@pytest.mark.parametrize("model", ["cnn1d", "resnet1d"])
def test_shapes_alone_agree(model, layer):
    options = {"K": 30} if "K" in SIGNAL_LAYERS[layer].Options.names() else {}

    def build():
        from functools import partial

        return MODELS[model](layer=partial(SIGNAL_LAYERS[layer], **options), in_channels=1)

    with torch.device("meta"):
        network = build()
    if not options:
        rehearse(network, (1, 16))
        assert build()(torch.randn(2, 1, 16)).shape == (2, 10)
        return
    with pytest.raises(ValueError, match="K=30 is larger than the number of candidates, 18"):
        rehearse(network, (1, 16))


def test_other_models_take_signals(run):
    assert run(model="knn", dataset="mnist1d")["test"]["top1"] > 0
    assert run(model="dynamic", dataset="mnist1d")["centers"][0] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("vgg11", "mnist1d"), "--model vgg11 takes images, and --dataset mnist1d has signals"),
        (("cnn1d", "digits"), "Datasets for cnn1d: mnist1d, ucr. Models for digits: vgg11"),
        (("cnn1d", "mnist1d", "--layer", "Conv2d"), "which takes Conv1d, Conv1d_New, ConvNN"),
        (("cnn1d", "mnist1d", "--seq_length", "3"), "larger than the number of candidates, 5"),
        (("resnet1d", "mnist1d", "--seq_length", "3"), "signals of 3 samples"),
        (("cnn1d", "mnist1d", "--depth", "2", "--pool_after", "3"), "depth is 2"),
    ],
)
def test_what_does_not_fit_is_refused(refused, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    model, dataset, *more = flags
    argv = ["--model", model, "--dataset", dataset, "--device", "cpu", *more]
    code, text = refused(main, argv)
    assert code == 2
    assert message in text
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Files


def write_ucr(folder, train, test, suffix=".tsv"):
    folder.mkdir(exist_ok=True)
    for part, text in (("TRAIN", train), ("TEST", test)):
        (folder / f"Toy_{part}{suffix}").write_text(text)
    return str(folder / f"Toy_TRAIN{suffix}")


def read(path, **options):
    return build_ucr(data_path=path, seed=0, min_side=1, normalize=False, **options)


TRAIN = "1\t0.5\t1.5\t2.5\n-1\t1\t2\t3\n"
TEST = "-1\t4\t5\t6\n"
TS = "# a comment\n@problemName Toy\n@data\n{}"
ARFF = "@relation toy\n@attribute a numeric\n@attribute b numeric\n@attribute c numeric\n"
ARFF += "@attribute class {{-1,1}}\n@data\n{}"


@pytest.mark.parametrize(
    ("suffix", "train", "test"),
    [
        (".tsv", TRAIN, TEST),
        (".txt", TRAIN.replace("\t", "  "), TEST.replace("\t", "  ")),
        (".csv", TRAIN.replace("\t", ","), TEST.replace("\t", ",")),
        (".ts", TS.format("0.5,1.5,2.5:1\n1,2,3:-1\n"), TS.format("4,5,6:-1\n")),
        (".arff", ARFF.format("0.5,1.5,2.5,1\n1,2,3,-1\n"), ARFF.format("4,5,6,-1\n")),
    ],
)
def test_files_of_the_archive(tmp_path, suffix, train, test):
    if suffix == ".arff":
        pytest.importorskip("scipy")
    data = read(write_ucr(tmp_path, train, test, suffix))
    assert data.train.features.tolist() == [[[0.5, 1.5, 2.5]], [[1, 2, 3]]]
    assert data.train.labels.tolist() == [1, 0]
    assert data.test.features.tolist() == [[[4, 5, 6]]]
    assert data.test.labels.tolist() == [0]
    assert data.class_names == ("-1", "1")
    assert data.sample_shape == (1, 3)


@pytest.mark.parametrize(
    ("unequal", "expected"),
    [("zeros", [1, 3, 0, 0, 0]), ("last", [1, 3, 3, 3, 3]), ("resample", [1, 1.5, 2, 2.5, 3])],
)
def test_shorter_signals(tmp_path, unequal, expected):
    path = write_ucr(tmp_path, "1\t1\t2\t3\t4\t5\n2\t1\t3\tNaN\tNaN\tNaN\n", "1\t1\t2\t3\t4\t5\n")
    data = read(path, unequal=unequal)
    assert data.train.features[1, 0].tolist() == expected
    assert "2 to 5 samples" in data.notes[0]
    with pytest.raises(DataError, match="signal 2 has 2 samples, and the longest has 5"):
        read(path)


def test_gaps_are_refused_or_bridged(tmp_path):
    path = write_ucr(tmp_path, "1\t1\t?\tNaN\t4\n2\t1\t2\t3\t4\n", "1\t1\t2\t3\t4\n")
    with pytest.raises(DataError, match="signal 1 lacks the value of sample 2"):
        read(path)
    assert read(path, missing="interpolate").train.features[0, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("1\t1\t2\n", TEST, "has one class alone, 1"),
        (TRAIN, "7\t1\t2\t3\n", "has the class 7, which"),
        ("1\t1\tx\n", TEST, "line 1, holds a word that is no number"),
        ("", TEST, "holds no signals"),
        ("1\tNaN\tNaN\n-1\t1\t2\n", TEST, "signal 1 has no values"),
        ("1\tinf\t2\n2\t1\t2\n", TEST, "row 1 is infinite"),
    ],
)
def test_broken_files_are_refused(tmp_path, train, test, message):
    path = write_ucr(tmp_path, train, test)
    with pytest.raises(DataError, match=message):
        read(path, unequal="zeros")


def test_files_of_other_names_are_refused(tmp_path):
    (tmp_path / "x.tsv").write_text(TRAIN)
    with pytest.raises(DataError, match="name ends in _TRAIN"):
        read(str(tmp_path / "x.tsv"))
    path = write_ucr(tmp_path, TRAIN, TEST)
    (tmp_path / "Toy_TEST.tsv").unlink()
    with pytest.raises(DataError, match="there is no file"):
        read(path)
    path = write_ucr(tmp_path, TRAIN, TEST, ".mat")
    with pytest.raises(DataError, match=r"reads \.tsv"):
        read(path)


def test_a_run_on_files_and_its_repetition(run, tmp_path):
    rows = torch.randn(40, 12).cumsum(1)
    lines = [f"{i % 2 + 1}\t" + "\t".join(map(str, row)) for i, row in enumerate(rows.tolist())]
    path = write_ucr(tmp_path / "toy", "\n".join(lines), "\n".join(lines[:10]))
    flags = ("--data_path", path, "--layer", "Branching", "--width", 4, "--pool_after", 0)
    result = run(*flags, "--output_dir", "files", model="cnn1d", dataset="ucr")
    tested = main(["--test_only", "--output_dir", "files", "--device", "cpu"])
    assert tested["test"]["top1"] == pytest.approx(result["best"])
