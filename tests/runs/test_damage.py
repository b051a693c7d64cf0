"""Checkpoints that are damaged or hostile, and what a run falls back on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage_runs import GONE, WRONG, spoil

import main as program
import models
from checkpoints import (
    CheckpointError,
    check_form,
    check_rows,
    load_checkpoint,
    read_weights,
    save_checkpoint,
)
from main import main
from run_folder import RunFolder
from tests.conftest import TinyNet
from trainers import GradientTrainer

ROOT = Path(program.__file__).parent
FLAGS = [
    *("--model", "tiny", "--layer", "Conv2d", "--dataset", "digits", "--device", "cpu"),
    *("--limit_train", "50", "--limit_test", "30", "--batch_size", "20", "--num_epochs", "3"),
    *("--scheduler", "cosine"),
]
RESUME = ("--resume", "--device", "cpu", "--output_dir")


def metrics(folder):
    return Path(folder, "metrics.csv").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a whole run, and one that was stopped amid its third epoch."""
    folder = tmp_path_factory.mktemp("made")
    original, count = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(models.MODELS, "tiny", TinyNet)
        main([*FLAGS, "--output_dir", "whole"])
        patch.setattr(GradientTrainer, "step", step)
        with pytest.raises(SystemExit):
            main([*FLAGS, "--output_dir", "run"])
    return folder


