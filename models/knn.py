"""K-nearest-neighbor classification: the training set is the model.

Queries are compared with every stored sample, exactly (:mod:`ops.sets.index`), and the K
nearest vote. One search serves several K.

Symbols: M queries, N stored samples, D features, C classes, K neighbors.

References:
    Kaiser, Nachum, Roy, Bengio, "Learning to Remember Rare Events", ICLR 2017 (the query step).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ops import METRICS
from ops.sets.index import DEFAULT_MAX_BYTES, ExactIndex
from ops.sets.merge import merge_over_ranks
from options import Options, option

__all__ = ["VOTES", "KNNClassifier", "count_votes"]

VOTES = ("majority", "majority_lowest", "distance")


@dataclass(frozen=True)
class KNNOptions(Options):
    """Who votes, and how."""

    title = "K nearest neighbors (--model knn; --K and --magnitude_type are above)"
    K: int = option(
        1,
        "number of neighbors; several at once: 1,3,5",
        least=1,
        several="commas",
        fixed=False,
        most=10**6,
    )
    magnitude_type: str = option(
        "cosine", "metric", choices=METRICS, argument="metric", fixed=False
    )
    vote: str = option(
        "majority",
        "neighbors count the same and ties go to the nearer (majority) or to the lowest class "
        "(majority_lowest, as in scikit-learn), or they count by 1 / distance",
        choices=VOTES,
        fixed=False,
    )
    knn_precision: str = option(
        "auto",
        "products in 8 bits where that is faster, or in float32; the neighbors are exact "
        "either way",
        choices=("auto", "float32"),
        argument="precision",
        fixed=False,
    )


def count_votes(
    values: Tensor, labels: Tensor, num_classes: int, metric: str, vote: str
) -> tuple[Tensor, Tensor]:
    """Let neighbors vote for their classes.

    Args:
        values: (M, K) squared distances or similarities, best first.
        labels: (M, K) classes of the neighbors.
        num_classes: C.
        metric: "euclidean", "cosine" or "dot".
        vote: "majority" counts, ties go to the class with the nearer neighbor; "majority_lowest"
            counts, ties go to the lowest class, which is scikit-learn's rule and that of many
            published tables; "distance" weights a neighbor by 1 / distance (euclidean),
            1 / (1 - similarity) (cosine) or its similarity, if positive (dot). Where neighbors
            lie at distance 0, they alone vote; where no weight is positive, all count the same.

    Returns:
        Shares (M, C) that sum to 1; and scores (M, C), the same but for ties, which are broken
        (by the nearer neighbor unless said otherwise), and for classes without a vote: -inf.
    """
    m, K = labels.shape
    if vote != "distance":
        weights = torch.ones_like(values, dtype=torch.float64)
    else:
        values = values.double()
        if metric == "dot":
            weights = values.clamp_min(0)
        else:
            distance = values.clamp_min(0).sqrt() if metric == "euclidean" else 1 - values
            # A cosine of 1 comes out of rounding as a few ulp less or more.
            same = distance <= (0 if metric == "euclidean" else 1e-7)
            weights = torch.where(same, 0.0, 1 / distance.clamp_min(1e-300))
            weights = torch.where(same.any(1, keepdim=True), same.double(), weights)
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    weights = weights / weights.sum(1, keepdim=True)
    shares = weights.new_zeros(m, num_classes).scatter_add_(1, labels, weights)
    # The rank of each class's nearest neighbor, as a sliver far below any difference of shares
    # that is not rounding.
    rank = torch.arange(K, device=labels.device, dtype=torch.float64).expand(m, -1)
    first = torch.full_like(shares, K).scatter_reduce_(1, labels, rank, "amin")
    if vote == "majority_lowest":
        order = torch.arange(num_classes, device=labels.device) / num_classes
    else:
        order = first / K
    scores = shares.mul(1e9).round().div(1e9) - order * 1e-10
    return shares.float(), scores.masked_fill(first == K, -torch.inf)


class KNNClassifier(nn.Module):
    """Classify by the K nearest stored samples.

    Samples are flattened. Pixels that are multiples of 1/255 (or integers in 0 … 255) are stored
    as 8-bit integers, losslessly, and compared by exact integer products.

    Args:
        K: Number of neighbors, or several of them: all come from one search.
        metric: "cosine", "euclidean" or "dot".
        vote: "majority" (ties go to the nearer), "majority_lowest" or "distance", see
            :func:`count_votes`.
        precision: "auto", or "float32": how products are taken; answers are the same.
        max_bytes: Working memory of a search, beside samples, queries and answers.

    Attributes:
        chosen: The K that :meth:`forward` uses, the first one unless set otherwise.

    Shape:
        - Input: (M, ...) with as many features as the stored samples.
        - Output: (M, C) shares of the votes.

    Example:
        >>> model = KNNClassifier(K=1, metric="euclidean")
        >>> model.fit(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))  # doctest: +ELLIPSIS
        KNNClassifier(...)
        >>> model.predict(torch.tensor([[0.8]]))
        tensor([1])
    """

    Options = KNNOptions
    defaults: ClassVar[dict] = {"batch_size": 4096, "num_epochs": 1}
    family = "kNN"
    tasks = ("classification",)
    training = "memory"
    uses_layer = False
    inputs = ("images", "signals")
    min_input_size = 1

    def __init__(
        self,
        *,
        K: int | Sequence[int] = 1,
        metric: str = "cosine",
        vote: str = "majority",
        precision: str = "auto",
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        super().__init__()
        self.K = (K,) if isinstance(K, int) else tuple(K)
        if not self.K or min(self.K) < 1 or len(set(self.K)) < len(self.K):
            raise ValueError(f"K must be one or more different numbers from 1 on (got {K})")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)} (got {metric!r})")
        if vote not in VOTES:
            raise ValueError(f"vote must be one of {', '.join(VOTES)} (got {vote!r})")
        self.metric, self.vote = metric, vote
        self.precision, self.max_bytes = precision, max_bytes
        self.chosen = self.K[0]
        self.num_classes = 0
        self.scale = 1.0  # stored features times this are the samples' features
        self.sharded = False  # whether other ranks hold other samples
        self.offset = 0  # index of the first sample of this rank
        self.file: str | None = None
        self._index: ExactIndex | None = None
        self._stored: list[tuple[Tensor, float, Tensor]] = []
        self._mapped: np.ndarray | None = None
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"K={', '.join(map(str, self.K))}, metric={self.metric}, vote={self.vote}, "
            f"samples={len(self.labels)}, classes={self.num_classes}"
        )

    # -- the stored samples

    def fit(
        self,
        features: Tensor | np.ndarray,
        labels: Tensor | Sequence[int],
        num_classes: int | None = None,
        *,
        shard: bool = False,
    ) -> "KNNClassifier":
        """Store samples.

        Args:
            features: (N, ...) of any numeric type. A memory-mapped array stays in its file.
            labels: (N,) classes 0 … C-1.
            num_classes: C; the largest label + 1 if None.
            shard: In a distributed run, keep only this rank's part of the features. Every rank
                passes the same arguments, searches for the same queries and gets the answer
                over all parts.

        Returns:
            The classifier itself.
        """
        labels = torch.as_tensor(labels).to(torch.int64)
        self._check(len(features), labels, num_classes)
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        total, self.offset = len(features), 0
        self.sharded = shard and dist.is_available() and dist.is_initialized()
        if self.sharded:
            rank, world = dist.get_rank(), dist.get_world_size()
            self.offset = total * rank // world
            features = features[self.offset : total * (rank + 1) // world]
            if isinstance(features, Tensor):
                features = features.clone()  # lets go of the other ranks' parts
        self._index, self._mapped, self.file, self.scale = None, None, None, 1.0
        if isinstance(features, np.memmap):
            self.file = str(features.filename)
            self._mapped = features.reshape(len(features), -1)
            self.features = torch.empty(0, self._mapped.shape[1])
        else:
            features = torch.as_tensor(features).flatten(1)
            levels, scale = as_levels(features)
            self.features, self.scale = (features, 1.0) if levels is None else (levels, scale)
        self.labels = labels.to(self.features.device)
        return self

    def store(self, features: Tensor, labels: Tensor) -> None:
        """Take a batch of samples; 8 bits a number where they do. :meth:`seal` ends it."""
        features = features.flatten(1)
        levels, scale = as_levels(features)
        self._stored.append((*((features, 1.0) if levels is None else (levels, scale)), labels))

    def seal(self, num_classes: int, *, shard: bool = False) -> "KNNClassifier":
        """Make the samples of all batches the stored ones; see :meth:`fit`."""
        parts = [(rows, scale) for rows, scale, _ in self._stored]
        labels = torch.cat([labels for _, _, labels in self._stored])
        self._stored.clear()
        scales = {scale for _, scale in parts}
        if len(scales) == 1 and len({rows.dtype for rows, _ in parts}) == 1:
            rows, scale = torch.cat([rows for rows, _ in parts]), scales.pop()
        else:
            rows, scale = torch.cat([_from_levels(*part) for part in parts]), 1.0
        parts.clear()
        self.fit(rows, labels, num_classes, shard=shard)
        self.scale *= scale
        return self

    def fit_batches(
        self, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, *, shard: bool = False
    ) -> "KNNClassifier":
        """Store samples that come in batches (features, labels)."""
        for features, labels in batches:
            self.store(features, labels)
        return self.seal(num_classes, shard=shard)

    def _check(self, count: int, labels: Tensor, num_classes: int | None) -> None:
        if count == 0:
            raise ValueError("there must be at least one sample to store (got 0)")
        if labels.shape != (count,):
            raise ValueError(f"labels must be ({count},) like the samples, got {(*labels.shape,)}")
        if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
            raise ValueError(
                f"labels must lie in 0 … {'' if num_classes is None else num_classes - 1}, got "
                f"{labels.min()} … {labels.max()}"
            )
        if max(self.K) > count:
            raise ValueError(
                f"K must be at most the number of samples, {count} (got {max(self.K)})"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the samples, in plain types."""
        return {
            "num_classes": self.num_classes,
            "scale": self.scale,
            "sharded": self.sharded,
            "offset": self.offset,
            "chosen": self.chosen,
            "file": self.file,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`get_extra_state` returned."""
        self.num_classes, self.scale = int(state["num_classes"]), float(state["scale"])
        self.sharded, self.offset = bool(state["sharded"]), int(state["offset"])
        if int(state["chosen"]) in self.K:
            self.chosen = int(state["chosen"])
        self.file = state["file"]
        if self.file is not None:
            if not Path(self.file).is_file():
                raise ValueError(f"the samples were in {self.file}, which is not there any more")
            mapped = np.load(self.file, mmap_mode="r")
            self._mapped = mapped.reshape(len(mapped), -1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("features", "labels"):  # of any number of samples
            if prefix + name in state_dict:
                loaded = state_dict[prefix + name]
                old = getattr(self, name)
                setattr(self, name, torch.empty_like(loaded, device=old.device))
        self._index, self._mapped = None, None
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- the search

    def kneighbors(
        self, queries: Tensor | np.ndarray | None = None, K: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the nearest stored samples.

        Args:
            queries: (M, ...); None asks for the neighbors of every stored sample, itself left out.
            K: Number of neighbors; the largest of the classifier's if None.

        Returns:
            Values (M, K): squared distances or similarities; and indices (M, K), best first.
        """
        K = max(self.K) if K is None else K
        if len(self.labels) == 0:
            raise ValueError("there are no stored samples: call fit first")
        if queries is None:
            return self._leave_one_out(K)
        queries = torch.as_tensor(queries).flatten(1)
        index = self._searcher()
        if self.sharded and not dist.is_initialized():
            raise ValueError("these are the samples of one rank of a distributed run, not all")
        if not 1 <= K <= len(self.labels):
            raise ValueError(
                f"K must lie in 1 … {len(self.labels)}, the number of samples (got {K})"
            )
        wide, factor = queries.dtype == torch.float64, 1.0
        if self.features.dtype == torch.uint8 and len(self.features):
            # Compare on the scale of the stored levels.
            levels, _ = as_levels(queries, (self.scale,))
            if levels is not None:
                queries = levels
            elif self.scale != 1.0:
                queries = queries.double() / self.scale
            factor = 1.0 if self.metric == "cosine" else self.scale**2
        if queries.device != self.labels.device:
            queries = queries.to(self.labels.device)
        values, indices = index.search(queries, min(K, len(index)), wide=self.sharded)
        if self.sharded:  # by the values as they were compared: rounded ones may be equal
            values, indices = merge_over_ranks(values, indices + self.offset, K, self.metric)
        return (values if wide else values.float()) * factor, indices

    def _searcher(self) -> ExactIndex:
        keys = self.features if self._mapped is None else self._mapped
        if self._index is None or (
            self._mapped is None and self._index.data.data_ptr() != keys.data_ptr()
        ):
            self._index = ExactIndex(
                keys, self.metric, precision=self.precision, max_bytes=self.max_bytes
            )
        return self._index

    @property
    def search_path(self) -> str:
        """How the last search took its products, in words."""
        return "" if self._index is None else self._index.path

    def _leave_one_out(self, K: int) -> tuple[Tensor, Tensor]:
        if self.sharded or self._mapped is not None:
            raise ValueError("leave-one-out needs all samples in the memory of one process")
        n = len(self.labels)
        if n - 1 < K:
            raise ValueError(f"K must be at most the number of other samples, {n - 1} (got {K})")
        values, indices = [], []
        for start in range(0, n, 8192):
            part = slice(start, start + 8192)
            v, i = self.kneighbors(_from_levels(self.features[part], self.scale), K + 1)
            own = torch.arange(start, start + len(v), device=i.device)[:, None]
            # The sample itself, or the last neighbor where duplicates come before it.
            drop = i == own
            drop[~drop.any(1), -1] = True
            values.append(v[~drop].view(-1, K))
            indices.append(i[~drop].view(-1, K))
        return torch.cat(values), torch.cat(indices)

    # -- the vote

    def votes(self, values: Tensor, indices: Tensor, K: int | None = None) -> tuple[Tensor, Tensor]:
        """Let the first K of found neighbors vote: shares and scores, see :func:`count_votes`."""
        K = self.chosen if K is None else K
        labels = self.labels[indices[:, :K]]
        return count_votes(values[:, :K], labels, self.num_classes, self.metric, self.vote)

    def predict_proba(
        self, queries: Tensor | np.ndarray, K: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return shares of the votes, (M, C), or (len(K), M, C) for several K."""
        several = (self.chosen if K is None else K,) if isinstance(K, int | None) else tuple(K)
        found = self.kneighbors(queries, max(several))
        shares = [self.votes(*found, k)[0] for k in several]
        return shares[0] if isinstance(K, int | None) else torch.stack(shares)

    def predict(self, queries: Tensor | np.ndarray, K: int | Sequence[int] | None = None) -> Tensor:
        """Return classes, (M,), or (len(K), M) for several K."""
        several = (self.chosen if K is None else K,) if isinstance(K, int | None) else tuple(K)
        found = self.kneighbors(queries, max(several))
        classes = [self.votes(*found, k)[1].argmax(1) for k in several]
        return classes[0] if isinstance(K, int | None) else torch.stack(classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return shares of the votes, (M, C)."""
        return self.predict_proba(x)


def as_levels(
    features: Tensor, units: Sequence[float] = (1 / 255, 1.0)
) -> tuple[Tensor | None, float]:
    """Return features as 8-bit integers and their unit, or (None, 1.0).

    Only for floating-point features that are whole multiples of a unit, but for the
    rounding of float32.
    """
    if not features.is_floating_point() or features.numel() == 0:
        return None, 1.0
    coarse = features.dtype in (torch.float16, torch.bfloat16)  # 1/255 is not near enough there
    for unit in units:
        if coarse and unit != 1.0:
            continue
        factor = float(round(1 / unit))
        if _on_grid(features[:16], factor) and _on_grid(features, factor):
            return (features * factor).round_().to(torch.uint8), unit
    return None, 1.0


def _on_grid(features: Tensor, factor: float) -> bool:
    """Say whether every number is i / factor, rounded to its type, with i in 0 … 255."""
    for start in range(0, len(features), 4096):
        part = features[start : start + 4096]
        levels = (part * factor).round_()
        # A comparison with NaN is False.
        if not bool(((levels >= 0) & (levels <= 255)).all()):
            return False
        if not torch.equal(levels.div_(factor), part):
            return False
    return True


def _from_levels(rows: Tensor, scale: float) -> Tensor:
    """Undo :func:`as_levels`."""
    if rows.dtype != torch.uint8 or scale == 1.0:
        return rows
    return rows.float().div_(round(1 / scale))
