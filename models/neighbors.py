"""The exact search with the manners of scikit-learn: estimators for pipelines and grids.

Names and semantics are those of `sklearn.neighbors`: a vote's ties go to the lowest class,
distances are not squared, and without queries the stored samples are asked for, each without
itself. What is added: :meth:`NearestNeighbors.add` and :meth:`NearestNeighbors.remove` change the
stored samples without a new fit, and `allowed` restricts a search to some of them. A sample keeps
its number.

Symbols: M queries, N stored samples, D features, K neighbors, C classes.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from ops.sets.changing import ChangingKeys
from ops.sets.index import DEFAULT_MAX_BYTES

__all__ = ["KNeighborsClassifier", "KNeighborsRegressor", "NearestNeighbors"]

METRICS = ("euclidean", "cosine")
WEIGHTS = ("uniform", "distance")


class NearestNeighbors(BaseEstimator):
    """Find the nearest of stored samples.

    Args:
        n_neighbors: K.
        radius: How far :meth:`radius_neighbors` looks, inclusively.
        metric: "euclidean", or "cosine": 1 - cosine; a zero row is at distance 1.
        max_bytes: Working memory of a search.

    Example:
        >>> model = NearestNeighbors(n_neighbors=1).fit([[0.0], [1.0]])
        >>> model.kneighbors([[0.9]], return_distance=False)
        array([[1]])
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        radius: float = 1.0,
        metric: str = "euclidean",
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.radius = radius
        self.metric = metric
        self.max_bytes = max_bytes

    def fit(self, X: Any, y: Any = None) -> NearestNeighbors:
        """Store samples (N, D)."""
        self._check()
        return self._store(validate_data(self, X, order="C"))

    def _check(self) -> None:
        if not isinstance(self.n_neighbors, Integral) or self.n_neighbors < 1:
            raise ValueError(
                f"n_neighbors must be a whole number from 1 on (got {self.n_neighbors!r})"
            )
        if not isinstance(self.radius, Real) or not self.radius >= 0:
            raise ValueError(f"radius must be a number from 0 on (got {self.radius!r})")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)} (got {self.metric!r})")

    def _store(self, X: np.ndarray) -> NearestNeighbors:
        self._keys = ChangingKeys(_searchable(X), self.metric, max_bytes=self.max_bytes)
        self._rows = X
        self.n_samples_fit_ = len(X)
        return self

    def add(self, X: Any) -> np.ndarray:
        """Add samples (n, D); return their numbers, which follow the last ones."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, order="C")
        names = self._keys.add(_searchable(X))
        self._rows = np.concatenate([self._rows, X])
        self.n_samples_fit_ = len(self._keys)
        return names.numpy()

    def remove(self, indices: Any) -> NearestNeighbors:
        """Remove samples by their numbers; the others keep theirs."""
        check_is_fitted(self)
        self._keys.remove(np.asarray(indices))
        self.n_samples_fit_ = len(self._keys)
        return self

    def _queries(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return _searchable(validate_data(self, X, reset=False, order="C"))

    def _distances(self, values: torch.Tensor) -> np.ndarray:
        """Turn squared distances or similarities into distances."""
        if self.metric == "cosine":
            return (1 - values).clamp_(0, 2).numpy()
        return values.sqrt().numpy()

    def kneighbors(
        self,
        X: Any = None,
        n_neighbors: int | None = None,
        return_distance: bool = True,
        *,
        allowed: Any = None,
    ) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """Find the nearest samples.

        Args:
            X: (M, D); None asks for the neighbors of every stored sample, itself left out.
            n_neighbors: K; that of the constructor if None.
            return_distance: Whether to return distances, too.
            allowed: A mask of samples by their numbers, or their numbers; all if None.

        Returns:
            Distances (M, K), if wanted, and numbers (M, K), nearest first, equal ones by number.
        """
        check_is_fitted(self)
        K = self.n_neighbors if n_neighbors is None else n_neighbors
        if not isinstance(K, Integral) or K < 1:
            raise ValueError(f"n_neighbors must be a whole number from 1 on (got {K!r})")
        names = self._keys.names
        itself = X is None
        queries = _searchable(self._rows[names.numpy()]) if itself else self._queries(X)
        among = None if allowed is None else self._numbers(allowed)
        count = len(names) if among is None else int(torch.isin(names, among).sum())
        if itself and among is not None:
            raise ValueError(
                "allowed needs queries: samples that are not allowed have no place in it to be "
                "left out of; pass X"
            )
        if count - itself < K:
            raise ValueError(
                f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {K}, "
                f"n_samples_fit = {count}, n_samples = {len(queries)}"
                + (", each sample itself left out" if itself else "")
            )
        values, found = self._keys.search(queries, int(K) + itself, among)
        if itself:
            drop = found == names[:, None]
            drop[~drop.any(1), -1] = True  # duplicates came before the sample
            values, found = (part[~drop].view(-1, K) for part in (values, found))
        return (self._distances(values), found.numpy()) if return_distance else found.numpy()

    def _numbers(self, allowed: Any) -> torch.Tensor:
        allowed = np.asarray(allowed)
        if allowed.dtype != bool:
            return torch.as_tensor(allowed, dtype=torch.int64)
        if allowed.shape != (self._keys.total,):
            raise ValueError(
                f"the mask of allowed samples must have one entry for each of the "
                f"{self._keys.total} samples ever stored (got shape {allowed.shape})"
            )
        return torch.from_numpy(allowed.nonzero()[0])

    def radius_neighbors(
        self, X: Any = None, radius: float | None = None, return_distance: bool = True
    ) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """Find all samples within a radius, inclusively, nearest first.

        Args:
            X: (M, D); None asks for the neighbors of every stored sample, itself left out.
            radius: That of the constructor if None.
            return_distance: Whether to return distances, too.

        Returns:
            Distances, if wanted, and numbers: arrays (M,) of arrays.
        """
        check_is_fitted(self)
        radius = self.radius if radius is None else radius
        names = self._keys.names
        queries = _searchable(self._rows[names.numpy()]) if X is None else self._queries(X)
        bound = 1 - radius if self.metric == "cosine" else radius * radius
        # The square and its root round: look a little farther, and decide by the distance itself.
        bound += -1e-12 if self.metric == "cosine" else 1e-12 * bound
        distances = np.empty(len(queries), dtype=object)
        indices = np.empty(len(queries), dtype=object)
        for row, (values, found) in enumerate(self._keys.within(queries, bound)):
            far, number = self._distances(values), found.numpy()
            keep = far <= radius
            if X is None:
                keep &= number != names[row].item()
            distances[row], indices[row] = far[keep], number[keep]
        return (distances, indices) if return_distance else indices


def _searchable(X: np.ndarray) -> np.ndarray:
    """Return rows in a type the search takes, contiguous."""
    known = (np.float32, np.float64, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16)
    return np.ascontiguousarray(X if X.dtype in known else X.astype(np.float64))


class _Supervised(NearestNeighbors):
    """Samples with targets."""

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: str = "uniform",
        radius: float = 1.0,
        metric: str = "euclidean",
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        super().__init__(n_neighbors, radius=radius, metric=metric, max_bytes=max_bytes)
        self.weights = weights

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def _check(self) -> None:
        super()._check()
        if self.weights not in WEIGHTS and not callable(self.weights):
            raise ValueError(
                f"weights must be one of {', '.join(WEIGHTS)} or a function of distances "
                f"(got {self.weights!r})"
            )

    def _weighted(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (M, K) and numbers (M, K) of the neighbors."""
        distances, indices = self.kneighbors(X)
        if self.weights == "uniform":
            return np.ones_like(distances), indices
        if callable(self.weights):
            return np.asarray(self.weights(distances), dtype=np.float64), indices
        same = distances == 0  # they alone count
        weights = 1 / np.where(same, 1.0, distances)
        return np.where(same.any(1, keepdims=True), same.astype(np.float64), weights), indices


