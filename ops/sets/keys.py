"""The keys of a large search: rows of a tensor or a memory-mapped file, a chunk at a time.

Symbols: N keys, D features.
"""

import mmap
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BYTES",
    "TYPE_CODES",
    "Keys",
    "as_tensor",
    "center",
    "common_dtype",
    "normalize",
]

TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.uint8: 2, torch.int8: 3}
BYTES = (torch.uint8, torch.int8)
_SAMPLE_ROWS = 4096  # rows whose mean is taken to center the data


class Keys:
    """Rows of keys in the dtype of the search, a chunk at a time.

    Args:
        data: (N, D) tensor, or array, memory-mapped or not.
        dtype: What :meth:`rows` returns.
        device: Where :meth:`rows` returns it.
    """

    def __init__(self, data: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.data, self.dtype, self.device = data, dtype, device
        self.mapping: mmap.mmap | None = None

    @property
    def copies(self) -> bool:
        """Whether a chunk is a copy rather than a view of the data."""
        return (
            self.data.dtype != self.dtype
            or not self.data.is_contiguous()
            or self.data.device != self.device
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start … stop, contiguous."""
        return self.data[start:stop].to(self.device, self.dtype).contiguous()

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, rows) in ascending order; pages of a mapped file are let go of."""
        for start in range(0, len(self.data), size):
            yield start, self.rows(start, min(len(self.data), start + size))
            self.release()

    def release(self) -> None:
        """Tell the system that the pages of a mapped file are not needed for now."""
        if self.mapping is not None and hasattr(self.mapping, "madvise"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def some(self, labels: Tensor) -> Tensor:
        """Return the rows that are named."""
        return self.data[labels.to(self.data.device)].to(self.device, self.dtype)

    def sample(self) -> Tensor:
        """Return some rows: short runs, evenly spread, for the sake of mapped files."""
        n = len(self.data)
        if n <= _SAMPLE_ROWS:
            return self.rows(0, n)
        starts = torch.linspace(0, n - 128, _SAMPLE_ROWS // 128, dtype=torch.float64).long()
        rows = self.some((starts[:, None] + torch.arange(128)).flatten())
        self.release()
        return rows


def as_tensor(keys: Tensor | np.ndarray) -> tuple[Tensor, mmap.mmap | None]:
    """View keys as a tensor; also return the mapping of a memory-mapped array."""
    if isinstance(keys, Tensor):
        return keys, None
    mapping = getattr(keys, "_mmap", None)
    with warnings.catch_warnings():  # a file mapped for reading is not writable; nothing writes
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(np.asarray(keys)), mapping


def common_dtype(queries: Tensor, keys: Tensor, in_memory: bool) -> torch.dtype:
    """Choose the narrowest of uint8, int8, float32, float64 that holds both exactly."""
    kinds = {queries.dtype, keys.dtype}
    if kinds == {torch.bool}:
        return torch.uint8
    if len(kinds) == 1 and queries.dtype in BYTES:
        return queries.dtype
    if torch.float64 in kinds:
        return torch.float64
    integers = [t for t in (queries, keys) if not t.is_floating_point()]
    if in_memory and len(integers) == 2:
        limits = [bound.item() for t in integers for bound in (t.min(), t.max())]
        for dtype, low, high in ((torch.uint8, 0, 255), (torch.int8, -128, 127)):
            if low <= min(limits) and max(limits) <= high:
                return dtype
    exact = (torch.bool, torch.uint8, torch.int8, torch.int16)
    return torch.float32 if all(t.dtype in exact for t in integers) else torch.float64


def normalize(rows: Tensor) -> Tensor:
    """Scale rows to length 1 in float64; zero rows stay zero."""
    rows = rows.double()
    norm = rows.square().sum(1, keepdim=True).sqrt()
    return torch.where(norm > 0, rows / norm, 0.0)


def center(keys: Keys, metric: str) -> Tensor:
    """Choose what is subtracted from every row, (D,) float64: about the mean of the keys."""
    if keys.dtype in BYTES:
        return torch.zeros(keys.data.shape[1], dtype=torch.float64, device=keys.device)
    sample = keys.sample()
    sample = normalize(sample) if metric == "cosine" else sample.double()
    mean = sample.mean(0)
    if not mean.abs().max() < 1e30:  # NaN, infinity, or beyond float32
        return torch.zeros_like(mean)
    return mean.float().double()
