"""Checkpoints: saved whole or not at all, with a digest; read as tensors and plain types only."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import atomic_path

__all__ = [
    "CheckpointError",
    "check_form",
    "check_rows",
    "checkpoint_digest",
    "content_digest",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "read_safetensors",
    "read_tensor_file",
    "read_weights",
    "save_checkpoint",
    "save_safetensors",
    "without_training",
]

FORMAT = 2  # of checkpoints; 1 had no digest


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def check_form(found: Any, like: Any, name: str) -> None:
    """Refuse an entry of a checkpoint that has another form than what this program writes.

    Args:
        found: The entry.
        like: One of the right form: tensors have its shape and type, tables its names, lists its
            length; a number stands for any number, but a whole one for whole ones.
        name: What the entry is called.

    Raises:
        CheckpointError: Names the first difference.
    """
    kind = type(like).__name__
    if isinstance(like, Tensor):
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (like.shape, like.dtype)
        kind = f"tensor {tuple(like.shape)} of {like.dtype}"
    elif isinstance(like, Mapping):
        same = isinstance(found, Mapping) and found.keys() == like.keys()
        kind = f"table of {', '.join(map(str, like)) or 'nothing'}"
    elif isinstance(like, list | tuple):
        same = isinstance(found, list | tuple) and len(found) == len(like)
        kind = f"list of {len(like)}"
    elif isinstance(like, float):
        same = isinstance(found, int | float) and not isinstance(found, bool)
    else:
        same = type(found) is type(like)
    if not same:
        raise CheckpointError(f"its {name} has another form than this program writes ({kind}).")
    if isinstance(like, Mapping):
        for key, value in like.items():
            check_form(found[key], value, f"{name}[{key!r}]")
    elif isinstance(like, list | tuple):
        for index, value in enumerate(like):
            check_form(found[index], value, f"{name}[{index}]")


def check_rows(rows: Any, name: str, needed: Iterable[str]) -> None:
    """Refuse a table of a checkpoint whose rows do not have the same columns, all of numbers.

    Args:
        rows: The table: a list of mappings.
        name: What it is called.
        needed: Columns that have to be there.

    Raises:
        CheckpointError: Says what is wrong with it.
    """
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise CheckpointError(f"its {name} holds something else than rows.")
    for row in rows:
        if row.keys() != rows[0].keys() or not row.keys() >= set(needed):
            raise CheckpointError(f"the rows of its {name} do not have the same columns.")
        for column, value in row.items():
            check_form(column, "", f"name of a column of {name}")
            check_form(value, 0.0, f"{name}[{column!r}]")


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


# What only a resumed run needs of a state; it stands in last.pt alone.
OF_TRAINING = ("trainer", "random_state", "random_states")


def without_training(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state without what the optimizer knows; the same one where that is nothing."""
    if not state.get("trainer"):
        return state
    return {name: value for name, value in state.items() if name not in OF_TRAINING}


def checkpoint_digest(state: Mapping[str, Any]) -> str:
    """Return the digest that :func:`save_checkpoint` gives a state."""
    content = {k: v for k, v in state.items() if k not in ("format", "digest")}
    return content_digest({"format": FORMAT, **content})


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
        if not all(isinstance(key, str) for key in checkpoint[name]):
            raise CheckpointError(f"{path} is damaged: entries of '{name}' have no names.")
    version, digest = checkpoint.get("format", 1), checkpoint.get("digest")
    if digest is None and isinstance(version, int) and version == 1:
        return checkpoint
    content = {name: value for name, value in checkpoint.items() if name != "digest"}
    try:
        whole = isinstance(version, int) and version == FORMAT and digest == content_digest(content)
    except (RuntimeError, TypeError, ValueError):  # lists in themselves, sparse tensors, ...
        whole = False
    if not whole:
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
        if "model" in content and isinstance(content.get("args"), Mapping):
            arguments = dict(content["args"])
        for name in ("net", "model", "state_dict"):
            if isinstance(content.get(name), Mapping):
                weights = content[name]
                break
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
    ):
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, or such a table under "
            "'net' (published files) or 'model' (this program)."
        )
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, arguments


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights; a mismatch becomes a ValueError that lists the names."""
    entries = checkpoint["model"].items()
    strange = [n for n, v in entries if not isinstance(v, Tensor | Mapping)]
    strange += [n for n, v in entries if isinstance(v, Mapping) and not n.endswith("_extra_state")]
    if strange:
        raise ValueError(f"the checkpoint does not fit the model: {strange[0]} is no tensor.")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model: {error}") from error
    except (TypeError, AttributeError, LookupError, ValueError) as error:  # of a model's own state
        raise ValueError(f"the checkpoint does not fit the model ({error!r}).") from error


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
