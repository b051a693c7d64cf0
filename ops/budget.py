"""How much a chunked operation may hold at a time, and the pieces that fit."""

from collections.abc import Iterator

import torch

__all__ = ["CHUNK_BYTES", "DEFAULT_MAX_BYTES", "check_memory", "chunk_bytes", "pieces"]

# What fits a CPU's shared cache, what fills a GPU.
DEFAULT_MAX_BYTES = {"cpu": 5 << 20, "cuda": 256 << 20, "mps": 64 << 20}
CHUNK_BYTES = 16 * 2**20  # intermediate products alive at a time; about what stays in cache

# Fewer rows than this, and a product spends its time on arranging its other factor.
PRODUCT_ROWS = 512


def chunk_bytes(device: torch.device, max_bytes: int | None = None, row_bytes: int = 0) -> int:
    """Return `max_bytes`, or the default of the device: more, up to 64 MiB, where rows are long."""
    if max_bytes:
        return max_bytes
    default = DEFAULT_MAX_BYTES.get(device.type, 64 << 20)
    return max(default, min(PRODUCT_ROWS * row_bytes, 64 << 20))


def pieces(b: int, m: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut b samples of m queries into pieces of at most `rows` queries (but at least one).

    A piece is whole samples or a part of one. All but the last pieces are equally large; the first
    is the largest.
    """
    group = max(1, min(b, rows // m))
    chunk = max(1, min(m, rows))
    chunk = -(-m // -(-m // chunk))
    for b0 in range(0, b, group):
        for m0 in range(0, m, chunk):
            yield slice(b0, min(b, b0 + group)), slice(m0, min(m, m0 + chunk))


def check_memory(num_bytes: int, device: torch.device) -> None:
    """Raise MemoryError if the device plainly has less free memory than `num_bytes`.

    Linux hands out memory it does not have and ends the process when it is used, so asking is not
    enough.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    else:
        try:
            with open("/proc/meminfo") as file:
                lines = dict(line.split(":", 1) for line in file)
            free = int(lines["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return  # no such count on this system: let the allocation decide
    if num_bytes > free:
        raise MemoryError(f"{num_bytes:,} bytes needed, {free:,} free")
