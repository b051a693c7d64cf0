"""Dynamic graph networks over points: each layer finds the neighbors anew, in its own features.

Reference: Wang et al., Dynamic Graph CNN for Learning on Point Clouds, ACM TOG 2019,
https://arxiv.org/abs/1801.07829. Symbols: B batch, N points, C channels, K neighbors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.graph import normalize_rows
from models.width import WidthOptions, scaled
from ops.maps.pairs import nearest_rows
from options import option

__all__ = ["DGCNN"]

WIDTHS = (64, 64, 128, 256)  # of the graph layers
JOINED, HEAD = 1024, (512, 256)
SLOPE = 0.2


@dataclass(frozen=True)
class DGCNNOptions(WidthOptions):
    """Neighbors and size."""

    title = "Dynamic graph networks (dgcnn)"
    K: int = option(20, "neighbors of a point, itself included", least=1, most=10**6)
    similarity_type: str = option(
        "Col",
        "dgcnn finds neighbors by the features of every layer (Col), or by coordinates, once and "
        "for all layers (Loc)",
        choices=("Col", "Loc"),
    )
    dropout: float = option(0.5, "dropout between the last layers", least=0, below=1)


class DGCNN(nn.Module):
    """Classify clouds of points by four graph layers, of which each has a graph of its own.

    Clouds of unequal sizes come with a fourth channel that is 1 for points that are there and 0 for
    padding, which comes last: padding is nobody's neighbor and counts in no statistics, mean or
    maximum. Where a cloud has fewer than K points, each point itself stands in for the neighbors
    that are missing. A cloud without any point counts as its first one.

    Args:
        layer: `layer(in_channels=, out_channels=) -> nn.Module`, see `layers.graph`.
        in_channels: 3, or 4 with a channel that says which points are there.
        num_classes: Number of outputs.
        K: Neighbors of a point.
        similarity_type: "Col": the nearest by the features of each layer; "Loc": by coordinates.
        dropout: Between the last layers.
        width: Factor of all channels.

    Shape:
        (B, in_channels, N) -> (B, num_classes)

    Raises:
        ValueError: in forward, for fewer than K points, and for other channels.
    """

    Options = DGCNNOptions
    defaults: ClassVar[dict] = {"layer": "EdgeConv", "groups": 1, "dataset": "shapes3d"}
    family = "DGCNN"
    tasks = ("classification",)
    inputs = ("points",)
    training = "gradient"
    uses_layer = True
    layer_kind = "graph"
    min_input_size = 1

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        in_channels: int = 3,
        num_classes: int = 10,
        K: int = 20,
        similarity_type: str = "Col",
        dropout: float = 0.5,
        width: float = 1.0,
    ):
        super().__init__()
        DGCNNOptions(K=K, similarity_type=similarity_type, dropout=dropout, width=width)
        self.K, self.similarity_type, self.in_channels = K, similarity_type, in_channels
        widths = [scaled(c, width) for c in WIDTHS]
        self.layers = nn.ModuleList(
            layer(in_channels=c, out_channels=o) for c, o in zip([3, *widths], widths, strict=False)
        )
        joined, (first, second) = scaled(JOINED, width), (scaled(c, width) for c in HEAD)
        self.join = nn.Linear(sum(widths), joined, bias=False)
        self.norm = nn.BatchNorm1d(joined)
        self.classifier = nn.Sequential(
            *(nn.Linear(2 * joined, first, bias=False), nn.BatchNorm1d(first)),
            *(nn.LeakyReLU(SLOPE), nn.Dropout(dropout)),
            *(nn.Linear(first, second, bias=False), nn.BatchNorm1d(second)),
            *(nn.LeakyReLU(SLOPE), nn.Dropout(dropout)),
            nn.Linear(second, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        self.check(x)
        if x.is_meta:
            return x.new_empty(len(x), self.classifier[-1].out_features)
        points = x[:, :3].transpose(1, 2).contiguous()  # (B, N, 3)
        present = counts = None
        if self.in_channels == 4:
            counts = (x[:, 3] > 0).sum(1).clamp(min=1)
            present = torch.arange(x.shape[2], device=x.device) < counts[:, None]  # (B, N)
        indices = self.neighbors(points, counts) if self.similarity_type == "Loc" else None
        found, rows = [], points
        for layer in self.layers:
            chosen = self.neighbors(rows, counts) if indices is None else indices
            rows = F.leaky_relu(layer(rows, chosen, None, present), SLOPE)
            found.append(rows)
        rows = F.leaky_relu(
            normalize_rows(self.norm, self.join(torch.cat(found, 2)), present), SLOPE
        )
        return self.classifier(torch.cat(pool_rows(rows, present, counts), 1))

    def check(self, x: Tensor) -> None:
        """Refuse clouds of another form."""
        if x.dim() != 3 or x.shape[1] != self.in_channels or self.in_channels not in (3, 4):
            raise ValueError(
                "DGCNN takes clouds (B, 3, N) of coordinates, or (B, 4, N) with a channel that "
                f"says which points are there; it was built for {self.in_channels} channels "
                f"(got {tuple(x.shape)})."
            )
        if x.shape[2] < self.K:
            raise ValueError(
                f"K={self.K} is larger than the number of points of a cloud, {x.shape[2]}. Try a "
                "smaller K, or more num_points."
            )

    def neighbors(self, rows: Tensor, counts: Tensor | None) -> Tensor:
        """Find the K nearest rows of each: (B, N, C) -> (B, N, K)."""
        return nearest_rows(rows, rows, self.K, "euclidean", key_counts=counts, fill=True)[1]

    def extra_repr(self) -> str:
        """Show who looks at whom."""
        return f"K={self.K}, similarity_type={self.similarity_type}"


def pool_rows(rows: Tensor, present: Tensor | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the maximum and the mean (B, C) of the rows (B, N, C) that are there."""
    if present is None:
        return rows.amax(1), rows.mean(1)
    largest = rows.masked_fill(~present[..., None], -torch.inf).amax(1)
    return largest, rows.sum(1) / counts[:, None]
