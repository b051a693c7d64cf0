"""Which checkpoints a run keeps, what stands in them, and what can be done with each choice."""

import csv
import json
from pathlib import Path

import pytest

from checkpoints import load_checkpoint, save_checkpoint
from main import main, size_text

RESUME = ("--resume", "--device", "cpu", "--output_dir")
FILES = {"both": {"last.pt", "best.pt"}, "last": {"last.pt"}, "best": {"best.pt"}, "none": set()}


def checkpoints(folder):
    return {path.name for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("choice", list(FILES))
def test_only_what_was_asked_for_is_kept(run, capsys, choice):
    flags = ("--val_split", "0.2", "--num_epochs", 4, "--lr", "0.05")
    whole = run(*flags, "--output_dir", "whole")
    capsys.readouterr()
    found = run(*flags, "--output_dir", "run", "--save", choice)
    assert checkpoints("run") == FILES[choice]
    assert found["history"] == whole["history"]
    assert found["best_epoch"] == whole["best_epoch"] < 4
    out, text = capsys.readouterr().out, Path("run/train_eval_results.txt").read_text()
    size = sum(path.stat().st_size for path in Path("run").iterdir())
    assert f"All of it is in run ({size_text(size)}" in out
    assert ("Test it:" in out) == (choice != "none")
    if choice in ("both", "best"):
        assert found["test"] == whole["test"]
        assert f"[Test at Epoch {whole['best_epoch']}]" in text
    else:
        assert found["test"] != whole["test"]
        assert f"--save {choice} keeps no weights of the best epoch: the last ones count." in text
        assert "[Test at Epoch 4]" in text
    assert json.loads(Path("run/summary.json").read_text())["test"] == found["test"]
    if choice != "none":
        again = main(["--test_only", "--output_dir", "run", "--device", "cpu"])
        assert again["test"] == found["test"]


def test_the_state_of_the_optimizer_is_in_last_alone(run):
    run("--output_dir", "run", "--num_epochs", 1)
    last, best = load_checkpoint("run/last.pt"), load_checkpoint("run/best.pt")
    assert set(last) - set(best) == {"trainer", "random_state"}
    for name, value in best["model"].items():
        assert value.equal(last["model"][name])
    assert Path("run/best.pt").stat().st_size < 0.6 * Path("run/last.pt").stat().st_size


@pytest.mark.parametrize("choice", ["last", "both"])
def test_what_keeps_last_resumes(run, choice):
    flags = ("--val_split", "0.2", "--lr", "0.05", "--save", choice)
    whole = run(*flags, "--num_epochs", 4, "--output_dir", "whole")
    run(*flags, "--num_epochs", 2, "--output_dir", "run")
    found = main([*RESUME, "run", "--num_epochs", "4"])
    assert found["history"] == whole["history"]
    assert found["test"] == whole["test"]
    assert checkpoints("run") == FILES[choice]


def test_weights_alone_cannot_be_gone_on_with(run, refused):
    run("--output_dir", "run", "--save", "best")
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert "run/best.pt holds weights without the state of the optimizer (--save says" in text
    assert "--pretrained run/best.pt begins a new run with these weights." in text
    run("--output_dir", "none", "--save", "none")
    code, text = refused(main, [*RESUME, "none"])
    assert code == 2
    assert "there is none at none/last.pt" in text


def test_states_amid_an_epoch_need_last(run, refused, tmp_path):
    code, text = refused(run, "--save", "best", "--save_every", 3)
    assert code == 2
    assert "--save_every 3 saves last.pt, and --save best keeps none." in text
    code, text = refused(run, "--save", "none", "--prune", model="dynamic")
    assert code == 2
    assert "--prune writes pruned.pt beside last.pt" in text
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_that_it_kept_nothing(run, refused, monkeypatch):
    import train_eval

    original = train_eval.train_one_epoch

    def interrupted(trainer, loader, *, epoch, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(trainer, loader, epoch=epoch, **options)

    monkeypatch.setattr(train_eval, "train_one_epoch", interrupted)
    code, text = refused(run, "--output_dir", "run", "--save", "best")
    assert code == 130
    assert "nothing to go on with from: --save best keeps no last.pt" in text
    assert main(["--test_only", "--output_dir", "run", "--device", "cpu"])["test"]


def test_a_store_of_samples_is_kept_once(run):
    run("--output_dir", "run", model="knn")
    assert Path("run/best.pt").samefile("run/last.pt")
    run("--output_dir", "best", "--save", "best", model="knn")
    assert checkpoints("best") == {"best.pt"}
    main(["--test_only", "--output_dir", "best", "--device", "cpu"])


def test_times_of_older_files_are_gone_on_with(run):
    run("--output_dir", "run", "--num_epochs", 1)
    last = load_checkpoint("run/last.pt")
    for row in last["progress"]["times"]:
        del row["train_seconds"]
    save_checkpoint("run/last.pt", last)
    main([*RESUME, "run", "--num_epochs", "2"])
    with open("run/timing.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["train_seconds"] == "nan"
    assert "nan" not in second.values()
    assert "samples/s)" in Path("run/train_eval_results.txt").read_text()
