"""Run the program on one hostile input and judge how it ended."""

import contextlib
import io
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torchvision

import main as program
import models
from tests.conftest import TinyNet

SECONDS = 60  # from here on a run hangs
PIPE = "pipe"


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        argv: The command line.
        files: Contents by path below the working folder; PIPE makes a named pipe.
        checks_only: Stop where the work would begin: what is left may be long, not wrong.
    """

    argv: tuple[str, ...]
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    checks_only: bool = False

    def __repr__(self) -> str:
        files = {name: content[:60] for name, content in self.files.items()}
        return f"Case({list(self.argv)}, {files})"


class Hang(BaseException):
    """The run took too long."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (None: it returned), and what is wrong with that, if any."""

    code: int | None
    problem: str
    seconds: float


def attempt(case: Case) -> Outcome:
    """Run the program in an empty folder."""
    out, err = io.StringIO(), io.StringIO()
    code, problem, start = None, "", time.perf_counter()
    with _place(case):
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                program.main(list(case.argv))
        except SystemExit as stop:
            code = stop.code
        except Hang:
            problem = f"hangs: more than {SECONDS} s"
        except BaseException:  # whatever ends a run otherwise is what is looked for
            problem = traceback.format_exc()
    said = err.getvalue()
    if not problem and "Traceback" in out.getvalue() + said:
        problem = f"shows a traceback:\n{out.getvalue()}{said}"
    if not problem and code not in (None, 0, 1, 2):
        problem = f"exit code {code!r}"
    lines = [s for s in said.splitlines() if s.startswith(("error: ", "main.py: error: "))]
    if not problem and code in (1, 2) and len(lines) != 1:
        problem = f"exit code {code} with {len(lines)} messages:\n{said}"
    return Outcome(code, problem, time.perf_counter() - start)


@contextlib.contextmanager
def _place(case: Case) -> Iterator[None]:
    """Make the files, go there, and let nothing be downloaded."""

    def no_network(self: object) -> None:
        raise OSError("no network")

    def ring(*_: object) -> None:
        raise Hang

    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name, content in case.files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == PIPE:
                os.mkfifo(path)
            else:
                path.write_bytes(content)
        stack.enter_context(mock.patch.dict(models.MODELS, tiny=TinyNet))
        for kind in ("MNIST", "CIFAR10", "CIFAR100"):
            owner = getattr(torchvision.datasets, kind)
            stack.enter_context(mock.patch.object(owner, "download", no_network))
        if case.checks_only:
            stack.enter_context(mock.patch.object(program, "run_choice", return_value={}))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        former = signal.signal(signal.SIGALRM, ring)
        stack.callback(signal.signal, signal.SIGALRM, former)
        os.chdir(folder)
        stack.callback(os.chdir, before)
        stack.callback(signal.alarm, 0)
        signal.alarm(SECONDS)
        yield
