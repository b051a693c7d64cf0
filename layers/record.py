"""Seeing neighbors: what the layers choose while a network runs.

    with record_neighbors(model) as records:
        model(images)
    for record in records:
        seen = record.at(40, 60, shape=images.shape[2:])  # row and column of a pixel
        print(record.name, seen.positions, seen.weights)

A layer tells its choice by `note` where `recording()` says that somebody listens; otherwise nothing
is made or kept. Symbols: B batch, G groups (heads or volumes), M queries, N places that may be
chosen, K neighbors, d axes of the map.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

__all__ = ["Neighbors", "Seen", "grid_places", "note", "record_neighbors", "recording"]


@dataclass(frozen=True)
class Seen:
    """What one query takes, in pixels of the image (or positions of the map, without an image).

    Attributes:
        query: Its center (d,).
        positions: Centers of its neighbors (G, K, d), nearest or heaviest first; they may lie in
            the border of zeros, outside the image. NaN for tokens that have no place.
        weights: Their weights (G, K); None where they weigh by their rank alone.
        beside: What it would take by other similarities, "Loc" or "Col": (K, d) each.
        extent: Height and width of what one position covers (d,).
    """

    query: Tensor
    positions: Tensor
    weights: Tensor | None
    beside: dict[str, Tensor]
    extent: Tensor


@dataclass(frozen=True)
class Neighbors:
    """What a layer chose in one forward pass.

    Attributes:
        layer: The layer.
        map_shape: Sides of its input map: (L,), (H, W), or (N,) tokens or items of a set.
        queries: Centers of the queries on that map (M, d).
        places: Centers of the positions that could be chosen (N, d).
        indices: The choice, (B, G, M, K) or, where samples or groups agree, 1 in their place.
        weights: Weights (B, G, M, K) of the neighbors, if they have any.
        group: What the groups are: "head", "volume", or "" for a single one.
        extent: Side of what one position covers, on the map.
        taken: The similarity that chose: "Col", "Loc", "Loc_Col", or the name of another.
        beside: What other similarities would have taken, (B or 1, M, K) each.
        name: Name of the layer in the network.
    """

    layer: nn.Module
    map_shape: tuple[int, ...]
    queries: Tensor
    places: Tensor
    indices: Tensor
    weights: Tensor | None = None
    group: str = ""
    extent: int = 1
    taken: str = "Col"
    beside: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""

    @property
    def num_groups(self) -> int:
        """Heads or volumes."""
        found = self.indices if self.weights is None else self.weights
        return max(self.indices.shape[1], found.shape[1])

    def at(self, *position: float, shape: Sequence[int] | None = None, sample: int = 0) -> Seen:
        """Return the choice of the query nearest to a pixel.

        Args:
            *position: Row and column of the pixel; one number on sequences.
            shape: Height and width of the image; None: the position is one of the layer's map.
            sample: Which one of the batch.

        Raises:
            ValueError: for another number of coordinates, or a position outside the image.
        """
        sides = self.map_shape if shape is None else tuple(shape)
        if not len(position) == len(sides) == len(self.map_shape):
            raise ValueError(
                f"{self.name or type(self.layer).__name__} has a map of {len(self.map_shape)} axes "
                f"{self.map_shape}: the position needs as many numbers, and shape too (got "
                f"{position} and {shape})."
            )
        if not all(0 <= p < side for p, side in zip(position, sides, strict=True)):
            raise ValueError(
                f"the position {position} lies outside the image of {' x '.join(map(str, sides))}: "
                "rows and columns count from 0."
            )
        like = self.queries
        scale = like.new_tensor(sides) / like.new_tensor(self.map_shape)

        def pixels(places: Tensor) -> Tensor:
            return (places + 0.5) * scale - 0.5

        queries = pixels(self.queries)
        distance = (queries - like.new_tensor(position)).square().sum(1).nan_to_num(torch.inf)
        m = int(distance.argmin())

        def mine(tensor: Tensor) -> Tensor:
            return tensor[sample if len(tensor) > 1 else 0]

        groups = self.num_groups
        indices = mine(self.indices)[:, m].expand(groups, -1)
        weights = None if self.weights is None else mine(self.weights)[:, m].expand(groups, -1)
        if weights is not None:
            order = weights.argsort(dim=1, descending=True, stable=True)
            weights, indices = weights.gather(1, order), indices.gather(1, order)
        return Seen(
            query=queries[m],
            positions=pixels(self.places[indices]),
            weights=weights,
            beside={name: pixels(self.places[mine(i)[m]]) for name, i in self.beside.items()},
            extent=scale * self.extent,
        )


def grid_places(
    shape: Sequence[int], first: Sequence[float], step: float, device: torch.device | None = None
) -> Tensor:
    """Return the centers of the positions of a grid, row by row: (N, d).

    Args:
        shape: Positions along each axis.
        first: Center of the first one along each axis.
        step: Distance of two of them.
        device: Of the result.
    """
    axes = [
        start + step * torch.arange(side, device=device)
        for side, start in zip(shape, first, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).float()


class _Recorder:
    """The layers of one network, and what they told."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.grids = {
            name: module.token_grid
            for module, name in self.names.items()
            if hasattr(module, "token_grid")
        }
        self.records: list[Neighbors] = []

    def add(self, record: Neighbors) -> None:
        """Keep a record of a layer of this network."""
        if record.layer not in self.names:
            return
        name = self.names[record.layer]
        record = replace(record, name=name)
        for prefix, grid in self.grids.items():
            if len(record.map_shape) == 1 and f"{name}.".startswith(f"{prefix}." if prefix else ""):
                record = _on_grid(record, grid)
        self.records.append(record)


def _on_grid(record: Neighbors, grid: tuple[int, int]) -> Neighbors:
    """Put tokens on the grid of patches they come from; those before it have no place."""
    places = grid_places(grid, (0, 0), 1, record.places.device)
    before = record.map_shape[0] - len(places)
    places = torch.cat([places.new_full((before, 2), torch.nan), places])
    return replace(record, map_shape=tuple(grid), places=places, queries=places)


_RECORDERS: list[_Recorder] = []


def recording() -> bool:
    """Tell whether somebody wants to see neighbors."""
    return bool(_RECORDERS)


def note(record: Neighbors) -> None:
    """Tell what a layer chose to whom it may concern."""
    weights = None if record.weights is None else record.weights.detach()
    for recorder in _RECORDERS:
        recorder.add(replace(record, weights=weights))


@contextmanager
def record_neighbors(model: nn.Module) -> Iterator[list[Neighbors]]:
    """Record what the neighbor layers of a network choose in the forward passes within.

    Compiled networks run uncompiled meanwhile. Candidates drawn at random are those of the pass;
    outputs, gradients and random numbers are what they are without.

    Args:
        model: Any network with layers of `layers`; a layer alone is one too.

    Yields:
        The records, in the order in which the layers ran.

    Example:
        >>> layer = Conv2d_NN(in_channels=3, out_channels=8, K=9)
        >>> with record_neighbors(layer) as records:
        ...     y = layer(torch.randn(1, 3, 16, 16))
        >>> records[0].at(4, 7).positions.shape  # groups, neighbors, row and column
        torch.Size([1, 9, 2])
    """
    recorder = _Recorder(model)
    compiled = "torch._dynamo" in sys.modules  # loading it takes a while
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    _RECORDERS.append(recorder)
    try:
        with stance:
            yield recorder.records
    finally:
        _RECORDERS.remove(recorder)