class KNeighborsClassifier(ClassifierMixin, _Supervised):
    """Let the K nearest samples vote; one target a sample. Ties go to the lowest class.

    Args:
        n_neighbors: K.
        weights: "uniform", "distance" (1 / distance) or a function of the distances (M, K).
        radius: See :class:`NearestNeighbors`.
        metric: See :class:`NearestNeighbors`.
        max_bytes: Working memory of a search.
    """

    def fit(self, X: Any, y: Any) -> KNeighborsClassifier:
        """Store samples (N, D) and their classes (N,)."""
        self._check()
        X, y = validate_data(self, X, y, multi_output=True, order="C")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, self._targets = np.unique(y, return_inverse=True)
        return self._store(X)

    def add(self, X: Any, y: Any) -> np.ndarray:
        """Add samples (n, D) and their classes (n,), new ones among them; return their numbers."""
        check_is_fitted(self)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if len(X) != len(y):
            raise ValueError(f"every sample needs a class (got {len(X)} samples, {len(y)} classes)")
        names = super().add(X)
        known = np.concatenate([self.classes_[self._targets], y])
        self.classes_, self._targets = np.unique(known, return_inverse=True)
        return names

    def predict_proba(self, X: Any = None) -> np.ndarray:
        """Return shares of the votes, (M, C)."""
        weights, indices = self._weighted(X)
        votes = np.zeros((len(indices), len(self.classes_)))
        np.add.at(votes, (np.arange(len(indices))[:, None], self._targets[indices]), weights)
        total = votes.sum(1, keepdims=True)
        return votes / np.where(total == 0, 1.0, total)

    def predict(self, X: Any = None) -> np.ndarray:
        """Return classes (M,)."""
        votes = self.predict_proba(X).argmax(1)
        return self.classes_[votes]


class KNeighborsRegressor(RegressorMixin, _Supervised):
    """Predict the (weighted) mean of the K nearest samples' targets.

    Args:
        n_neighbors: K.
        weights: "uniform", "distance" (1 / distance) or a function of the distances (M, K).
        radius: See :class:`NearestNeighbors`.
        metric: See :class:`NearestNeighbors`.
        max_bytes: Working memory of a search.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> KNeighborsRegressor:
        """Store samples (N, D) and their targets (N,) or (N, any)."""
        self._check()
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, order="C")
        self._targets = np.asarray(y, dtype=np.float64)
        return self._store(X)

    def add(self, X: Any, y: Any) -> np.ndarray:
        """Add samples (n, D) and their targets; return their numbers."""
        check_is_fitted(self)
        y = np.asarray(y, dtype=np.float64)
        if y.shape != (len(X), *self._targets.shape[1:]):
            raise ValueError(
                f"targets must be {(len(X), *self._targets.shape[1:])} like the samples and the "
                f"targets before (got {y.shape})"
            )
        names = super().add(X)
        self._targets = np.concatenate([self._targets, y])
        return names

    def predict(self, X: Any = None) -> np.ndarray:
        """Return means (M,) or (M, any)."""
        weights, indices = self._weighted(X)
        targets = self._targets[indices]  # (M, K, ...)
        weights = weights.reshape(*weights.shape, *[1] * (targets.ndim - 2))
        return (targets * weights).sum(1) / weights.sum(1)
