"""What adding costs: a toy task, layer, model and data set, each one file and one row.

The files are written into a temporary folder, the rows set in the tables; nothing else is touched.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from layers import LAYERS
from main import build_parser, main
from models import MODELS
from tasks import DATASETS, TASKS, DatasetEntry

LAYER = '''
from dataclasses import dataclass

from torch import nn

from options import Options, option


@dataclass(frozen=True)
class ScaledOptions(Options):
    """A convolution times a number."""

    title = "Scaled convolution"
    gain: float = option(2.0, "factor of the output of Scaled", above=0)


class Scaled(nn.Module):
    Options = ScaledOptions

    def __init__(self, in_channels, out_channels, stride=1, *, gain=2.0):
        super().__init__()
        self.options = ScaledOptions(gain=gain)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, x):
        return self.options.gain * self.conv(x)

    def extra_repr(self):
        return self.options.describe()
'''

MODEL = '''
from dataclasses import dataclass

from torch import nn

from options import Options, option


@dataclass(frozen=True)
class ToyOptions(Options):
    """A network of one layer."""

    title = "Toy network"
    toy_width: int = option(4, "channels of the toy network", least=1)


class Toy(nn.Module):
    Options = ToyOptions
    family, tasks, training = "Toy", ("classification", "counting"), "gradient"
    uses_layer, min_input_size = True, 1

    def __init__(self, *, layer, in_channels, num_classes, toy_width=4):
        super().__init__()
        ToyOptions(toy_width=toy_width)
        self.layer = layer(in_channels=in_channels, out_channels=toy_width)
        self.classifier = nn.Linear(toy_width, num_classes)

    def forward(self, x):
        return self.classifier(self.layer(x).mean((2, 3)))
'''

DATASET = '''
from dataclasses import dataclass

import torch

from dataset import Data, FeatureArray
from options import Options, option


@dataclass(frozen=True)
class StripesOptions(Options):
    """Generated stripes."""

    title = "Stripes"
    stripe_count: int = option(40, "images of generated stripes", least=2)


def build_stripes(*, stripe_count, seed, **needs):
    labels = torch.arange(stripe_count) % 2
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(stripe_count, 1, 6, 6, generator=generator) * 0.1
    images[labels == 1, :, ::2] += 1
    part = FeatureArray(images, labels)
    return Data("stripes", "classification", part, part, (1, 6, 6), 2)
'''

TASK = '''
from dataclasses import dataclass

import torch

from options import Options, option
from tasks.task import Task


@dataclass(frozen=True)
class CountingOptions(Options):
    """Counting."""

    title = "Counting"
    count_scale: float = option(1.0, "unit of the counted numbers", above=0)


class CountingTask(Task):
    """The class is a number; the smaller the error, the better."""

    name = "counting"
    headline, headline_name, headline_unit = "error", "Error", ""
    higher_is_better = False
    Options = CountingOptions

    def __init__(self, *, count_scale=1.0, seed=0):
        super().__init__(seed=seed)
        self.count_scale = count_scale

    def sizes(self, data):
        return {"in_channels": data.sample_shape[0], "num_classes": 1}

    def errors(self, outputs, targets):
        return (outputs[:, 0] - targets * self.count_scale).abs()

    def loss(self, outputs, targets):
        return self.errors(outputs, targets).mean()

    def metrics(self, outputs, targets):
        return {"error": self.errors(outputs, targets)}

    def line(self, metrics):
        return f"Error: {metrics['error']:.6f}"
'''


def load(folder, name, text):
    """Write a file and import it."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """All four, each by its file and its row."""
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setitem(LAYERS, "Scaled", load(files, "scaled", LAYER).Scaled)
    monkeypatch.setitem(MODELS, "toy", load(files, "toy", MODEL).Toy)
    monkeypatch.setitem(TASKS, "counting", load(files, "counting", TASK).CountingTask)
    stripes = load(files, "stripes", DATASET)
    row = DatasetEntry(
        ("classification", "counting"), stripes.build_stripes, stripes.StripesOptions
    )
    monkeypatch.setitem(DATASETS, "stripes", row)


TOY = ["--model", "toy", "--layer", "Scaled", "--dataset", "stripes", "--device", "cpu"]
FLAGS = ["--gain", "--toy_width", "--stripe_count", "--count_scale"]


def test_flags_are_in_the_help(toys, capsys):
    text = build_parser().format_help()
    for flag in FLAGS:
        assert flag in text
    for heading in ("Scaled convolution", "Toy network", "Stripes", "Counting"):
        assert heading in text


def test_all_four_train_resume_and_test(toys):
    own = ["--gain", "1.5", "--toy_width", "3", "--stripe_count", "30"]
    counting = ["--task", "counting", "--count_scale", "2", "--lr", "0.05"]
    short = ["--num_epochs", "3", "--batch_size", "8", "--output_dir", "run"]
    result = main([*TOY, *own, *counting, *short])
    errors = [row["test_error"] for row in result["history"]]
    assert result["best"] == min(errors)
    assert errors[-1] < errors[0]
    text = Path("run/args.txt").read_text()
    for line in ("gain: 1.5", "toy_width: 3", "stripe_count: 30", "count_scale: 2.0"):
        assert f"\n{line}\n" in text
    assert "gain=1.5" in Path("run/model.txt").read_text()
    again = main(["--test_only", "--output_dir", "run", "--device", "cpu"])
    assert again["test"]["error"] == result["best"]
    main(["--resume", "--output_dir", "run", "--num_epochs", "4", "--device", "cpu"])
    replay = main(["--config", "run/args.txt", "--output_dir", "replay", "--device", "cpu"])
    assert replay["history"][:3] == result["history"]


def test_the_first_task_of_a_data_set_is_its_default(toys):
    result = main([*TOY, "--num_epochs", "1", "--output_dir", "run"])
    assert "test_top1" in result["history"][0]
    assert "\ntask: classification\n" in Path("run/args.txt").read_text()


def test_toys_mix_with_what_is_there(toys):
    main(["--model", "toy", "--layer", "ConvNN", "--K", "4", "--dataset", "digits", "--dry_run"])
    main(["--model", "resnet18", "--layer", "Scaled", "--dataset", "digits", "--dry_run"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gain", "0"], "--gain: must be above 0 (got 0)"),
        (["--toy_width", "0"], "--toy_width: must be at least 1"),
        (["--stripe_count", "many"], "--stripe_count: invalid int value: 'many'"),
        (["--task", "denoising"], "--task denoising cannot be learnt from --dataset stripes"),
        (["--task", "counting", "--model", "vgg11"], "--model vgg11 cannot do counting"),
        (["--task", "counting", "--dataset", "digits"], "cannot be learnt from --dataset digits"),
    ],
)
def test_misuse_is_refused(toys, refused, flags, message):
    code, text = refused(main, [*TOY, *flags])
    assert code == 2
    assert message in text


def test_options_of_what_is_not_chosen_have_no_effect(toys, capsys):
    flags = ["--gain", "3", "--stripe_count", "9", "--count_scale", "2", "--toy_width", "2"]
    main(["--model", "toy", "--layer", "Conv2d", "--dataset", "digits", *flags, "--dry_run"])
    note = "no effect with --model toy --layer Conv2d: --count_scale, --gain, --stripe_count."
    assert note in capsys.readouterr().out


def test_a_checkpoint_fixes_what_its_weights_mean(toys, refused):
    main([*TOY, "--num_epochs", "1", "--output_dir", "run"])
    code, text = refused(main, ["--test_only", "--output_dir", "run", "--gain", "3"])
    assert code == 2
    assert "--gain is 2.0 there and 3.0 here" in text
    assert torch.load("run/best.pt", weights_only=True)["args"]["gain"] == 2.0
