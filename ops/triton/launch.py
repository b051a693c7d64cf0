"""Whether Triton's kernels can run here, and with which block sizes.

`NEIGHBORS_NATIVE` acts as it does on the compiled kernels of the CPU (`ops.cpu.build`): 0 switches
these off too, `require` raises where they cannot run. Nothing here imports Triton before a kernel
is asked for.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ops.cpu.build import NativeError, switch

__all__ = [
    "has_tf32",
    "interpreted",
    "kernels",
    "next_power",
    "on_device",
    "precision",
    "tuned",
    "widens",
]


def interpreted() -> bool:
    """Tell whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _problem(device: torch.device) -> str:
    """Say why the kernels cannot run on this device, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return ""
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, and these tensors are on {device}"
    return _problem_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _problem_of_gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and major < 7:
        return f"Triton needs compute capability 7.0 or more (this GPU has {major}.{minor})"
    try:
        importlib.import_module("ops.triton.search").probe(torch.device("cuda", index))
    except Exception as error:  # of Triton or what it calls: no C compiler, no headers, the driver
        return f"Triton does not run here: {error}"
    return ""


def kernels(name: str, *tensors: Tensor | None) -> ModuleType | None:
    """Return a module of kernels, or None where they are switched off or cannot run.

    Args:
        name: A file beside this one.
        tensors: What they must be able to take, all on one device: float32, half precision and
            indices; None is passed over.

    Raises:
        NativeError: If they cannot run on this device and `NEIGHBORS_NATIVE=require` says they
            must.
    """
    given = [t for t in tensors if t is not None]
    if switch() == "0" or any(t.dtype == torch.float64 for t in given):
        return None
    problem = _problem(given[0].device)
    if not problem:
        return importlib.import_module(f"ops.triton.{name}")
    if switch() == "require":
        raise NativeError(problem)
    return None


def status(device: torch.device) -> str:
    """Say in words whether the kernels are in use on a device."""
    if switch() == "0":
        return "switched off"
    if problem := _problem(device):
        return f"absent: {problem}"
    return f"Triton {importlib.import_module('triton').__version__}"


def has_tf32(device: torch.device) -> bool:
    """Tell whether products of float32 can be made in TensorFloat-32."""
    if device.type != "cuda":
        return interpreted()
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


def widens(dtype: torch.dtype) -> bool:
    """Tell whether kernels must widen a type for a product: the interpreter has no bfloat16's."""
    return interpreted() and dtype == torch.bfloat16


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the GPU of the first tensor, whichever is the current one."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return function(*args, **kwargs)

    return wrapped


def precision() -> str:
    """How float32 is multiplied: as PyTorch multiplies matrices."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def next_power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tuned(
    key: Sequence[str],
    small: dict[str, int],
    *shapes: dict[str, int],
    **options: Any,
) -> Callable[..., Any]:
    """Decorate a kernel so that its block sizes are the fastest of some, timed at the first use.

    Args:
        key: Names of the arguments for whose values they are chosen anew.
        small: Block sizes for the interpreter, which times nothing.
        shapes: Block sizes to be tried on a GPU, "num_warps" and "num_stages" among them.
        options: Passed on to `triton.autotune`.
    """
    import triton

    def config(sizes: dict[str, int]) -> Any:
        more = {name: sizes[name] for name in ("num_warps", "num_stages") if name in sizes}
        return triton.Config({k: v for k, v in sizes.items() if k not in more}, **more)

    if interpreted():
        return triton.autotune([config(small)], key=list(key))
    return triton.autotune([config(sizes) for sizes in shapes], key=list(key), **options)
