"""Exact search by PyTorch: low-precision products, a certified bound, the rest in float64.

The reference of `ops.sets.index`, and its way on GPUs. Symbols as there.
"""

import math
import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import METRICS
from ops.cpu import build
from ops.cpu.build import OutOfRange
from ops.sets.keys import BYTES, TYPE_CODES, Keys, center, normalize
from ops.topk import two_stage_topk

__all__ = ["int_mm_pays", "search_torch"]


@lru_cache(maxsize=1)
def int_mm_pays() -> bool:
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
            self.low = (normalize(rows) - mean).to(work)
        elif rows.dtype == torch.float64:
            self.low = (rows - mean).to(work)
        else:  # the difference of two float32 numbers has one rounding as well
            self.low = rows.to(work) - mean.to(work)
        length = torch.linalg.vector_norm(self.low, dim=1, dtype=torch.float64)
        if not (length < (1e18 if work == torch.float32 else 1e150)).all():
            raise OutOfRange
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


def search_torch(
    queries: Tensor, keys: Keys, K: int, metric: str, max_bytes: int, mode: str
) -> tuple[Tensor, Tensor, str]:
    """Search with PyTorch's matrix products in ``mode``: "int8", "float32" or "float64".

    One pass over the keys keeps a shortlist of every query, longer than K, by approximate cost.
    The shortlist is evaluated exactly, and is certified when every key outside it must cost more
    than the K-th best. Queries where it is not take another pass with a longer one.

    Returns:
        Costs (M, K) float64, indices (M, K), and how products were taken, in words.

    Raises:
        OutOfRange: If the numbers do not fit the mode.
    """
    m, d = queries.shape
    n = len(keys.data)
    if mode == "int8" and keys.dtype in BYTES and metric != "cosine":
        mode = "integer"
    mean = center(keys, metric)
    costs = torch.empty(m, K, dtype=torch.float64, device=queries.device)
    found = torch.empty(m, K, dtype=torch.int64, device=queries.device)
    prepared = _LowPrecision(queries, mean, metric, mode)
    open_rows = torch.arange(m, device=queries.device)
    length = 4 * K + 32 if mode == "int8" else K + K // 2 + 8
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the bound is that of true float32
    try:
        while len(open_rows):
            length = min(n, length)
            x = prepared if len(open_rows) == m else prepared.part(open_rows)
            values, labels, error, shift = _shortlist(
                x, keys, length, mean, metric, max_bytes, mode
            )
            if mode == "integer":
                exact = values.double() + shift[:, None]
            else:
                exact = _exact_costs(x.rows, keys, labels, metric, max_bytes)
            if not exact.isfinite().all():
                raise OutOfRange
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
    default = f"{mode} products with a certified bound, decided in float64"
    return costs, found, words.get(mode, default)


