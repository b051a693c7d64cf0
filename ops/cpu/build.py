"""Compiled CPU kernels: built on first use, absent without a compiler.

Each needs a C++17 compiler and nothing else, and takes a few seconds to build, once per machine,
into a cache folder of the user. Environment variables:

- `NEIGHBORS_NATIVE`: 0 switches the kernels off, 1 (or unset) uses them where they can be built,
  `require` raises where they cannot, with the compiler's words.
- `NEIGHBORS_NATIVE_CACHE`: the folder, instead of `~/.cache/neighbors`.
- `NEIGHBORS_NATIVE_ARCH`: the value of `-march`, instead of `native` (x86-64-v3 gives
  AVX2, x86-64 neither that nor AVX-512).
- `CXX`: the compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "NativeError",
    "build",
    "distance_library",
    "exact_search_helpers",
    "exact_search_library",
    "library",
    "optional",
    "pointer",
    "run",
    "status",
    "usable",
    "window_kernels",
]

SOURCES = Path(__file__).parent
ABI = 2
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-w")
_BUILD_SECONDS = 180

_lock = threading.Lock()
_found: dict[str, ctypes.CDLL | Exception] = {}  # what came of each build


class NativeError(RuntimeError):
    """The kernels cannot be built or loaded."""


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


def _declare_search(lib: ctypes.CDLL) -> None:
    if lib.nn_abi() != ABI:
        raise OSError(f"{lib._name} is not of this version")
    i, p, d, f = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    lib.nn_topk.argtypes = [p, i, i, i, i, f, p, p, d]
    lib.nn_search.argtypes = [p, p, i, i, i, i, i, d, p, i, d, p, i, i, p, p, d]
    sizes = [i] * 6
    lib.nn_aggregate.argtypes = [p, p, i, p, p, p, *sizes, d]
    lib.nn_aggregate_grad_input.argtypes = [p, p, i, p, p, *sizes, d]
    lib.nn_aggregate_grad_weight.argtypes = [p, p, p, i, p, *sizes, d]
    sizes = [i] * 5
    lib.nn_attend.argtypes = [p, p, p, p, i, p, p, p, d, d, f, p, p, *sizes, d]
    lib.nn_attend_backward.argtypes = [p, p, p, p, p, p, i, p, p, d, d, p, p, p, p, *sizes, d]


def _open(path: Path, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    declare(lib)
    return lib


def build(
    name: str, declare: Callable[[ctypes.CDLL], None], options: Sequence[str] = ()
) -> ctypes.CDLL:
    """Compile `<name>.cpp`, unless the cache holds it, and load it.

    Args:
        name: Name of the source, without suffix.
        declare: Sets the argument types; raises OSError or AttributeError if the library is not
            the expected one.
        options: More options for the compiler.

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
            flags = [*arch, *options]
            recipe = "\0".join([compiler, *_FLAGS, *flags, _cpu(), sys.platform])
            key = hashlib.sha256(text + recipe.encode()).hexdigest()[:24]
            path = folder / f"{name}-{key}.so"
            problem = "" if path.exists() else _compile(compiler, flags, source, path)
            if not problem:
                try:
                    return _open(path, declare)
                except (OSError, AttributeError) as error:  # a damaged file: build it again
                    problem = _compile(compiler, flags, source, path)
                    if not problem:
                        try:
                            return _open(path, declare)
                        except (OSError, AttributeError):
                            problem = str(error)
            problems.append(problem)
    raise NativeError("\n".join(problems))


def _wanted() -> str:
    wanted = os.environ.get("NEIGHBORS_NATIVE", "1").lower()
    return "0" if wanted in ("0", "off", "false", "no") else wanted


def optional(
    name: str, declare: Callable[[ctypes.CDLL], None], options: Sequence[str] = ()
) -> ctypes.CDLL | None:
    """Return :func:`build`'s library, or None where it is switched off or cannot be built.

    It is built at the first call; what came of that is kept.
    """
    wanted = _wanted()
    if wanted == "0":
        return None
    if name not in _found:
        with _lock:
            if name not in _found:
                try:
                    _found[name] = build(name, declare, options)
                except (NativeError, OSError, RuntimeError) as error:
                    _found[name] = error
    found = _found[name]
    if isinstance(found, Exception):
        if wanted == "require":
            raise NativeError(str(found)) from found
        return None
    return found


