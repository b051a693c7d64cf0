"""How much a chunked operation may hold at a time."""

import torch

__all__ = ["DEFAULT_MAX_BYTES", "chunk_bytes"]

# What fits a CPU's shared cache, what fills a GPU.
DEFAULT_MAX_BYTES = {"cpu": 5 << 20, "cuda": 256 << 20, "mps": 64 << 20}


def chunk_bytes(device: torch.device, max_bytes: int | None = None) -> int:
    """Return `max_bytes`, or the default of the device."""
    return max_bytes or DEFAULT_MAX_BYTES.get(device.type, 64 << 20)
