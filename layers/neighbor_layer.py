"""What the layers over nearest neighbors share: shuffle, padding, coordinates, candidates.

Symbols: B batch, C channels, N positions of the padded map (keys), M queries, K neighbors, O output
channels, r shuffle scale, s stride.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.coordinates import AggregationOptions, coordinate_channels
from layers.pixel_shuffle import ShuffleOptions, pixel_shuffle, pixel_unshuffle
from layers.record import Neighbors, grid_places, note
from layers.sampling import (
    STEP,
    SamplingOptions,
    count_candidates,
    count_queries,
    per_axis,
    query_index,
    random_index,
    spatial_index,
)
from ops.maps.locations import location_neighbors
from options import Options, check_at_least, option

__all__ = ["NeighborLayer", "NeighborOptions", "with_coordinates"]

MAGNITUDE_TYPES = ("cosine", "euclidean")


@dataclass(frozen=True)
class _Taps(Options):
    K: int = option(9, "number of neighbors, the position itself included", least=1, most=10**6)
    padding: int = option(
        1,
        "width of the border of zeros whose positions are candidates too (neighbor layers); "
        "convolutions always keep the size of the map",
        least=0,
        most=1024,
    )


@dataclass(frozen=True)
class NeighborOptions(AggregationOptions, ShuffleOptions, SamplingOptions, _Taps):
    """How neighbors are found and combined."""

    title = "Neighbor layers (ConvNN, ConvNN_Attn, Branching, ...)"
    magnitude_type: str = option("cosine", "similarity of two positions", choices=MAGNITUDE_TYPES)


class NeighborLayer(nn.Module):
    """What the layers over nearest neighbors share: shuffle, padding, coordinates, candidates.

    A subclass sets `ndim` (1 or 2), owns the parameters and turns neighbors into outputs.
    Its `forward` calls `pad_and_flatten`, `self_index`, `candidates`, and `unflatten`. On the meta
    device it checks shapes and searches nothing: a free way to find, before any work, a K larger
    than the candidates somewhere in a network.
    """

    ndim: int

    Options = NeighborOptions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | Sequence[int],
        options: NeighborOptions,
    ) -> None:
        super().__init__()
        check_at_least("in_channels", in_channels, 1, "number of input channels")
        check_at_least("out_channels", out_channels, 1, "number of output channels")
        steps = per_axis("stride", stride, self.ndim, STEP)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride = steps if len(set(steps)) > 1 else steps[0]
        self.options = options
        for each in options.declared():  # K, padding, …
            setattr(self, each.name, getattr(options, each.name))
        self.scale_in, self.scale_out = options.scales
        coords = self.ndim if self.aggregation_type == "Loc_Col" else 0
        self.in_channels_1d = in_channels * self.scale_in**self.ndim + coords
        self.out_channels_1d = out_channels * self.scale_out**self.ndim

    def pad_and_flatten(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Unshuffle, pad with zeros, flatten: (B, C, ...) -> keys (B, N, C·r^ndim), their shape.

        Raises:
            ValueError: if the input has the wrong shape, the scale does not divide it, or it
                has fewer candidates than K.
        """
        if x.dim() != self.ndim + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} expects (B, {self.in_channels}, "
                f"{'L' if self.ndim == 1 else 'H, W'}), got {tuple(x.shape)}."
            )
        if self.scale_in > 1:
            x = pixel_unshuffle(x, self.scale_in)  # (B, C, H, W) -> (B, C·r², H/r, W/r)
        # Channels last from here on: a position's features are one piece of memory.
        x = x.movedim(1, -1)  # (B, C, H, W) -> (B, H, W, C)
        if self.padding:
            x = F.pad(x, [0, 0] + [self.padding] * (2 * self.ndim))
        key_shape = tuple(x.shape[1:-1])
        self.check_candidates(key_shape)
        return x.contiguous().flatten(1, -2), key_shape

    def check_candidates(self, key_shape: tuple[int, ...]) -> None:
        """Refuse a map with fewer candidates than K; needs the shape alone."""
        options = (self.padding, self.sampling_type, self.num_samples, self.sample_padding)
        available = count_candidates(key_shape, *options)
        if available < self.K:
            sides = " x ".join(str(side - 2 * self.padding) for side in key_shape)
            raise ValueError(
                f"K={self.K} is larger than the number of candidates, {available}: a map of "
                f"{sides} positions, padding {self.padding}, sampling_type {self.sampling_type}"
                f"{'' if self.sampling_type == 'all' else f', num_samples {self.num_samples}'} "
                f"offers no more neighbors. Try K {available} or less, more padding or samples, "
                "or a larger input."
            )

    def self_index(self, key_shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Number the queries among the keys; (M,)."""
        return query_index(key_shape, self.padding, self.stride, device)

    def candidates(self, key_shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Choose who may become a neighbor: (N',), or None for all keys."""
        if self.sampling_type == "random":
            return random_index(math.prod(key_shape), self.num_samples, self.training, device)
        if self.sampling_type == "spatial":
            return spatial_index(
                key_shape, self.padding, self.num_samples, self.sample_padding, device
            )
        return None

    def shape_only(self, keys: Tensor, key_shape: tuple[int, ...]) -> Tensor:
        """Return an output without content: on the meta device a layer only checks shapes."""
        queries = math.prod(count_queries(key_shape, self.padding, self.stride))
        return self.unflatten(
            keys.new_empty(keys.shape[0], queries, self.out_channels_1d), key_shape
        )

    def unflatten(self, y: Tensor, key_shape: tuple[int, ...]) -> Tensor:
        """Put rows back on the map and shuffle: (B, M, O·r^ndim) -> (B, O, ...)."""
        sides = count_queries(key_shape, self.padding, self.stride)
        y = y.transpose(1, 2).unflatten(2, sides)
        return pixel_shuffle(y, self.scale_out) if self.scale_out > 1 else y

    def note_neighbors(
        self,
        indices: Tensor,
        key_shape: tuple[int, ...],
        *,
        weights: Tensor | None = None,
        taken: str = "Col",
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Tell `layers.record` what was chosen.

        Args:
            indices: (B, M, K) or (M, K) positions of the padded map.
            key_shape: Its sides.
            weights: (B, M, K), if the neighbors have any.
            taken: The similarity that chose.
            beside: What other similarities take, like `indices`; the K nearest positions ("Loc"),
                which are the taps of a convolution, are added.
        """
        r, p = self.scale_in, self.padding
        places = grid_places(
            key_shape, [(r - 1) / 2 - p * r] * self.ndim, r, indices.device
        )  # a position of the unshuffled map is r wide
        others = dict(beside or {})
        if taken != "Loc":
            others["Loc"] = location_neighbors(
                key_shape, self.K, "euclidean", padding=p, stride=self.stride, device=indices.device
            )
        note(
            Neighbors(
                self,
                tuple((side - 2 * p) * r for side in key_shape),
                places[self.self_index(key_shape, indices.device)],
                places,
                _with_batch(indices)[:, None],
                None if weights is None else weights[:, None],
                extent=r,
                taken=taken,
                beside={name: _with_batch(other) for name, other in others.items()},
            )
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Some published weights were trained without biases: that is a bias of zero.
        for name, parameter in self.named_parameters():
            if name.endswith("bias") and f"{prefix}{name.rsplit('.', 1)[0]}.weight" in state_dict:
                state_dict.setdefault(prefix + name, torch.zeros_like(parameter))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the options that matter."""
        return (
            f"{self.in_channels}, {self.out_channels}, stride={self.stride}, "
            f"{self.options.describe()}"
        )


def _with_batch(indices: Tensor) -> Tensor:
    """Return (B, M, K), B = 1 where all samples agree."""
    return indices if indices.dim() == 3 else indices[None]


def with_coordinates(keys: Tensor, key_shape: tuple[int, ...]) -> Tensor:
    """Append the coordinates of the padded map: (B, N, C) -> (B, N, C + ndim)."""
    coords = coordinate_channels(key_shape, dtype=keys.dtype, device=keys.device)
    coords = coords.flatten(1).T  # (N, ndim)
    return torch.cat([keys, coords.expand(keys.shape[0], *coords.shape)], dim=2)