def library() -> ctypes.CDLL | None:
    """Return the kernels of the search, or None; see :func:`optional`."""
    return optional("search", _declare_search)


def status() -> str:
    """Say in words whether the kernels are in use, building them if need be."""
    if _wanted() == "0":
        return "switched off"
    lib = library()
    if lib is None:
        return f"absent: {_found['search']}"
    return f"compiled, vectors of {lib.nn_vector_length()} floats"


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor's first element, None (null) for none."""
    return None if tensor is None else tensor.data_ptr()


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether the kernels can take these tensors: all float32 or indices, on the CPU."""
    kinds = (torch.float32, torch.int64)
    return (
        all(t is None or (t.device.type == "cpu" and t.dtype in kinds) for t in tensors)
        and library() is not None
    )


def run(function: Callable[..., int], *args: Tensor | float | None) -> None:
    """Run a kernel on tensors (contiguous, kept alive here) and numbers, on torch's threads."""
    raw = [pointer(a) if isinstance(a, Tensor) else a for a in args]
    code = function(*raw, torch.get_num_threads())
    if code == 2:
        raise IndexError("a neighbor index is out of range")
    if code:
        raise MemoryError("a neighbor kernel ran out of memory")


def _declare_windows(lib: ctypes.CDLL) -> None:
    """Set the argument types of `windows.cpp`."""
    if lib.relaxed_abi() != 3:
        raise OSError("another version of the kernels")
    p, i, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.relaxed_forward.argtypes = [p] * 3 + [i] * 3 + [threads]
    lib.relaxed_backward.argtypes = [p] * 3 + [i] * 3 + [threads]
    lib.window_rows.argtypes = [p] * 3 + [threads] * 2
    lib.window_columns.argtypes = [p] * 3 + [threads]
    lib.window_distances.argtypes = [p] * 4 + [i] * 2 + [threads]
    lib.window_distances_backward.argtypes = [p] * 4 + [i, threads]
    lib.window_aggregate.argtypes = [p] * 4 + [i] * 4 + [threads]
    lib.window_aggregate_backward.argtypes = [p] * 6 + [i, threads]


def window_kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the compiled kernels if they exist here and can take these tensors."""
    if torch.compiler.is_compiling() or any(
        t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors
    ):
        return None
    return optional("windows", _declare_windows, ("-fopenmp-simd",))


def exact_search_library() -> ctypes.CDLL | None:
    """Return the compiled search where the processor has fast 8-bit products."""
    library = exact_search_helpers()
    return library if library is not None and library.es_supported() else None


def exact_search_helpers() -> ctypes.CDLL | None:
    """Load index.cpp if it can be compiled, for the parts that run anywhere."""
    return optional("index", _declare_exact_search, ("-fopenmp-simd", "-fno-trapping-math"))


def _declare_exact_search(library: ctypes.CDLL) -> None:
    pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.es_new.restype = pointer
    library.es_new.argtypes = [pointer, integer, *[number] * 3, integer, integer, pointer, integer]
    library.es_pack.argtypes = [pointer, integer, number, number, integer, integer, *[pointer] * 3]
    library.es_pack.argtypes += [integer]
    library.es_scan.argtypes = [*[pointer] * 4, number, number]
    library.es_select.argtypes = [pointer, *[number] * 3, pointer, ctypes.c_float, number]
    library.es_select.argtypes += [pointer, pointer, number, integer]
    library.es_costs.argtypes = [pointer, integer, number, number, pointer, pointer, number]
    library.es_costs.argtypes += [integer, pointer, integer]
    library.es_finish.argtypes, library.es_finish.restype = [pointer] * 3, None
    library.es_free.argtypes, library.es_free.restype = [pointer], None
    library.es_evaluated.argtypes, library.es_evaluated.restype = [pointer], number
    library.es_panel.restype = library.es_meta.restype = number


def _declare_distances(library: ctypes.CDLL) -> None:
    size, address = ctypes.c_int64, ctypes.c_void_p
    number, integer = ctypes.c_float, ctypes.c_int
    library.nd_squared.argtypes = [*[address] * 2, *[size] * 3, address, integer]
    library.nd_votes.argtypes = [*[address] * 3, *[size] * 4, number, integer, address, integer]


def distance_library() -> ctypes.CDLL | None:
    """Return the compiled distances to centers, or None; see :func:`optional`."""
    return optional("distances", _declare_distances)
