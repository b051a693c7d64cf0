"""Kill runs at random moments and at each of their writes, resume them, and compare the files.

    python scripts/kill_runs.py --moments 20 --trainers gradient growth memory

A run is killed by SIGKILL before each operation on a file of its folder (opening it to write,
renaming, linking, removing, changing its rights), amid the writing of each checkpoint, and at
random moments; and it is stopped by SIGTERM amid each of its steps and at random moments, which
has to end it with the code 143. Of the random moments every other run is killed once more while
it is gone on with. The same command (`--resume auto`) goes on until the run ends; then every file
has to be that of the unbroken run, byte for byte but for times. Prints a table in Markdown.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import checkpoints
import trainers
from tests.forked_runs import COMMANDS, RUN, differences, snapshot, start, table, wait

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename", "os.link", "os.remove", "os.chmod", "os.rmdir", "os.mkdir"}


def at_write(number: int, report: Path | None = None) -> Callable[[], None]:
    """Return a hook that kills a run at its n-th operation on a file of its folder.

    Args:
        number: Which one, from 0 on; less than 0: none, and the count goes to `report`.
        report: Where the number of operations is written.
    """

    def hook() -> None:
        place, count = Path(RUN).absolute(), 0

        def step() -> None:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            if report is not None:
                os.write(counter, b".")

        def watch(event: str, arguments: tuple) -> None:
            if event != "open" and event not in CHANGES:
                return
            path = arguments[0]
            if not isinstance(path, str | os.PathLike):
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
                return
            if place in (whole := Path(path).absolute()).parents or whole == place:
                step()

        original = checkpoints._Watched.write

        def write(self, data):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 9:  # a part of the file is on disk, the rest is not
                self.file.flush()
                step()
            return original(self, data)

        if report is not None:
            counter = os.open(report, os.O_CREAT | os.O_WRONLY)
        checkpoints._Watched.write = write
        sys.addaudithook(watch)

    return hook


def at_step(trainer: str, number: int) -> Callable[[], None]:
    """Return a hook that stops a run by SIGTERM amid its n-th step, from 1 on."""

    def hook() -> None:
        owner, count = trainers.TRAINERS[trainer], 0
        original = owner.step

        def step(self, *arguments):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *arguments)

        owner.step = step

    return hook


class Attack:
    """Runs of one trainer that are interrupted and gone on with.

    Args:
        trainer: Name of the trainer.
        place: An empty folder.
    """

    def __init__(self, trainer: str, place: Path) -> None:
        self.trainer, self.place = trainer, place
        self.words = [*COMMANDS[trainer], "--output_dir", RUN, "--resume", "auto"]
        self.rows: list[dict[str, object]] = []
        self.problems: list[str] = []
        whole = place / "whole"
        whole.mkdir()
        begun = time.perf_counter()
        self._finish(whole)
        self.length = time.perf_counter() - begun
        self.expected = snapshot(whole / RUN)

    def _finish(self, folder: Path) -> None:
        ended = wait(start(folder, self.words), folder)
        if ended.code != 0:
            raise SystemExit(f"{folder}: the run failed:\n{ended.said}")

    def count_writes(self) -> int:
        """Return how many operations on files an unbroken run takes."""
        folder = self.place / "counted"
        folder.mkdir()
        report = self.place / "count"
        wait(start(folder, self.words, at_write(-1, report)), folder)
        shutil.rmtree(folder)
        return report.stat().st_size

    def try_all(self, how: str, cases: dict[str, Callable[[Path], list[int]]], stop: bool) -> None:
        """Interrupt runs, go on with them and compare.

        Args:
            how: How they are interrupted.
            cases: Begins a run in a folder and returns the exit codes of its processes, by name.
            stop: Whether they are asked to stop, not killed.
        """
        names = ("runs", "interrupted", "files compared", "that differ", "other exit codes")
        row = dict.fromkeys(names, 0)
        wanted = 143 if stop else -signal.SIGKILL
        for name, begin in cases.items():
            folder = self.place / "case"
            folder.mkdir()
            codes = begin(folder)
            row["runs"] += 1
            row["interrupted"] += sum(code == wanted for code in codes)
            for code in codes:
                if code not in (0, wanted):
                    row["other exit codes"] += 1
                    said = (folder / "log.txt").read_text()
                    self.problems.append(f"{self.trainer}, {name}: exit code {code}\n{said}")
            self._finish(folder)
            found = snapshot(folder / RUN)
            wrong = differences(self.expected, found)
            row["files compared"] += len(found)
            row["that differ"] += len(wrong)
            if wrong:
                self.problems.append(f"{self.trainer}, {name}: {', '.join(wrong)} differ")
            shutil.rmtree(folder)
        self.rows.append({"trainer": self.trainer, "interrupted at": how, **row})
        print(table(self.rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)

    def at_moments(self, number: int, signum: int, seed: int) -> None:
        """Interrupt runs from outside at random moments, every other one twice."""
        rng = random.Random(seed)

        def begin(folder: Path) -> list[int]:
            codes = []
            for _ in range(1 + rng.randrange(2)):
                process = start(folder, self.words)
                time.sleep(rng.uniform(0.02, self.length))
                os.kill(process, signum)
                codes.append(wait(process, folder).code)
            return codes

        name = signal.Signals(signum).name
        cases = {f"{name} at moment {i}": begin for i in range(number)}
        self.try_all(f"random moments, {name}", cases, stop=signum == signal.SIGTERM)

    def at_writes(self, stride: int) -> None:
        """Kill runs at every n-th write."""

        def killed_at(number: int) -> Callable[[Path], list[int]]:
            return lambda folder: [wait(start(folder, self.words, at_write(number)), folder).code]

        numbers = range(0, self.count_writes(), stride)
        cases = {f"SIGKILL at write {number}": killed_at(number) for number in numbers}
        self.try_all("each write, SIGKILL" if stride == 1 else "some writes, SIGKILL", cases, False)

    def at_steps(self, stride: int) -> None:
        """Stop runs amid every n-th step, until they end before it."""

        def stopped_at(number: int) -> Callable[[Path], list[int]]:
            hook = at_step(self.trainer, number)
            return lambda folder: [wait(start(folder, self.words, hook), folder).code]

        count = STEPS[self.trainer]
        cases = {f"SIGTERM amid step {n}": stopped_at(n) for n in range(1, count + 1, stride)}
        self.try_all("each step, SIGTERM" if stride == 1 else "some steps, SIGTERM", cases, True)


STEPS = {"gradient": 15, "growth": 4, "memory": 1}  # of the commands


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="random moments a trainer")
    parser.add_argument("--stride", type=int, default=1, help="try every n-th write and step")
    parser.add_argument("--trainers", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, problems = [], []
    for each in arguments.trainers:
        with tempfile.TemporaryDirectory() as scratch:
            attack = Attack(each, Path(scratch))
            for signum in (signal.SIGKILL, signal.SIGTERM):
                attack.at_moments(arguments.moments, signum, arguments.seed)
            attack.at_steps(arguments.stride)
            attack.at_writes(arguments.stride)
        rows += attack.rows
        problems += attack.problems
    print(table(rows), *problems, sep="\n")
    sys.exit(bool(problems))
