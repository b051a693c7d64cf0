"""Compiled CPU kernels: built on first use, absent without a compiler.

Each source beside this file needs a C++17 compiler and nothing else, and takes a few seconds to
build, once per machine, into a cache folder of the user. Environment variables:

- `NEIGHBORS_NATIVE`: 0 switches the kernels off, 1 (or unset) uses them where they can be built,
  `require` raises where they cannot, with the compiler's words.
- `NEIGHBORS_NATIVE_CACHE`: the folder, instead of `~/.cache/neighbors`.
- `NEIGHBORS_NATIVE_ARCH`: the value of `-march`, instead of `native` (x86-64-v3 gives
  AVX2, x86-64 neither that nor AVX-512).
- `CXX`: the compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["NativeError", "OutOfRange", "build", "kernel", "library", "status", "switch"]

SOURCES = Path(__file__).parent
ABI = 7  # kernels_abi() in threads.h: one number for all of SIGNATURES

# The entry points of each source and their arguments: p a pointer, i an int64, d an int, f a float
# and t the number of threads, which `kernel` adds. They return a code (`_run`), or what follows >.
SIGNATURES = {
    "search": {
        "nn_search": "ppiiiiidpidpiippt",
        "nn_topk": "piiiifppt",
        "nn_vector_length": ">d",
    },
    "aggregate": {
        "nn_aggregate": "ppipppiiiiiit",
        "nn_aggregate_grad_input": "ppippiiiiiit",
        "nn_aggregate_grad_weight": "pppipiiiiiit",
    },
    "attend": {
        "nn_attend": "ppppipppddfppiiiiit",
        "nn_attend_backward": "ppppppippddppppiiiiit",
    },
    "reduce": {
        "nn_max_rows": "ppppiiiiit",
        "nn_max_rows_backward": "pppiiiit",
        "nn_sum_rows": "pppiiiiit",
        "nn_sum_rows_backward": "pppiiiiit",
    },
    "relax": {
        "relaxed_forward": "pppiiit",
        "relaxed_backward": "pppiiit",
    },
    "windows": {
        "window_rows": "pppdt",
        "window_columns": "pppt",
        "window_distances": "ppppiit",
        "window_distances_backward": "ppppit",
        "window_aggregate": "ppppiiiit",
        "window_aggregate_backward": "ppppppit",
    },
    "index": {
        "es_supported": ">d",
        "es_panel": ">i",
        "es_meta": ">i",
        "es_new": "pdiiiddpt>p",
        "es_free": "p>",
        "es_pack": "pdiiddpppt",
        "es_scan": "ppppii",
        "es_select": "piiipfippit",
        "es_costs": "pdiippidpt",
        "es_evaluated": "p>i",
        "es_finish": "ppp",
    },
    "progressive": {
        "pg_axes": ">i",
        "pg_supported": ">d",
        "pg_most": ">i",
        "pg_rotate": "pdiidppiipppt",
        "pg_sketch": "pippippppt",
        "pg_pack": "pppiiipppt",
        "pg_scan": "ppddpppppppppt",
    },
    "distances": {
        "nd_squared": "ppiiipt",
        "nd_votes": "pppiiiifdpt",
    },
}
_SOURCE_OF = {name: source for source, names in SIGNATURES.items() for name in names}
_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "d": ctypes.c_int,
    "f": ctypes.c_float,
    "t": ctypes.c_int,
}
# Sources that one layer needs: they are compiled at the same time.
_TOGETHER = (
    ("search", "aggregate", "attend", "reduce"),
    ("windows", "relax"),
    ("index", "progressive"),
    ("distances",),
)
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-w")
_OPTIONS = {
    "relax": ("-fopenmp-simd",),
    "windows": ("-fopenmp-simd",),
    "index": ("-fopenmp-simd", "-fno-trapping-math"),
    "progressive": ("-fopenmp-simd", "-fno-trapping-math"),
}
_BUILD_SECONDS = 180

_lock = threading.Lock()
_found: dict[str, ctypes.CDLL | Exception] = {}  # what came of each build


class NativeError(RuntimeError):
    """The kernels cannot be built or loaded."""


class OutOfRange(ArithmeticError):
    """The numbers do not fit the arithmetic of a path; a wider one is tried."""


def _compilers() -> list[str]:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return [found for name in names if (found := shutil.which(name))]


def _cpu() -> str:
    """Describe the processor, as far as code made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _cache_folder() -> Path:
    if folder := os.environ.get("NEIGHBORS_NATIVE_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "neighbors"


def _arch_flags() -> list[list[str]]:
    if arch := os.environ.get("NEIGHBORS_NATIVE_ARCH"):
        return [[f"-march={arch}"]]
    return [["-march=native"], ["-mcpu=native"], []]  # some compilers know only one of these


def _compile(compiler: str, flags: list[str], source: Path, target: Path) -> str:
    """Build `target` from `source`; return what went wrong, or nothing."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    link = ["-ldl"] if sys.platform.startswith("linux") else []
    command = [compiler, *_FLAGS, *flags, "-o", name, str(source), "-pthread", *link]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
        )
        if done.returncode:
            return f"{' '.join(command)}\n{done.stderr[-2000:]}"
        os.replace(name, target)  # whole or not at all, whoever else is building
        return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}\n{error}"
    finally:
        Path(name).unlink(missing_ok=True)


def _open(path: Path, name: str) -> ctypes.CDLL:
    """Load a source's library; raise OSError or AttributeError if it is not the expected one."""
    lib = ctypes.CDLL(str(path))
    if lib.kernels_abi() != ABI:
        raise OSError(f"{path} is not of this version")
    for entry, signature in SIGNATURES[name].items():
        arguments, returns, result = signature.partition(">")
        function = getattr(lib, entry)
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = _TYPES.get(result) if returns else ctypes.c_int
    return lib


def build(name: str) -> ctypes.CDLL:
    """Compile `<name>.cpp`, unless the cache holds it, and load it.

    Raises:
        NativeError: If that is not possible here.
    """
    if sys.platform == "win32":
        raise NativeError("the kernels are built on Linux and macOS only")
    compilers = _compilers()
    if not compilers:
        raise NativeError("no C++ compiler found (looked for $CXX, g++, c++, clang++)")
    source = SOURCES / f"{name}.cpp"
    text = b"".join(path.read_bytes() for path in (source, *sorted(SOURCES.glob("*.h"))))
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    problems = []
    for compiler in compilers:
        for arch in _arch_flags():
            flags = [*arch, *_OPTIONS.get(name, ())]
            recipe = "\0".join([compiler, *_FLAGS, *flags, _cpu(), sys.platform])
            key = hashlib.sha256(text + recipe.encode()).hexdigest()[:24]
            path = folder / f"{name}-{key}.so"
            problem = "" if path.exists() else _compile(compiler, flags, source, path)
            if not problem:
                try:
                    return _open(path, name)
                except (OSError, AttributeError) as error:  # a damaged file: build it again
                    problem = _compile(compiler, flags, source, path)
                    if not problem:
                        try:
                            return _open(path, name)
                        except (OSError, AttributeError):
                            problem = str(error)
            problems.append(problem)
    raise NativeError("\n".join(problems))


def switch() -> str:
    """Return what `NEIGHBORS_NATIVE` asks for: "0", "1" or "require"."""
    wanted = os.environ.get("NEIGHBORS_NATIVE", "1").lower()
    return "0" if wanted in ("0", "off", "false", "no") else wanted


def _try_build(name: str) -> ctypes.CDLL | Exception:
    try:
        return build(name)
    except (NativeError, OSError, RuntimeError) as error:
        return error


def library(name: str = "search") -> ctypes.CDLL | None:
    """Return the kernels of a source, or None where they are switched off or cannot be built.

    They are built at the first call, with those needed beside them; what came of that is kept.
    """
    wanted = switch()
    if wanted == "0":
        return None
    if name not in _found:
        with _lock:
            if name not in _found:
                names = next(group for group in _TOGETHER if name in group)
                with ThreadPoolExecutor(len(names)) as pool:
                    _found.update(zip(names, pool.map(_try_build, names), strict=True))
    found = _found[name]
    if isinstance(found, Exception):
        if wanted == "require":
            raise NativeError(str(found)) from found
        return None
    return found


def status() -> str:
    """Say in words whether the kernels are in use, building them if need be."""
    if switch() == "0":
        return "switched off"
    lib = library()
    if lib is None:
        return f"absent: {_found['search']}"
    return f"compiled, vectors of {lib.nn_vector_length()} floats"


def kernel(name: str, *tensors: Tensor | None) -> Callable[..., Any] | None:
    """Return a compiled function, or None where there is none that can take these tensors.

    Args:
        name: One of the entry points in `SIGNATURES`.
        tensors: What it must be able to take: float32 or indices, on the CPU, in no traced graph.

    Returns:
        A function of contiguous tensors (addresses, kept alive during the call), None (null) and
        numbers, which runs on torch's threads. It raises IndexError for an index out of range,
        `OutOfRange` for numbers beyond its arithmetic, and MemoryError.
    """
    kinds = (torch.float32, torch.int64)
    if torch.compiler.is_compiling() or any(
        t is not None and (t.device.type != "cpu" or t.dtype not in kinds) for t in tensors
    ):
        return None
    lib = library(_SOURCE_OF[name])
    return None if lib is None else functools.partial(_run, getattr(lib, name), name)


def _run(function: Callable[..., Any], name: str, *args: Any) -> Any:
    arguments, returns, _ = SIGNATURES[_SOURCE_OF[name]][name].partition(">")
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    result = function(*raw, *([torch.get_num_threads()] if arguments.endswith("t") else []))
    if returns or result == 0:
        return result
    if result == 2:
        raise IndexError("a neighbor index is out of range")
    if result == 3:
        raise OutOfRange(f"{name}: not a number, or overflow")
    raise MemoryError(f"a neighbor kernel ran out of memory ({name}, code {result})")
