"""Damage what runs leave and where they write, go on with them, and see what happens.

    python scripts/damage_runs.py

A run that was stopped amid an epoch is given a damaged `last.pt`: cut off, with a bit flipped, or
with an entry that is missing or wrong (signed by a right digest). `--resume` has to refuse it in
one sentence, or to end with the files of an unbroken run; `--resume auto` has to end with these
files wherever the digest tells the damage. Runs on disks that are full or cannot be written have
to end in one sentence, and with the files of an unbroken run once there is room. Small disks are
mounted as a tmpfs, which takes the rights of root; without them file sizes are limited instead.
Prints a table in Markdown.
"""

import argparse
import contextlib
import copy
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from checkpoints import load_checkpoint, save_checkpoint
from scripts.kill_runs import at_step
from tests.forked_runs import COMMANDS, RUN, Ended, differences, snapshot, start, table, wait

GONE = object()
STATE = ("trainer", "optimizer", "state")
GROUP = ("trainer", "optimizer", "param_groups", 0)
WRONG: list[tuple[tuple, Any]] = [
    (("trainer",), GONE),
    (("trainer",), 5),
    (("trainer",), {"optimizer": {}}),
    (("trainer", "optimizer"), None),
    (STATE, None),
    (STATE, {0: 3}),
    (STATE, {"x": {}}),
    ((*STATE, 0), None),
    ((*STATE, 0, "exp_avg"), None),
    ((*STATE, 0, "exp_avg"), GONE),
    ((*STATE, 0, "exp_avg"), torch.zeros(3)),
    ((*STATE, 0, "step"), None),
    ((*STATE, 0, "step"), "x"),
    ((*STATE, 0, "step"), torch.zeros(2)),
    ((*STATE, 0, "more"), torch.zeros(2)),
    (GROUP, None),
    ((*GROUP, "lr"), None),
    ((*GROUP, "lr"), "x"),
    ((*GROUP, "betas"), GONE),
    ((*GROUP, "betas"), [0.9]),
    ((*GROUP, "foreach"), "x"),
    ((*GROUP, "params"), [0]),
    (("trainer", "scheduler"), GONE),
    (("trainer", "scheduler"), None),
    (("trainer", "scheduler"), 5),
    (("trainer", "scheduler", "step"), 3),
    (("trainer", "scheduler", "last_epoch"), None),
    (("trainer", "scheduler", "base_lrs"), "x"),
    (("trainer", "scheduler", "base_lrs"), []),
    (("trainer", "scaler"), GONE),
    (("progress",), GONE),
    (("progress",), []),
    (("progress",), {"epoch": "two"}),
    (("progress", "epoch"), -1),
    (("progress", "epoch"), 10**9),
    (("progress", "best_epoch"), 10**9),
    (("progress", "best_value"), None),
    (("progress", "history"), []),
    (("progress", "history"), [{}, {}]),
    (("progress", "history", 0, "epoch"), None),
    (("progress", "history", 0, "train_loss"), "x"),
    (("progress", "history", 0, 3), 4.0),
    (("progress", "history", 1, "train_loss"), GONE),
    (("progress", "times"), [{}, {}]),
    (("progress", "lines"), [3]),
    (("random_state",), GONE),
    (("random_state",), {}),
    (("random_state", "python"), 3),
    (("random_state", "python", 1, 0), 2**70),
    (("random_state", "python", 2), "x"),
    (("random_state", "numpy", 2), 10**6),
    (("random_state", "numpy", 1), torch.zeros(3)),
    (("random_state", "torch"), torch.zeros(3)),
    (("random_state", "torch"), torch.zeros(5056, dtype=torch.uint8)),
    (("random_state", "cuda"), GONE),
    (("place",), {"step": "x"}),
    (("place", "step"), -1),
    (("place", "epoch"), 9),
    (("place", "done"), None),
    (("place", "seconds"), "x"),
    (("place", "count"), None),
    (("place", "sums"), None),
    (("place", "sums", "loss"), "x"),
    (("place", "sums", "loss"), torch.zeros(3)),
    (("places",), 3),
    (("model",), GONE),
    (("model",), []),
    (("model",), {}),
    (("model", "classifier.weight"), "x"),
    (("model", "classifier.weight"), None),
    (("model", "classifier.weight"), torch.zeros(1)),
    (("model", 3), torch.zeros(1)),
    (("args",), GONE),
    (("args",), "K"),
    (("args", "K"), "many"),
    (("args", "model"), 7),
    (("args", 3), 4),
]


