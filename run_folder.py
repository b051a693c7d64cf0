"""A run: what it did so far, what stopped it, its folder, and the lock that one start holds."""

import contextlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from checkpoints import (
    CheckpointError,
    check_rows,
    load_checkpoint,
    save_checkpoint,
    without_training,
)
from utils import CsvLog, WriteError, atomic_path, remove_left_overs, write_text, writing

__all__ = [
    "Measured",
    "Pass",
    "Progress",
    "RunFolder",
    "TrainingError",
]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is saved.

    Attributes:
        batch: The batch that showed it, where it is known.
    """

    batch: Any = None


TIME_COLUMNS = ("epoch", "seconds", "train_seconds", "train_samples_per_second")


@dataclass
class Progress:
    """What a run has done so far; part of every checkpoint.

    Attributes:
        epoch: Epochs done.
        best_epoch: The best of them; 0: none yet.
        best_value: Its headline metric.
        best_digest: Digest of the state after it (`content_digest`); empty in that state itself.
        finished: Whether there is no more to learn.
        history: Rows of metrics.csv.
        lines: Lines of the results file.
        times: Rows of timing.csv.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_value: float = float("-inf")
    best_digest: str = ""
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: Any) -> "Progress":
        """Read it from a checkpoint.

        Raises:
            CheckpointError: If an entry is missing or of the wrong type.
        """
        made = cls()
        if not isinstance(state, Mapping):
            raise CheckpointError("its 'progress' is no table.")
        later = {"best_digest", "finished"}  # not in files of format 1
        for name, default in vars(made).items():
            if name not in state and name in later:
                continue
            value = state.get(name)
            if type(value) is not type(default) and not (
                name == "best_value" and isinstance(value, int)
            ):
                raise CheckpointError(f"'{name}' of its 'progress' is missing or of another type.")
            setattr(made, name, value.copy() if isinstance(value, list) else value)
        check_rows(made.history, "progress['history']", ["epoch"])
        check_rows(made.times, "progress['times']", set(TIME_COLUMNS) - {"train_seconds"})
        if not all(isinstance(line, str) for line in made.lines):
            raise CheckpointError("its progress['lines'] holds something else than text.")
        told = [row["epoch"] for row in made.history]
        right = told == list(range(1, len(told) + 1)) and len(told) == made.epoch
        if not right or not 0 <= made.best_epoch <= made.epoch:
            raise CheckpointError(
                f"its progress says epoch {made.epoch}, best epoch {made.best_epoch}, and has rows "
                f"of {len(told)} epochs: they do not belong together."
            )
        # Older files do not know how long the training part of an epoch took.
        made.times = [{c: row.get(c, math.nan) for c in TIME_COLUMNS} for row in made.times]
        return made


@dataclass
class Pass:
    """What the training part of an epoch did.

    Attributes:
        epoch: Its number.
        metrics: Training metrics, averaged over samples.
        samples: How many samples were learnt from.
        start: When it began, by `time.perf_counter`.
        seconds: How long it took.
    """

    epoch: int
    metrics: dict[str, float]
    samples: int
    start: float
    seconds: float


