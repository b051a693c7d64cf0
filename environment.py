"""What surrounded a run: versions, machine, command, data; kept in ``environment.json``."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from checkpoints import content_digest
from run_folder import RunFolder
from utils import read_text_file, write_text

__all__ = ["describe_environment", "fingerprint", "record_start"]


def git_commit() -> str | None:
    """Return the commit of this checkout, "+" behind it if files differ; None outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if (here / ".git").exists() else None
    if commit is None:
        return None
    return commit + ("+" if git("status", "--porcelain", "-uno") else "")


def describe_environment(command: str, device: torch.device, processes: int) -> dict[str, Any]:
    """Return versions, machine and command of this start."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": command,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "host": platform.node(),
        "device": device.type,
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": processes,
        "git_commit": git_commit(),
    }


def _content(dataset: Dataset | None) -> Any:
    """Return what a data set is made of, as far as it can be told without drawing from it."""
    if dataset is None:
        return None
    if isinstance(dataset, Subset):
        return [list(map(int, dataset.indices)), _content(dataset.dataset)]
    parts: list[Any] = [type(dataset).__name__, len(dataset)]
    for name in ("images", "labels", "features", "targets"):
        value = getattr(dataset, name, None)
        if isinstance(value, list) and value and not isinstance(value[0], Tensor | int):
            continue
        if isinstance(value, Tensor | list):
            parts.append(value)
    samples = getattr(dataset, "samples", None)  # files: names and sizes, not their content
    if isinstance(samples, list):
        parts.append([[Path(path).name, os.path.getsize(path), int(c)] for path, c in samples])
    return parts


def fingerprint(data: Any) -> str:
    """Return a digest of a run's data; of files in folders the names and sizes count."""
    return content_digest([data.name, *map(_content, (data.train, data.val, data.test))])


def record_start(folder: RunFolder, facts: dict[str, Any], *, goes_on: bool) -> str | None:
    """Add a start of the run to ``environment.json``.

    Args:
        folder: The run folder.
        facts: What :func:`describe_environment` returned, and more.
        goes_on: Whether the run was begun before.

    Returns:
        A note where the data differ from those that the run began with.
    """
    path = folder.file(folder.ENVIRONMENT)
    starts: list[Any] = []
    if goes_on and path.is_file():
        try:
            starts = json.loads(read_text_file(path))["starts"]
            if not isinstance(starts, list):
                raise TypeError("its starts are no list")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            starts = []
            print(f"note: {path} is damaged and begun anew ({error}).")
    write_text(path, json.dumps({"starts": [*starts, facts]}, indent=1) + "\n")
    before = starts[0].get("data") if starts and isinstance(starts[0], dict) else None
    if before not in (None, facts["data"]):
        return "note: the data are others than those that the run began with."
    return None
