"""What a run leaves and what it needs: folders, checkpoints, text files, seeds, counts, curves.

Everything that a run leaves on disk goes through this file: text and checkpoints are written to a
temporary name beside their target and renamed, so that an interrupted write never damages what was
there before.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "CheckpointError",
    "CsvLog",
    "Measured",
    "Pass",
    "Progress",
    "RunFolder",
    "TrainingError",
    "WriteError",
    "atomic_path",
    "autocast",
    "compute_flops",
    "content_digest",
    "count_parameters",
    "describe_model",
    "format_args",
    "free_memory",
    "get_random_state",
    "layer_rows",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "lonely_norms",
    "memory_size",
    "parse_args_text",
    "plot_growth",
    "plot_learning_curves",
    "read_safetensors",
    "read_tensor_file",
    "read_text_file",
    "read_weights",
    "save_checkpoint",
    "save_panels",
    "save_safetensors",
    "seed_everything",
    "set_random_state",
    "write_text",
]


# ---------------------------------------------------------------------------------------------
# Randomness


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath still draw from the global state
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """Collect the state of every global generator in types that load with ``weights_only=True``."""
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`get_random_state` collected."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


# ---------------------------------------------------------------------------------------------
# The machine


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Mixed precision: float16 on GPUs, bfloat16 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def memory_size(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, free or not; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device that nobody uses; half of the machine's if it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return (memory_size(device) or 4 * 2**30) // 2
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


# ---------------------------------------------------------------------------------------------
# Files


FORMAT = 2  # of checkpoints; 1 had no digest


class WriteError(RuntimeError):
    """A file that cannot be written; the message names it and says why."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into a :class:`WriteError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"{path} cannot be written: {reason}. Make room there or give yourself the right to "
            "write, or name another folder."
        ) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` when the block succeeds.

    Raises:
        WriteError: If the file cannot be written.
    """
    path = Path(path)
    with writing(path):
        # The suffix stays: writers such as matplotlib choose the file format by it.
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem[:100]}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


LEFT_OVER = re.compile(r"\.\w+-[a-z0-9_]{8}\.(pt|txt|csv|png|json)")  # names of `atomic_path`


def remove_left_overs(folder: Path) -> None:
    """Remove what writes that were killed left in a folder, and in the folders in it."""
    for path in [*folder.glob(".*-*"), *folder.glob("*/.*-*")]:
        if LEFT_OVER.fullmatch(path.name) and path.is_file():
            with writing(path):
                path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class _Watched(io.RawIOBase):
    """A file that remembers why a write failed: `torch.save` forgets it."""

    def __init__(self, file: Any) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def content_digest(content: Any) -> str:
    """Return a SHA-256 of tensors and plain types: of their values, not of a file's bytes."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            digest.update(f"tensor {item.dtype} {tuple(item.shape)};".encode())
            plain = item.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy() if plain.numel() else b"")
        elif isinstance(item, Mapping):
            digest.update(f"mapping {len(item)};".encode())
            for key, value in item.items():
                add(key)
                add(value)
        elif isinstance(item, list | tuple):
            digest.update(f"list {len(item)};".encode())
            for value in item:
                add(value)
        else:
            text = repr(item).encode()
            digest.update(f"{type(item).__name__} {len(text)};".encode() + text)

    add(content)
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, checkpoint: Mapping[str, Any]) -> str:
    """Save tensors and plain types atomically (they load with ``weights_only=True``).

    Returns:
        The digest of what was saved, which stands in the file too.

    Raises:
        WriteError: If the file cannot be written; what was there before is kept.
    """
    content = {k: v for k, v in checkpoint.items() if k not in ("format", "digest")}
    content = {"format": FORMAT, **content}
    digest = content_digest(content)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        watched = _Watched(file)
        try:
            torch.save({**content, "digest": digest}, watched)
            file.flush()
            os.fsync(file.fileno())
        except RuntimeError:
            if watched.error is not None:
                raise watched.error from None
            raise
    return digest


# Types of numbers in a safetensors file: https://huggingface.co/docs/safetensors
SAFE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64}


def save_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], args: Mapping[str, Any]
) -> None:
    """Write weights and the arguments they belong to as a safetensors file: no code in it."""
    names = {dtype: name for name, dtype in SAFE_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"args": json.dumps(dict(args))}}
    parts, start = [], 0
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous().numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + len(part)],
        }
        parts.append(part)
        start += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def read_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Read what :func:`save_safetensors` or others wrote: ``model``, and ``args`` if it has any.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"there is no checkpoint {path}.") from error
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        args = json.loads(header.pop("__metadata__", {}).get("args", "{}"))
        data, model = bytearray(content[8 + size :]), {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            part, dtype = data[start:stop], SAFE_TYPES[entry["dtype"]]
            flat = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
            model[name] = flat.view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error!r}") from error
    return {"model": model, "args": args}


def read_tensor_file(path: str | os.PathLike) -> Any:
    """Read what ``torch.save`` wrote, to the CPU; nothing but tensors and plain types is unpickled.

    A file whose name ends in .safetensors is read as such.

    Raises:
        CheckpointError: If the file is missing or damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        what = "that is no file" if path.exists() else "there is no such file"
        raise CheckpointError(f"there is no checkpoint {path}: {what}.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # torch.load documents no error types: zip, pickle, EOF, runtime
        # What torch says is left out: it advises to read the file as code.
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is cut off or damaged, or holds something "
            "else than tensors and plain types."
        ) from error


MOST_TEXT = 2**30  # bytes


def read_text_file(path: str | os.PathLike) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        ValueError: If it is missing, no regular file (a pipe could wait for ever), or no text.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no regular file")
        if found.st_size > MOST_TEXT:
            raise OSError(
                f"it has {found.st_size:,} bytes, and texts of up to {MOST_TEXT:,} are read"
            )
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ValueError(f"{path} cannot be read: {error}.") from error


def format_args(args: Mapping[str, Any]) -> str:
    """Word arguments as one ``name: value`` per line, lists and unusual strings as JSON.

    A string is unusual if a plain line would not give it back: line breaks, blanks at its ends,
    the word None, a quote at its beginning, characters that cannot be printed.
    :func:`parse_args_text` reads it back.
    """
    lines = []
    for name, value in args.items():
        if isinstance(value, list | tuple):
            value = json.dumps(list(value))
        elif isinstance(value, str) and (
            value == "None" or value[:1] == '"' or value != value.strip() or not value.isprintable()
        ):
            value = json.dumps(value)
        lines.append(f"{name}: {value}\n")
    return "".join(lines)


def parse_args_text(text: str) -> dict[str, str]:
    """Read ``name: value`` lines into strings; lines without a colon are ignored.

    Lines that begin with a space or ``#`` are ignored as well. What is written as JSON stays so.
    """
    values = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name and not name[0].isspace() and not name.startswith("#"):
            values[name.strip()] = value.strip()
    return values


def link_or_copy(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source``, or a copy where there are no links."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links, or another one
            shutil.copyfile(source, temporary)


class CsvLog:
    """A CSV file with one row per event, flushed as it is written.

    Args:
        path: The file. Rows already known are written anew, so that a resumed run holds each
            row once.
        rows: Rows to start with.
    """

    def __init__(self, path: str | os.PathLike, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = Path(path)
        self.fields: list[str] = list(rows[0]) if rows else []
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.path, text.getvalue())
        else:
            self.path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; the first row decides the columns."""
        new = not self.fields
        if new:
            self.fields = list(row)
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


# ---------------------------------------------------------------------------------------------
# Checkpoints


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is saved.

    Attributes:
        batch: The batch that showed it, where it is known.
    """

    batch: Any = None


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load a checkpoint to the CPU, tensors and plain types only.

    From format 2 on a file holds a digest of its content, which is checked; files of format 1 hold
    none and are believed.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint.
    """
    checkpoint = read_tensor_file(path)
    if not isinstance(checkpoint, dict) or not {"model", "args"} <= set(checkpoint):
        raise CheckpointError(
            f"{path} is no checkpoint of this program (it lacks 'model' and 'args')."
        )
    for name in ("model", "args"):
        if not isinstance(checkpoint[name], Mapping):
            raise CheckpointError(f"{path} is no checkpoint of this program: '{name}' is no table.")
    digest = checkpoint.get("digest")
    if digest is None and checkpoint.get("format", 1) == 1:
        return checkpoint
    content = {name: value for name, value in checkpoint.items() if name != "digest"}
    if checkpoint.get("format") != FORMAT or digest != content_digest(content):
        raise CheckpointError(
            f"{path} is damaged: its content is not what was saved (its digest differs)."
        )
    return checkpoint


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a published checkpoint, of one of this program, or a plain state dict.

    Nothing but tensors and plain types is unpickled.

    Args:
        path: The file (`051_ckpt.t7`, `best.pt`, …).

    Returns:
        The weights by name, and the arguments of the run where the file holds them.

    Raises:
        ValueError: If the file is missing, damaged, or holds no weights.
    """
    content = read_tensor_file(path)
    weights: Any = content
    arguments: dict[str, Any] = {}
    if isinstance(content, Mapping):
        arguments = dict(content.get("args") or {}) if "model" in content else {}
        for name in ("net", "model", "state_dict"):
            if isinstance(content.get(name), Mapping):
                weights = content[name]
                break
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, or such a table under "
            "'net' (published files) or 'model' (this program)."
        )
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, arguments


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights; a mismatch becomes a ValueError that lists the names."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model: {error}") from error


def load_pretrained(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load weights by name; every one must arrive.

    Weights that published files hold and no forward pass applies (`model.dead_weights`, a regular
    expression) are left out, and counters of batches that older files lack stay at zero.

    Args:
        model: The network.
        weights: By name, as :func:`read_weights` gives them.

    Returns:
        Names that were left out.

    Raises:
        ValueError: If names are missing or unknown or shapes differ; lists all of them.
    """
    own = model.state_dict()
    pattern = getattr(model, "dead_weights", None)
    dead = [n for n in weights if pattern and re.fullmatch(pattern, n) and n not in own]
    found = {name: value for name, value in weights.items() if name not in dead}
    counter = "num_batches_tracked"
    problems = [
        f"missing: {name} {tuple(value.shape)}"
        for name, value in own.items()
        if name not in found and not name.endswith(counter)
    ]
    problems += [
        f"unknown: {name} {tuple(value.shape)}" for name, value in found.items() if name not in own
    ]
    problems += [
        f"other shape: {name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here"
        for name, value in found.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit this {type(model).__name__}; {len(problems)} names differ:\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict(found, strict=False)
    return dead


# ---------------------------------------------------------------------------------------------
# The folder of a run


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
        for name in ("history", "times"):
            if not all(isinstance(row, Mapping) for row in getattr(made, name)):
                raise CheckpointError(f"'{name}' of its 'progress' holds something else than rows.")
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
    """

    RESULTS, METRICS, TIMING = "train_eval_results.txt", "metrics.csv", "timing.csv"
    LAST, BEST, TEST, CURVES = "last.pt", "best.pt", "test_results.txt", "curves.png"
    ARGS, MODEL, SUMMARY = "args.txt", "model.txt", "summary.json"
    ENVIRONMENT = "environment.json"

    LOCK = ".lock"

    def __init__(self, path: str | os.PathLike, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
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
                for name in (self.LAST, self.BEST, self.TEST, self.CURVES, self.SUMMARY):
                    (self.path / name).unlink(missing_ok=True)
        if args_text is not None:
            write_text(self.path / self.ARGS, args_text)
        write_text(self.path / self.MODEL, model_text)
        write_text(self.path / self.RESULTS, "".join(f"{line}\n" for line in progress.lines))
        self.metrics = CsvLog(self.path / self.METRICS, progress.history)
        self.timing = CsvLog(self.path / self.TIMING, progress.times)

    def write_line(self, line: str) -> None:
        """Append a line to the results file and show it."""
        if not self.writes:
            return
        tqdm.write(line)
        path = self.path / self.RESULTS
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def save(self, checkpoint: Mapping[str, Any], *, best: bool) -> str:
        """Save ``last.pt``, and let ``best.pt`` be the same file if it is the best so far.

        The pair is decided by ``last.pt`` alone: if this is interrupted, :meth:`settle` of the
        resumed run finds from its entries which file ``best.pt`` has to be.

        Returns:
            The digest of what was saved; empty where this process does not write.
        """
        if not self.writes:
            return ""
        digest = save_checkpoint(self.path / self.LAST, checkpoint)
        if best:
            link_or_copy(self.path / self.LAST, self.path / self.BEST)
        return digest

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
        if not itself and progress.best_epoch:
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
        if itself:
            if best.is_file() and best.samefile(last):
                return True, None
            same = False
            if best.is_file():
                with contextlib.suppress(CheckpointError):
                    same = load_checkpoint(best).get("digest", "") == progress.best_digest != ""
            link_or_copy(last, best)
            if same:
                return True, None
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

    def summarize(self, **facts: Any) -> None:
        """Write ``summary.json``: what scripts need to know of a run without guessing."""
        if self.writes:
            write_text(self.file(self.SUMMARY), json.dumps(facts, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------
# What a network is


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters: (all, trainable)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def compute_flops(model: nn.Module, inputs: Tensor) -> int:
    """Count floating-point operations of one forward pass (a multiply-add counts as two).

    Counts matrix products and convolutions, the similarity products of the search included;
    selection (top-K) and gathering do no arithmetic and count as zero.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton: only where it is used

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops()


def layer_rows(model: nn.Module, inputs: Tensor) -> list[tuple[str, str, str, int, int]]:
    """Measure every module that has parameters, or does arithmetic, of its own.

    A module's children are left out of its numbers, and shared ones are counted once: the columns
    add up to the totals of the network.

    Args:
        model: The network, in evaluation mode.
        inputs: One sample with a batch dimension.

    Returns:
        Name, class, shape of the last output ("" if it is not called by itself), parameters and
        FLOPs of one forward pass of each.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton: only where it is used

    shapes: dict[nn.Module, str] = {}
    flops: dict[nn.Module, int] = {}
    open_calls: list[list[int]] = []  # FLOPs when the call began, and those of its children
    handles = []

    def begin(module: nn.Module, _: Any) -> None:
        open_calls.append([counter.get_total_flops(), 0])

    def end(module: nn.Module, _: Any, output: Any) -> None:
        start, below = open_calls.pop()
        spent = counter.get_total_flops() - start
        flops[module] = flops.get(module, 0) + spent - below
        if open_calls:
            open_calls[-1][1] += spent
        shapes[module] = str(tuple(output.shape)) if isinstance(output, Tensor) else ""

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
        try:
            model(inputs)
        finally:
            for handle in handles:
                handle.remove()
    rows, seen = [], set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        count, spent = sum(p.numel() for p in own), flops.get(module, 0)
        if count or spent:
            rows.append(
                (name or "(itself)", type(module).__name__, shapes.get(module, ""), count, spent)
            )
    return rows


def lonely_norms(model: nn.Module, inputs: Tensor) -> list[str]:
    """Return the names of batch norms that see one value per channel of these inputs.

    In training they would have no variance to divide by.

    Args:
        model: The network; its mode is left as it was.
        inputs: One sample with a batch dimension.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, arguments: tuple) -> None:
            x = arguments[0]
            if x.numel() == x.shape[1] and name not in found:
                found.append(name)

        return look

    norms = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in norms]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def describe_model(model: nn.Module, inputs: Tensor) -> str:
    """Describe a network: module tree, and one table of shapes, parameters and FLOPs.

    Args:
        model: The network; its mode is left as it was.
        inputs: One sample with a batch dimension.
    """
    training = model.training
    model.eval()
    try:
        rows = layer_rows(model, inputs)
    finally:
        model.train(training)
    total, trainable = count_parameters(model)
    lines = [("module", "class", "output", "parameters", "FLOPs")]
    lines += [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in rows]
    lines.append(("total", "", "", f"{total:,}", f"{sum(row[4] for row in rows):,}"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    table = "\n".join(
        "  ".join(
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return (
        f"{model}\n\n{table}\n\n"
        f"Parameters: {total:,} ({trainable:,} trainable), {4 * total / 1e6:,.2f} MB in float32\n"
        f"FLOPs of one forward pass on {tuple(inputs.shape)}: {sum(row[4] for row in rows):,} "
        "(a multiply-add counts as two; the similarities of a search are in it; normalization, "
        "activations, and picking and gathering neighbors count as zero)\n"
    )


# ---------------------------------------------------------------------------------------------
# Pictures


def save_panels(path: str | os.PathLike, panels: Mapping[str, Tensor]) -> None:
    """Draw images side by side, each pixel as one pixel, captions above.

    Args:
        path: Where the PNG goes.
        panels: Images (C, H, W) by caption, clipped to [0, 1] for display.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    height, width = next(iter(panels.values())).shape[-2:]
    top, gap = 20, 4
    sheet = Image.new("RGB", ((width + gap) * len(panels) - gap, height + top), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, image) in enumerate(panels.items()):
        array = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        array = array.expand(3, -1, -1).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(array), (i * (width + gap), top))
        draw.text((i * (width + gap) + 3, 2), caption, fill="black", font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def plot_learning_curves(
    history: Sequence[Mapping[str, float]], path: str | os.PathLike, *, eval_name: str = "test"
) -> None:
    """Draw one panel per metric that a training run measured, both sets in it.

    Args:
        history: One mapping per epoch, with keys ``epoch``, ``train_<metric>``, ``test_<metric>``.
        path: Where the PNG goes.
        eval_name: Prefix of the held-out columns.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    names = [key.removeprefix("train_") for key in history[0] if key.startswith("train_")]
    names += [
        key.removeprefix(f"{eval_name}_")
        for key in history[0]
        if key.startswith(f"{eval_name}_") and key.removeprefix(f"{eval_name}_") not in names
    ]
    figure = Figure(figsize=(4.2 * max(1, len(names)), 3.4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, name in zip(
        figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False
    ):
        for prefix, style in (("train", "o-"), (eval_name, "s-")):
            values = [row.get(f"{prefix}_{name}") for row in history]
            if all(value is not None for value in values):
                axis.plot(epochs, values, style, markersize=3, label=prefix)
        axis.set(xlabel="epoch", title=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_growth(rows: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
    """Draw how a network grew: its centers, and how much of each batch it got right.

    Args:
        rows: One mapping a batch with ``layer``, ``samples``, ``centers``, ``seen`` (% right before
            the batch was learnt) and ``learnt`` (% right after).
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure

    seen_samples, total = [], 0
    for row in rows:
        total += row["samples"]
        seen_samples.append(total)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number in sorted({row["layer"] for row in rows}):
        mine = [i for i, row in enumerate(rows) if row["layer"] == number]
        left.plot(
            [seen_samples[i] for i in mine],
            [rows[i]["centers"] for i in mine],
            label=f"layer {number}",
        )
    left.set(xlabel="samples", title="centers")
    left.legend()
    width = max(1, len(rows) // 100)  # batches are small: average some
    groups = [range(i, min(i + width, len(rows))) for i in range(0, len(rows), width)]
    for name, label in (("seen", "before it is learnt"), ("learnt", "after")):
        right.plot(
            [seen_samples[group[-1]] for group in groups],
            [sum(rows[i][name] for i in group) / len(group) for group in groups],
            label=label,
        )
    right.set(xlabel="samples", title="% right in a batch")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", nbins=5)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
