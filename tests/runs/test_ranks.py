"""Several processes: the numbers of one, moving checkpoints, errors that end all."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import commandline
import main as program
import models
from main import main
from options import Options
from ranks import Shares, SyncedBatchNorm, synchronise_norms
from trainers import GradientTrainer

ROOT = Path(program.__file__).parent
SCRIPT = """
import json, os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/runs"]
from test_ranks import PlainNet, die_at
import models
models.MODELS["plain"] = PlainNet
from main import main
import torch.distributed as dist
dist.init_process_group("gloo")
for words in json.loads(sys.argv[1]):
    if words[0] == "--die":
        die_at(int(words[1]))
        words = words[2:]
    main(words)
dist.barrier()
dist.destroy_process_group()
from ranks import leave_together
leave_together()
"""
FLAGS = ["--model", "plain", "--layer", "Conv2d", "--dataset", "digits", "--device", "cpu"]
# 21 steps, the last one of a single sample; 7 batches of the test set, the last one shorter.
FLAGS += ["--batch_size", "10", "--limit_train", "201", "--limit_test", "63", "--augment"]
# Plain descent: Adam would blow up the rounding of gradients that are zero (biases before norms).
FLAGS += ["--optimizer", "sgd", "--lr", "0.05", "--sync_bn"]


class PlainNet(nn.Module):
    """Batch norm, a parameter that nothing uses, and nothing random."""

    Options = Options
    family, tasks, training = "Plain", ("classification",), "gradient"
    uses_layer, min_input_size = True, 1

    def __init__(self, *, layer, in_channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            layer(in_channels=in_channels, out_channels=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(32, num_classes)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.classifier(self.features(x))


def die_at(number):
    """Kill the second process at a training step."""
    original, count = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == number and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    GradientTrainer.step = step


def torchrun(processes, folder, *commands):
    script = folder / "start.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(20000 + (os.getpid() * 7 + processes) % 20000), str(script)]
    command += [json.dumps([[str(word) for word in words] for words in commands])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def rows(folder):
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def plain(monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shares_cover_every_batch(monkeypatch):
    for world in (1, 2, 3, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        shares = Shares(23, 7, whole=True)
        for index, size in enumerate((7, 7, 7, 2)):
            seen = []
            for number in range(world):
                monkeypatch.setenv("RANK", str(number))
                begin, end, count = shares.share(index)
                assert count == size
                seen += range(begin, end)
            assert seen == list(range(size))


def test_synced_norm_alone_is_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    other = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    other.load_state_dict(model.state_dict())
    assert synchronise_norms(other) == 1
    assert isinstance(other[1], SyncedBatchNorm)
    assert list(other.state_dict()) == list(model.state_dict())
    x = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(other(x), model(x))


def test_parts_of_a_batch_add_up():
    from tasks.classification import ClassificationTask

    def learn(parts):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        trainer = GradientTrainer(
            *(model, ClassificationTask()),
            device=torch.device("cpu"),
            num_epochs=1,
            accum_steps=parts,
        )
        found = trainer.step((torch.randn(7, 4), torch.randint(3, (7,))))
        return model.weight.detach(), found

    whole, parts = learn(1), learn(3)
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1]["loss"], whole[1]["loss"])
    assert parts[1]["top1"].tolist() == whole[1]["top1"].tolist()


@pytest.mark.parametrize("processes", [2, 3])
def test_the_numbers_of_one_process(plain, processes):
    one = main([*FLAGS, "--num_epochs", "2", "--output_dir", "one"])
    commands = [
        [*FLAGS, "--num_epochs", 1, "--output_dir", "several"],
        ["--resume", "--output_dir", "several", "--num_epochs", 2, "--device", "cpu"],
        ["--test_only", "--checkpoint", "one/last.pt", "--output_dir", "t", "--device", "cpu"],
    ]
    done = torchrun(processes, plain, *commands)
    assert done.returncode == 0, done.stderr[-3000:]
    several = rows("several")
    assert len(several) == 2  # one writer
    for mine, theirs in zip(one["history"], several, strict=True):
        for name in ("train_loss", "test_loss"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5)
        assert theirs["train_top1"] == mine["train_top1"]
    # The same weights give the same numbers to the last digit.
    line = f"Loss: {one['history'][-1]['test_loss']:.8f} Accuracy: Top1: "
    assert line in Path("t/test_results.txt").read_text()
    resumed = main(["--resume", "--output_dir", "several", "--num_epochs", "3", "--device", "cpu"])
    longer = main(["--resume", "--output_dir", "one", "--num_epochs", "3", "--device", "cpu"])
    assert resumed["best"] == pytest.approx(longer["best"], abs=4)


def test_an_error_ends_all_with_one_message(plain):
    done = torchrun(2, plain, [*FLAGS, "--lr", "1e39", "--batch_size", 201, "--output_dir", "run"])
    assert done.returncode != 0
    assert done.stderr.count("the weights are ruined") == 1
    done = torchrun(2, plain, [*FLAGS, "--val_split", "0.001", "--output_dir", "no"])
    assert done.stderr.count("validation samples of 201") == 1
    assert not Path("no").exists()


def test_a_killed_process_ends_the_others_and_the_folder_resumes(plain):
    whole = main([*FLAGS, "--num_epochs", "2", "--output_dir", "one"])
    start = time.monotonic()
    words = [*FLAGS, "--num_epochs", 2, "--output_dir", "run", "--save_every", 5]
    done = torchrun(2, plain, ["--die", 30, *words])
    assert done.returncode != 0
    assert time.monotonic() - start < 120
    assert "cannot go on without the others" in done.stderr or "Interrupted" in done.stderr
    resumed = main(["--resume", "--output_dir", "run", "--device", "cpu"])
    expected = whole["history"][-1]["train_loss"]
    assert resumed["history"][-1]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_growth_is_refused_under_torchrun(plain, monkeypatch, refused):
    monkeypatch.setattr(commandline, "world_size", lambda: 2)
    code, text = refused(main, ["--model", "dynamic", "--dataset", "digits", "--device", "cpu"])
    assert code == 2
    assert "learns in one" in text
