"""Kill runs at random moments and at each of their writes, resume them, and compare the files.

    python scripts/kill_runs.py --moments 20 --trainers gradient growth memory

Every run is forked from this process, which has imported everything and learnt nothing. A run is
killed by SIGKILL: at the n-th file that it moves to its name or links, for every n until it ends
by itself, and at random moments. It is gone on with by the same command (`--resume auto`) until it
ends; then every file has to be that of the unbroken run, byte for byte but for times. With
`--stop`, runs are stopped by SIGTERM amid an epoch instead, which has to exit with 143.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import models
from checkpoints import content_digest, load_checkpoint
from main import main
from options import Options


class SmallNet(nn.Module):
    """A layer, batch norm, dropout and a classifier."""

    Options = Options
    family, tasks, training = "Small", ("classification",), "gradient"
    uses_layer, min_input_size = True, 1

    def __init__(self, *, layer, in_channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            layer(in_channels=in_channels, out_channels=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x))


DIGITS = ["--dataset", "digits", "--device", "cpu", "--limit_test", "40"]
COMMANDS = {
    "gradient": [
        *("--model", "small", "--layer", "Conv2d", "--num_epochs", "3", "--batch_size", "20"),
        *("--limit_train", "110", "--val_split", "0.1", "--augment", "--save_every", "2"),
        *("--scheduler", "cosine"),
    ],
    "growth": [
        *("--model", "dynamic", "--num_epochs", "2", "--num_layers", "2", "--batch_size", "20"),
        *("--limit_train", "1200", "--save_every", "1", "--prune"),
    ],
    "memory": ["--model", "knn", "--K", "1,3", "--limit_train", "200"],
}


def start(folder: Path, words: list[str], hook=None) -> int:
    """Fork a run in a folder; return its process."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        models.MODELS["small"] = SmallNet
        if hook is not None:
            hook()
        main([*words, *DIGITS, "--output_dir", "run", "--resume", "auto"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code or 0)


def finish(folder: Path, words: list[str]) -> None:
    _, status = os.waitpid(start(folder, words), 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{folder}: the resumed run failed:\n{(folder / 'log.txt').read_text()}")


def kill_at_write(number: int):
    """Return a hook that kills the process before its n-th rename or link, or right after it."""

    def hook():
        count = 0
        before = number % 2 == 0

        def wrap(function):
            def call(*arguments):
                nonlocal count
                count += 1
                if count == number // 2 + 1 and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*arguments)
                if count == number // 2 + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        os.replace, os.link = wrap(os.replace), wrap(os.link)

    return hook


SECONDS = re.compile(r"\d+\.\d+s|\d+ (samples|queries)/s")
TIMED = ("times", "lines", "digest", "best_digest")


def untimed(item):
    if isinstance(item, dict):
        return {k: untimed(v) for k, v in item.items() if k not in TIMED}
    return item


def snapshot(folder: Path) -> dict[str, object]:
    """Return what every file of a run says, but for times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in ("timing.csv", "environment.json"):
            continue
        if path.suffix == ".pt":
            found[name] = content_digest(untimed(load_checkpoint(path)))
        elif name == "summary.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.suffix == ".txt":
            found[name] = SECONDS.sub("", path.read_text(encoding="utf-8"))
        else:
            found[name] = path.read_bytes()
    return found


def differences(one: dict, other: dict) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def attack(trainer: str, args: argparse.Namespace, place: Path) -> list[str]:
    """Kill, resume and compare; return what went wrong."""
    words, problems, killed = COMMANDS[trainer], [], 0
    whole = place / "whole"
    whole.mkdir()
    begun = time.perf_counter()
    finish(whole, words)
    length = time.perf_counter() - begun
    expected = snapshot(whole / "run")

    def judge(name: str, folder: Path) -> None:
        finish(folder, words)
        if wrong := differences(expected, snapshot(folder / "run")):
            problems.append(f"{trainer}, {name}: {', '.join(wrong)} differ")
        shutil.rmtree(folder)

    rng = random.Random(args.seed)
    moments = [rng.uniform(0.02, length) for _ in range(args.moments)]
    for number, moment in enumerate(moments):
        folder = place / f"moment_{number}"
        folder.mkdir()
        process = start(folder, words)
        time.sleep(moment)
        os.kill(process, signal.SIGTERM if args.stop else signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(status)
        if args.stop and code not in (0, 143):
            problems.append(f"{trainer}, SIGTERM after {moment:.3f}s: exit code {code}")
        killed += code != 0
        judge(f"moment {number} ({moment:.3f}s)", folder)
    number = 0
    while not args.stop:
        folder = place / f"write_{number}"
        folder.mkdir()
        _, status = os.waitpid(start(folder, words, kill_at_write(number)), 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        killed += 1
        judge(f"write {number // 2 + 1}, {('before', 'after')[number % 2]}", folder)
        number += args.stride
    print(f"{trainer}: {killed} killed, {len(problems)} went wrong.", flush=True)
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="random moments a trainer")
    parser.add_argument("--stride", type=int, default=1, help="try every n-th write")
    parser.add_argument("--stop", action="store_true", help="SIGTERM at moments, no kill at writes")
    parser.add_argument("--trainers", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for each in arguments.trainers:
        with tempfile.TemporaryDirectory() as scratch:
            found += attack(each, arguments, Path(scratch))
    print("\n".join(found))
    sys.exit(bool(found))
