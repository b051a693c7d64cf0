"""Exact nearest neighbors of many queries among many keys: the large two-dimensional search.

Where :mod:`layers.neighbors` searches feature maps, this file searches training sets: one matrix of
keys, held in memory or in a memory-mapped file, in chunks bounded by a byte budget. "Exact" means
that the neighbors are those of a float64 search; of equal ones the lower index comes first.

The product of every query with every key is taken in a low precision, and what it cannot decide is
decided in float64:

- 8-bit integers: integer products. Squared distances and dot products are exact as they are.
- Anything else: with x̂, ŷ the low-precision rows, |x·y - x̂·ŷ| <= |x - x̂| |y| + |x̂| |y - ŷ|
  (Cauchy-Schwarz; the norms of the residuals are computed), plus the rounding of the product. A
  key whose cost, less this bound, is at most the K-th best exact cost is evaluated in float64; no
  other key can be among the best K. Rows are centered first: distances do not change, dot
  products change by terms known exactly enough, and the bound shrinks.

Low precision is 8 bits where the processor multiplies 8-bit integers fast (x86 with AVX-512 VNNI,
compiled; or ``torch._int_mm`` where it measures faster), else float32.

Symbols: M queries, N keys, D features, K neighbors. The cost of a pair is its squared distance or
minus its similarity: smaller is better.
"""

import ctypes
import math
import mmap
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from layers import native

__all__ = ["ExactIndex", "exact_search", "merge_neighbors", "merge_over_ranks"]

METRICS = ("euclidean", "dot", "cosine")
PRECISIONS = ("auto", "float32")
DEFAULT_MAX_BYTES = 1 << 26
_TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.uint8: 2, torch.int8: 3}
_BYTES = (torch.uint8, torch.int8)
_SAMPLE_ROWS = 4096  # rows whose mean is taken to center the data


class _OutOfRange(Exception):
    """The numbers do not fit the arithmetic of a path; a wider one is tried."""


# ---------------------------------------------------------------------------------------------
# Keys


class _Keys:
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


def _as_tensor(keys: Tensor | np.ndarray) -> tuple[Tensor, mmap.mmap | None]:
    """View keys as a tensor; also return the mapping of a memory-mapped array."""
    if isinstance(keys, Tensor):
        return keys, None
    mapping = getattr(keys, "_mmap", None)
    with warnings.catch_warnings():  # a file mapped for reading is not writable; nothing writes
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(np.asarray(keys)), mapping


def _common_dtype(queries: Tensor, keys: Tensor, in_memory: bool) -> torch.dtype:
    """Choose the narrowest of uint8, int8, float32, float64 that holds both exactly."""
    kinds = {queries.dtype, keys.dtype}
    if kinds == {torch.bool}:
        return torch.uint8
    if len(kinds) == 1 and queries.dtype in _BYTES:
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


def _normalize(rows: Tensor) -> Tensor:
    """Scale rows to length 1 in float64; zero rows stay zero."""
    rows = rows.double()
    norm = rows.square().sum(1, keepdim=True).sqrt()
    return torch.where(norm > 0, rows / norm, 0.0)


# ---------------------------------------------------------------------------------------------
# The search