@dataclass
class Measured:
    """What the evaluation of an epoch found.

    Attributes:
        metrics: The metrics that decide on the best epoch.
        rows: Rows of metrics.csv.
        lines: Lines of the results file.
        times: Rows of timing.csv.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    lines: list[str]
    times: list[dict[str, Any]]


class RunFolder:
    """The files of one run: args.txt, model.txt, results, tables, checkpoints, pictures.

    Args:
        path: The folder; created by :meth:`start`.
        writes: Whether this process writes; of several processes only the first one does.
        saves: Which checkpoints are kept: "best", "last", "both" or "none".
    """

    RESULTS, METRICS, TIMING = "train_eval_results.txt", "metrics.csv", "timing.csv"
    LAST, BEST, PREVIOUS = "last.pt", "best.pt", "previous.pt"
    TEST, CURVES = "test_results.txt", "curves.png"
    ARGS, MODEL, SUMMARY = "args.txt", "model.txt", "summary.json"
    ENVIRONMENT = "environment.json"

    LOCK = ".lock"

    def __init__(
        self, path: str | os.PathLike, *, writes: bool = True, saves: str = "both"
    ) -> None:
        self.path, self.writes, self.saves = Path(path), writes, saves
        self.keeps_last, self.keeps_best = saves in ("last", "both"), saves in ("best", "both")
        self.trackers: Any = None  # see `trackers.Trackers`
        self._scratch: tempfile.TemporaryDirectory | None = None

    def holds_run(self) -> bool:
        """Say whether an earlier run left results here."""
        names = (self.LAST, self.BEST, self.METRICS, self.TEST)
        return any(os.path.exists(self.path / name) for name in names)

    def file(self, name: str) -> Path:
        """Return the path of a file that is about to be written; its folder is made.

        A process that does not write is given a place outside, which vanishes with it.
        """
        if not self.writes and self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory()
        path = (self.path if self.writes else Path(self._scratch.name)) / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_result(self, name: str, text: str) -> None:
        """Write what a test found; what an earlier one found is kept as NAME.1.EXT and so on."""
        path = self.file(name)
        if path.exists():
            if path.read_bytes() == text.encode("utf-8"):
                return
            number = next(
                n for n in count(1) if not path.with_suffix(f".{n}{path.suffix}").exists()
            )
            with writing(path):
                link_or_copy(path, path.with_suffix(f".{number}{path.suffix}"))
        write_text(path, text)

    def writable(self) -> bool:
        """Say whether files can be written here, by writing one."""
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(1 << 16))
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and hold it for this process, so that no other writes into it.

        The system lets go of it when the process ends, however that comes about. A folder that was
        made and stays empty is removed again.

        Raises:
            WriteError: If another process holds it, or it cannot be written.
        """
        if not self.writes:
            yield
            return
        with writing(self.path):
            made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._locked():
                names = (v for k, v in vars(RunFolder).items() if k.isupper())
                if blocked := [name for name in names if (self.path / name).is_dir()]:
                    raise WriteError(
                        f"{self.path / blocked[0]} is a folder, and a run writes a file of that "
                        "name. Move it away, or name another --output_dir."
                    )
                remove_left_overs(self.path)
                yield
        finally:
            with contextlib.suppress(OSError):  # it holds a run
                for path in made:
                    path.rmdir()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path / self.LOCK
        if fcntl is None:
            print("note: this system knows no file locks: see that no other run writes here.")
            yield
            return
        with writing(path):
            while True:
                file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held to the end
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    file.close()
                    raise WriteError(
                        f"--output_dir {self.path} is being written by {holder}. Wait for its end, "
                        "stop it, or name another folder."
                    ) from error
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
                file.close()  # its holder removed it just now
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()

    def start(
        self, args_text: str | None, model_text: str, progress: Progress, *, fresh: bool
    ) -> None:
        """Write args.txt and model.txt, and the logs as far as they are known.

        Args:
            args_text: What args.txt is to hold; None leaves it as it is.
            model_text: What model.txt is to hold.
            progress: What was done so far.
            fresh: Whether the run begins here: files of another one are removed first.
        """
        if not self.writes:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if fresh:
                names = (self.LAST, self.BEST, self.PREVIOUS, self.TEST, self.CURVES, self.SUMMARY)
                for name in names:
                    (self.path / name).unlink(missing_ok=True)
        if args_text is not None:
            write_text(self.path / self.ARGS, args_text)
        write_text(self.path / self.MODEL, model_text)
        write_text(self.path / self.RESULTS, "".join(f"{line}\n" for line in progress.lines))
        self.metrics = CsvLog(self.path / self.METRICS, progress.history)
        self.timing = CsvLog(self.path / self.TIMING, progress.times)
        if self.trackers is not None:
            self.trackers.rows(progress.history)

    def write_line(self, line: str) -> None:
        """Append a line to the results file and show it."""
        if not self.writes:
            return
        tqdm.write(line)
        path = self.path / self.RESULTS
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def save(self, checkpoint: Mapping[str, Any], *, best: bool) -> str:
        """Save ``last.pt``, and ``best.pt`` if it is the best so far.

        What only a resumed run needs stands in ``last.pt`` alone; where that is nothing, both are
        one file. The pair is decided by ``last.pt``: if this is interrupted, :meth:`settle` of the
        resumed run finds from its entries which state ``best.pt`` has to be. Where ``best.pt`` is
        not another whole state to fall back on, ``previous.pt`` is the one before ``last.pt``;
        :meth:`end` removes it.

        Returns:
            The digest of the file that is left for the best state; empty if there is none.
        """
        if not self.writes:
            return ""
        last, kept, previous = (self.path / n for n in (self.LAST, self.BEST, self.PREVIOUS))
        digest = ""
        if self.keeps_last:
            if last.is_file():
                link_or_copy(last, previous)
            digest = save_checkpoint(last, checkpoint)
            if not best and kept.is_file() and without_training(checkpoint) is checkpoint:
                with writing(previous):
                    previous.unlink(missing_ok=True)
        return self._save_best(checkpoint, digest) if best and self.keeps_best else ""

    def _save_best(self, checkpoint: Mapping[str, Any], digest: str) -> str:
        lean = without_training(checkpoint)
        if lean is not checkpoint or not self.keeps_last:
            return save_checkpoint(self.path / self.BEST, lean)
        link_or_copy(self.path / self.LAST, self.path / self.BEST)
        return digest

    def end(self) -> None:
        """Remove what only a run that goes on needs."""
        if self.writes:
            with writing(self.path / self.PREVIOUS):
                (self.path / self.PREVIOUS).unlink(missing_ok=True)

    def settle(self, source: Path, progress: Progress, *, at_end: bool) -> tuple[bool, str | None]:
        """Let ``last.pt`` and ``best.pt`` be those of the state that a run goes on from.

        Args:
            source: The file that it goes on from, here or in another folder.
            progress: What is done according to it.
            at_end: Whether it is the state at the end of an epoch, not amid one.

        Returns:
            Whether there is a best state, and a line that says what was mended or is missing.
        """
        last, best = self.path / self.LAST, self.path / self.BEST
        itself = at_end and progress.best_epoch == progress.epoch
        theirs = source.parent / self.BEST
        problem = None
        if not itself and progress.best_epoch and self.keeps_best:
            try:
                found = load_checkpoint(theirs)
                told = found.get("progress")
                epoch = told.get("epoch") if isinstance(told, Mapping) else None
                if progress.best_digest not in ("", found.get("digest")) or (
                    epoch != progress.best_epoch or "place" in found
                ):
                    problem = f"{theirs} is another state than the best one, of epoch "
                    problem += str(progress.best_epoch)
            except CheckpointError as error:
                problem = str(error).rstrip(".")
        if source.resolve() != last.resolve():
            link_or_copy(source, last)
        if not self.keeps_best:
            return True, None
        if itself:
            if best.is_file():
                with contextlib.suppress(CheckpointError):
                    if load_checkpoint(best).get("digest", "") == progress.best_digest != "":
                        return True, None
            self._save_best(load_checkpoint(last), progress.best_digest)
            return True, f"{self.BEST} is made from {source}, which holds the best epoch."
        if problem is not None:
            best.unlink(missing_ok=True)
            return False, problem
        if progress.best_epoch and theirs.resolve() != best.resolve():
            link_or_copy(theirs, best)
        return True, None

    def log(
        self,
        rows: Sequence[Mapping[str, Any]],
        lines: Sequence[str],
        times: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write what was measured: rows of the table, lines of the results, times."""
        if not self.writes:
            return
        for line in lines:
            self.write_line(line)
        for row in rows:
            self.metrics.append(row)
        for row in times:
            self.timing.append(row)
        if self.trackers is not None:
            self.trackers.rows(rows)

    def sizes(self) -> dict[str, int]:
        """Return the bytes that the folder takes, and those of each checkpoint in it."""
        paths = (p for p in self.path.rglob("*") if p.is_file() and p.name != self.LOCK)
        files = {path: path.stat() for path in paths}
        once = {(found.st_dev, found.st_ino): found.st_size for found in files.values()}
        named = {p.name: found.st_size for p, found in files.items()}
        checkpoints = {name: named[name] for name in (self.LAST, self.BEST) if name in named}
        return {"": sum(once.values()), **checkpoints}

    def summarize(self, **facts: Any) -> None:
        """Write ``summary.json``: what scripts need to know of a run without guessing."""
        if self.writes:
            write_text(self.file(self.SUMMARY), json.dumps(facts, indent=1) + "\n")


def link_or_copy(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source``, or a copy where there are no links."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links, or another one
            shutil.copyfile(source, temporary)