def _shortlist(
    x: _LowPrecision,
    keys: Keys,
    length: int,
    mean: Tensor,
    metric: str,
    max_bytes: int,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the keys of smallest approximate cost.

    Args:
        x: M queries.
        keys: The keys.
        length: How many, L.
        mean: What is subtracted from every row.
        metric: Says what a cost is.
        max_bytes: Byte budget.
        mode: See :func:`search_torch`.

    Returns:
        Approximate costs (M, L) less a shift, indices (M, L), a bound (M,) on the error of all
        approximate costs, and the shift (M,).
    """
    m, d = x.low.shape
    device = x.low.device
    # One tile of scores should stay in the processor's cache; a GPU wants larger ones.
    tile = max_bytes // 8 if device.type == "cpu" else max_bytes
    size = max(1, min(len(keys.data), max(256, max_bytes // (32 * d)), 8192))
    rows = max(1, min(m, tile // (4 * size)))
    kind = torch.int32 if mode == "integer" else x.low.dtype
    kind = torch.float32 if mode == "int8" else kind
    worst = torch.iinfo(kind).max if mode == "integer" else math.inf
    values = torch.full((m, length), worst, dtype=kind, device=device)
    labels = torch.zeros(m, length, dtype=torch.int64, device=device)
    error = torch.zeros(m, dtype=torch.float64, device=device)
    shift = torch.zeros(m, dtype=torch.float64, device=device)
    native = build.kernel("es_select") if mode == "float32" and device.type == "cpu" else None
    products = torch.empty(rows, size) if native is not None else None
    for start, key_rows in keys.chunks(size):
        y = _LowPrecision(key_rows, mean, metric, mode)
        for first in range(0, m, rows):
            part = slice(first, first + rows)
            if native is not None:
                some = x.part(part)
                tile_rows, count = len(some.low), len(key_rows)
                out = products.view(-1)[: tile_rows * count].view(tile_rows, count)
                torch.mm(some.low, y.low.T, out=out)
                bias, factor, bound, shift[part] = _bound(some, y, mean, metric, mode)
                error[part] = torch.maximum(error[part], bound)
                best = (values[part], labels[part], length)
                native(
                    out, tile_rows, count, count, bias.float().contiguous(), factor, start, *best
                )
                continue
            costs, bound, shift[part] = _approximate(x.part(part), y, mean, metric, mode)
            error[part] = torch.maximum(error[part], bound)
            _keep_smallest(costs, start, values[part], labels[part])
    return values, labels, error, shift


def _keep_smallest(costs: Tensor, start: int, values: Tensor, labels: Tensor) -> None:
    """Count costs (M, N) of the keys from number `start` on in the shortlist (M, L)."""
    length = values.shape[1]
    new, local = _smallest(costs, min(length, costs.shape[1]))
    if start == 0:
        values[:, : new.shape[1]], labels[:, : new.shape[1]] = new, local
        return
    merged, order = torch.cat([values, new], 1).topk(length, dim=1, largest=False, sorted=False)
    values.copy_(merged)
    labels.copy_(torch.cat([labels, local + start], 1).gather(1, order))


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
        bias, shift, factor = -y.along, -(x.along.double() + mean.square().sum()), 1
    rounding = 16 if mode == "int8" else x.low.shape[1] + 16
    longest = (y.norm + y.residual).max()
    error = x.residual * longest + x.norm * y.residual.max()
    error += rounding * x.unit * (x.norm + x.residual) * longest
    error = factor * error + x.moved + y.moved.max()
    error += 16 * x.unit * bias.abs().max() + 1e-12 * shift.abs() + 1e-36
    return bias, factor, error * 1.01, shift.double()


def _smallest(costs: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return the K smallest entries of every row of (M, N), ascending, equal ones in any order."""
    group = 32
    if costs.device.type == "cpu" and costs.shape[1] // group >= 2 * K:
        return two_stage_topk(costs, K, False, group)
    return costs.topk(K, dim=1, largest=False)


def _exact_costs(
    queries: Tensor, keys: Keys, labels: Tensor, metric: str, max_bytes: int
) -> Tensor:
    """Evaluate costs in float64: queries (M, D), labels (M, L) of keys -> (M, L)."""
    m, length = labels.shape
    in_place = queries.device.type == "cpu" and not keys.copies
    native = build.kernel("es_costs") if in_place else None
    if native is not None:
        out = torch.empty(m, length, dtype=torch.float64)
        kind, metric_code = TYPE_CODES[keys.dtype], METRICS.index(metric)
        named = (keys.data, labels.contiguous(), length)
        native(queries, kind, m, queries.shape[1], *named, metric_code, out)
        keys.release()
        return out
    step = max(1, max_bytes // (64 * queries.shape[1] * length))
    out = torch.empty(m, length, dtype=torch.float64, device=queries.device)
    for first in range(0, m, step):
        part = slice(first, first + step)
        x = queries[part, None].double()
        y = keys.some(labels[part]).double()
        if metric == "euclidean":
            out[part] = (x - y).square_().sum(2)
            continue
        cost = -(x * y).sum(2)
        if metric == "cosine":
            norms = x.square().sum(2).sqrt() * y.square().sum(2).sqrt()
            cost = torch.where(norms > 0, cost / norms, 0.0)
        out[part] = cost
    keys.release()
    return out
