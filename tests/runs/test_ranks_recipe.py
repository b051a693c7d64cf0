"""Several processes: mixed samples, averaged weights and warm-up are those of one process."""

from pathlib import Path

import pytest
import torch
from runs.test_ranks import FLAGS, PlainNet, rows, start

import models
from checkpoints import load_checkpoint
from main import main

RECIPE = ["--mixup", "0.4", "--cutmix", "1", "--label_smoothing", "0.1", "--ema", "0.9"]
RECIPE += ["--warmup_epochs", "1.5", "--auto_augment", "trivial", "--random_erasing", "0.5"]


def test_the_recipe_of_one_process(monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)
    monkeypatch.chdir(tmp_path)
    one = main([*FLAGS, *RECIPE, "--num_epochs", "2", "--output_dir", "one"])
    commands = [
        [*FLAGS, *RECIPE, "--num_epochs", 1, "--output_dir", "several"],
        ["--resume", "--output_dir", "several", "--num_epochs", 2, "--device", "cpu"],
    ]
    codes, said = start(2, tmp_path, *commands)
    assert codes == [0, 0], said[-3000:]
    for mine, theirs in zip(one["history"], rows("several"), strict=True):
        for name in ("train_loss", "test_loss", "lr"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5)
    ours, others = (load_checkpoint(Path(name, "last.pt")) for name in ("several", "one"))
    for part in (ours["model"], ours["trainer"]["weights"]):
        theirs = others["model"] if part is ours["model"] else others["trainer"]["weights"]
        for name, value in part.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
