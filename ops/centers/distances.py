"""Distance kernels: how much a stored center counts for a query, as a matrix of weights.

Five kernels turn the distance between a query x and a center c into a weight
(ε = ``epsilon``, p = ``exponent``):

========================  =================================================================
``euclidean``             (‖x − c‖ + ε)^p
``euclidean_pyramid``     mean over s < ``scales`` of (‖x[::2^s] − c[::2^s]‖ + ε)^p
``cosine``                (1 − |cos(x, c)| + ε)^p
``dot``                   (|1 − |x·c|| + ε)^p, which is (1 − |x·c| + ε)^p for |x·c| ≤ 1
``influence_cone``        max(0, f·d_min − d), d = ‖x − c‖ + ε, d_min over the centers
========================  =================================================================

Every kernel is split in two: `DistanceKernel.distances` gives one positive number a pair (ε
included), by matrix products; the weight is a function of that number alone. For the four inverse
kernels weight = distance^p, so weights may be taken relative to the nearest center: (d / d_min)^p
≤ 1 predicts the same and never overflows, where the bare formula reaches 1e48 (ε = 1e-6, p = −8).

No tensor of differences (queries × centers × features) is ever made.
Symbols: B queries, N keys (centers), D features.

References:
    J. Loverich, "Dynamic and Deep Nearest Neighbors in PyTorch" (the kernels' formulas).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.cpu import build

__all__ = [
    "KERNELS",
    "DistanceKernel",
    "cosine_kernel",
    "dot_kernel",
    "euclidean_distances",
    "euclidean_kernel",
    "euclidean_pyramid_kernel",
    "influence_cone_kernel",
    "power_",
]

KERNELS = ("euclidean", "euclidean_pyramid", "cosine", "dot", "influence_cone")

# Up to this many features plain differences are as fast as a matrix product, and exact.
_DIRECT_FEATURES = 16
# Up to this many differences in all, compiled code takes them one by one: faster than a product and
# what must come after it.
_COMPILED_DIFFERENCES = 1 << 22
# Below this share of ‖x‖² the expansion ‖x‖² + ‖c‖² − 2x·c has lost too many digits.
_NEAR = 1e-2
# Exponents that are reached by squaring so many times, then a reciprocal.
_SQUARINGS = {-1.0: 0, -2.0: 1, -4.0: 2, -8.0: 3}
# Pairs gathered at once when near-duplicates are recomputed (elements of a pairs × D tensor).
_PAIR_ELEMENTS = 1 << 22


def power_(x: Tensor, exponent: float) -> Tensor:
    """Raise `x` > 0 to a power in place; −1, −2, −4, −8 by squaring, faster than ``pow``."""
    if exponent in _SQUARINGS:
        for _ in range(_SQUARINGS[exponent]):
            x.square_()
        return x.reciprocal_()
    return x.pow_(exponent)


def _direct_squared(keys: Tensor, queries: Tensor, out: Tensor, work: Tensor | None) -> Tensor:
    """Add up squared differences feature by feature in two buffers: (N, D), (B, D) -> (B, N)."""
    columns = keys.t().contiguous()  # strided rows would not vectorise
    torch.sub(queries[:, :1], columns[0], out=out)
    out.square_()
    if keys.shape[1] > 1:
        work = torch.empty_like(out) if work is None else work
    for feature in range(1, keys.shape[1]):
        torch.sub(queries[:, feature : feature + 1], columns[feature], out=work)
        out.addcmul_(work, work)
    return out


def _repair_near(squared: Tensor, keys: Tensor, queries: Tensor, query_squares: Tensor) -> None:
    """Recompute, in place, squared distances so small that the expansion left no digits of them."""
    # If ‖x − c‖² is a small share of ‖x‖² + ‖c‖², then ‖c‖ ≈ ‖x‖: one threshold a row will do.
    threshold = 3 * _NEAR * query_squares
    rows = (squared.amin(dim=1) < threshold).nonzero().flatten()
    if rows.numel() == 0:
        return
    near = squared[rows] < threshold[rows, None]
    pairs = near.nonzero()
    if pairs.shape[0] * 16 > near.numel():
        exact = torch.cdist(queries[rows], keys, compute_mode="donot_use_mm_for_euclid_dist")
        squared[rows] = exact.square_()
        return
    for part in pairs.split(max(1, _PAIR_ELEMENTS // keys.shape[1])):
        row, column = rows[part[:, 0]], part[:, 1]
        squared[row, column] = (queries[row] - keys[column]).square_().sum(dim=1)


def _kernel(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """Return compiled distances if there are any and they can read these tensors as they are."""
    return build.kernel(name, *tensors) if all(t.is_contiguous() for t in tensors) else None


def _squared_distances(
    keys: Tensor,
    queries: Tensor,
    key_squares: Tensor,
    query_squares: Tensor,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """Squared distances, (N, D), (B, D), (N,), (B,) -> (B, N), exact for near-duplicates."""
    if out is None:
        out = queries.new_empty(queries.shape[0], keys.shape[0])
    if keys.shape[0] == 0:
        return out
    few = keys.shape[1] <= _DIRECT_FEATURES
    small = few or out.numel() * keys.shape[1] <= _COMPILED_DIFFERENCES
    native = _kernel("nd_squared", queries, keys, out) if small else None
    if native is not None:
        native(queries, keys, *out.shape, keys.shape[1], out)
        return out
    if few:
        return _direct_squared(keys, queries, out, work)
    torch.addmm(key_squares, queries, keys.t(), alpha=-2, out=out)
    out.add_(query_squares[:, None]).clamp_(min=0)
    _repair_near(out, keys, queries, query_squares)
    return out


def euclidean_distances(keys: Tensor, queries: Tensor) -> Tensor:
    """Compute Euclidean distances (not squared), exact also where query and key nearly coincide.

    Args:
        keys: The stored points.
        queries: The points to measure from.

    Shape:
        keys (N, D), queries (B, D) -> (B, N). Memory O(B·N).

    Returns:
        Distances ≥ 0; exactly 0 for exact duplicates.
    """
    squares = [points.square().sum(dim=1) for points in (keys, queries)]
    return _squared_distances(keys, queries, *squares).sqrt_()


@dataclass(frozen=True)
class DistanceKernel:
    """One of the five kernels with its settings: distances, and the weights they give.

    Args:
        kernel_type: One of `KERNELS`.
        epsilon: Added to every distance; keeps inverse kernels finite at distance 0.
        exponent: Power of the inverse kernels, < 0. Unused by the influence cone.
        scales: Levels of the pyramid: level s sees every 2^s-th feature.
        factor: Reach of the influence cone in units of the distance to the nearest center, > 1.

    Raises:
        ValueError: For settings under which a weight would be infinite, negative or all zero.
    """

    kernel_type: str = "cosine"
    epsilon: float = 1e-6
    exponent: float = -4.0
    scales: int = 4
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.kernel_type not in KERNELS:
            raise ValueError(
                f"kernel_type must be one of {', '.join(KERNELS)}, got {self.kernel_type!r}"
            )
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(
                f"epsilon must be a finite number > 0, got {self.epsilon}: with 0 a query that "
                "lies on a center would divide by zero. Try 1e-6."
            )
        if self.inverse and not (math.isfinite(self.exponent) and self.exponent < 0):
            raise ValueError(
                f"exponent must be < 0 for the {self.kernel_type} kernel, got {self.exponent}: "
                "otherwise far centers count most. Try -4."
            )
        if self.kernel_type == "euclidean_pyramid" and self.scales < 1:
            raise ValueError(f"scales must be >= 1, got {self.scales}")
        if self.kernel_type == "influence_cone" and not (
            math.isfinite(self.factor) and self.factor > 1
        ):
            raise ValueError(
                f"influence cone factor must be > 1, got {self.factor}: "
                "at 1 even the nearest center has weight 0. Try 2."
            )

    @property
    def inverse(self) -> bool:
        """Whether the weight is distance^exponent (all kernels but the influence cone)."""
        return self.kernel_type != "influence_cone"

    def _levels(self, num_features: int) -> list[Tensor]:
        """Split features into disjoint sets; the first ``scales − s`` of them are level s."""
        position = torch.arange(num_features)
        coarsest = self.scales - 1
        levels = [position[:: 2**coarsest]]
        for s in reversed(range(coarsest)):
            member = position[:: 2**s]
            levels.append(member[member % 2 ** (s + 1) != 0])
        return levels

    def arrange(self, points: Tensor) -> Tensor:
        """Return points as `distances` reads them: the pyramid's features level after level."""
        if self.kernel_type != "euclidean_pyramid":
            return points
        return points[:, torch.cat(self._levels(points.shape[1])).to(points.device)]

    def summarize(self, arranged: Tensor) -> Tensor:
        """Compute the norms `distances` needs of each point, once a point: (N, D) -> (N, A)."""
        if self.kernel_type == "cosine":
            return arranged.norm(dim=1, keepdim=True).clamp_(min=1e-12).reciprocal_()
        if self.kernel_type == "dot":
            return arranged.new_empty(arranged.shape[0], 0)
        if self.kernel_type == "euclidean_pyramid":
            sizes = [len(level) for level in self._levels(arranged.shape[1])]
            return torch.stack([p.square().sum(dim=1) for p in arranged.split(sizes, dim=1)], dim=1)
        return torch.linalg.vector_norm(arranged, dim=1, keepdim=True).square_()

    def prepare_queries(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and norms in the form `distances` reads; for cosine, unit vectors."""
        arranged = self.arrange(queries)
        norms = self.summarize(arranged)
        return (arranged * norms, norms) if self.kernel_type == "cosine" else (arranged, norms)

    def distances(
        self,
        keys: Tensor,
        key_norms: Tensor,
        queries: Tensor,
        query_norms: Tensor,
        out: Tensor | None = None,
        work: Tensor | None = None,
    ) -> Tensor:
        """Compute the positive number a pair from which its weight follows, ε included.

        Args:
            keys: Points as `arrange` returns them.
            key_norms: What `summarize` returned for the keys.
            queries: First result of `prepare_queries`.
            query_norms: Second result of `prepare_queries`.
            out: Optional (B, N) buffer for the result.
            work: Optional (B, N) buffer for low-dimensional differences.

        Shape:
            keys (N, D), key_norms (N, A), queries (B, D), query_norms (B, A) -> (B, N).
        """
        if out is None:
            out = queries.new_empty(queries.shape[0], keys.shape[0])
        if self.kernel_type in ("cosine", "dot"):
            torch.mm(queries, keys.t(), out=out)
            if self.kernel_type == "cosine":
                out.mul_(key_norms[:, 0]).abs_()
                # rounding lets |cos| exceed 1 by some 1e-7: clamp, or 1 − |cos| + ε could be
                # negative
                torch.sub(out.new_ones(()), out, out=out)
                return out.clamp_(min=0).add_(self.epsilon)
            return out.abs_().sub_(1).abs_().add_(self.epsilon)
        if self.kernel_type == "euclidean_pyramid":
            return self._pyramid(keys, key_norms, queries, query_norms, out, work)
        _squared_distances(keys, queries, key_norms[:, 0], query_norms[:, 0], out, work)
        return out.sqrt_().add_(self.epsilon)

    def _pyramid(
        self,
        keys: Tensor,
        key_norms: Tensor,
        queries: Tensor,
        query_norms: Tensor,
        out: Tensor,
        work: Tensor | None,
    ) -> Tensor:
        """Mean over the levels, (mean_s d_s^p)^(1/p): weight = distance^p here too.

        The levels' feature sets are nested: each adds a block to the squared distance of the one
        before, and all of them together cost one matrix product over the features.
        """
        sizes = [len(level) for level in self._levels(keys.shape[1])]
        total = torch.zeros_like(out)
        levels = []
        parts = zip(keys.split(sizes, dim=1), queries.split(sizes, dim=1), strict=True)
        for s, (key_part, query_part) in enumerate(parts):
            if key_part.shape[1]:
                total += _squared_distances(
                    key_part, query_part, key_norms[:, s], query_norms[:, s], out, work
                )
            levels.append(total.sqrt().add_(self.epsilon))
        stacked = torch.stack(levels)  # (S, B, N)
        # the coarsest level sees the fewest features: its distance is the smallest
        ratio = power_(stacked / levels[0], self.exponent).mean(dim=0)
        return torch.mul(levels[0], ratio.pow_(1 / self.exponent), out=out)

    def weights_fit(self, query_norms: Tensor, key_norms: Tensor) -> bool:
        """Whether distance^p and sums of it stay clear of overflow and underflow in float32.

        Queries may become keys later on.

        Args:
            query_norms: Second result of `prepare_queries`, (B, A).
            key_norms: What `summarize` returned for the keys, (N, A).
        """
        if self.kernel_type == "dot" or query_norms.shape[0] == 0:
            return False
        farthest = 1.0
        if self.kernel_type != "cosine":
            longest = torch.cat([query_norms, key_norms]).sum(dim=1).max()
            farthest = 2 * float(longest) ** 0.5
        smallest, largest = (self.exponent * math.log10(d + self.epsilon) for d in (farthest, 0.0))
        return largest <= 28 and smallest >= -28

    def add_votes(self, keys: Tensor, queries: Tensor, columns: Tensor, sums: Tensor) -> bool:
        """Add the votes of some keys to sums, weight times column, in one compiled pass.

        Args:
            keys: The keys, as `arrange` returns them.
            queries: First result of `prepare_queries`.
            columns: A row of values a key.
            sums: Where the votes are added.

        Shape:
            keys (N, D), queries (B, D), columns (N, V), sums (B, V).

        Returns:
            Whether it was done: for Euclidean weights with an exponent of −1, −2, −4 or −8, on
            the CPU, with compiled kernels, and few keys or features.
        """
        (count, features), rows = keys.shape, queries.shape[0]
        few = features <= _DIRECT_FEATURES or rows * count * features <= _COMPILED_DIFFERENCES
        if self.kernel_type != "euclidean" or self.exponent not in _SQUARINGS or not few:
            return False
        native = _kernel("nd_votes", queries, keys, columns, sums)
        if native is None:
            return False
        sizes = rows, count, features, columns.shape[1]
        power = self.epsilon, _SQUARINGS[self.exponent]
        native(queries, keys, columns, *sizes, *power, sums)
        return True

    def weights(self, distances: Tensor, *, relative: bool = False) -> Tensor:
        """Turn a full (B, N) matrix of `distances` into weights, a new matrix.

        Args:
            distances: One row a query, all its keys.
            relative: Divide each row by its largest weight (inverse kernels). The ratios within a
                row, and so every prediction, stay the same, and no weight overflows. Without it
                weights are held to 1e30, so that their sums stay finite in float32.
        """
        if not self.inverse:
            nearest = distances.amin(dim=1, keepdim=True)
            return (self.factor * nearest - distances).clamp_(min=0)
        if relative:
            return power_(distances / distances.amin(dim=1, keepdim=True), self.exponent)
        return power_(distances.clone(), self.exponent).clamp_(max=1e30)

    def __call__(self, keys: Tensor, queries: Tensor, *, relative: bool = False) -> Tensor:
        """Compute the weight of every key for every query: (N, D), (B, D) -> (B, N)."""
        arranged = self.arrange(keys)
        distances = self.distances(
            arranged, self.summarize(arranged), *self.prepare_queries(queries)
        )
        return self.weights(distances, relative=relative)


def euclidean_kernel(
    keys: Tensor, queries: Tensor, *, epsilon: float = 1e-6, exponent: float = -4.0
) -> Tensor:
    """Compute (‖x − c‖ + ε)^p: keys (N, D), queries (B, D) -> (B, N)."""
    return DistanceKernel("euclidean", epsilon, exponent)(keys, queries)


def euclidean_pyramid_kernel(
    keys: Tensor, queries: Tensor, *, epsilon: float = 1e-6, exponent: float = -4.0, scales: int = 4
) -> Tensor:
    """Compute the mean over s < scales of (‖x[::2^s] − c[::2^s]‖ + ε)^p: -> (B, N)."""
    return DistanceKernel("euclidean_pyramid", epsilon, exponent, scales=scales)(keys, queries)


def cosine_kernel(
    keys: Tensor, queries: Tensor, *, epsilon: float = 1e-6, exponent: float = -4.0
) -> Tensor:
    """Compute (1 − |cos(x, c)| + ε)^p; zero vectors have cosine 0: (N, D), (B, D) -> (B, N)."""
    return DistanceKernel("cosine", epsilon, exponent)(keys, queries)


def dot_kernel(
    keys: Tensor, queries: Tensor, *, epsilon: float = 1e-6, exponent: float = -4.0
) -> Tensor:
    """Compute (|1 − |x·c|| + ε)^p: keys (N, D), queries (B, D) -> (B, N)."""
    return DistanceKernel("dot", epsilon, exponent)(keys, queries)


def influence_cone_kernel(
    keys: Tensor, queries: Tensor, *, epsilon: float = 1e-6, factor: float = 2.0
) -> Tensor:
    """Compute max(0, f·d_min − d) with d = ‖x − c‖ + ε: keys (N, D), queries (B, D) -> (B, N)."""
    return DistanceKernel("influence_cone", epsilon, factor=factor)(keys, queries)