class ExactIndex:
    """Keys that are searched again and again.

    Args:
        keys: (N, D) tensor or NumPy array of numbers; ``np.load(path, mmap_mode="r")`` searches a
            file larger than memory. Not copied: leave it unchanged.
        metric: "euclidean" (squared distances), "dot" or "cosine" (a zero row has similarity 0).
        precision: "auto", or "float32" to take products in float32 only; the answer is the same.
        max_bytes: Working memory in bytes, beside keys, queries and results; a search takes up to
            about twice this.

    Attributes:
        path: How the last search took its products, in words.
    """

    def __init__(
        self,
        keys: Tensor | np.ndarray,
        metric: str = "euclidean",
        *,
        precision: str = "auto",
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)} (got {metric!r})")
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)} (got {precision!r})"
            )
        self.data, self.mapping = _as_tensor(keys)
        if self.data.dim() != 2 or self.data.numel() == 0:
            raise ValueError(f"keys must be (N, D), not empty, got {tuple(self.data.shape)}")
        self.metric, self.precision, self.max_bytes = metric, precision, max_bytes
        self.path = ""
        self._packed: dict[tuple, list] = {}

    def __len__(self) -> int:
        return len(self.data)

    @torch.no_grad()
    def search(self, queries: Tensor | np.ndarray, K: int) -> tuple[Tensor, Tensor]:
        """Find the K nearest keys of every query.

        Args:
            queries: (M, D).
            K: Number of neighbors, 1 … N.

        Returns:
            Values (M, K), float32 (float64 if queries or keys are): squared distances, or
            similarities; and indices (M, K) int64, best first, equal ones by index.

        Raises:
            ValueError: If shapes do not agree, K is out of range, or numbers are not finite.
        """
        queries, _ = _as_tensor(queries)
        n, d = self.data.shape
        if queries.dim() != 2 or queries.shape[1] != d:
            raise ValueError(f"queries must be (M, {d}) like the keys, got {tuple(queries.shape)}")
        if not 1 <= K <= n:
            raise ValueError(f"K must lie in 1 … {n}, the number of keys (got {K})")
        wide = torch.float64 in (queries.dtype, self.data.dtype)
        device = queries.device
        if len(queries) == 0:
            empty = torch.empty(0, K, device=device)
            return empty.double() if wide else empty, empty.long()
        dtype = _common_dtype(queries, self.data, self.mapping is None)
        # MPS has no float64: the search then runs on the CPU, whose memory it shares.
        place = torch.device("cpu") if device.type == "mps" else device
        keys = _Keys(self.data, dtype, place)
        keys.mapping = self.mapping
        rows = queries.to(place, dtype).contiguous()
        costs = torch.empty(len(rows), K, dtype=torch.float64, device=place)
        indices = torch.empty(len(rows), K, dtype=torch.int64, device=place)
        # Queries are taken in blocks as well: their packed rows and running best count as memory.
        block = max(1024, self.max_bytes // (2 * (d * 8 + 32 * K + 64)))
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            costs[part], indices[part] = self._search_block(rows[part], keys, K)
        values = costs if self.metric == "euclidean" else costs.neg_()
        return values.to(device, torch.float64 if wide else torch.float32), indices.to(device)

    def _search_block(self, queries: Tensor, keys: _Keys, K: int) -> tuple[Tensor, Tensor]:
        """Try the fastest way first: costs (M, K) float64 and indices (M, K)."""
        on_cpu = queries.device.type == "cpu"
        if self.precision == "auto" and on_cpu and queries.shape[1] <= 8192:
            library = _library()
            if library is not None:
                try:
                    found = self._search_compiled(library, queries, keys, K)
                    if found is not None:
                        return found
                except _OutOfRange:
                    pass
            elif _int_mm_pays():
                try:
                    return _search_torch(queries, keys, K, self, "int8")
                except _OutOfRange:
                    pass
        try:
            return _search_torch(queries, keys, K, self, "float32")
        except _OutOfRange:
            pass
        try:
            return _search_torch(queries, keys, K, self, "float64")
        except _OutOfRange:
            raise ValueError(
                "queries and keys must be finite (found NaN, infinity or overflow)"
            ) from None

    def _search_compiled(
        self, library: ctypes.CDLL, queries: Tensor, keys: _Keys, K: int
    ) -> tuple[Tensor, Tensor] | None:
        """Search with 8-bit products in compiled code; None where the bound does not help."""
        m, d = queries.shape
        exact = keys.dtype in _BYTES and self.metric != "cosine"
        mean = _center(keys, self.metric).float().contiguous()
        kind, metric = _TYPE_CODES[keys.dtype], METRICS.index(self.metric)
        threads = torch.get_num_threads()

        def begin(rows: Tensor) -> int:
            handle = library.es_new(
                rows.data_ptr(), kind, len(rows), d, K, metric, exact, mean.data_ptr(), threads
            )
            if not handle:
                raise _OutOfRange
            return handle

        handle = begin(queries)
        try:
            for start, rows, packed, meta in self._packed_chunks(library, keys, mean, exact):
                arguments = (packed.data_ptr(), meta.data_ptr(), rows.data_ptr(), len(rows), start)
                if start == 0 and not exact and m >= 1024:
                    # A few queries tell whether 8 bits separate these keys at all.
                    some = queries[:: m // 64][:64].contiguous()
                    probe = begin(some)
                    _check(library.es_scan(probe, *arguments))
                    evaluated = library.es_evaluated(probe) / len(some)
                    library.es_free(probe)
                    if evaluated > max(256, 8 * K, len(rows) / 24):
                        return None
                _check(library.es_scan(handle, *arguments))
            costs = torch.empty(m, K, dtype=torch.float64)
            indices = torch.empty(m, K, dtype=torch.int64)
            library.es_finish(handle, costs.data_ptr(), indices.data_ptr())
        finally:
            library.es_free(handle)
        self.path = (
            "8-bit integer products, exact"
            if exact
            else "8-bit products with a certified bound, decided in float64"
        )
        return costs, indices

    def _packed_chunks(
        self, library: ctypes.CDLL, keys: _Keys, mean: Tensor, exact: bool
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (start, rows, packed, meta); what fits the budget is kept for the next search."""
        n, d = keys.data.shape
        panel, width = library.es_panel(), library.es_meta()
        padded = (d + 3) // 4 * 4
        key_bytes = padded + 4 * width // panel + 1
        kept = self._packed.get((keys.dtype, exact))
        if kept is not None:
            for start, stop, packed, meta in kept:
                yield start, keys.rows(start, stop), packed, meta
                keys.release()
            return
        keep = n * key_bytes <= self.max_bytes
        # A converted copy, or the pages of a mapped file, count as well.
        counts = keys.copies or keys.mapping is not None
        chunk_bytes = key_bytes + (8 * d if counts else 0)
        size = max(panel, self.max_bytes // chunk_bytes // panel * panel)
        panels = (min(size, n) + panel - 1) // panel
        kind, metric = _TYPE_CODES[keys.dtype], METRICS.index(self.metric)
        new = []
        for start, rows in keys.chunks(size):
            if not new or keep:
                panels = (len(rows) + panel - 1) // panel
                packed = torch.empty(panels * padded * panel, dtype=torch.uint8)
                meta = torch.empty(panels * width)
                new.append((start, start + len(rows), packed, meta))
            state = library.es_pack(
                rows.data_ptr(),
                kind,
                len(rows),
                d,
                metric,
                exact,
                mean.data_ptr(),
                packed.data_ptr(),
                meta.data_ptr(),
                torch.get_num_threads(),
            )
            _check(state)
            yield start, rows, packed, meta
        if keep:
            self._packed[keys.dtype, exact] = new


def exact_search(
    queries: Tensor | np.ndarray,
    keys: Tensor | np.ndarray,
    K: int,
    metric: str = "euclidean",
    *,
    precision: str = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> tuple[Tensor, Tensor]:
    """Find the K nearest keys of every query, once; see :class:`ExactIndex`.

    Example:
        >>> values, indices = exact_search(torch.tensor([[0.9]]), torch.tensor([[0.], [1.]]), 1)
        >>> indices
        tensor([[1]])
    """
    index = ExactIndex(keys, metric, precision=precision, max_bytes=max_bytes)
    return index.search(queries, K)


def _center(keys: _Keys, metric: str) -> Tensor:
    """Choose what is subtracted from every row, (D,) float64: about the mean of the keys."""
    if keys.dtype in _BYTES:
        return torch.zeros(keys.data.shape[1], dtype=torch.float64, device=keys.device)
    sample = keys.sample()
    sample = _normalize(sample) if metric == "cosine" else sample.double()
    mean = sample.mean(0)
    if not mean.abs().max() < 1e30:  # NaN, infinity, or beyond float32
        return torch.zeros_like(mean)
    return mean.float().double()


# ---------------------------------------------------------------------------------------------
# Compiled code


def _library() -> ctypes.CDLL | None:
    """Return the compiled search where the processor has fast 8-bit products."""
    library = _helpers()
    return library if library is not None and library.es_supported() else None


def _helpers() -> ctypes.CDLL | None:
    """Load csrc/exact_search.cpp if it can be compiled, for the parts that run anywhere."""
    return native.optional("exact_search", _declare, ("-fopenmp-simd", "-fno-trapping-math"))


def _declare(library: ctypes.CDLL) -> None:
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


def _check(state: int) -> None:
    if state == 1:
        raise _OutOfRange
    if state:
        raise MemoryError(f"the compiled search ran out of memory or threads (state {state})")


@lru_cache(maxsize=1)
def _int_mm_pays() -> bool:
    """Measure once whether ``torch._int_mm`` beats float32 clearly on this machine."""
    if not hasattr(torch, "_int_mm"):
        return False

    def seconds(a: Tensor, b: Tensor, multiply) -> float:
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            multiply(a, b)
            best = min(best, time.perf_counter() - start)
        return best

    a = torch.ones(256, 512, dtype=torch.int8)
    b = torch.ones(512, 512, dtype=torch.int8)
    try:
        if (torch._int_mm(a, b.T) != 512).any():
            return False
        return seconds(a, b.T, torch._int_mm) < 0.6 * seconds(a.float(), b.T.float(), torch.mm)
    except RuntimeError:  # not built for this processor
        return False


# ---------------------------------------------------------------------------------------------
# PyTorch only: the reference, and the way on GPUs


class _LowPrecision:
    """Rows prepared for products of one precision.

    Attributes:
        low: What is multiplied.
        scale: Factor of each row of ``low`` (int8), or None.
        norm: At least the length of each row of ``low``, times its scale, float64.
        residual: At least the length of the difference from the true (centered) row.
        square: Squared length of the true centered row.
        along: Its product with the mean.
        moved: Bound on the rounding of ``square`` (euclidean) or ``along``.
        unit: Unit roundoff of the costs.
    """

    def __init__(self, rows: Tensor, mean: Tensor, metric: str, mode: str) -> None:
        self.rows, self.scale = rows, None
        if mode == "integer":
            # Shift uint8 by 128: distances stay; dot products are mended with the sums of rows.
            self.low = rows if rows.dtype == torch.int8 else (rows.int() - 128).to(torch.int8)
            return
        work = torch.float64 if mode == "float64" else torch.float32
        self.unit = torch.finfo(work).eps / 2
        if metric == "cosine":
            self.low = (_normalize(rows) - mean).to(work)
        elif rows.dtype == torch.float64:
            self.low = (rows - mean).to(work)
        else:  # the difference of two float32 numbers has one rounding as well
            self.low = rows.to(work) - mean.to(work)
        length = torch.linalg.vector_norm(self.low, dim=1, dtype=torch.float64)
        if not (length < (1e18 if work == torch.float32 else 1e150)).all():
            raise _OutOfRange
        self.square = length.square()
        self.residual = length * (2 * self.unit)
        if metric == "euclidean":
            self.moved = 2 * length * self.residual + self.residual.square()
        else:
            self.along = (self.low.to(mean.dtype) if mode == "float64" else self.low) @ mean.to(
                work
            )
            size = mean.norm()
            self.moved = size * self.residual + (len(mean) + 4) * self.unit * size * length
        self.norm = length
        if mode == "int8":
            self.scale = (self.low.abs().amax(1) / 127).clamp_min(1e-30)
            quantized = (self.low / self.scale[:, None]).round_().clamp_(-127, 127)
            difference = torch.addcmul(self.low, quantized, self.scale[:, None], value=-1)
            self.low = quantized.to(torch.int8)
            slip = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64)
            self.residual = self.residual + slip + length * (4 * self.unit)
            self.norm = length + self.residual

    def part(self, rows: slice | Tensor) -> "_LowPrecision":
        """Return some of the rows."""
        chosen = object.__new__(_LowPrecision)
        for name, value in vars(self).items():
            of_rows = isinstance(value, Tensor) and value.dim() > 0
            setattr(chosen, name, value[rows] if of_rows else value)
        return chosen


def _search_torch(
    queries: Tensor, keys: _Keys, K: int, index: ExactIndex, mode: str
) -> tuple[Tensor, Tensor]:
    """Search with PyTorch's matrix products in ``mode``: "int8", "float32" or "float64".

    One pass over the keys keeps a shortlist of every query, longer than K, by approximate cost.
    The shortlist is evaluated exactly, and is certified when every key outside it must cost more
    than the K-th best. Queries where it is not take another pass with a longer one.
    """
    m, d = queries.shape
    n = len(keys.data)
    if mode == "int8" and keys.dtype in _BYTES and index.metric != "cosine":
        mode = "integer"
    mean = _center(keys, index.metric)
    costs = torch.empty(m, K, dtype=torch.float64, device=queries.device)
    found = torch.empty(m, K, dtype=torch.int64, device=queries.device)
    prepared = _LowPrecision(queries, mean, index.metric, mode)
    open_rows = torch.arange(m, device=queries.device)
    length = 4 * K + 32 if mode == "int8" else K + K // 2 + 8
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the bound is that of true float32
    try:
        while len(open_rows):
            length = min(n, length)
            x = prepared if len(open_rows) == m else prepared.part(open_rows)
            values, labels, error, shift = _shortlist(x, keys, length, mean, index, mode)
            if mode == "integer":
                exact = values.double() + shift[:, None]
            else:
                exact = _exact_costs(x.rows, keys, labels, index)
            if not exact.isfinite().all():
                raise _OutOfRange
            # Stable sorts: by index, then by cost, so that the lower index comes first on ties.
            labels, order = labels.sort(dim=1)
            exact, order = exact.gather(1, order).sort(dim=1, stable=True)
            labels = labels.gather(1, order)
            outside = values.amax(1).double() + shift - error
            certified = (outside > exact[:, K - 1]) | (length == n)
            done = open_rows[certified]
            costs[done], found[done] = exact[certified, :K], labels[certified, :K]
            open_rows = open_rows[~certified]
            length *= 4
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
    words = {"integer": "8-bit integer products, exact"}
    index.path = words.get(mode, f"{mode} products with a certified bound, decided in float64")
    return costs, found


def _shortlist(
    x: _LowPrecision, keys: _Keys, length: int, mean: Tensor, index: ExactIndex, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the keys of smallest approximate cost.

    Args:
        x: M queries.
        keys: The keys.
        length: How many, L.
        mean: What is subtracted from every row.
        index: For metric and byte budget.
        mode: See :func:`_search_torch`.

    Returns:
        Approximate costs (M, L) less a shift, indices (M, L), a bound (M,) on the error of all
        approximate costs, and the shift (M,).
    """
    m, d = x.low.shape
    device, budget = x.low.device, index.max_bytes
    # One tile of scores should stay in the processor's cache; a GPU wants larger ones.
    tile = budget // 8 if device.type == "cpu" else budget
    size = max(1, min(len(keys.data), max(256, budget // (32 * d)), 8192))
    rows = max(1, min(m, tile // (4 * size)))
    kind = torch.int32 if mode == "integer" else x.low.dtype
    kind = torch.float32 if mode == "int8" else kind
    worst = torch.iinfo(kind).max if mode == "integer" else math.inf
    values = torch.full((m, length), worst, dtype=kind, device=device)
    labels = torch.zeros(m, length, dtype=torch.int64, device=device)
    error = torch.zeros(m, dtype=torch.float64, device=device)
    shift = torch.zeros(m, dtype=torch.float64, device=device)
    library = _helpers() if mode == "float32" and device.type == "cpu" else None
    products = torch.empty(rows, size) if library is not None else None
    for start, key_rows in keys.chunks(size):
        y = _LowPrecision(key_rows, mean, index.metric, mode)
        for first in range(0, m, rows):
            part = slice(first, first + rows)
            if library is not None:
                some = x.part(part)
                tile_rows, count = len(some.low), len(key_rows)
                out = products.view(-1)[: tile_rows * count].view(tile_rows, count)
                torch.mm(some.low, y.low.T, out=out)
                bias, factor, bound, shift[part] = _bound(some, y, mean, index.metric, mode)
                bias = bias.float().contiguous()
                error[part] = torch.maximum(error[part], bound)
                state = library.es_select(
                    out.data_ptr(),
                    tile_rows,
                    count,
                    count,
                    bias.data_ptr(),
                    factor,
                    start,
                    values[part].data_ptr(),
                    labels[part].data_ptr(),
                    length,
                    torch.get_num_threads(),
                )
                _check(state)
                continue
            costs, bound, shift[part] = _approximate(x.part(part), y, mean, index.metric, mode)
            error[part] = torch.maximum(error[part], bound)
            new, local = _smallest(costs, min(length, len(key_rows)))
            if start == 0:
                values[part, : new.shape[1]], labels[part, : new.shape[1]] = new, local
                continue
            merged = torch.cat([values[part], new], 1)
            values[part], order = merged.topk(length, dim=1, largest=False, sorted=False)
            labels[part] = torch.cat([labels[part], local + start], 1).gather(1, order)
    return values, labels, error, shift


def _int8_products(x: Tensor, y: Tensor) -> Tensor:
    """Return x·yᵀ of int8 rows (M, D) and (N, D): int32 (M, N)."""
    if x.shape[1] == 1:  # torch 2.6 multiplies single columns wrongly
        x, y = (F.pad(rows, (0, 1)) for rows in (x, y))
    return torch._int_mm(x, y.T)


def _approximate(
    x: _LowPrecision, y: _LowPrecision, mean: Tensor, metric: str, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return costs (M, N) less a shift (M,), a bound (M,) on their error, and the shift."""
    d = x.low.shape[1]
    if mode == "integer":
        products = _int8_products(x.low, y.low)
        low = y.low.int()
        if metric == "euclidean":
            costs = low.square().sum(1, dtype=torch.int32) - products.mul_(2)
            shift = x.low.int().square().sum(1).double()
        else:  # x·y = x'·y' + 128 Σ y' + 128 Σ x' + 128² D, with ' for the shifted ones
            offset = 128 if x.rows.dtype == torch.uint8 else 0
            costs = products.neg_() - offset * low.sum(1, dtype=torch.int32)
            shift = -offset * (x.low.sum(1, dtype=torch.int64) + offset * d).double()
        return costs, torch.zeros_like(shift), shift
    bias, factor, error, shift = _bound(x, y, mean, metric, mode)
    if mode == "int8":
        costs = _int8_products(x.low, y.low).float()
        costs.mul_(y.scale).mul_(x.scale[:, None] * -factor).add_(bias.float())
    else:
        costs = torch.addmm(bias.to(y.low.dtype), x.low, y.low.T, alpha=-factor)
    return costs, error, shift


def _bound(
    x: _LowPrecision, y: _LowPrecision, mean: Tensor, metric: str, mode: str
) -> tuple[Tensor, int, Tensor, Tensor]:
    """Return bias (N,), factor, bound, shift (M,): |cost - bias + factor x·y - shift| <= bound.

    Here x·y is the product of the low-precision rows, with all the rounding it may have.
    """
    if metric == "euclidean":
        bias, shift, factor = y.square, x.square, 2
    else:  # x·y = x~·y~ + mean·y~ + x·mean, with ~ for centered rows
        bias, shift, factor = -y.along, -(x.along + mean.square().sum()), 1
    rounding = 16 if mode == "int8" else x.low.shape[1] + 16
    longest = (y.norm + y.residual).max()
    error = x.residual * longest + x.norm * y.residual.max()
    error += rounding * x.unit * (x.norm + x.residual) * longest
    error = factor * error + x.moved + y.moved.max()
    error += 16 * x.unit * bias.abs().max() + 1e-12 * shift.abs() + 1e-36
    return bias, factor, error * 1.01, shift.double()


def _smallest(costs: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return the K smallest entries of every row of (M, N), ascending.

    On the CPU the columns are first reduced to groups by their minimum, a fast pass over memory:
    the K smallest entries lie in the K groups with the smallest minima.
    """
    m, n = costs.shape
    group = 32
    width = n // group
    if costs.device.type != "cpu" or width < 2 * K:
        return costs.topk(K, dim=1, largest=False)
    minima = costs[:, : width * group].view(m, group, width).amin(1)
    columns = minima.topk(K, dim=1, largest=False, sorted=False).indices
    members = columns[:, :, None] + width * torch.arange(group, device=costs.device)
    rest = torch.arange(width * group, n, device=costs.device).expand(m, -1)
    members = torch.cat([members.flatten(1), rest], 1)
    values, order = costs.gather(1, members).topk(K, dim=1, largest=False)
    return values, members.gather(1, order)


def _exact_costs(queries: Tensor, keys: _Keys, labels: Tensor, index: ExactIndex) -> Tensor:
    """Evaluate costs in float64: queries (M, D), labels (M, L) of keys -> (M, L)."""
    m, length = labels.shape
    library = _helpers() if queries.device.type == "cpu" and not keys.copies else None
    if library is not None:
        out = torch.empty(m, length, dtype=torch.float64)
        labels = labels.contiguous()
        state = library.es_costs(
            queries.data_ptr(),
            _TYPE_CODES[keys.dtype],
            m,
            queries.shape[1],
            keys.data.data_ptr(),
            labels.data_ptr(),
            length,
            METRICS.index(index.metric),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        _check(state)
        keys.release()
        return out
    step = max(1, index.max_bytes // (64 * queries.shape[1] * length))
    out = torch.empty(m, length, dtype=torch.float64, device=queries.device)
    for first in range(0, m, step):
        part = slice(first, first + step)
        x = queries[part, None].double()
        y = keys.some(labels[part]).double()
        if index.metric == "euclidean":
            out[part] = (x - y).square_().sum(2)
            continue
        cost = -(x * y).sum(2)
        if index.metric == "cosine":
            norms = x.square().sum(2).sqrt() * y.square().sum(2).sqrt()
            cost = torch.where(norms > 0, cost / norms, 0.0)
        out[part] = cost
    keys.release()
    return out


# ---------------------------------------------------------------------------------------------
# Several sets of keys


def merge_neighbors(values: Tensor, indices: Tensor, K: int, metric: str) -> tuple[Tensor, Tensor]:
    """Merge neighbors found among several sets of keys: (M, any) -> the best K, (M, K).

    Equal values are ordered by index. Places without a neighbor have index -1.
    """
    by_index = indices.argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    largest = metric != "euclidean"
    worst = -math.inf if largest else math.inf
    order = values.masked_fill(indices < 0, worst).argsort(dim=1, descending=largest, stable=True)
    return values.gather(1, order)[:, :K], indices.gather(1, order)[:, :K]


def merge_over_ranks(values: Tensor, indices: Tensor, K: int, metric: str) -> tuple[Tensor, Tensor]:
    """Merge the neighbors that every rank of a distributed run found among its own keys.

    All ranks pass the same queries and get the same answer.

    Args:
        values: (M, k) of this rank, k <= K.
        indices: (M, k), positions in the whole set of keys.
        K: Number of neighbors over all ranks.
        metric: Says whether small or large values are best.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values[:, :K], indices[:, :K]
    missing = K - values.shape[1]
    if missing > 0:  # all ranks must send equal shapes
        values = torch.cat([values, values.new_zeros(len(values), missing)], 1)
        indices = torch.cat([indices, indices.new_full((len(indices), missing), -1)], 1)
    parts = []
    for mine in (values.contiguous(), indices.contiguous()):
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine)
        parts.append(torch.cat(theirs, 1))
    return merge_neighbors(*parts, K, metric)
