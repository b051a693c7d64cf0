"""Exact search among keys that come and go.

Keys keep the number they got when they were added. They lie in two stretches, an old and a new one,
each with an :class:`~ops.sets.index.ExactIndex`; the new one is taken into the old when it has
grown to a quarter of it, and a stretch is copied without its removed keys when these are many.

Symbols: M queries, N keys, D features, K neighbors.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ops.sets.index import DEFAULT_MAX_BYTES, ExactIndex
from ops.sets.merge import merge_neighbors

__all__ = ["ChangingKeys"]


class _Stretch:
    """Rows of keys, their numbers, and which of them are still there."""

    def __init__(self, rows: Tensor | np.ndarray, names: Tensor, **options: object) -> None:
        self.rows, self.names, self.options = rows, names, options
        self.alive = torch.ones(len(names), dtype=torch.bool)
        self.index = ExactIndex(rows, **options)

    def compact(self) -> "_Stretch | None":
        """Return the stretch without what was removed; None if nothing is left."""
        keep = self.alive
        if keep.all():
            return self
        if not keep.any():
            return None
        rows = self.rows[keep.numpy()] if isinstance(self.rows, np.ndarray) else self.rows[keep]
        return _Stretch(rows, self.names[keep], **self.options)

    def search(self, queries: Tensor, K: int) -> tuple[Tensor, Tensor]:
        """Return values (M, k) and numbers (M, k) of keys that are there, k <= K."""
        gone = int((~self.alive).sum())
        k = min(K, len(self.names) - gone)
        values, places = self.index.search(queries, k + gone, wide=True)
        if gone:
            # Stable: those that are there come first, in their order.
            order = (~self.alive)[places].to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
            values, places = values.gather(1, order), places.gather(1, order)
        return values, self.names[places]


class ChangingKeys:
    """Keys that can be added and removed.

    Args:
        keys: (N, D) tensor or array, the first keys. Not copied: leave it unchanged.
        metric: "euclidean" (squared distances), "dot" or "cosine".
        max_bytes: See :class:`~ops.sets.index.ExactIndex`.
    """

    def __init__(
        self,
        keys: Tensor | np.ndarray,
        metric: str = "euclidean",
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self.options = {"metric": metric, "max_bytes": max_bytes}
        self.total = len(keys)
        self._stretches = [_Stretch(keys, torch.arange(len(keys)), **self.options)]

    def __len__(self) -> int:
        return sum(int(stretch.alive.sum()) for stretch in self._stretches)

    @property
    def names(self) -> Tensor:
        """Numbers of the keys that are there, ascending."""
        return torch.cat([stretch.names[stretch.alive] for stretch in self._stretches])

    def add(self, keys: Tensor | np.ndarray) -> Tensor:
        """Add keys (n, D) and return their numbers (n,), those that follow the last ones."""
        names = torch.arange(self.total, self.total + len(keys))
        self.total += len(keys)
        rows = torch.as_tensor(keys)
        if len(self._stretches) > 1:
            new = self._stretches.pop()
            rows = torch.cat([torch.as_tensor(new.rows)[new.alive], rows])
            names = torch.cat([new.names[new.alive], names])
        if self._stretches and 4 * len(rows) >= len(self._stretches[0].names):
            old = self._stretches.pop()
            rows = torch.cat([torch.as_tensor(old.rows)[old.alive], rows])
            names = torch.cat([old.names[old.alive], names])
        self._stretches.append(_Stretch(rows, names, **self.options))
        return torch.arange(self.total - len(keys), self.total)

    def remove(self, names: Tensor | np.ndarray) -> None:
        """Remove keys by their numbers (n,).

        Raises:
            ValueError: If one of them is not there.
        """
        names = torch.as_tensor(names, dtype=torch.int64).flatten().unique()
        missing = names[~torch.isin(names, self.names)]
        if len(missing):
            raise ValueError(
                f"key {missing[0].item()} cannot be removed because it is not there: give "
                "numbers that fit or add returned and that were not removed before"
            )
        if len(names) == len(self):
            raise ValueError(
                f"all {len(names)} keys were to be removed, but a search needs one: keep one, or "
                "begin anew with other keys"
            )
        for stretch in self._stretches:
            stretch.alive[torch.isin(stretch.names, names)] = False
        many = [
            stretch.compact() if (~stretch.alive).sum() > 64 or not stretch.alive.any() else stretch
            for stretch in self._stretches
        ]
        self._stretches = [stretch for stretch in many if stretch is not None]

    def search(
        self, queries: Tensor | np.ndarray, K: int, allowed: Tensor | np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the K nearest keys of every query.

        Args:
            queries: (M, D).
            K: Number of neighbors, 1 … the number of keys there (and allowed).
            allowed: Numbers of the only keys that count, (n,); all if None.

        Returns:
            Values (M, K) float64, squared distances or similarities, and the numbers of the keys
            (M, K), best first, equal ones by number.
        """
        stretches = self._stretches if allowed is None else self._allowed(allowed)
        count = sum(int(stretch.alive.sum()) for stretch in stretches)
        if not 1 <= K <= count:
            raise ValueError(
                f"the number of neighbors must lie in 1 … {count}, the number of keys to choose "
                f"from (got {K})"
            )
        queries = torch.as_tensor(queries)
        found = [stretch.search(queries, K) for stretch in stretches]
        if len(found) == 1:
            return found[0]
        values, names = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return merge_neighbors(values, names, K, str(self.options["metric"]))

    def _allowed(self, allowed: Tensor | np.ndarray) -> list[_Stretch]:
        """Return stretches of the allowed keys alone."""
        allowed = torch.as_tensor(allowed, dtype=torch.int64)
        chosen = []
        for stretch in self._stretches:
            keep = stretch.alive & torch.isin(stretch.names, allowed)
            part = _Stretch(stretch.rows, stretch.names, **self.options)
            part.alive = keep
            part = part.compact()
            if part is not None:
                chosen.append(part)
        return chosen

    def within(self, queries: Tensor | np.ndarray, bound: float) -> list[tuple[Tensor, Tensor]]:
        """Find all keys as near as `bound`, a squared distance or the least similarity.

        Returns:
            For each query, values and numbers of its keys, best first.
        """
        queries = torch.as_tensor(queries)
        largest = self.options["metric"] != "euclidean"
        found: list[tuple[Tensor, Tensor]] = [None] * len(queries)  # type: ignore[list-item]
        asking, K = torch.arange(len(queries)), min(16, len(self))
        while len(asking):
            values, names = self.search(queries[asking], K)
            inside = values >= bound if largest else values <= bound
            done = ~inside[:, -1] if len(self) > K else torch.ones(len(asking), dtype=torch.bool)
            for row in done.nonzero()[:, 0].tolist():
                found[asking[row]] = values[row][inside[row]], names[row][inside[row]]
            asking = asking[~done]
            K = min(len(self), max(4 * K, math.isqrt(len(self))))
        return found
