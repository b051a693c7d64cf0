"""Growing networks: one layer of dynamic neighbors, or several, each fed by the one before.

In a deep network the class scores by consecutive parts (`splits`) of one layer's centers are the
next layer's input. Layers are grown one after the other, each in its own passes over the data.

References:
    J. Loverich, "Dynamic and Deep Nearest Neighbors in PyTorch".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layers.dynamic import PREDICTORS, DynamicNeighbors
from layers.prune import prune_centers
from models.transform import Transform, TransformOptions
from ops.centers.distances import KERNELS, DistanceKernel
from options import option

__all__ = ["DynamicNetwork"]


@dataclass(frozen=True)
class DynamicOptions(TransformOptions):
    """Which centers vote how, and when one is added."""

    title = "Growing networks (--model dynamic)"
    K: int = option(9, "voters of --predictor knn", least=1, most=10**6)
    kernel_type: str = option(
        "cosine",
        "what weight a center has at a distance; cosine and dot compare directions, "
        "influence_cone sees only centers near the nearest one",
        choices=KERNELS,
    )
    epsilon: float = option(1e-6, "added to every distance, > 0", most=1e12)
    exponent: float = option(
        -4.0, "the weight is distance to this power, < 0 (all kernels but influence_cone)"
    )
    scales: int = option(4, "levels of euclidean_pyramid", most=64)
    influence_cone_factor: float = option(
        2.0, "reach of influence_cone in distances of the nearest center, > 1", most=1e12
    )
    predictor: str = option(
        "interp",
        "who votes: all centers, the nearest one, or the --K nearest",
        choices=PREDICTORS,
    )
    target_accuracy: float = option(
        0.9, "share of a batch, in (0, 1], from which on it is not gone over again"
    )
    max_count: int = option(3, "times a batch is gone over at most", most=10**6)
    max_neighbors: int = option(100_000, "most centers of each layer", most=10**8)
    num_layers: int = option(1, "layers, grown one after the other", most=1000)
    splits: int = option(
        1, "parts of a layer's centers whose class scores the next layer sees", most=1000
    )


class DynamicNetwork(nn.Module):
    """A stack of `DynamicNeighbors`, grown layer by layer.

    Args:
        num_inputs: Features of a sample; inputs are flattened.
        num_classes: Number of classes; exactly one of `num_classes` and `num_outputs` is given.
        num_outputs: Values a sample of a regression (one layer only).
        num_layers: Number of layers.
        splits: Parts of a layer's centers whose class scores the next layer sees.
        num_passes: Passes over the data for each layer; a pass that adds nothing is its last.
        batch_size: Samples that are learnt at a time; `grow` may be given many batches at once.
        kernel_type: See `DistanceKernel`, as are the next four.
        epsilon: Added to every distance.
        exponent: Power of the inverse kernels.
        scales: Levels of the pyramid.
        influence_cone_factor: Reach of the influence cone.
        predictor: See `DynamicNeighbors`, as are all that follow.
        K: Voters of predictor ``knn``.
        target_accuracy: Share of a batch from which on it is not gone over again.
        max_count: Rounds a batch at most.
        max_neighbors: Most centers of each layer.
        tolerance: Error from which on a regression counts as wrong.
        features: "learned": a `Transform` stands before the first layer; anything else: nothing.
        in_channels: Channels of a sample, for the transform.
        image_size: Its sides, likewise.
        learned_dim: See `Transform`, as are the next two.
        learned_width: Channels of the first convolution.
        learned_depth: Convolutions.

    Attributes:
        transform: What learns features before anything grows, or None.
        growth: One row a batch grown: layer, pass, samples, added, centers, and the percentage
            that was right before (`seen`) and after (`learnt`) growing.
    """

    Options = DynamicOptions
    defaults: ClassVar[dict] = {"batch_size": 64, "num_epochs": 1}
    task_defaults: ClassVar[dict] = {
        "approximation": {
            "kernel_type": "euclidean",
            "tolerance": 0.2,
            "target_accuracy": 0.8,
            "batch_size": 256,
        }
    }
    family, tasks = "Dynamic", ("classification", "approximation", "language")
    training, uses_layer, min_input_size = "growth", False, 1
    inputs = ("images", "signals")

    def __init__(
        self,
        *,
        num_inputs: int,
        num_classes: int | None = None,
        num_outputs: int | None = None,
        num_layers: int = 1,
        splits: int = 1,
        num_passes: int = 1,
        batch_size: int = 64,
        kernel_type: str = "cosine",
        epsilon: float = 1e-6,
        exponent: float = -4.0,
        scales: int = 4,
        influence_cone_factor: float = 2.0,
        predictor: str = "interp",
        K: int = 9,
        target_accuracy: float = 0.9,
        max_count: int = 3,
        max_neighbors: int = 100_000,
        tolerance: float = 0.05,
        features: str = "raw",
        in_channels: int = 1,
        image_size: Sequence[int] | None = None,
        learned_dim: int = 32,
        learned_width: int = 32,
        learned_depth: int = 3,
    ) -> None:
        super().__init__()
        if num_layers < 1 or splits < 1:
            raise ValueError(f"num_layers and splits must be >= 1, got {num_layers} and {splits}")
        if num_outputs is not None and num_layers > 1:
            raise ValueError(
                f"a regression has no class scores to feed a next layer: num_layers must be 1, "
                f"got {num_layers}"
            )
        kernel = DistanceKernel(kernel_type, epsilon, exponent, scales, influence_cone_factor)
        self.transform: Transform | None = None
        if features == "learned":
            shape = (in_channels, *(image_size or (8, 8)))  # sides are not known in a rehearsal
            self.transform = Transform(shape, learned_dim, learned_width, learned_depth)
            self.transform.eval()
            num_inputs = learned_dim
        widths = [num_inputs] + [splits * (num_classes or 0)] * (num_layers - 1)
        self.layers = nn.ModuleList(
            DynamicNeighbors(
                num_features=width,
                num_classes=num_classes,
                num_outputs=num_outputs,
                kernel=kernel,
                predictor=predictor,
                K=K,
                target_accuracy=target_accuracy,
                max_count=max_count,
                max_neighbors=max_neighbors,
                tolerance=tolerance,
            )
            for width in widths
        )
        self.splits, self.num_passes, self.batch_size = splits, num_passes, batch_size
        self.growth: list[dict[str, float]] = []
        # layer being grown, passes it has had, centers this pass has added
        self.register_buffer("stage", torch.zeros(3, dtype=torch.int64))

    @property
    def num_stages(self) -> int:
        """Passes over the data that growing takes at most."""
        return len(self.layers) * self.num_passes

    @property
    def current(self) -> int:
        """Index of the layer being grown."""
        return int(self.stage[0])

    @property
    def num_centers(self) -> int:
        """Centers of the layer being grown."""
        return self.layers[self.current].num_centers

    @property
    def full(self) -> bool:
        """Whether the layer being grown holds as many centers as it may."""
        return self.layers[self.current].full

    def features(self, x: Tensor, layer: int) -> Tensor:
        """Return what layer number `layer` sees of samples (B, ...)."""
        x = x.flatten(1) if self.transform is None else self.transform.features(x)
        for before in self.layers[:layer]:
            x = before.featurize(x, self.splits)
        return x

    def train(self, mode: bool = True) -> DynamicNetwork:
        """Set the mode of all but the transform, which is trained by itself."""
        super().train(mode)
        if self.transform is not None:
            self.transform.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Predict by the deepest layer that has centers: scores (B, C) or values (B, O)."""
        grown = max(i for i, layer in enumerate(self.layers) if layer.num_centers or i == 0)
        return self.layers[grown](self.features(x, grown))

    @torch.no_grad()
    def grow(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn samples, batch by batch; return each one's prediction once its batch was learnt.

        Shape:
            x (B, ...), y (B,) int64 or (B, O) -> (B, C) or (B, O).

        Raises:
            CentersFull: If memory does not allow more centers; nothing is lost.
        """
        index = self.current
        layer, centers = self.layers[index], self.layers[index].num_centers
        try:
            events, outputs = layer.grow(self.features(x, index), y, self.batch_size)
        finally:
            self.stage[2] += layer.num_centers - centers
        for event in events:
            centers += event.added
            self.growth.append(
                {
                    "layer": index + 1,
                    "pass": int(self.stage[1]) + 1,
                    "samples": event.total,
                    "added": event.added,
                    "centers": centers,
                    "seen": 100 * event.seen_correct / event.total,
                    "learnt": 100 * event.correct / event.total,
                }
            )
        return outputs

    def end_pass(self) -> bool:
        """Finish a pass over the data; return whether growing is finished.

        A layer is done after `num_passes` passes, when it is full, or when a pass added nothing;
        the last layer is never left, so that a run may be gone on with.
        """
        index, passes, added = self.stage.tolist()
        passes += 1
        done = added == 0 or passes >= self.num_passes or self.full
        last = index == len(self.layers) - 1
        if done and not last:
            self.stage.copy_(torch.tensor([index + 1, 0, 0]))
            return False
        self.stage.copy_(torch.tensor([index, passes, 0]))
        return last and (added == 0 or self.full)

    def prune(self, x: Tensor, y: Tensor) -> tuple[int, int]:
        """Drop centers of the last layer that no training prediction needs.

        Args:
            x: Training samples (N, ...).
            y: Their classes or values.

        Returns:
            Centers before and after.
        """
        index = len(self.layers) - 1
        layer = self.layers[index]
        before = layer.num_centers
        features = torch.cat([self.features(part, index) for part in x.split(4096)])
        layer.keep(prune_centers(layer, features, y))
        return before, layer.num_centers
