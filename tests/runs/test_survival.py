"""Runs that are killed, stopped, started twice, or given damaged files and folders."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoints
import faults
import main as program
import run_folder
from checkpoints import CheckpointError, content_digest, load_checkpoint, save_checkpoint
from main import main
from run_folder import RunFolder
from trainers import GradientTrainer
from utils import WriteError

ROOT = Path(program.__file__).parent
SMALL = ("--dataset", "digits", "--num_epochs", "1", "--limit_train", "50", "--device", "cpu")
RESUME = ("--resume", "--device", "cpu", "--output_dir")


@pytest.fixture(autouse=True)
def heard():
    """Hear the signals that tests send, also where the tests are run by nohup or behind a shell."""
    before = [signal.signal(signal.SIGHUP, signal.SIG_DFL)]
    before.append(signal.signal(signal.SIGINT, signal.default_int_handler))
    yield
    for number, handler in zip((signal.SIGHUP, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def metrics(folder):
    return Path(folder, "metrics.csv").read_text()


def signal_at(monkeypatch, number, signum):
    """Send this process a signal amid its n-th training step."""
    original, count = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signum)
        return original(self, *arguments)

    monkeypatch.setattr(GradientTrainer, "step", step)


# ---------------------------------------------------------------------------------------------
# last.pt and best.pt are one decision


def test_killed_between_last_and_best(run, monkeypatch, refused):
    flags = ("--val_split", "0.2", "--num_epochs", 4, "--lr", "0.05")
    whole = run(*flags, "--output_dir", "whole")
    original = run_folder.save_checkpoint

    def save(path, state):
        if path.name == "best.pt" and state["progress"]["epoch"] == whole["best_epoch"]:
            raise KeyboardInterrupt
        return original(path, state)

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    assert refused(run, *flags, "--output_dir", "broken")[0] == 130
    monkeypatch.setattr(run_folder, "save_checkpoint", original)
    resumed = main([*RESUME, "broken"])
    assert resumed["test"] == whole["test"]
    assert load_checkpoint("broken/best.pt")["progress"]["epoch"] == whole["best_epoch"]


def test_resuming_into_another_folder_takes_the_best_along(run):
    flags = ("--val_split", "0.2", "--num_epochs", 3, "--lr", "0.05")
    whole = run(*flags, "--output_dir", "a")
    resumed = main([*RESUME, "b", "--checkpoint", "a/last.pt"])
    assert resumed["test"] == whole["test"]
    best = load_checkpoint("b/best.pt")
    assert best["progress"]["epoch"] == whole["best_epoch"]
    assert best["digest"] == load_checkpoint("a/best.pt")["digest"]


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_a_lost_best_is_said(run, damage):
    run("--output_dir", "run", "--num_epochs", 3)
    last = load_checkpoint("run/last.pt")
    last["progress"]["best_epoch"], last["progress"]["best_digest"] = 2, "0" * 64
    save_checkpoint("run/last.pt", last)
    if damage == "missing":
        Path("run/best.pt").unlink()
    resumed = main([*RESUME, "run"])
    assert resumed["best_epoch"] == 3
    text = Path("run/train_eval_results.txt").read_text()
    assert "The weights of the best epoch, 2, are lost" in text
    assert load_checkpoint("run/best.pt")["progress"]["epoch"] == 3


# ---------------------------------------------------------------------------------------------
# One run in a folder at a time


def test_a_second_start_is_refused_and_told_of_the_first(run, refused):
    with RunFolder("run").held():
        code, text = refused(run, "--output_dir", "run", "--overwrite")
        assert code == 2
        assert f"is being written by process {os.getpid()} on " in text
    run("--output_dir", "run")
    assert not Path("run/.lock").exists()


def test_a_dead_process_keeps_no_lock(run):
    Path("run").mkdir()
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); from run_folder import RunFolder\n"
        "with RunFolder('run').held(): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)]).returncode == 9
    assert Path("run/.lock").exists()
    run("--output_dir", "run")
    assert not Path("run/.lock").exists()


def test_a_refused_run_leaves_no_folder(run, refused, tmp_path):
    assert refused(run, "--output_dir", "a/b", "--val_split", "0.001")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_left_overs_of_killed_writes_are_removed(run):
    Path("run/images").mkdir(parents=True)
    others = [Path("run/.last-a1b2c3d4.pt"), Path("run/images/.001_x-a1b2c3d_.png")]
    kept = [Path("run/.notes-of-mine.txt"), Path("run/.last-a1b2c3d4.py")]
    for path in others + kept:
        path.write_text("x")
    run("--output_dir", "run")
    assert not any(path.exists() for path in others)
    assert all(path.exists() for path in kept)


# ---------------------------------------------------------------------------------------------
# Numbers that are not finite, batches of one sample


def test_ruined_weights_are_not_saved(run, refused):
    flags = ("--batch_size", 50, "--output_dir", "run", "--layer", "Conv2d")
    code, text = refused(run, *flags, "--lr", "1e39")
    assert code == 1
    assert "is not finite after step 1 of epoch 1" in text
    assert "Nothing was saved yet" in text
    assert not Path("run/best.pt").exists()


def test_an_evaluation_that_is_not_finite_keeps_the_last_good_state(run, refused, monkeypatch):
    from tasks.classification import ClassificationTask

    original, count = ClassificationTask.loss, 0

    def loss(self, outputs, targets):
        nonlocal count
        value = original(self, outputs, targets)
        count += not torch.is_grad_enabled()
        return value * float("nan") if count > 2 and not torch.is_grad_enabled() else value

    monkeypatch.setattr(ClassificationTask, "loss", loss)
    code, text = refused(run, "--output_dir", "run")
    assert code == 1
    assert "test_loss is nan after epoch 2" in text
    assert "The last good state is in run/last.pt" in text
    assert load_checkpoint("run/last.pt")["progress"]["epoch"] == 1


@pytest.mark.parametrize(
    ("count", "size", "fix"),
    [(17, 16, "Use --batch_size 15"), (4, 1, "Use --batch_size 2"), (1, 16, "More training")],
)
def test_a_batch_of_one_sample_is_refused_before_work(run, refused, tmp_path, count, size, fix):
    flags = ("--layer", "Conv2d", "--limit_train", count, "--batch_size", size)
    code, text = refused(run, *flags, model="resnet18")
    assert code == 2
    assert "batch norm (" in text
    assert fix in text
    assert list(tmp_path.iterdir()) == []


def test_a_batch_of_one_sample_is_fine_where_batch_norm_sees_more(run):
    run("--limit_train", 21)
    run("--limit_train", 3, "--batch_size", 1)


# ---------------------------------------------------------------------------------------------
# Damaged checkpoints


@pytest.fixture
def saved(run):
    run("--output_dir", "run", "--layer", "Conv2d")
    return Path("run/last.pt").read_bytes()


def test_flipped_bits_and_cut_files_are_noticed(saved):
    whole = load_checkpoint("run/last.pt")
    torch.manual_seed(1)
    said = []
    for bit in torch.randint(8 * len(saved), (100,)).tolist():
        damaged = bytearray(saved)
        damaged[bit // 8] ^= 1 << bit % 8
        Path("bit.pt").write_bytes(damaged)
        try:
            found = load_checkpoint("bit.pt")
        except CheckpointError as error:
            said.append(str(error))
        else:  # a byte between two entries
            assert found["digest"] == whole["digest"]
    assert len(said) > 50
    assert not any("weights_only" in text for text in said)
    for length in torch.linspace(0, len(saved) - 1, 100).int().tolist():
        Path("cut.pt").write_bytes(saved[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint("cut.pt")


def test_a_broken_last_names_the_whole_best(saved, refused):
    Path("run/last.pt").write_bytes(saved[:-100])
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert "run/last.pt cannot be read" in text
    assert "run/best.pt begins a new run with these weights." in text
    code, text = refused(main, [*RESUME, "run", "--checkpoint", "run/best.pt"])
    assert code == 2
    assert "run/best.pt holds weights without the state of the optimizer" in text
    main(["--pretrained", "run/best.pt", "--output_dir", "more", *SMALL])


def test_files_without_a_digest_still_load_and_resume(run, saved):
    checkpoint = load_checkpoint("run/last.pt")
    del checkpoint["digest"], checkpoint["progress"]["best_digest"]
    del checkpoint["progress"]["finished"]
    torch.save({**checkpoint, "format": 1}, "run/last.pt")
    whole = run("--output_dir", "whole", "--layer", "Conv2d", "--num_epochs", 3)
    resumed = main([*RESUME, "run", "--num_epochs", "3"])
    assert metrics("run") == metrics("whole")
    assert resumed["best"] == whole["best"]


# ---------------------------------------------------------------------------------------------
# Disks and paths


def test_paths_that_cannot_be_a_run_folder(run, refused, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    for name in ("/proc/x", "x" * 300, "link", "file", "file/run"):
        code, text = refused(run, "--output_dir", name)
        assert code == 2, name
        assert "--output_dir" in text or "/proc/x" in text, name


@pytest.mark.parametrize("name", ["args.txt", "last.pt", "metrics.csv", ".lock"])
def test_folders_in_the_place_of_files(run, refused, name):
    Path("run", name).mkdir(parents=True)
    code, text = refused(run, "--output_dir", "run", "--overwrite")
    assert code == 2
    assert name in text


def test_last_being_a_folder_is_said(run, refused):
    Path("run/last.pt").mkdir(parents=True)
    code, text = refused(main, [*RESUME, "run"])
    assert code == 2
    assert "run/last.pt: that is no file" in text


def test_a_full_disk_ends_a_run_in_one_sentence(run, refused, monkeypatch):
    run("--output_dir", "run", "--num_epochs", 1)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    code, text = refused(main, [*RESUME, "run", "--num_epochs", "2"])
    assert code == 1
    assert "run/last.pt cannot be written: No space left on device" in text
    assert load_checkpoint("run/last.pt")["progress"]["epoch"] == 1
    assert {p.name for p in Path("run").iterdir() if p.name.startswith(".")} == set()


def test_what_torch_forgets_of_a_failed_write_is_kept(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    original = checkpoints._Watched
    monkeypatch.setattr(checkpoints, "_Watched", lambda file: original(Full()))
    with pytest.raises(WriteError, match="No space left on device"):
        save_checkpoint(tmp_path / "x.pt", {"model": {"a": torch.ones(5)}, "args": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_test_measures_where_nothing_can_be_written(run, monkeypatch, capsys):
    result = run("--output_dir", "run", "--layer", "Conv2d")
    before = sorted(Path("run").iterdir())
    monkeypatch.setattr(RunFolder, "writable", lambda self: False)
    again = main(["--test_only", "--output_dir", "run", "--device", "cpu"])
    assert again["test"]["top1"] == result["best"]
    assert "run cannot be written: nothing of this was kept" in capsys.readouterr().out
    assert sorted(Path("run").iterdir()) == before


# ---------------------------------------------------------------------------------------------
# Signals, and going on amid an epoch


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_finishes_the_step_and_saves(run, monkeypatch, refused, name):
    flags = ("--augment", "--num_epochs", 3, "--output_dir")
    run(*flags, "whole")
    signum = getattr(signal, name)
    with monkeypatch.context() as patch:
        signal_at(patch, 5, signum)  # the second of three steps of epoch 2
        code, text = refused(run, *flags, "broken")
    assert code == 128 + signum
    assert f"Interrupted ({name}). The last good state is in broken/last.pt" in text
    assert load_checkpoint("broken/last.pt")["place"]["step"] == 2
    main([*RESUME, "broken"])
    assert metrics("broken") == metrics("whole")
    for file in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(f"{f}/{file}") for f in ("broken", "whole"))
        for entry in ("model",) if file == "best.pt" else ("model", "trainer", "random_state"):
            assert content_digest(one[entry]) == content_digest(other[entry])
    assert Path("broken/curves.png").read_bytes() == Path("whole/curves.png").read_bytes()
    assert "--num_epochs 3" in Path("broken/args.txt").read_text()  # the first command


def test_a_signal_during_an_evaluation_keeps_the_epoch(run, monkeypatch, refused):
    import evaluation

    flags = ("--num_epochs", 2, "--output_dir")
    run(*flags, "whole")
    original = evaluation.evaluate

    def evaluate(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", evaluate)
        assert refused(run, *flags, "broken")[0] == 143
    place = load_checkpoint("broken/last.pt")["place"]
    assert (place["epoch"], place["step"], place["done"]) == (1, 3, True)
    main([*RESUME, "broken"])
    assert metrics("broken") == metrics("whole")


def test_save_every_goes_on_amid_an_epoch_with_loading_processes(run, monkeypatch, refused):
    flags = ("--augment", "--save_every", 2, "--num_workers", 2, "--noise", "0.1", "--output_dir")
    run(*flags, "whole")
    original, count = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt  # as if killed: nothing more is saved
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GradientTrainer, "step", step)
        assert refused(run, *flags, "broken")[0] == 130
    assert load_checkpoint("broken/last.pt")["place"]["step"] == 2
    main([*RESUME, "broken"])
    assert metrics("broken") == metrics("whole")


def test_a_second_signal_and_early_ones():
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); import faults\n"
        "with faults.handled(), faults.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('never')"
    )
    words = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "on\n")
    code = (
        "import sys, os, signal, runpy\n"
        "class Early:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Early()); sys.argv = [sys.argv[1]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", code, str(ROOT / "main.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 130
    assert done.stderr == "Interrupted before anything was done.\n"


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with faults.handled():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resume_auto_begins_goes_on_and_is_done(run, monkeypatch, refused, capsys):
    flags = ("--resume", "auto", "--output_dir", "run")
    run("--output_dir", "whole")
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        assert refused(run, *flags)[0] == 143
    run(*flags)
    assert metrics("run") == metrics("whole")
    run(*flags)
    assert "nothing to resume" in capsys.readouterr().out
    Path("run/last.pt").write_bytes(b"x")
    run(*flags)
    out = capsys.readouterr().out
    assert "run/best.pt holds weights alone" in out
    assert "no whole checkpoint in run: the run begins" in out
    assert metrics("run") == metrics("whole")
    Path("run/last.pt").write_bytes(b"x")
    Path("run/best.pt").write_bytes(b"x")
    run(*flags)
    assert "no whole checkpoint in run: the run begins" in capsys.readouterr().out
    assert metrics("run") == metrics("whole")


def test_growth_resumes_to_complete_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "dynamic", "--dataset", "digits", "--device", "cpu", "--limit_train", "200"]
    main([*argv, "--output_dir", "run"])
    names = ("growth.csv", "growth.png", "curves.png", "summary.json", "metrics.csv")
    before = {name: Path("run", name).read_bytes() for name in names}
    for name in names:
        Path("run", name).unlink()
    main([*RESUME, "run"])
    assert {name: Path("run", name).read_bytes() for name in names} == before


def test_interrupted_runs_leave_the_files_of_an_unbroken_one():
    words = [sys.executable, "scripts/kill_runs.py", "--moments", "0", "--stride", "600"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SIGTERM") == 6, done.stdout  # two rows a trainer


# ---------------------------------------------------------------------------------------------
# The same numbers twice, and what surrounded them


def test_the_folder_records_what_surrounded_the_run(run):
    run("--output_dir", "run")
    main([*RESUME, "run", "--num_epochs", "3"])
    starts = json.loads(Path("run/environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["torch"] == torch.__version__
    assert starts[0]["data"] == starts[1]["data"]
    assert starts[0]["threads"] == torch.get_num_threads()
    assert "--resume" in starts[1]["command"]


def test_other_data_are_noticed(run, capsys):
    run("--output_dir", "run")
    path = Path("run/environment.json")
    path.write_text(path.read_text().replace('"data": "', '"data": "x'))
    main([*RESUME, "run", "--num_epochs", "3"])
    assert "the data are others" in capsys.readouterr().out


def test_seeds_report_mean_and_deviation(run):
    several = run("--seeds", 3, 4, "--output_dir", "all")
    one = run("--seed", 4, "--output_dir", "one")
    assert metrics("all/seed_4") == metrics("one")
    best = [several["seeds"][seed]["best"] for seed in (3, 4)]
    assert one["best"] == best[1]
    mean, deviation = several["mean"]["best"]
    assert mean == sum(best) / 2
    assert deviation == pytest.approx(abs(best[0] - best[1]) / 2**0.5)
    assert "mean ± standard deviation" in Path("all/seeds.txt").read_text()


def test_a_disk_that_is_full_after_the_last_seed_is_said(run, refused, monkeypatch):
    def full(path, text):
        raise WriteError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr(program, "write_text", full)
    code, text = refused(run, "--seeds", 3, 4, "--num_epochs", 1, "--output_dir", "all")
    assert code == 1
    assert "error: all/seeds.txt cannot be written: No space left on device." in text


def test_deterministic_runs_train(run):
    try:
        result = run("--deterministic", "--output_dir", "run")
        assert result["best"] == run("--output_dir", "plain")["best"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
    ],
)
def test_full_memory_is_one_sentence(run, refused, monkeypatch, error):
    original, count = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(GradientTrainer, "step", step)
    code, text = refused(run, "--output_dir", "run")
    assert code == 1
    assert re.search(r"is full with --batch_size 20 \(at most \d+\.\d GB were in use\)", text)
    for way in ("Lower --batch_size", "--accum_steps", "--use_amp", "--resize"):
        assert way in text
    assert "The last good state is in run/last.pt" in text
    assert load_checkpoint("run/last.pt")["progress"]["epoch"] == 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read sizes from")
def test_memory_that_is_full_indeed(tmp_path):
    code = (
        "import os, resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "import sklearn.datasets, torch, torchvision, main\n"
        "torch.set_num_threads(1)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * os.sysconf('SC_PAGE_SIZE') + 200 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "main.main(sys.argv[2:])"
    )
    flags = [
        *("--model", "resnet18", "--layer", "Conv2d", "--dataset", "digits", "--resize", "32"),
        *("--limit_train", "600", "--limit_test", "20", "--batch_size", "600"),
        *("--device", "cpu", "--output_dir", "run"),
    ]
    words = [sys.executable, "-c", code, str(ROOT), *flags]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "the memory of this machine is full with --batch_size 600" in done.stderr


def test_debug_nan_keeps_the_batch(run, refused, monkeypatch):
    from tasks.classification import ClassificationTask

    original, count = ClassificationTask.loss, 0

    def loss(self, outputs, targets):
        nonlocal count
        count += 1
        value = original(self, outputs, targets)
        return value * float("nan") if count == 2 else value

    monkeypatch.setattr(ClassificationTask, "loss", loss)
    code, text = refused(run, "--debug_nan", "--output_dir", "run")
    assert code == 1
    assert "not finite in epoch 1, step 2" in text
    images, labels = torch.load("run/nan_batch.pt", weights_only=True)["batch"]
    assert len(images) == len(labels) == 20