def spoil(checkpoint: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    """Return a checkpoint in which the entry at a path is gone, or another value."""
    spoilt = copy.deepcopy(checkpoint)
    inner = spoilt
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return spoilt


class Damage:
    """Runs whose files or disks are damaged.

    Args:
        place: An empty folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.words = [*COMMANDS["gradient"], "--output_dir", RUN, "--resume", "auto"]
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.counter = 0
        for name in ("whole", "stopped"):
            (place / name).mkdir()
            hook = at_step("gradient", 12) if name == "stopped" else None
            ended = wait(start(place / name, self.words, hook), place / name)
            if ended.code != (143 if hook else 0):
                raise SystemExit(f"the run to be damaged failed:\n{ended.said}")
        self.expected = snapshot(place / "whole" / RUN)
        self.stopped = (place / "stopped" / RUN / "last.pt").read_bytes()

    @contextlib.contextmanager
    def case(self, *, begun: bool) -> Iterator[Path]:
        """Yield a folder, with a run that was stopped in it if that is asked for."""
        self.counter += 1
        folder = self.place / f"case_{self.counter}"
        if begun:
            shutil.copytree(self.place / "stopped", folder)
        else:
            folder.mkdir()
        yield folder
        shutil.rmtree(folder)

    def row(self, what: str) -> dict[str, Any]:
        """Begin a row of the table."""
        if self.rows:
            print(list(self.rows[-1].values()), file=sys.stderr, flush=True)
        names = ("refused in a sentence", "went on to the same files", "tracebacks")
        names += ("wrong numbers", "made good afterwards")
        self.rows.append({"damage": what, "cases": 0, **dict.fromkeys(names, 0)})
        return self.rows[-1]

    def judge(self, row: dict[str, Any], name: str, folder: Path, ended: Ended) -> bool:
        """Count how a run ended; return whether it went on to its end."""
        heads = ("error: ", "main.py: error: ")
        said = [line for line in ended.said.splitlines() if line.startswith(heads)]
        row["cases"] += 1
        if ended.code == 0 and not ended.broken:
            wrong = differences(self.expected, snapshot(folder / RUN))
            row["went on to the same files" if not wrong else "wrong numbers"] += 1
            if wrong:
                self.problems.append(f"{name}: {', '.join(wrong)} differ")
            return True
        if ended.broken or ended.code not in (1, 2) or len(said) != 1:
            row["tracebacks"] += 1
            self.problems.append(f"{name}: exit code {ended.code}\n{ended.said}")
        else:
            row["refused in a sentence"] += 1
        return False

    def make_good(self, row: dict[str, Any], name: str, folder: Path) -> None:
        """Go on by ``--resume auto``: it has to end with the files of an unbroken run."""
        ended = wait(start(folder, self.words), folder)
        wrong = ["the run"] if ended.code else differences(self.expected, snapshot(folder / RUN))
        row["made good afterwards"] += not wrong
        if wrong:
            self.problems.append(f"{name}, --resume auto: {', '.join(wrong)}\n{ended.said}")

    def damage_file(self, what: str, contents: dict[str, bytes], *, noticed: bool = True) -> None:
        """Put other contents in the place of ``last.pt``.

        Args:
            what: Kind of damage.
            contents: The file by name of the case.
            noticed: Whether the digest tells, so that `--resume auto` takes another file.
        """
        row = self.row(what)
        for name, content in contents.items():
            with self.case(begun=True) as folder:
                last = folder / RUN / "last.pt"
                last.unlink()  # it may share its content with others
                last.write_bytes(content)
                words = ["--resume", "--output_dir", RUN, "--device", "cpu"]
                ended = wait(start(folder, words), folder)
                if not self.judge(row, f"{what}, {name}", folder, ended) and noticed:
                    self.make_good(row, f"{what}, {name}", folder)
        if not noticed:
            row["made good afterwards"] = "-"

    def cut(self, count: int) -> None:
        """Cut last.pt off at lengths from nothing to all but one byte."""
        lengths = torch.linspace(0, len(self.stopped) - 1, count).int().tolist()
        contents = {f"{length} bytes": self.stopped[:length] for length in lengths}
        self.damage_file("last.pt is cut off", contents)

    def flip(self, count: int, seed: int) -> None:
        """Flip single bits of last.pt."""
        rng, contents = random.Random(seed), {}
        for _ in range(count):
            bit = rng.randrange(8 * len(self.stopped))
            damaged = bytearray(self.stopped)
            damaged[bit // 8] ^= 1 << bit % 8
            contents[f"bit {bit}"] = bytes(damaged)
        self.damage_file("a bit of last.pt is flipped", contents)

    def exchange(self, wrong: list[tuple[tuple, Any]]) -> None:
        """Exchange entries of last.pt, and sign them."""
        checkpoint, contents = load_checkpoint(self.place / "stopped" / RUN / "last.pt"), {}
        path = self.place / "spoilt.pt"
        for number, (where, value) in enumerate(wrong):
            save_checkpoint(path, spoil(checkpoint, where, value))
            kind = "gone" if value is GONE else type(value).__name__
            contents[f"{number}: {' '.join(map(str, where))} is {kind}"] = path.read_bytes()
        what = "an entry of last.pt is missing or wrong, with a right digest"
        self.damage_file(what, contents, noticed=False)

    def fill(self, count: int) -> None:
        """Run on disks that are too small, then give them room."""
        most = sum(path.stat().st_size for path in (self.place / "whole" / RUN).iterdir())
        row = self.row("the disk is full (tmpfs)")
        for size in torch.linspace(8192, 1.2 * most, count).int().tolist():
            with self.case(begun=False) as folder, mounted(folder / RUN, f"size={size}") as change:
                ended = wait(start(folder, self.words), folder)
                name = f"a disk of {size} bytes"
                if not self.judge(row, name, folder, ended):
                    change("size=64m")
                    self.make_good(row, name, folder)

    def limit(self, count: int) -> None:
        """Run with a limit of file sizes, then without."""
        row = self.row("files may not grow (ulimit -f)")
        for size in torch.linspace(4096, len(self.stopped), count).int().tolist():

            def hook(size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

            with self.case(begun=False) as folder:
                ended = wait(start(folder, self.words, hook), folder)
                name = f"files of {size} bytes"
                if not self.judge(row, name, folder, ended):
                    self.make_good(row, name, folder)

    @contextlib.contextmanager
    def unwritable(self) -> Iterator[tuple[Path, Callable[[str], None]]]:
        """Yield the folder of a stopped run that cannot be written, and what changes that."""
        with self.case(begun=True) as folder:
            (folder / RUN).rename(folder / "begun")
            with mounted(folder / RUN, "size=64m") as change:
                shutil.copytree(folder / "begun", folder / RUN, dirs_exist_ok=True)
                change("ro")
                yield folder, change

    def read_only(self) -> None:
        """Run, and test, where nothing can be written."""
        row = self.row("the folder cannot be written (tmpfs, read-only)")
        starts = {
            "--overwrite": [*COMMANDS["gradient"], "--output_dir", RUN, "--overwrite"],
            "--resume": ["--resume", "--output_dir", RUN, "--device", "cpu"],
            "--resume auto": self.words,
        }
        for name, words in starts.items():
            with self.unwritable() as (folder, change):
                ended = wait(start(folder, words), folder)
                if not self.judge(row, f"read-only, {name}", folder, ended):
                    change("rw")
                    self.make_good(row, f"read-only, {name}", folder)
        row = self.row("the folder cannot be written, --test_only")
        with self.unwritable() as (folder, change):
            words = ["--test_only", "--output_dir", RUN, "--device", "cpu"]
            ended = wait(start(folder, words), folder)
            change("rw")
            again = wait(start(folder, words), folder)
            measured = [
                [line for line in each.said.splitlines() if line.startswith("[Test]")]
                for each in (ended, again)
            ]
            row["cases"] += 1
            row["tracebacks"] += ended.broken or ended.code != 0
            same = len(measured[0]) == 1 and measured[0] == measured[1]
            row["went on to the same files" if same else "wrong numbers"] += 1
            if (
                ended.broken
                or ended.code
                or not same
                or "nothing of this was kept" not in ended.said
            ):
                self.problems.append(f"--test_only, read-only:\n{ended.said}")


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[Callable[[str], None]]:
    """Mount a tmpfs for a while; yields what mounts it anew with other options."""

    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        subprocess.run(words, check=True, capture_output=True)

    path.mkdir(exist_ok=True)
    mount(options)
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def can_mount() -> bool:
    """Say whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder), "size=64k"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="lengths, and bits; disks: a fifth")
    parser.add_argument("--stride", type=int, default=1, help="try every n-th wrong entry")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        damage = Damage(Path(scratch))
        if can_mount():
            damage.fill(-(-arguments.count // 5))
            damage.read_only()
        else:
            print("note: no tmpfs can be mounted here: full and read-only disks are left out.")
        damage.limit(-(-arguments.count // 5))
        damage.cut(arguments.count)
        damage.flip(arguments.count, arguments.seed)
        damage.exchange(WRONG[:: arguments.stride])
    print(table(damage.rows), *damage.problems, sep="\n")
    sys.exit(bool(damage.problems))
