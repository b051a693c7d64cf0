"""TensorBoard and Weights & Biases: what they are told, resuming, what is said where they lack."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import trackers
import train_eval
from main import main

# Stands in for the package: it writes down what it is told.
FAKE = """
import json
from pathlib import Path

class Error(Exception): pass

class Image(str): pass

class Run:
    def __init__(self, path, settings):
        self.path, self.step, self.summary = path, 0, {}
        self.note("init", settings)
    def note(self, what, content):
        with open(self.path, "a") as file:
            file.write(json.dumps([what, content]) + chr(10))
    def log(self, row, step):
        assert step >= self.step
        self.step = step
        self.note("log", [step, row])
    def finish(self, exit_code):
        self.note("summary", self.summary)
        self.note("finish", exit_code)

def init(**settings):
    if settings["project"] == "closed":
        raise Error("api_key not configured")
    return Run(Path(settings["dir"], "told.jsonl"), settings)
"""


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def told(folder, what):
    lines = Path(folder, "told.jsonl").read_text().splitlines()
    return [content for kind, content in map(json.loads, lines) if kind == what]


def interrupt(monkeypatch, run, *flags):
    """Interrupt a run in its second epoch."""
    original = train_eval.train_one_epoch

    def interrupted(trainer, loader, *, epoch, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(trainer, loader, epoch=epoch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_eval, "train_one_epoch", interrupted)
        with pytest.raises(SystemExit):
            run(*flags)


@pytest.mark.parametrize("flag", ["--tensorboard", "--wandb"])
def test_a_missing_package_is_named_before_any_work(run, refused, monkeypatch, tmp_path, flag):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    code, text = refused(run, flag)
    package = flag.removeprefix("--")
    assert code == 2
    assert f"{flag} needs the package {package}, which is not installed here: pip " in text
    assert f"pip install {package}" in text
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_told_rows_pictures_and_settings(run, wandb):
    found = run("--wandb", "digits", "--output_dir", "run", "--val_split", "0.2", "--lr", "0.01")
    (settings,) = told("run", "init")
    assert settings["project"] == "digits"
    assert settings["name"] == "run"
    assert settings["config"]["lr"] == 0.01
    assert "branch_ratio" not in settings["config"]
    *rows, (step, pictures) = told("run", "log")
    assert [step for step, _ in rows] == [1, 2]
    for (_, row), expected in zip(rows, found["history"], strict=True):
        assert row == {name: value for name, value in expected.items() if name != "epoch"}
    assert (step, pictures) == (2, {"curves": "run/curves.png"})
    (final,) = told("run", "summary")
    assert final["final/best"] == found["best"]
    assert final["final/test_top1"] == found["test"]["top1"]
    assert told("run", "finish") == [0]


def test_wandb_goes_on_with_its_run(run, wandb, monkeypatch):
    interrupt(monkeypatch, run, "--wandb", "--output_dir", "run")
    assert told("run", "finish") == [1]
    main(["--resume", "--output_dir", "run", "--device", "cpu"])
    first, second = told("run", "init")
    assert first["project"] == "neighbors"
    assert second["id"] == first["id"]
    run("--wandb", "--output_dir", "run", "--overwrite")
    assert told("run", "init")[2]["id"] != first["id"]


def test_wandb_that_cannot_start_says_what_to_do(run, wandb, refused):
    code, text = refused(run, "--wandb", "closed")
    assert code == 1
    assert "--wandb closed cannot start: api_key not configured. Log in by wandb login" in text


def test_tensorboard_holds_rows_pictures_and_settings(run, monkeypatch):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = run("--output_dir", "plain")
    interrupt(monkeypatch, run, "--tensorboard", "--output_dir", "run")
    found = main(["--resume", "--output_dir", "run", "--device", "cpu"])
    assert found["history"] == plain["history"]
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    tags = events.Tags()
    assert set(found["history"][0]) - {"epoch"} <= set(tags["scalars"])
    for name in ("train_loss", "test_top1", "lr"):
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == [1, 2]
        for each, row in zip(scalars, found["history"], strict=True):
            assert each.value == pytest.approx(row[name])
    assert tags["images"] == ["curves"]
    assert events.Scalars("final/best")[0].value == pytest.approx(found["best"])
    assert "_hparams_/session_start_info" in events.summary_metadata
