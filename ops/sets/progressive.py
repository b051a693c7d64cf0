"""Exact search that looks at most keys only in part: data whose features hang together.

Rows are rotated to the principal axes of a sample. With x₁ the coordinates of x on the first axes
and x₂ the rest, |x - y|² >= |x₁ - y₁|² + (|x₂| - |y₂|)²: the length of the rest is one more
coordinate. These few numbers, with one scale for keys and queries alike, are rounded to 8 bits: the
*sketch* of a row. Distances of sketches are exact integers, and the triangle inequality bounds what
they say:

    |x - y| >= unit (|p - q| - slip_x - slip_y),

the slip of a row being at least the distance, in units, from its true coordinates to its sketch. A
Hadamard transform before rounding evens out the coordinates, so that one scale serves all.

1. The nearest of some first keys, by their sketches, are evaluated: no neighbor is farther than the
   K-th of them.
2. All keys are compared by sketches of 64 numbers; of those in reach the most promising are
   evaluated after a quarter, a half and all of the keys, and shorten the reach.
3. What is left is compared by sketches of 128 numbers.
4. What is left then is evaluated in float64, the most promising first, until no bound is in reach.
   All keys whose bound equals the K-th cost are evaluated, so that ties go to the lower index.

Keys lie in an order that strides through the set: the first ones are a fair sample even of keys
sorted by class. A query with very many candidates (one that ties with all keys) is compared with
every key; where there are more than a few of them, they are left to the caller.

**Cosine and dot products** are distances, too. On unit vectors |u - v|² = 2 - 2 cos. For dot
products keys get one more coordinate √(R² - |y|²), R the largest norm of a key, and queries a 0
there: |x - y|² then is |x|² + R² - 2 x·y. A zero row has cosine 0 with everything, as a unit vector
has that is orthogonal to all others: a key gets the extra coordinate 1, a query a rest of length 1.

**What rounding may do**, all of it added to the slip (u = 2⁻²⁴, P the rows of the rotation in
float32, n = |x| after centering):

- The rows of P are orthonormal but for ε = |PPᵀ - I| (Frobenius, computed in float64):
  Q = (PPᵀ)^-½ P is exactly so, and |Qx - Px| <= ε n for ε <= ½.
- Products are summed over blocks of at most `_BLOCK` features, and the blocks one after the other:
  each coordinate is within γ |p| n, γ = 1.01 (block + blocks) u, whatever the order inside a block
  is. All of them: within γ |P| n (Frobenius). So the coordinates are within
  e = (ε + γ |P|) n of those of Q.
- The length of the rest is √(n² - |Qx|²): between those of |Px| + e and |Px| - e, and taken from
  |Px| itself. The larger of the two differences is the doubt about it: about e n / rest where
  the rest is large, √(2 e n) at most where it vanishes and the difference cancels.
- Centering rounds each feature once: 1.3e-7 n. (Qx, |rest|) moves no farther than x does.
- Hadamard's log₂(width) additions, the centers that are subtracted and the extra coordinate round a
  few times: (20 + log₂ width) u times the length of all that was added up.
- The length of the difference between coordinates and sketch is computed, and enlarged by the
  rounding of its own sum, (width + 8) u relatively.

Costs in float64 are taken for exact up to 1e-12 relatively, as everywhere in :mod:`ops.sets.index`.

Symbols: M queries, N keys, D features, K neighbors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ops import METRICS
from ops.cpu import build
from ops.cpu.build import OutOfRange
from ops.sets.keys import TYPE_CODES, Keys, normalize

__all__ = [
    "ProgressiveKeys",
    "ProgressiveQueries",
    "Rotation",
    "fit_rotation",
    "hangs_together",
    "prunes",
    "supported",
]

_BLOCK = 128  # features summed at once in a rotation, see γ above
_STEP_ROWS = 2048  # rows rotated at once: what a rotation needs beside its results
_FIRST_WIDTH = 64
_SAMPLE = 512  # rows of a sample that choose a scale
_ROUND = 2.0**-24
_MOST_CANDIDATES = 16384
_PATIENCE = 16  # rows of all keys prepared for whole products cost about as much
_PROBES = 64


@dataclass(frozen=True)
class Stage:
    """How rows are sketched.

    Attributes:
        axes: Leading axes of the rotation.
        width: Numbers of a sketch, a power of two: axes, an extra coordinate, the rest.
        unit: Unit of the distances of sketches.
        lost: Bound on the error of the coordinates, relative to the length of a row.
        least: The same where lengths vanish.
        centers: What is subtracted from the extra coordinate and the rest.
        most: Numbers of a sketch lie in -most … most.
    """

    axes: int
    width: int
    unit: float
    lost: float
    least: float
    centers: tuple[float, float]
    most: int


@dataclass(frozen=True)
class Rotation:
    """A rotation fitted on a sample of keys, and how sketches are made.

    Attributes:
        metric: Of the search.
        mean: (D,) float32, subtracted from every row.
        axes: The most important first, float32, as :func:`_in_panels` lays them out.
        stages: One or two of growing width.
        longest: R, for dot products.
    """

    metric: str
    mean: Tensor
    axes: Tensor
    stages: tuple[Stage, ...]
    longest: float

    @property
    def key_bytes(self) -> int:
        """Bytes of a key's sketches."""
        return sum(stage.width + 8 for stage in self.stages)

    def coordinates(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return coordinates (n, A or more), squared norms before and after centering (n,)."""
        n, d = rows.shape
        panels = len(self.axes)
        z = torch.empty(n, panels * self.axes.shape[2])
        before, after = torch.empty(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        build.kernel("pg_rotate")(
            *(rows, TYPE_CODES[rows.dtype], n, d, int(self.metric == "cosine")),
            *(self.mean, self.axes, panels, _BLOCK, z, before, after),
        )
        return z, before, after

    def sketch(self, rows: Tensor, stages: tuple[Stage, ...], keys: bool) -> tuple[list, Tensor]:
        """Sketch rows once for every stage: (data, squares, slips) each; also squared norms."""
        n = len(rows)
        made = [
            (
                torch.empty(n, stage.width, dtype=torch.int8),
                torch.empty(n, dtype=torch.int32),
                torch.empty(n),
            )
            for stage in stages
        ]
        norms = torch.empty(n, dtype=torch.float64)
        write = build.kernel("pg_sketch")
        for start in range(0, n, _STEP_ROWS):
            part = slice(start, start + _STEP_ROWS)
            z, before, after = self.coordinates(rows[part])
            norms[part] = before
            extra = self._extra(before, after, keys)
            for stage, (data, squares, slips) in zip(stages, made, strict=True):
                numbers = torch.tensor(
                    [
                        *(stage.axes, stage.width, stage.unit, stage.lost, stage.least),
                        *(*stage.centers, stage.most),
                    ],
                    dtype=torch.float64,
                )
                write(
                    *(z, z.stride(0), after, extra, len(z), numbers),
                    *(data[part], squares[part], slips[part]),
                )
        return made, norms

    def _extra(self, before: Tensor, after: Tensor, keys: bool) -> Tensor | None:
        """Return the coordinates beside the rotated ones; a zero query's rest grows in place."""
        if self.metric == "euclidean":
            return None
        if self.metric == "cosine":
            zero = before == 0
            if keys:
                return zero.float()
            after += zero
        elif keys:
            return (self.longest**2 - before).clamp_(min=0).sqrt_().float()
        return torch.zeros(len(before))


def supported() -> bool:
    """Whether sketches are compared by compiled code made for this processor: x86 with AVX2."""
    found = build.kernel("pg_supported")
    return found is not None and bool(found())


def _in_panels(axes: Tensor) -> Tensor:
    """Lay axes (D, A) out as the compiled rotation reads them: (panels, D, axes of a panel)."""
    size = build.kernel("pg_axes")()
    panels = -(-axes.shape[1] // size)
    padded = torch.nn.functional.pad(axes, (0, panels * size - axes.shape[1]))
    return padded.view(len(axes), panels, size).transpose(0, 1).contiguous()


def _hadamard(width: int) -> Tensor:
    """Return the Hadamard matrix of a power of two."""
    h = torch.ones(1, 1)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hangs_together(sample: Tensor) -> bool:
    """Say from few rows whether few axes hold most of the variance.

    (tr C)² / tr(C²) of the covariance C counts the axes that matter: D for isotropic noise. With
    rows as they come, products of different rows estimate tr(C²) without bias.
    """
    n, d = sample.shape
    sample = sample - sample.mean(0)
    gram = (sample @ sample.T).double()
    size = gram.diagonal().sum() / n
    products = (gram.square().sum() - gram.diagonal().square().sum()) / (n * (n - 1))
    return bool(size.square() < products * (d / 4))


def _leading_axes(sample: Tensor, count: int) -> Tensor:
    """Return about the leading eigenvectors of the covariance of rows, (D, count), orthonormal.

    Subspace iteration: how near they are to the eigenvectors decides about speed alone.
    """
    d = sample.shape[1]
    covariance = sample.T @ sample
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(d, min(d, count + 8), generator=generator)
    for _ in range(2):
        basis = torch.linalg.qr(covariance @ basis)[0]
    values, turn = torch.linalg.eigh(basis.T @ covariance @ basis)
    basis = basis @ turn.flip(1)
    return torch.linalg.qr(basis[:, :count])[0].contiguous()


def _widths(d: int) -> tuple[int, ...]:
    """Widths of the sketches for D features."""
    second = 1 << int(math.log2(max(1, d // 2)))
    second = min(128, second)
    return (_FIRST_WIDTH, second) if second > _FIRST_WIDTH else (_FIRST_WIDTH,)


def fit_rotation(keys: Keys, metric: str, longest: float) -> Rotation:
    """Fit a rotation on a sample of the keys.

    Raises:
        OutOfRange: If the numbers are too large or too small for float32, or not finite.
    """
    rows = keys.sample()
    d = rows.shape[1]
    own = int(metric != "euclidean")
    prepared = (normalize(rows) if metric == "cosine" else rows.double()).float()
    mean = prepared.mean(0)
    size = torch.linalg.vector_norm(prepared - mean, dim=1).max()
    if not 1e-12 < size < 1e18:
        raise OutOfRange
    widths = _widths(d)
    axes = _leading_axes((prepared - mean)[::2], min(d, widths[-1] - 1 - own))
    exact = axes.double()
    skew = (exact.T @ exact - torch.eye(exact.shape[1], dtype=torch.float64)).norm().item()
    if not skew <= 0.1:
        raise OutOfRange
    blocks = -(-d // _BLOCK)
    gamma = 1.01 * (min(d, _BLOCK) + blocks) * _ROUND
    bare = Rotation(metric, mean, _in_panels(axes), (), longest)
    z, before, after = bare.coordinates(rows.contiguous())
    extra = bare._extra(before, after, True)
    stages = []
    for width in widths:
        count = min(width - 1 - own, axes.shape[1])
        z1 = z[:, :count]
        rest = (after - z1.double().square().sum(1)).clamp_(min=0).sqrt().float()
        centers = (float(extra.mean()) if own else 0.0, float(rest.mean()))
        columns = [z1, *([extra[:, None] - centers[0]] if own else []), rest[:, None] - centers[1]]
        points = torch.cat(columns, 1)[:: max(1, len(z) // _SAMPLE)]
        points = points @ _hadamard(width)[: points.shape[1]]
        most = 127 if stages else build.kernel("pg_most")()
        unit = _choose_step(points, most) / math.sqrt(width)
        lost = skew + gamma * axes[:, :count].norm().item() * 1.001
        # Products that vanish in float32 (below 1e-38) are far below this.
        stages.append(Stage(count, width, unit, lost, max(1e-9 * unit, 1e-30), centers, most))
    return Rotation(metric, mean, bare.axes, tuple(stages), longest)


def _choose_step(points: Tensor, most: int) -> float:
    """Return the rounding step that loses least: a small one cuts large numbers off."""
    top = points.abs().max().item()
    steps = [top * part / most for part in (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2)]

    def loss(step: float) -> float:
        rounded = (points / step).round_().clamp_(-most, most) * step
        return (points - rounded).norm(dim=1).mean().item()

    return max(min(steps, key=loss), 1e-25)


class ProgressiveKeys:
    """Sketches of a stretch of keys, ready to be searched.

    Args:
        rotation: Fitted on the keys.
        rows: (N, D), of the type of the search; left unchanged.
    """

    def __init__(self, rotation: Rotation, rows: Tensor) -> None:
        self.rotation, self.count = rotation, len(rows)
        made, _ = rotation.sketch(rows, rotation.stages, keys=True)
        panel = build.kernel("es_panel")()
        panels = -(-self.count // panel)
        self.step = _stride(self.count)
        data, squares, slips = made[0]
        first = (
            torch.empty(panels * panel * data.shape[1], dtype=torch.uint8),
            torch.empty(panels * panel, dtype=torch.int32),
            torch.empty(panels),
        )
        build.kernel("pg_pack")(
            *(data, squares, slips, self.count, data.shape[1], self.step), *first
        )
        self.stages = [first, *made[1:]]


def _stride(n: int) -> int:
    """Return a step that visits all of n places and never stays near where it was."""
    step = max(1, int(n * 0.6180339887))
    while math.gcd(step, n) != 1:
        step += 1
    return step % n if n > 1 else 1


class ProgressiveQueries:
    """Queries on their way over all stretches of keys.

    Args:
        rotation: Fitted on the keys.
        rows: (M, D), kept.
        K: Number of neighbors.
    """

    def __init__(self, rotation: Rotation, rows: Tensor, K: int) -> None:
        m = len(rows)
        self.rotation, self.rows, self.K = rotation, rows, K
        self.sketches, squares = rotation.sketch(rows, rotation.stages, keys=False)
        self.norms = squares.sqrt()
        if rotation.metric == "euclidean":
            self.offset, self.factor = torch.zeros_like(squares), 1.0
        elif rotation.metric == "cosine":
            self.offset, self.factor = torch.full_like(squares, 2.0), 2.0
        else:
            self.offset, self.factor = squares + rotation.longest**2, 2.0
        self.costs = torch.zeros(m, K, dtype=torch.float64)
        self.indices = torch.full((m, K), -1)
        self.open = torch.zeros(m, dtype=torch.uint8)
        self.counts = torch.zeros(3, dtype=torch.int64)

    def scan(
        self, keys: ProgressiveKeys, rows: Tensor, start: int, patience: int = _PATIENCE
    ) -> None:
        """Compare with a stretch of keys.

        Args:
            keys: Their sketches.
            rows: Themselves.
            start: The number of the first of them.
            patience: How many queries with too many candidates may be compared with every key.
        """
        m, d = self.rows.shape
        n, stages = keys.count, self.rotation.stages
        addresses = []
        for number in range(2):
            there = number < len(stages)
            pair = (self.sketches[number], keys.stages[number]) if there else ()
            addresses += [t.data_ptr() for side in pair for t in side] if there else [0] * 6
        panels = -(-n // build.kernel("es_panel")())
        seeds = max(panels // 16, -(-4 * self.K // 48))
        widths = [stage.width for stage in stages] + [0] * (2 - len(stages))
        units = [stage.unit for stage in stages] + [1.0] * (2 - len(stages))
        sizes = (m, n, d, self.K, start, keys.step, *widths, seeds, _most(n, self.K))
        sizes += (patience,)
        build.kernel("pg_scan")(
            *(self.rows, rows, TYPE_CODES[rows.dtype], METRICS.index(self.rotation.metric)),
            *(torch.tensor(addresses), torch.tensor(sizes)),
            torch.tensor([*units, self.factor], dtype=torch.float64),
            *(self.norms, self.offset, self.costs, self.indices, self.open, self.counts),
        )

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return costs and indices (M, K), best first, and which queries (M,) were given up."""
        indices, order = self.indices.sort(dim=1)
        costs, best = self.costs.gather(1, order).sort(dim=1, stable=True)
        return costs, indices.gather(1, best), self.open.bool()


def _most(n: int, K: int) -> int:
    """How many candidates a query may have."""
    return max(64 * K, min(n // 4, _MOST_CANDIDATES), 256)


def prunes(rotation: Rotation, keys: Keys, queries: Tensor, K: int, eight_bits: bool) -> bool:
    """Try some queries on a sample of the keys: whether sketches leave few enough of them.

    Work is counted in 8-bit multiplications of one processor with VNNI. With AVX2 alone those of
    sketches take twice as long, but whole rows are float32 products then (``eight_bits`` False),
    which take 3.5 times as long: measured on one processor each.
    """
    rows = keys.sample()[::2].contiguous()
    some = queries[:: max(1, len(queries) // _PROBES)][:_PROBES].contiguous()
    near = max(1, -(-K * len(rows) // len(keys.data)))
    hunt = ProgressiveQueries(rotation, some, near)
    hunt.scan(ProgressiveKeys(rotation, rows), rows, 0, patience=0)
    if hunt.open.double().mean() > 0.05:
        return False
    left, seen, evaluated = (hunt.counts.double() / (len(some) * len(rows))).tolist()
    # Four times K are evaluated on the way, of a sample as of all keys.
    evaluated += 4 * (K / len(keys.data) - near / len(rows))
    d = rows.shape[1]
    each = 3000 + 20 * rows.element_size() * d
    first, whole = (_FIRST_WIDTH + 40, 0.7 * d) if eight_bits else (2 * _FIRST_WIDTH + 60, 2.5 * d)
    return first + 600 * left + 2500 * seen + each * max(0.0, evaluated) < whole
