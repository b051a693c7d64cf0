"""Exact nearest neighbors of many queries among many keys: the large two-dimensional search.

Where :mod:`ops.maps.search` searches feature maps, this file searches training sets: one matrix of
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

Low precision is 8 bits where the processor multiplies 8-bit integers fast (x86 with AVX-512 VNNI
or AVX-VNNI, compiled; or ``torch._int_mm`` where it measures faster), else float32. Data whose
features hang together need no such product at all: :mod:`ops.sets.progressive` compares short 8-bit
sketches first, on any x86 with AVX2, compiled.

Symbols: M queries, N keys, D features, K neighbors. The cost of a pair is its squared distance or
minus its similarity: smaller is better.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ops import METRICS
from ops.cpu import build
from ops.cpu.build import OutOfRange
from ops.sets import certified, progressive
from ops.sets.keys import (
    BYTES,
    TYPE_CODES,
    Keys,
    as_tensor,
    center,
    common_dtype,
    normalize,
)
from ops.sets.progressive import ProgressiveKeys, ProgressiveQueries, Rotation

__all__ = ["DEFAULT_MAX_BYTES", "PRECISIONS", "ExactIndex", "exact_search"]

PRECISIONS = ("auto", "float32")
DEFAULT_MAX_BYTES = 1 << 26
# From where on fitting a rotation pays, in a search or in several of the same keys.
MIN_KEYS, MIN_QUERIES, MIN_FEATURES = 8192, 2048, 128
# Of more neighbors the candidates are so many that whole products measured faster, in 8 bits or
# (with AVX2 alone) in float32.
MAX_NEIGHBORS, MAX_NEIGHBORS_FLOAT32 = 32, 128


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
        self.data, self.mapping = as_tensor(keys)
        if self.data.dim() != 2 or self.data.numel() == 0:
            raise ValueError(f"keys must be (N, D), not empty, got {tuple(self.data.shape)}")
        self.metric, self.precision, self.max_bytes = metric, precision, max_bytes
        self.path = ""
        self._packed: dict[tuple, list] = {}
        self._asked = 0
        self._rotations: dict[torch.dtype, Rotation | None] = {}
        self._sketched: dict[torch.dtype, list] = {}
        self._prunes: dict[tuple, bool] = {}

    def __len__(self) -> int:
        return len(self.data)

    @torch.no_grad()
    def search(
        self, queries: Tensor | np.ndarray, K: int, *, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Find the K nearest keys of every query.

        Args:
            queries: (M, D).
            K: Number of neighbors, 1 … N.
            wide: Whether to return the values as they were decided, in float64.

        Returns:
            Values (M, K), float32 (float64 if wide, or if queries or keys are): squared
            distances, or similarities; and indices (M, K) int64, best first, equal ones by index.

        Raises:
            ValueError: If shapes do not agree, K is out of range, or numbers are not finite.
        """
        queries, _ = as_tensor(queries)
        n, d = self.data.shape
        if queries.dim() != 2 or queries.shape[1] != d:
            raise ValueError(f"queries must be (M, {d}) like the keys, got {tuple(queries.shape)}")
        if not 1 <= K <= n:
            raise ValueError(f"K must lie in 1 … {n}, the number of keys (got {K})")
        wide = wide or torch.float64 in (queries.dtype, self.data.dtype)
        device = queries.device
        if len(queries) == 0:
            empty = torch.empty(0, K, device=device)
            return empty.double() if wide else empty, empty.long()
        dtype = common_dtype(queries, self.data, self.mapping is None)
        # MPS has no float64: the search then runs on the CPU, whose memory it shares.
        place = torch.device("cpu") if device.type == "mps" else device
        keys = Keys(self.data, dtype, place)
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

    def _search_block(self, queries: Tensor, keys: Keys, K: int) -> tuple[Tensor, Tensor]:
        """Try the fastest way first: costs (M, K) float64 and indices (M, K)."""
        self._asked += len(queries)
        rotation = self._rotation(queries, keys, K)
        if rotation is not None:
            try:
                return self._search_progressive(queries, keys, K, rotation)
            except OutOfRange:
                self._rotations[keys.dtype] = None
        return self._search_everything(queries, keys, K)

    def _search_everything(self, queries: Tensor, keys: Keys, K: int) -> tuple[Tensor, Tensor]:
        """Search by products of whole rows: costs (M, K) float64 and indices (M, K)."""
        on_cpu = queries.device.type == "cpu"
        if self.precision == "auto" and on_cpu and queries.shape[1] <= 8192:
            if eight_bits():
                try:
                    found = self._search_compiled(queries, keys, K)
                    if found is not None:
                        return found
                except OutOfRange:
                    pass
            elif certified.int_mm_pays():
                try:
                    return self._search_torch(queries, keys, K, "int8")
                except OutOfRange:
                    pass
        try:
            return self._search_torch(queries, keys, K, "float32")
        except OutOfRange:
            pass
        try:
            return self._search_torch(queries, keys, K, "float64")
        except OutOfRange:
            raise ValueError(
                "queries and keys must be finite (found NaN, infinity or overflow)"
            ) from None

    def _rotation(self, queries: Tensor, keys: Keys, K: int) -> Rotation | None:
        """Return the rotation of the progressive search, or None where it does not pay."""
        n, d = keys.data.shape
        most_neighbors = MAX_NEIGHBORS if eight_bits() else MAX_NEIGHBORS_FLOAT32
        large = n >= MIN_KEYS and MIN_FEATURES <= d <= 8192 and most_neighbors >= K
        if self.precision != "auto" or queries.device.type != "cpu" or not large:
            return None
        kept = keys.dtype in self._sketched
        if not (kept or self._asked >= MIN_QUERIES) or not progressive.supported():
            return None
        if keys.dtype not in self._rotations:
            self._rotations[keys.dtype] = self._fit(keys)
        rotation = self._rotations[keys.dtype]
        if rotation is None or not (
            kept or self._fits(rotation, keys) or len(queries) >= 2 * MIN_QUERIES
        ):
            return None
        if (keys.dtype, K) not in self._prunes:
            self._prunes[keys.dtype, K] = progressive.prunes(
                rotation, keys, queries, K, eight_bits()
            )
        return rotation if self._prunes[keys.dtype, K] else None

    def _fit(self, keys: Keys) -> Rotation | None:
        sample = keys.sample()
        some = sample[:: max(1, len(sample) // 512)].float()
        if not progressive.hangs_together(
            normalize(some).float() if self.metric == "cosine" else some
        ):
            return None
        longest = 0.0
        if self.metric == "dot":
            for _, rows in keys.chunks(4096):
                longest = max(longest, rows.double().square().sum(1).max().sqrt().item())
        try:
            return progressive.fit_rotation(keys, self.metric, longest * (1 + 1e-12))
        except OutOfRange:
            return None

    def _fits(self, rotation: Rotation, keys: Keys) -> bool:
        return len(keys.data) * rotation.key_bytes <= self.max_bytes

    def _search_progressive(
        self, queries: Tensor, keys: Keys, K: int, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Search by sketches; queries that tie with very many keys are left to whole rows."""
        hunt = ProgressiveQueries(rotation, queries, K)
        kept = self._sketched.get(keys.dtype)
        if kept is not None:
            for start, stop, sketches in kept:
                hunt.scan(sketches, keys.rows(start, stop), start)
                keys.release()
        else:
            keep = self._fits(rotation, keys)
            # A converted copy, or the pages of a mapped file, count as well.
            counts = keys.copies or keys.mapping is not None
            key_bytes = rotation.key_bytes + 64 + (8 * keys.data.shape[1] if counts else 0)
            new = []
            for start, rows in keys.chunks(max(1024, self.max_bytes // key_bytes)):
                sketches = ProgressiveKeys(rotation, rows)
                hunt.scan(sketches, rows, start)
                if keep:
                    new.append((start, start + len(rows), sketches))
            if keep:
                self._sketched[keys.dtype] = new
        costs, indices, left = hunt.result()
        if left.any():
            costs[left], indices[left] = self._search_everything(queries[left], keys, K)
        self.path = (
            f"8-bit sketches along {' and '.join(str(s.axes) for s in rotation.stages)} principal "
            "axes with a certified bound, decided in float64"
        )
        return costs, indices

    def _search_torch(
        self, queries: Tensor, keys: Keys, K: int, mode: str
    ) -> tuple[Tensor, Tensor]:
        costs, indices, self.path = certified.search_torch(
            queries, keys, K, self.metric, self.max_bytes, mode
        )
        return costs, indices

    def _search_compiled(self, queries: Tensor, keys: Keys, K: int) -> tuple[Tensor, Tensor] | None:
        """Search with 8-bit products in compiled code; None where the bound does not help."""
        m, d = queries.shape
        exact = keys.dtype in BYTES and self.metric != "cosine"
        mean = center(keys, self.metric).float().contiguous()
        kind, metric = TYPE_CODES[keys.dtype], METRICS.index(self.metric)
        scan, free = build.kernel("es_scan"), build.kernel("es_free")

        def begin(rows: Tensor) -> int:
            new = build.kernel("es_new")
            handle = new(rows, kind, len(rows), d, K, metric, exact, mean)
            if not handle:
                raise OutOfRange
            return handle

        handle = begin(queries)
        try:
            for start, rows, packed, meta in self._packed_chunks(keys, mean, exact):
                arguments = (packed, meta, rows, len(rows), start)
                if start == 0 and not exact and m >= 1024:
                    # A few queries tell whether 8 bits separate these keys at all.
                    some = queries[:: m // 64][:64].contiguous()
                    probe = begin(some)
                    scan(probe, *arguments)
                    evaluated = build.kernel("es_evaluated")(probe) / len(some)
                    free(probe)
                    if evaluated > max(256, 8 * K, len(rows) / 24):
                        return None
                scan(handle, *arguments)
            costs = torch.empty(m, K, dtype=torch.float64)
            indices = torch.empty(m, K, dtype=torch.int64)
            build.kernel("es_finish")(handle, costs, indices)
        finally:
            free(handle)
        self.path = (
            "8-bit integer products, exact"
            if exact
            else "8-bit products with a certified bound, decided in float64"
        )
        return costs, indices

    def _packed_chunks(
        self, keys: Keys, mean: Tensor, exact: bool
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (start, rows, packed, meta); what fits the budget is kept for the next search."""
        n, d = keys.data.shape
        panel, width = build.kernel("es_panel")(), build.kernel("es_meta")()
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
        kind, metric = TYPE_CODES[keys.dtype], METRICS.index(self.metric)
        new = []
        for start, rows in keys.chunks(size):
            if not new or keep:
                panels = (len(rows) + panel - 1) // panel
                packed = torch.empty(panels * padded * panel, dtype=torch.uint8)
                meta = torch.empty(panels * width)
                new.append((start, start + len(rows), packed, meta))
            pack = build.kernel("es_pack")
            pack(rows, kind, len(rows), d, metric, exact, mean, packed, meta)
            yield start, rows, packed, meta
        if keep:
            self._packed[keys.dtype, exact] = new


def eight_bits() -> bool:
    """Whether compiled 8-bit products of whole rows are fast here: AVX-512 VNNI, AVX-VNNI."""
    supported = build.kernel("es_supported")
    return supported is not None and bool(supported())


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
