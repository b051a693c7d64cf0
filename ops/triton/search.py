"""The exact search on a GPU: tiles of scores by matrix units, a running top-K beside them.

A program takes a block of queries, meets the keys in tiles, and keeps the best so far in
registers: O(M·K) memory, no scores. A score and its key's place are one 64-bit number, the score's
bits in an order that integers share, the place's complement below: of equal scores the lower index
is the larger number, so that ties fall as on a CPU. A tile's best number is moved among the kept
ones, over the least of them, until no row's best is larger than its least: many rounds in the first
tiles, hardly one in the later ones. NaN counts as less than any number.

Scores rank, values are made of them at the end. They are q·k for "dot", q·k / max(|k|, 1e-12) for
"cosine" (values: divided by max(|q|, 1e-12) too), q·k - |k|²/2 for "euclidean" (values: |q|² minus
twice that).

**Exact** searches multiply in float32. **Certified** ones multiply in less: half precision as it
is, float32 rounded to TensorFloat-32. They keep at least twice as many keys as asked for, score
those again in float32, and accept a row where its K-th score in float32 lies above the least kept
coarse score by more than the error's bound. No key outside can then be among the K best: its
coarse score is at most the least kept one, so its score in float32 is below the K-th. The rows
that are left are searched again exactly (by a launch whose other blocks end at once: nothing waits
for the CPU). The bound, for C channels, u = 2⁻²³ and S = |q| max|k| ≥ Σ|q_c||k_c|:

- Rounding to TensorFloat-32, to nearest at 11 significant bits, moves a factor by 2⁻¹¹ of itself
  at most, a product of two by 2⁻¹⁰ + 2⁻²², all of them by (2⁻¹⁰ + 2⁻²²) S. Products of half
  precision are exact in float32.
- Matrix units add in float32, but cut off instead of rounding to nearest, and align several
  summands to the largest of them: an addition is taken to lose 2u of the largest partial sum,
  which is at most S (1 + 2⁻¹⁰), and C of them 4u·C·S with room to spare.
- The float32 scores are sums in some order, by at most C u S from the exact ones.
- Both scores are then scaled (cosine, |k| · scale ≤ 1 + 4u) or have |k|²/2 taken off, the same
  number: at most 2u (S + |k|²/2) each.
- Underflow loses 2⁻¹²⁶ a product, and of a factor in TensorFloat-32 2⁻¹²⁶ times the other one.

Where numbers are not finite the bound is not, and the row is searched exactly.

Symbols: B batch, M queries, N keys, C channels, K neighbors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import METRICS
from ops.maps.search import places, prepare_indices
from ops.rows import take_rows
from ops.triton.launch import has_tf32, next_power, on_device, tuned, widens

__all__ = ["MOST", "probe", "search"]

MOST = 64  # neighbors kept in registers
_MOST_CERTIFIED = 32
_FEWEST_CHANNELS = 32  # of a certified search: fewer gain nothing
COSINE = tl.constexpr(METRICS.index("cosine"))
EUCLIDEAN = tl.constexpr(METRICS.index("euclidean"))
# The packed number of no key (the next ones too, so that empty places differ), and what all of
# them are less than.
EMPTY = tl.constexpr(-9223372036854775807)
LEAST = tl.constexpr(-9223372034707292160)
NAN_RANK = tl.constexpr(-2147483647)


@triton.jit
def _pack(score, place):
    """Score and place as one number, larger for larger scores, then for lower places."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is no less than 0
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = tl.where(score != score, NAN_RANK, rank)
    return (rank.to(tl.int64) << 32) | ((~place).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _score_of(packed):
    rank = (packed >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _place_of(packed, N):
    """The place of a key; a valid one even of an empty number."""
    place = ~((packed & 0xFFFFFFFF).to(tl.int32))
    return tl.minimum(tl.maximum(place, 0), N - 1)


@triton.jit
def _keep(best, packed):
    """Keep the best of (BM, KEEP) and (BM, BN) numbers, in any order."""
    low, top = tl.min(best, 1), tl.max(packed, 1)
    while tl.sum((top > low).to(tl.int32), 0) > 0:
        takes = (top > low)[:, None] & (best == low[:, None])
        best = tl.where(takes, top[:, None], best)
        packed = tl.where(packed == top[:, None], EMPTY, packed)
        low, top = tl.min(best, 1), tl.max(packed, 1)
    return best


@triton.jit
def _write_best(
    best,
    K,
    first,
    row,
    mask,
    N,
    query_ptr,
    names_ptr,
    values_ptr,
    indices_ptr,
    METRIC: tl.constexpr,
):
    """Write the K best of (BM, KEEP) numbers, best first, after `first`; return the K-th."""
    of_query = tl.load(query_ptr + row, mask=mask, other=0.0)
    kth = tl.max(best, 1)
    for j in range(K):
        kth = tl.max(best, 1)
        best = tl.where(best == kth[:, None], EMPTY, best)
        value = _score_of(kth)
        if METRIC == COSINE:
            value = value * of_query
        if METRIC == EUCLIDEAN:
            value = of_query - 2 * value
            value = tl.where(value < 0, 0.0, value)
        at = row * (K + first) + first + j
        tl.store(values_ptr + at, value, mask=mask)
        name = _place_of(kth, N).to(tl.int64)
        if names_ptr is not None:
            name = tl.load(names_ptr + name, mask=mask, other=0)
        tl.store(indices_ptr + at, name, mask=mask)
    return kth


@tuned(
    ["C", "KEEP", "FINAL"],
    {"BM": 16, "BN": 32, "BC": 16},
    {"BM": 16, "BN": 128, "BC": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 32, "BN": 64, "BC": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 32, "BN": 128, "BC": 32, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BN": 64, "BC": 32, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BN": 128, "BC": 32, "num_warps": 8, "num_stages": 3},
)
@triton.jit
def _scan(
    q_ptr,
    k_ptr,
    key_ptr,
    rows_ptr,
    own_ptr,
    done_ptr,
    query_ptr,
    names_ptr,
    kept_ptr,
    values_ptr,
    indices_ptr,
    M,
    N,
    NQ,
    C,
    K,
    first,
    names_step,
    KEEP: tl.constexpr,
    METRIC: tl.constexpr,
    FINAL: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Meet a block of queries (BM) with all keys.

    Queries are rows of (B, NQ, C), those at `rows_ptr` (B, M) where that is given. FINAL: write the
    K best, of rows that are not done; else write KEEP packed numbers.
    """
    tiles = tl.cdiv(M, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    mask = m < M
    row = b * M + m
    if done_ptr is not None:
        mask = mask & (tl.load(done_ptr + row, mask=mask, other=1) == 0)
    at = m.to(tl.int64)
    if rows_ptr is not None:
        at = tl.load(rows_ptr + row, mask=mask, other=0)
    queries = q_ptr + (b * NQ + at)[:, None] * C
    if own_ptr is not None:
        own = tl.load(own_ptr + row, mask=mask, other=0)
    best = tl.zeros((BM, KEEP), tl.int64) + EMPTY + tl.arange(0, KEEP)[None, :]
    end = N * tl.max(mask.to(tl.int32), 0)  # nothing to do: no keys
    for n0 in range(0, end, BN):
        n = n0 + tl.arange(0, BN)
        here = n < N
        key = b * N + n
        score = tl.zeros((BM, BN), tl.float32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            q = tl.load(queries + c[None, :], mask=mask[:, None] & (c < C)[None, :], other=0.0)
            k = tl.load(
                k_ptr + key[None, :] * C + c[:, None],
                mask=here[None, :] & (c < C)[:, None],
                other=0.0,
            )
            if WIDEN:
                q = q.to(tl.float32)
                k = k.to(tl.float32)
            score = tl.dot(q, k, score, input_precision=PRECISION)
        if METRIC == COSINE:
            score = score * tl.load(key_ptr + key, mask=here, other=0.0)[None, :]
        if METRIC == EUCLIDEAN:
            score = score + tl.load(key_ptr + key, mask=here, other=0.0)[None, :]
        allowed = here[None, :] & mask[:, None]
        if own_ptr is not None:
            allowed = allowed & (n[None, :] != own[:, None])
        best = _keep(best, tl.where(allowed, _pack(score, n[None, :]), EMPTY))
    if FINAL:
        names = names_ptr
        if names_ptr is not None:
            names = names_ptr + b * names_step
        _write_best(best, K, first, row, mask, N, query_ptr, names, values_ptr, indices_ptr, METRIC)
    else:
        keep = tl.arange(0, KEEP)
        tl.store(kept_ptr + row[:, None] * KEEP + keep[None, :], best, mask=mask[:, None])


@tuned(
    ["C", "KEEP"],
    {"BM": 8, "BC": 16},
    {"BM": 2, "BC": 32, "num_warps": 2},
    {"BM": 4, "BC": 32, "num_warps": 4},
    {"BM": 4, "BC": 64, "num_warps": 8},
    {"BM": 8, "BC": 32, "num_warps": 8},
)
@triton.jit
def _decide(
    q_ptr,
    k_ptr,
    key_ptr,
    rows_ptr,
    bound_ptr,
    query_ptr,
    names_ptr,
    kept_ptr,
    values_ptr,
    indices_ptr,
    done_ptr,
    M,
    N,
    NQ,
    C,
    K,
    first,
    names_step,
    KEEP: tl.constexpr,
    METRIC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Score the kept keys again in float32; write the K best, and whether they are certain."""
    tiles = tl.cdiv(M, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    mask = m < M
    row = b * M + m
    at = m.to(tl.int64)
    if rows_ptr is not None:
        at = tl.load(rows_ptr + row, mask=mask, other=0)
    kept = tl.load(
        kept_ptr + row[:, None] * KEEP + tl.arange(0, KEEP)[None, :],
        mask=mask[:, None],
        other=EMPTY,
    )
    place = _place_of(kept, N)
    key = b * N + place
    score = tl.zeros((BM, KEEP), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = (c < C)[None, :] & mask[:, None]
        q = tl.load(q_ptr + (b * NQ + at)[:, None] * C + c[None, :], mask=inside, other=0.0)
        k = tl.load(
            k_ptr + key[:, :, None] * C + c[None, None, :], mask=inside[:, None, :], other=0.0
        )
        score += tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32), 2)
    if METRIC == COSINE:
        score = score * tl.load(key_ptr + key)
    if METRIC == EUCLIDEAN:
        score = score + tl.load(key_ptr + key)
    best = tl.where(kept < LEAST, kept, _pack(score, place))
    names = names_ptr
    if names_ptr is not None:
        names = names_ptr + b * names_step
    kth = _write_best(
        best, K, first, row, mask, N, query_ptr, names, values_ptr, indices_ptr, METRIC
    )
    least = tl.min(kept, 1)
    bound = tl.load(bound_ptr + row, mask=mask, other=0.0)
    certain = (least < LEAST) | (_score_of(kth) > _score_of(least) + bound)
    tl.store(done_ptr + row, certain.to(tl.uint8), mask=mask)


@triton.jit
def _pair_scores(
    a_ptr,
    b_ptr,
    a_rows_ptr,
    b_rows_ptr,
    out_ptr,
    M,
    NA,
    NB,
    C,
    SQUARED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Products, or SQUARED distances, of rows of (B, NA, C) and of (B, NB, C) at (B, M) places."""
    tiles = tl.cdiv(M, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    mask = m < M
    row = b * M + m
    at_a = m.to(tl.int64)
    at_b = m.to(tl.int64)
    if a_rows_ptr is not None:
        at_a = tl.load(a_rows_ptr + row, mask=mask, other=0)
    if b_rows_ptr is not None:
        at_b = tl.load(b_rows_ptr + row, mask=mask, other=0)
    total = tl.zeros((BM,), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = (c < C)[None, :] & mask[:, None]
        x = tl.load(a_ptr + (b * NA + at_a)[:, None] * C + c[None, :], mask=inside, other=0.0)
        y = tl.load(b_ptr + (b * NB + at_b)[:, None] * C + c[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        if SQUARED:
            total += tl.sum((x - y) * (x - y), 1)
        else:
            total += tl.sum(x * y, 1)
    tl.store(out_ptr + row, total, mask=mask)


def _pairs(
    a: Tensor,
    b: Tensor,
    m: int,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
    squared: bool = False,
) -> Tensor:
    """Products, or squared distances, of m pairs of rows a sample: (B, M) in float32."""
    samples, n, c = a.shape
    out = a.new_empty(samples, m, dtype=torch.float32)
    _pair_scores[(samples * triton.cdiv(m, 32),)](
        a, b, a_rows, b_rows, out, m, n, b.shape[1], c, SQUARED=squared, BM=32, BC=32
    )
    return out


def probe(device: torch.device) -> None:
    """Compile and run a small kernel; raise whatever keeps Triton from that."""
    ones = torch.ones(1, 1, 1, device=device)
    with torch.cuda.device_of(ones):
        if _pairs(ones, ones, 1).item() != 1:
            raise RuntimeError("a product of ones is not one")


def _round_tf32(x: Tensor) -> Tensor:
    """Float32 numbers rounded to TensorFloat-32, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _error_bound(
    q_square: Tensor, k_square: Tensor, scale: Tensor | None, c: int, offset: bool, rounded: bool
) -> Tensor:
    """How far a coarse score and one in float32 may differ (B, M); see the module.

    Args:
        q_square: Squared norms of the queries (B, M).
        k_square: Squared norms of the keys (B, N).
        scale: What products are multiplied by (B, N), if anything.
        c: Channels.
        offset: Whether half the keys' squares are taken off.
        rounded: Whether factors were rounded to TensorFloat-32.
    """
    unit, tiny = 2.0**-23, 2.0**-125
    q, k = q_square.sqrt(), k_square.amax(1, keepdim=True).sqrt()
    lost = tiny * c * (1 + q + k)
    if scale is not None:
        lost = lost * scale.amax(1, keepdim=True)
        k = k * 0 + (1 + 4 * unit)  # |k| times its scale; no number where k is none
    bound = (5 * c * unit + 4 * unit + (2.0**-10 + 2.0**-22 if rounded else 0)) * q * k
    if offset:
        bound = bound + 2 * unit * k * k
    return bound * 1.01 + lost  # the bound, too, is rounded


def _is_certified(keys: Tensor, count: int, K: int) -> bool:
    """Tell whether a certified search among so many keys is likely to be the faster one."""
    if K > _MOST_CERTIFIED or keys.shape[2] < _FEWEST_CHANNELS or count < 8 * next_power(2 * K):
        return False
    return keys.dtype != torch.float32 or has_tf32(keys.device)


@on_device
def search(
    queries: Tensor | None,
    keys: Tensor,
    K: int,
    metric: str,
    self_index: Tensor | None,
    exclude_self: bool,
    candidates: Tensor | None,
    certified: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Search as `ops.maps.search.nearest_neighbors` does, for M > 0 and K up to `MOST`.

    Queries and keys are float32, float16 or bfloat16, of one type. `certified` tells whether
    products are made in less than float32, with a certificate; None: where that is likely to pay.
    """
    b, n, _ = keys.shape
    keys = keys.contiguous()
    own, names = prepare_indices(keys.device, K, self_index, exclude_self, candidates)
    m = own.shape[-1] if queries is None else queries.shape[1]
    own = None if own is None else own.expand(b, m).contiguous()
    q, rows = (keys, own) if queries is None else (queries.contiguous(), None)
    key_square = _pairs(keys, keys, n)
    q_square = key_square.gather(1, own) if queries is None else _pairs(q, q, m)
    of_query = _inverse_norm(q_square) if metric == "cosine" else q_square
    values = keys.new_empty(b, m, K, dtype=torch.float32)
    indices = torch.empty(b, m, K, dtype=torch.int64, device=keys.device)
    first = 0 if own is None or exclude_self else 1
    if first:
        own_square = key_square.gather(1, own)  # this one refuses positions there are none of
        mine = _pairs(q, keys, m, rows, own, squared=metric == "euclidean")
        if metric == "cosine":
            mine *= of_query * _inverse_norm(own_square)
        values[..., 0], indices[..., 0] = mine, own
    if first == K:
        return values, indices
    k = keys
    if names is not None:
        names = names.expand(b, -1).contiguous()
        k, key_square = take_rows(keys, names), key_square.gather(1, names)
        own = None if own is None else places(own, names, n)
    if certified is None:
        certified = _is_certified(keys, k.shape[1], K - first)
    found = (rows, own, names, of_query, values, indices, first)
    _find(q, k, metric, q_square, key_square, certified, *found)
    return values, indices


def _inverse_norm(square: Tensor) -> Tensor:
    return square.sqrt().clamp(min=1e-12).reciprocal()


def _find(
    q: Tensor,
    k: Tensor,
    metric: str,
    q_square: Tensor,
    k_square: Tensor,
    certified: bool,
    rows: Tensor | None,
    own: Tensor | None,
    names: Tensor | None,
    of_query: Tensor,
    values: Tensor,
    indices: Tensor,
    first: int,
) -> None:
    """Fill values and indices (B, M, K) from column `first` on, exactly or with a certificate."""
    (b, n, c), (m, K) = k.shape, values.shape[1:]
    scale = _inverse_norm(k_square) if metric == "cosine" else None
    of_key = k_square / -2 if metric == "euclidean" else scale
    code = METRICS.index(metric)
    sizes = (m, n, q.shape[1], c, K - first, first, n)
    results = (values, indices)
    done = kept = None

    def grid(blocks):
        return (b * triton.cdiv(m, blocks["BM"]),)

    if certified:
        keep = next_power(2 * (K - first))
        kept = torch.empty(b, m, keep, dtype=torch.int64, device=k.device)
        done = torch.empty(b, m, dtype=torch.uint8, device=k.device)
        rounded = k.dtype == torch.float32
        bound = _error_bound(q_square, k_square, scale, c, metric == "euclidean", rounded)
        coarse_k = _round_tf32(k) if rounded else k
        coarse_q = coarse_k if q is k else _round_tf32(q) if rounded else q
        pointers = (coarse_q, coarse_k, of_key, rows, own, None, of_query, names, kept, *results)
        options = {"KEEP": keep, "METRIC": code}
        coarse = {"FINAL": False, "WIDEN": widens(k.dtype), "PRECISION": "tf32"}
        _scan[grid](*pointers, *sizes, **options, **coarse)
        pointers = (q, k, of_key, rows, bound, of_query, names, kept, *results, done)
        _decide[grid](*pointers, *sizes, **options)
    pointers = (q, k, of_key, rows, own, done, of_query, names, None, *results)
    options = {"KEEP": next_power(K - first), "METRIC": code}
    _scan[grid](*pointers, *sizes, **options, FINAL=True, WIDEN=True, PRECISION="ieee")
