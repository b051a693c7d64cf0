"""Generated images: the labels read back from the pixels, and that the seed decides."""

import colorsys

import pytest
import torch

from main import main
from tasks.generated import (
    CopyOptions,
    MatchOptions,
    RecallOptions,
    bar_stamps,
    build_recall,
    draw_copy,
    draw_match,
    draw_recall,
    hue_colors,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cells_of(image, options):
    """Every cell of an image as (3, size, size), the gap left out."""
    size = options.cell - 1
    for row in range(options.grid):
        for column in range(options.grid):
            y, x = row * options.cell, column * options.cell
            yield image[:, y : y + size, x : x + size]


def figures_of(image, options):
    """(mask, color) of every cell that is not empty; the background is dim."""
    for cell in cells_of(image, options):
        mask = cell.amax(0) > 60
        if mask.any():
            yield mask, cell[:, mask].float().mean(1)


def test_hues_are_those_of_the_standard_library():
    hues = torch.linspace(-1, 2, 31)
    expected = torch.tensor([colorsys.hsv_to_rgb(h % 1, 1, 1) for h in hues.tolist()])
    torch.testing.assert_close(hue_colors(hues), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"repeat": True}, {"distractors": 1, "grid": 2}, {"cell": 9, "jitter": 0.0}]
)
def test_recall_asks_for_the_bar_in_the_color_of_the_plus(changes):
    options = RecallOptions(**changes)
    images, labels = draw_recall(40, options, generator())
    side = options.grid * options.cell - 1
    assert images.shape == (40, 3, side, side)
    assert images.dtype == torch.uint8
    stamps = bar_stamps(options.cell - 1)
    repeated = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        found = list(figures_of(image, options))
        assert len(found) == options.distractors + 2
        kinds = [next(i for i, s in enumerate(stamps) if s.equal(mask)) for mask, _ in found]
        plus = found[kinds.index(4)][1]
        same = [k for k, (_, c) in zip(kinds, found, strict=True) if k != 4 and c.equal(plus)]
        assert same == [label]
        bars = [k for k in kinds if k != 4]
        repeated += len(set(bars)) < len(bars)
    assert (repeated > 0) == options.repeat
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_match_labels_two_framed_patches():
    options = MatchOptions(distractors=2)
    images, labels = draw_match(60, options, generator())
    for image, label in zip(images, labels.tolist(), strict=True):
        framed = []
        for cell in cells_of(image, options):
            if cell[:, 0].min() == 255:
                assert cell[:, :, 0].min() == 255
                framed.append(colorsys.rgb_to_hsv(*(cell[:, 2, 2] / 255).tolist())[0])
        first, second = framed
        apart = abs((first - second + 0.5) % 1 - 0.5)
        assert apart < 0.06 if label else apart > 0.24
    assert 0.3 < labels.float().mean() < 0.7


def test_copy_labels_repeated_blocks():
    options = CopyOptions(side=10, block=3)
    images, labels = draw_copy(30, options, generator())
    for image, label in zip(images, labels.tolist(), strict=True):
        blocks = image.unfold(1, 3, 1).unfold(2, 3, 1).permute(1, 2, 0, 3, 4).reshape(64, -1)
        assert len(blocks) - len(blocks.unique(dim=0)) == label
    assert set(labels.tolist()) == {0, 1}


def test_the_seed_decides():
    build = {"num_train": 5, "num_test": 5, "min_side": 1, "normalize": True}
    build |= {"resize": None, "noise": 0.0, "grid": 3, "cell": 7, "jitter": 0.05}
    build |= {"distractors": 3, "repeat": False}
    first, again, other = (build_recall(seed=seed, **build) for seed in (0, 0, 1))
    assert first.train.images.equal(again.train.images)
    assert not first.train.images.equal(other.train.images)
    assert not first.train.images.equal(first.test.images)
    assert not other.train.images.equal(first.test.images)
    assert first.sample_shape == (3, 20, 20)
    assert first.num_outputs == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--grid", "2", "--distractors", "3"), "5 figures do not fit on a grid of 2 x 2"),
        (("--dataset", "copy", "--block", "11"), "block 11 is too large for side 20"),
        (("--pool_after", "5"), "--pool_after 5"),
    ],
)
def test_what_does_not_fit_is_refused(refused, flags, message):
    argv = ["--model", "convnet", "--dataset", "recall", "--device", "cpu", *flags]
    code, text = refused(main, argv)
    assert code == 2
    assert message in text


@pytest.mark.parametrize("dataset", ["recall", "match", "copy"])
def test_runs_from_the_command_line(dataset, tmp_path):
    argv = ["--model", "convnet", "--layer", "Branching", "--depth", "2", "--width", "4"]
    argv += ["--dataset", dataset, "--num_train", "30", "--num_test", "10", "--K", "3"]
    argv += ["--device", "cpu", "--batch_size", "10", "--num_epochs", "1", "--noise", "0.1"]
    result = main([*argv, "--output_dir", str(tmp_path / "run")])
    assert result["best_epoch"] == 1
