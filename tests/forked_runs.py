"""Small runs of the three trainers in processes of their own, and what their files say.

Every run is forked from this process, which has imported everything and learnt nothing.
"""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision  # noqa: F401 - what a run would import

import models
from checkpoints import content_digest, load_checkpoint
from main import main
from tests.conftest import TinyNet

__all__ = ["COMMANDS", "RUN", "Ended", "differences", "snapshot", "start", "table", "wait"]

RUN = "run"  # the run folder, in the folder of a case


DIGITS = ("--dataset", "digits", "--device", "cpu", "--limit_test", "40")
COMMANDS = {
    "gradient": [
        *("--model", "tiny", "--layer", "Conv2d", "--num_epochs", "3", "--batch_size", "20"),
        *("--limit_train", "110", "--val_split", "0.1", "--augment", "--save_every", "2"),
        *("--scheduler", "cosine", *DIGITS),
    ],
    "growth": [
        *("--model", "dynamic", "--num_epochs", "2", "--num_layers", "2", "--batch_size", "20"),
        *("--limit_train", "1200", "--save_every", "1", "--prune", *DIGITS),
    ],
    "memory": ["--model", "knn", "--K", "1,3", "--limit_train", "200", *DIGITS],
}


class Ended:
    """How a run ended.

    Attributes:
        code: Its exit code; less than zero: the signal that killed it.
        said: What it printed.
    """

    def __init__(self, code: int, said: str) -> None:
        self.code, self.said = code, said

    @property
    def broken(self) -> bool:
        """Whether it ended in a traceback."""
        return "Traceback (most recent call last)" in self.said


def start(folder: Path, words: list[str], hook: Callable[[], Any] | None = None) -> int:
    """Fork a run of ``main.py`` in a folder; return its process.

    Args:
        folder: Where it runs; what it prints goes into ``log.txt`` there.
        words: Its flags.
        hook: Called in the process before the run.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code: Any = 70
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        models.MODELS["tiny"] = TinyNet
        if hook is not None:
            hook()
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # it is looked for in what was printed
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code or 0)


def wait(process: int, folder: Path) -> Ended:
    """Wait for a run to end."""
    _, status = os.waitpid(process, 0)
    said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), said)


SECONDS = re.compile(r"\d+\.\d+s|\d+ (samples|queries)/s")
TIMED = ("times", "lines", "digest", "best_digest")


def _untimed(item: Any) -> Any:
    if isinstance(item, dict):
        return {k: _untimed(v) for k, v in item.items() if k not in TIMED}
    return item


def snapshot(folder: Path) -> dict[str, Any]:
    """Return what every file of a run says, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in ("timing.csv", "environment.json"):
            continue
        if path.suffix == ".pt":
            found[name] = content_digest(_untimed(load_checkpoint(path)))
        elif name == "summary.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.suffix == ".txt":
            found[name] = SECONDS.sub("", path.read_text(encoding="utf-8"))
        else:
            found[name] = path.read_bytes()
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of files that are not the same, or only in one of two snapshots."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[n]) for n in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
