"""Dynamic neighbors: a layer that grows by keeping the samples it still gets wrong.

Centers c_i with values v_i predict by a weighted vote: the weight of a center follows from its
distance to the query (`ops.centers.distances`). `DynamicNeighbors.grow` learns batch by batch:
the first becomes the first centers; of every later one, the samples still predicted wrong become
centers, until the batch is predicted well enough. No gradients.

The centers there were cost one matrix product with all samples of a call; after that the sums
behind each prediction are kept (`ops.centers.votes`), and a new center is one more column. Memory
is O(samples · block), whatever the number of centers.

Symbols: B samples, N centers, D features, C classes, V columns of values (C, or outputs + 1).

References:
    J. Loverich, "Dynamic and Deep Nearest Neighbors in PyTorch" (the algorithm and its results).
    P. Hart, "The condensed nearest neighbor rule", 1968 (the same idea with one neighbor).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ops.budget import check_memory
from ops.centers.distances import DistanceKernel
from ops.centers.votes import ConeSums, ConeVotes, InterpVotes, TopKVotes

__all__ = ["PREDICTORS", "CentersFull", "DynamicNeighbors", "Growth"]

PREDICTORS = ("interp", "nearest", "knn")

_BLOCK_ELEMENTS = {"cpu": 1 << 19}  # rows × block on the CPU: stays in cache
_BLOCK_ELEMENTS_GPU = 1 << 26
_ROWS = 512  # queries at a time in `forward`
_SHARE = 256  # queries at a time in `grow`: what one of several processes does of them
_MIN_CAPACITY = 1024
_BUFFERS = ("_centers", "_targets", "_arranged", "_norms", "_columns")


class CentersFull(MemoryError):
    """No memory for more centers; the layer still holds, and predicts with, those it has."""


class Growth(NamedTuple):
    """What one call of `DynamicNeighbors.grow` did.

    Attributes:
        added: Centers added.
        rounds: Times the batch was predicted and its errors added.
        seen_correct: Samples predicted right before anything was added (0 for the first batch).
        correct: Samples predicted right afterwards.
        total: Samples in the batch.
    """

    added: int
    rounds: int
    seen_correct: int
    correct: int
    total: int


class DynamicNeighbors(nn.Module):
    """Grow a set of centers from batches; predict by their weighted vote (or weighted mean).

    Args:
        num_features: Features of a sample, D.
        num_classes: Number of classes C; exactly one of `num_classes` and `num_outputs` is given.
        num_outputs: Values a sample of a regression, O.
        kernel: How distance becomes weight.
        predictor: ``interp`` all centers vote, ``nearest`` only the one with the largest weight,
            ``knn`` the `K` largest. Growing uses the same predictor.
        K: Voters of ``knn``.
        target_accuracy: Share of a batch, in (0, 1], from which on no further round is run on it.
        max_count: Rounds a batch at most; every round adds all samples still wrong. The first
            always runs.
        max_neighbors: Most centers ever held.
        tolerance: A regression counts as wrong where ‖prediction − value‖ ≥ tolerance.

    Shape:
        x (B, D) -> class scores (B, C), each row summing to 1, or values (B, O).

    Attributes:
        crew: How several processes share the work of `grow`, all given the same samples: each does
            some rows (`ranks.Crew`). Rows go in the same chunks without it, so that the centers
            are the same to the last digit; None: one process.

    The state_dict holds the centers there are (`centers`, `targets`) and loads into a layer of any
    size.

    Example:
        >>> layer = DynamicNeighbors(num_features=2, num_classes=2)
        >>> events, _ = layer.grow(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> events[0].added
        2
        >>> layer(torch.tensor([[0.1, 1.0]])).argmax(dim=1)
        tensor([0])
    """

    crew: Any = None

    def __init__(
        self,
        *,
        num_features: int,
        num_classes: int | None = None,
        num_outputs: int | None = None,
        kernel: DistanceKernel | None = None,
        predictor: str = "interp",
        K: int = 9,
        target_accuracy: float = 0.9,
        max_count: int = 3,
        max_neighbors: int = 100_000,
        tolerance: float = 0.05,
    ) -> None:
        super().__init__()
        if (num_classes is None) == (num_outputs is None):
            raise ValueError(
                f"give either num_classes or num_outputs, got {num_classes} and {num_outputs}"
            )
        if predictor not in PREDICTORS:
            raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {predictor!r}")
        if not 0 < target_accuracy <= 1:
            raise ValueError(f"target_accuracy must be in (0, 1], got {target_accuracy}")
        positive = {
            "num_features": num_features,
            "K": K,
            "max_count": max_count,
            "max_neighbors": max_neighbors,
        }
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if num_outputs is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {tolerance}")
        self.num_features, self.num_classes, self.num_outputs = (
            num_features,
            num_classes,
            num_outputs,
        )
        self.kernel = kernel or DistanceKernel()
        self.predictor, self.K = predictor, K
        self.target_accuracy, self.max_count = target_accuracy, max_count
        self.max_neighbors, self.tolerance = max_neighbors, tolerance
        self.num_centers = 0
        self._scratch: list[Tensor] = []
        self._create(0)

    # ---------------------------------------------------------------- storage

    @property
    def classification(self) -> bool:
        """Whether the layer votes for classes (else it averages values)."""
        return self.num_classes is not None

    @property
    def centers(self) -> Tensor:
        """The centers in the order they were added, (N, D)."""
        return self._centers[: self.num_centers]

    @property
    def targets(self) -> Tensor:
        """Class (N,) or values (N, O) of each center."""
        return self._targets[: self.num_centers]

    @property
    def full(self) -> bool:
        """Whether `max_neighbors` is reached: nothing is added any more."""
        return self.num_centers >= self.max_neighbors

    def extra_repr(self) -> str:
        """Show the options that matter."""
        kind = (
            f"num_classes={self.num_classes}"
            if self.classification
            else f"num_outputs={self.num_outputs}"
        )
        voters = f"{self.predictor}, K={self.K}" if self.predictor == "knn" else self.predictor
        return (
            f"{self.num_features}, {kind}, centers={self.num_centers}, predictor={voters}, "
            f"{self.kernel}"
        )

    def _create(self, capacity: int, like: Tensor | None = None) -> None:
        """Allocate what is kept a center: itself, target, arranged key, norms, row of values."""
        like = torch.empty(0) if like is None else like
        num_norms = self.kernel.summarize(
            self.kernel.arrange(like.new_zeros(1, self.num_features))
        ).shape[1]
        arranged = self.kernel.kernel_type == "euclidean_pyramid"
        if self.classification:
            targets = like.new_empty(capacity, dtype=torch.int64)
        else:
            targets = like.new_empty(capacity, self.num_outputs)
        num_columns = self.num_classes or self.num_outputs + 1
        buffers = {
            "_centers": like.new_empty(capacity, self.num_features),
            "_targets": targets,
            "_arranged": like.new_empty(capacity if arranged else 0, self.num_features),
            "_norms": like.new_empty(capacity, num_norms),
            "_columns": like.new_empty(capacity, num_columns),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def _reserve(self, needed: int) -> None:
        """Make room: twice what there was, or just what is needed where memory is short."""
        capacity = self._centers.shape[0]
        if needed <= capacity:
            return
        wanted = min(max(_MIN_CAPACITY, 2 * capacity, needed), max(self.max_neighbors, needed))
        kept = {name: getattr(self, name) for name in _BUFFERS}
        row_bytes = sum(
            b.element_size() * (b.shape[1] if b.dim() == 2 else 1) for b in kept.values()
        )
        for size in dict.fromkeys((wanted, needed)):
            try:
                check_memory(size * row_bytes, self._centers.device)
                self._create(size, like=self._centers)
            except (MemoryError, RuntimeError) as error:
                for name, buffer in kept.items():
                    self.register_buffer(name, buffer, persistent=False)
                reason = error
                continue
            for name, buffer in kept.items():
                getattr(self, name)[: min(self.num_centers, buffer.shape[0])] = buffer[
                    : self.num_centers
                ]
            return
        raise CentersFull(
            f"no memory for {needed:,} centers of {self.num_features:,} features "
            f"({needed * row_bytes / 2**30:.2f} GiB); those so far ({self.num_centers:,}) are kept"
        ) from reason

    def _describe(self, x: Tensor, y: Tensor, norms: Tensor | None = None) -> dict[str, Tensor]:
        """Make what is kept of samples if they become centers: by buffer, a row a sample."""
        arranged = self.kernel.arrange(x)
        if self.classification:
            columns = x.new_zeros(len(x), self.num_classes).scatter_(1, y[:, None], 1)
        else:
            columns = torch.cat([y, y.new_ones(len(y), 1)], dim=1)
        samples = {"_centers": x, "_targets": y, "_columns": columns}
        samples["_norms"] = self.kernel.summarize(arranged) if norms is None else norms
        return samples if arranged is x else {**samples, "_arranged": arranged}

    def _append(self, samples: dict[str, Tensor], chosen: Tensor | None = None) -> None:
        """Store samples that `_describe` has prepared, or the `chosen` of them, as centers."""
        count = len(samples["_centers"] if chosen is None else chosen)
        start, end = self.num_centers, self.num_centers + count
        self._reserve(end)
        for name, rows in samples.items():
            place = getattr(self, name)[start:end]
            if chosen is None:
                place.copy_(rows)
            else:
                torch.index_select(rows, 0, chosen, out=place)
        self.num_centers = end

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # copies, not views: a view would drag its whole buffer into the file
        destination[prefix + "centers"] = self.centers.clone()
        destination[prefix + "targets"] = self.targets.clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        centers, targets = state_dict.get(prefix + "centers"), state_dict.get(prefix + "targets")
        missing = [prefix + n for n, t in (("centers", centers), ("targets", targets)) if t is None]
        if missing:
            missing_keys.extend(missing)
            return
        known = (prefix + "centers", prefix + "targets")
        unexpected_keys.extend(
            k for k in state_dict if strict and k.startswith(prefix) and k not in known
        )
        if (
            centers.shape[1:] != (self.num_features,)
            or targets.shape[1:] != self._targets.shape[1:]
        ):
            error_msgs.append(
                f"{prefix}centers {tuple(centers.shape)} and targets {tuple(targets.shape)} do not "
                f"fit a layer of {self.num_features} features"
            )
            return
        self.num_centers = 0
        self._create(0, like=self._centers)
        self._append(self._describe(centers.to(self._centers), targets.to(self._targets)))

    def keep(self, selected: Tensor) -> None:
        """Keep only the centers whose entry in `selected` (N,), bool, is true, in their order."""
        centers, targets = self.centers[selected], self.targets[selected]
        self.num_centers = 0
        self._create(0, like=self._centers)
        self._append(self._describe(centers, targets))

    # ---------------------------------------------------------------- prediction

    def _voters(self, queries: Tensor, norms: Tensor) -> InterpVotes | ConeVotes | TopKVotes:
        """Make the accumulator of the chosen predictor for some prepared queries."""
        if self.predictor != "interp":
            return TopKVotes(self.kernel, queries, self.K if self.predictor == "knn" else 1)
        if not self.kernel.inverse:
            return ConeVotes(self.kernel, queries)
        safe = self.kernel.weights_fit(norms, self._norms[: self.num_centers])
        return InterpVotes(self.kernel, queries, self._columns.shape[1], safe)

    def _buffers_for(self, rows: int, block: int) -> tuple[Tensor, Tensor]:
        """Two (rows, block) work areas, reused from call to call."""
        like, needed = self._centers, rows * block
        if (
            not self._scratch
            or self._scratch[0].numel() < needed
            or self._scratch[0].device != like.device
            or self._scratch[0].dtype != like.dtype
        ):
            self._scratch = [like.new_empty(needed) for _ in range(2)]
        out, work = (area[:needed].view(rows, block) for area in self._scratch)
        return out, work

    def _accumulate(
        self,
        voters: InterpVotes | ConeSums | ConeVotes | TopKVotes,
        queries: Tensor,
        norms: Tensor,
        start: int,
        end: int,
        rows: slice | None = None,
    ) -> None:
        """Let the centers start..end vote on some rows of the queries, block by block."""
        keys = self._arranged if self._arranged.shape[0] else self._centers
        rows = rows or slice(0, queries.shape[0])
        queries, norms = queries[rows], norms[rows]
        count = queries.shape[0]
        elements = _BLOCK_ELEMENTS.get(queries.device.type, _BLOCK_ELEMENTS_GPU)
        block = max(512, elements // max(count, 1))
        simple = isinstance(voters, InterpVotes) and voters.safe
        sums = voters.sums[rows] if simple else None
        for first in range(start, end, block):
            last = min(first + block, end)
            some, columns = keys[first:last], self._columns[first:last]
            if sums is not None and self.kernel.add_votes(some, queries, columns, sums):
                continue
            out, work = self._buffers_for(count, last - first)
            key_norms = self._norms[first:last]
            distances = self.kernel.distances(some, key_norms, queries, norms, out=out, work=work)
            voters.update(distances, columns, first, rows)

    def _accumulate_rows(
        self, voters: InterpVotes | ConeVotes | TopKVotes, queries: Tensor, norms: Tensor, end: int
    ) -> None:
        """Let the centers 0..end vote, some rows of the queries at a time, each in one process."""
        if not voters.by_rows:
            self._accumulate(voters, queries, norms, 0, end)
            return
        chunks = [slice(i, min(i + _SHARE, len(queries))) for i in range(0, len(queries), _SHARE)]
        for rows in chunks if self.crew is None else self.crew.mine(chunks):
            self._accumulate(voters, queries, norms, 0, end, rows)
        if self.crew is not None:
            for state in voters.by_rows:
                self.crew.complete(state, chunks)

    def _finish(self, sums: Tensor) -> Tensor:
        """Normalise: class scores that sum to 1 (0 where nobody voted), or the weighted mean."""
        if self.classification:
            return sums / sums.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(sums.dtype).tiny)
        return sums[:, :-1] / sums[:, -1:]

    def _check(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"expected samples of shape (B, {self.num_features}), got {tuple(x.shape)}"
            )
        return x.to(self._centers)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Predict: class scores (B, C) that sum to 1, or values (B, O).

        Raises:
            ValueError: If there are no centers yet.
        """
        return self.featurize(x, splits=1)

    @torch.no_grad()
    def featurize(self, x: Tensor, splits: int = 1) -> Tensor:
        """Predict with each of `splits` consecutive parts of the centers: (B, D) -> (B, splits·C).

        A part with no center in reach (influence cone) gives zeros.
        """
        x = self._check(x)
        if self.num_centers == 0:
            raise ValueError("no centers yet: grow the layer first")
        edges = [self.num_centers * i // splits for i in range(splits + 1)]
        parts = list(itertools.pairwise(edges))
        rows = [self._featurize_rows(some, parts) for some in x.split(_ROWS)]
        return torch.cat(rows)

    def _featurize_rows(self, x: Tensor, parts: list[tuple[int, int]]) -> Tensor:
        """`featurize` for some rows; a part holds the centers first..last."""
        queries, norms = self.kernel.prepare_queries(x)
        columns, scores = self._columns, []
        if self.predictor == "interp" and not self.kernel.inverse:
            voters = ConeSums(self.kernel, queries, columns.shape[1])
            self._accumulate(voters, queries, norms, 0, self.num_centers)  # one d_min for all parts
            voters.counting = True
            for first, last in parts:
                voters.sums.zero_()
                self._accumulate(voters, queries, norms, first, last)
                scores.append(self._finish(voters.sums))
            return torch.cat(scores, dim=1)
        for first, last in parts:
            voters = self._voters(queries, norms)
            self._accumulate(voters, queries, norms, first, last)
            empty = x.new_zeros(len(x), columns.shape[1])
            scores.append(
                self._finish(voters.result(columns, 0, len(x)) if last > first else empty)
            )
        return torch.cat(scores, dim=1)

    def correct(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Tell which predictions are right, (B,) bool: class equal, or error below tolerance."""
        if self.classification:
            return prediction.argmax(dim=1) == y
        return (prediction - y).norm(dim=1) < self.tolerance

    # ---------------------------------------------------------------- growth

    @torch.no_grad()
    def grow(
        self, x: Tensor, y: Tensor, batch_size: int | None = None
    ) -> tuple[list[Growth], Tensor]:
        """Learn batch by batch: add the samples predicted wrong; the very first batch whole.

        The batches of one call share a single pass over the centers there were before it, and
        each is told of those the earlier ones add: the same result as a call a batch, faster.

        Args:
            x: Samples.
            y: Their classes, or values.
            batch_size: Samples a batch; None takes all as one batch.

        Shape:
            x (B, D), y (B,) int64 or (B, O).

        Returns:
            What happened, batch by batch, and the prediction of each sample once its batch was
            learnt, as `forward` words it.

        Raises:
            CentersFull: If memory does not allow more centers; nothing is lost.
        """
        x, y = self._check(x), y.to(self._targets)
        batch_size = batch_size or max(len(x), 1)
        events, outputs = [], []
        if self.num_centers == 0 and len(x):
            first = x[:batch_size]
            kept = min(len(first), self.max_neighbors)
            self._append(self._describe(first[:kept], y[:kept]))
            outputs.append(self(first))
            right = int(self.correct(outputs[0], y[:batch_size]).sum())
            events.append(Growth(kept, 1, 0, right, len(first)))
            x, y = x[batch_size:], y[batch_size:]
        queries, norms = self.kernel.prepare_queries(x)
        samples = self._describe(x, y, norms)
        voters = self._voters(queries, norms)
        known = self.num_centers
        self._accumulate_rows(voters, queries, norms, known)
        sums = []
        for first in range(0, len(x), batch_size):
            last = min(first + batch_size, len(x))
            # what the batches before this one have added
            self._accumulate(voters, queries, norms, known, self.num_centers, slice(first, last))
            events.append(self._grow_batch(samples, queries, norms, voters, first, last))
            sums.append(voters.result(self._columns, first, last))
        if sums:
            outputs.append(self._finish(torch.cat(sums)))
        return events, torch.cat(outputs) if outputs else self(x)

    def _grow_batch(self, samples, queries, norms, voters, first: int, last: int) -> Growth:
        """Grow by rows first..last, for which all centers so far have been counted."""
        y, total = samples["_targets"][first:last], last - first
        added = rounds = 0
        while True:
            right = self._right(voters.result(self._columns, first, last), y)
            wrong = (~right).nonzero().flatten()
            num_right = total - len(wrong)
            if rounds == 0:
                seen_correct = num_right
            good = rounds > 0 and num_right >= self.target_accuracy * total
            if good or rounds == self.max_count or num_right == total or self.full:
                return Growth(added, rounds, seen_correct, num_right, total)
            rounds += 1
            before = self.num_centers
            self._append(samples, wrong[: self.max_neighbors - before] + first)
            added += self.num_centers - before
            self._accumulate(voters, queries, norms, before, self.num_centers, slice(first, last))

    def _right(self, sums: Tensor, y: Tensor) -> Tensor:
        """`correct`, straight from the sums: scaling does not change the best class."""
        return self.correct(sums if self.classification else self._finish(sums), y)
