"""Shared fixtures: a network small enough to train in a test, and a way to run the program."""

import pytest
import torch
from torch import nn

import models
from main import main
from options import Options


class TinyNet(nn.Module):
    """Two layers of the chosen kind and a linear classifier."""

    Options = Options
    family, tasks, training = "Tiny", ("classification",), "gradient"
    uses_layer, min_input_size = True, 1

    def __init__(self, *, layer, in_channels, num_classes, dropout=0.2):
        super().__init__()
        self.features = nn.Sequential(
            layer(in_channels=in_channels, out_channels=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            layer(in_channels=8, out_channels=8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.classifier(self.dropout(self.features(x)))


@pytest.fixture
def tiny_model(monkeypatch):
    """Register TinyNet as ``--model tiny``."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    return "tiny"


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    """Run main() in an empty folder with a tiny network on a few digits; flags are added to it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def call(*flags, model=tiny_model, dataset="digits"):
        argv = ["--model", model, "--dataset", dataset, "--device", "cpu", "--batch_size", "20"]
        small = ["--limit_train", "50", "--limit_test", "30", "--num_epochs", "2"]
        return main([*argv, *small, *map(str, flags)])

    return call


@pytest.fixture
def refused(capsys):
    """Call something that must exit with an error; return the exit code and what it said."""

    def call(function, *args, **kwargs):
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        return stop.value.code, " ".join(capsys.readouterr().err.split())

    return call