@pytest.fixture
def stopped(made, tmp_path, monkeypatch, tiny_model):
    """Copies of both, in the working folder; returns the state that can be gone on with."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return load_checkpoint("run/last.pt")


# ---------------------------------------------------------------------------------------------
# Entries that are missing or wrong, with a right digest

HARMLESS = [
    (("trainer", "scheduler", "step"), 3),
    (("trainer", "scaler"), GONE),
]


def words_of(entry):
    path, value = entry
    return f"{'.'.join(map(str, path))}-{'gone' if value is GONE else type(value).__name__}"


@pytest.mark.parametrize("entry", [e for e in WRONG if e not in HARMLESS], ids=words_of)
def test_wrong_entries_are_refused_in_a_sentence(stopped, refused, entry):
    save_checkpoint("run/last.pt", spoil(stopped, *entry))
    before = metrics("run")
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert text.count("error: ") == 1
    assert metrics("run") == before


@pytest.mark.parametrize("entry", HARMLESS, ids=words_of)
def test_entries_that_say_nothing_change_nothing(stopped, entry):
    save_checkpoint("run/last.pt", spoil(stopped, *entry))
    main([*RESUME, "run"])
    assert metrics("run") == metrics("whole")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("scheduler", ["none", "plateau", "step"])
def test_every_optimizer_and_schedule_goes_on(run, optimizer, scheduler):
    flags = ("--optimizer", optimizer, "--scheduler", scheduler, "--output_dir")
    run(*flags, "whole", "--num_epochs", 2)
    run(*flags, "run", "--num_epochs", 1)
    last = load_checkpoint("run/last.pt")
    main([*RESUME, "run", "--num_epochs", "2"])
    assert metrics("run") == metrics("whole")
    state = last["trainer"]["optimizer"]["state"]
    assert set(state[0]) == {"momentum_buffer"} if optimizer == "sgd" else "exp_avg" in state[0]


def test_momentum_of_zero_remembers_nothing(run):
    flags = ("--optimizer", "sgd", "--momentum", "0", "--output_dir", "run")
    run(*flags, "--num_epochs", 1)
    main([*RESUME, "run", "--num_epochs", "2"])


GROWTH = [
    ("growth", 5),
    ("growth", [3]),
    ("growth", [{"layer": 1}]),
    ("growth", [{"layer": 1, "samples": 2, "centers": 3, "seen": "x", "learnt": 1.0}]),
    ("full", 5),
]


@pytest.mark.parametrize(("name", "value"), GROWTH)
def test_wrong_records_of_growth_are_refused(run, refused, name, value):
    run("--output_dir", "run", "--num_layers", 1, model="dynamic")
    save_checkpoint("run/last.pt", spoil(load_checkpoint("run/last.pt"), ("trainer", name), value))
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert f"trainer['{name}']" in text


def test_a_version_that_measures_other_things_is_said(stopped, refused):
    for row in stopped["progress"]["history"]:
        row["test_other"] = 1.0
    save_checkpoint("run/last.pt", stopped)
    code, text = refused(main, [*RESUME, "run"])
    assert code == 1
    assert "the checkpoint is of another version of this program" in text


def test_a_best_epoch_without_its_metric_is_refused(stopped, refused):
    del stopped["place"]
    stopped["progress"]["best_digest"] = "0" * 64
    stopped["progress"]["best_epoch"] = 1
    stopped["progress"]["history"] = [{"epoch": n, "train_loss": 1.0} for n in (1, 2)]
    save_checkpoint("run/last.pt", stopped)
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert "it lacks test_top1" in text


def test_forms():
    like = {"a": [1, 2.0, None], "b": torch.zeros(2)}
    check_form({"a": [3, 4, None], "b": torch.ones(2)}, like, "it")
    for wrong, name in (
        ({"a": [3, 4, None]}, "it has"),
        ({"a": [3.5, 4, None], "b": torch.ones(2)}, r"it\['a'\]\[0\] has"),
        ({"a": [True, 4, None], "b": torch.ones(2)}, r"it\['a'\]\[0\] has"),
        ({"a": [3, True, None], "b": torch.ones(2)}, r"it\['a'\]\[1\] has"),
        ({"a": [3, 4, 0], "b": torch.ones(2)}, r"it\['a'\]\[2\] has"),
        ({"a": [3, 4], "b": torch.ones(2)}, r"it\['a'\] has .*list of 3"),
        ({"a": [3, 4, None], "b": torch.ones(2).long()}, r"it\['b'\] has .*tensor \(2,\)"),
    ):
        with pytest.raises(CheckpointError, match=name):
            check_form(wrong, like, "it")


def test_rows():
    check_rows([], "rows", ["x"])
    check_rows([{"x": 1, "y": 2.5}, {"x": 3, "y": 4}], "rows", ["x"])
    for rows in (3, [3], [{"y": 1}], [{"x": 1}, {"x": 1, "y": 2}], [{"x": "1"}], [{"x": 1, 2: 3}]):
        with pytest.raises(CheckpointError, match="rows"):
            check_rows(rows, "rows", ["x"])


@pytest.mark.parametrize("value", [None, {"a": 1}, "x", b"x"])
def test_weights_of_a_grown_network_are_tensors(run, refused, value):
    run("--output_dir", "run", "--num_layers", 1, model="dynamic")
    last = load_checkpoint("run/last.pt")
    for name in last["model"]:
        save_checkpoint("run/last.pt", spoil(last, ("model", name), value))
        code, text = refused(main, [*RESUME, "run"])
        assert code == 2, name
        assert f"{name} is no tensor" in text


@pytest.mark.parametrize("value", [GONE, None, {}, {"num_classes": "x"}, 5])
def test_what_a_memory_keeps_beside_samples_is_checked(run, refused, value):
    run("--output_dir", "run", "--K", 1, model="knn")
    best = load_checkpoint("run/best.pt")
    (name,) = [name for name in best["model"] if name.endswith("_extra_state")]
    save_checkpoint("run/best.pt", spoil(best, ("model", name), value))
    code, text = refused(main, ["--test_only", "--output_dir", "run", "--device", "cpu"])
    assert code == 2
    assert "the checkpoint does not fit the model" in text


# ---------------------------------------------------------------------------------------------
# Files that are none


def test_contents_that_no_digest_can_be_taken_of(tmp_path):
    endless = []
    endless.append(endless)
    for strange in (endless, torch.zeros(3).to_sparse()):
        content = {"model": {}, "args": {}, "format": 2, "digest": "x", "strange": strange}
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["format", "digest"])
def test_tensors_in_the_place_of_format_and_digest(stopped, name):
    torch.save({**stopped, name: torch.zeros(3)}, "a.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint("a.pt")


def test_weights_need_names(tmp_path):
    torch.save({3: torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "a.pt")
    torch.save({"model": {"a": torch.zeros(3)}, "args": torch.zeros(3)}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt")[1] == {}


def test_a_test_needs_no_progress(stopped):
    save_checkpoint("run/best.pt", {**stopped, "progress": 3})
    main(["--test_only", "--output_dir", "run", "--device", "cpu"])
    assert "(epoch ?)" in Path("run/test_results.txt").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": 3}', "[" * 10**5])
def test_a_damaged_record_of_starts_is_begun_anew(stopped, capsys, text):
    Path("run/environment.json").write_text(text)
    main([*RESUME, "run"])
    assert "run/environment.json is damaged and begun anew" in capsys.readouterr().out
    assert metrics("run") == metrics("whole")


@pytest.mark.parametrize("line", ["test_dir: 5", "test_dir: [5]", "test_dir: {}"])
def test_an_args_file_names_a_folder_by_a_number(tmp_path, monkeypatch, refused, line):
    monkeypatch.chdir(tmp_path)
    Path("args.txt").write_text(f"model: dncnn\ndataset: denoise\n{line}\n")
    code, text = refused(main, ["--config", "args.txt", "--device", "cpu"])
    assert code == 2
    assert text.count("error: ") == 1


# ---------------------------------------------------------------------------------------------
# What a run falls back on


def states(folder):
    """Epoch and place of the checkpoints of a folder."""
    found = {}
    for name in (RunFolder.LAST, RunFolder.PREVIOUS, RunFolder.BEST):
        if Path(folder, name).exists():
            checkpoint = load_checkpoint(Path(folder, name))
            place = checkpoint.get("place", {"step": 0})["step"]
            found[name] = (checkpoint["progress"]["epoch"], place)
    return found


def test_one_other_state_is_kept_while_a_run_learns(tmp_path):
    folder = RunFolder(tmp_path)
    checkpoint = {"model": {}, "args": {}, "progress": {"epoch": 0}}

    def save(epoch, best):
        checkpoint["progress"]["epoch"] = epoch
        folder.save(checkpoint, best=best)
        found = states(tmp_path)
        assert len({os.stat(tmp_path / name).st_ino for name in found}) <= 2
        return {name: epoch for name, (epoch, _) in found.items()}

    assert save(1, True) == {"last.pt": 1, "best.pt": 1}
    assert save(2, True) == {"last.pt": 2, "previous.pt": 1, "best.pt": 2}
    assert save(3, False) == {"last.pt": 3, "best.pt": 2}
    assert save(4, False) == {"last.pt": 4, "best.pt": 2}
    assert save(5, True) == {"last.pt": 5, "previous.pt": 4, "best.pt": 5}
    folder.end()
    assert list(states(tmp_path)) == ["last.pt", "best.pt"]


def test_a_broken_last_that_is_the_best_names_the_one_before(stopped, refused):
    flags = [*FLAGS, "--output_dir", "run", "--resume", "auto"]
    shutil.copyfile("run/last.pt", "run/previous.pt")
    for name in ("last.pt", "best.pt"):
        Path("run", name).write_bytes(Path("run", name).read_bytes()[:-99])
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert "run/previous.pt is whole: python main.py --resume --checkpoint " in text
    shutil.copytree("run", "again")
    main(flags)
    assert metrics("run") == metrics("whole")
    assert not Path("run/previous.pt").exists()
    main([*RESUME, "again", "--checkpoint", "again/previous.pt"])
    assert metrics("again") == metrics("whole")


def test_a_new_run_falls_back_on_nothing_old(stopped):
    shutil.copyfile("run/last.pt", "run/previous.pt")
    main([*FLAGS, "--output_dir", "run", "--overwrite", "--num_epochs", "1"])
    assert states("run") == {"last.pt": (1, 0), "best.pt": (1, 0)}


def test_damaged_files_and_disks():
    words = [sys.executable, "scripts/damage_runs.py", "--count", "1", "--stride", "400"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
