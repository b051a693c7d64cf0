"""What the layers over nearest neighbors share: shuffle, padding, coordinates, candidates.

Symbols: B batch, C channels, N positions of the padded map (keys), M queries, K neighbors, O output
channels, r shuffle scale, s stride.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.coordinates import coordinate_channels
from layers.options import check_neighbor_options
from layers.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from layers.sampling import count_candidates, query_index, random_index, spatial_index

__all__ = ["NeighborLayer", "with_coordinates"]


class NeighborLayer(nn.Module):
    """What the layers over nearest neighbors share: shuffle, padding, coordinates, candidates.

    A subclass sets `ndim` (1 or 2), owns the parameters and turns neighbors into outputs.
    Its `forward` calls `pad_and_flatten`, `self_index`, `candidates`, and `unflatten`. On the meta
    device it checks shapes and searches nothing: a free way to find, before any work, a K larger
    than the candidates somewhere in a network.
    """

    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        K: int,
        stride: int,
        padding: int,
        sampling_type: str,
        num_samples: int,
        sample_padding: int,
        shuffle_pattern: str,
        shuffle_scale: int,
        magnitude_type: str,
        aggregation_type: str,
    ):
        super().__init__()
        check_neighbor_options(
            in_channels=in_channels,
            out_channels=out_channels,
            K=K,
            stride=stride,
            padding=padding,
            sampling_type=sampling_type,
            num_samples=num_samples,
            sample_padding=sample_padding,
            shuffle_pattern=shuffle_pattern,
            shuffle_scale=shuffle_scale,
            magnitude_type=magnitude_type,
            aggregation_type=aggregation_type,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.K = K
        self.stride = stride
        self.padding = padding
        self.sampling_type = sampling_type
        self.num_samples = num_samples
        self.sample_padding = sample_padding
        self.shuffle_pattern = shuffle_pattern
        self.shuffle_scale = shuffle_scale
        self.magnitude_type = magnitude_type
        self.aggregation_type = aggregation_type
        # Scales before and after the layer; 1 does nothing.
        self.scale_in = shuffle_scale if shuffle_pattern in ("B", "BA") else 1
        self.scale_out = shuffle_scale if shuffle_pattern in ("A", "BA") else 1
        coords = self.ndim if aggregation_type == "Loc_Col" else 0
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
        queries = len(self.self_index(key_shape, keys.device))
        return self.unflatten(
            keys.new_empty(keys.shape[0], queries, self.out_channels_1d), key_shape
        )

    def unflatten(self, y: Tensor, key_shape: tuple[int, ...]) -> Tensor:
        """Put rows back on the map and shuffle: (B, M, O·r^ndim) -> (B, O, ...)."""
        sides = [-(-(side - 2 * self.padding) // self.stride) for side in key_shape]
        y = y.transpose(1, 2).unflatten(2, sides)
        return pixel_shuffle(y, self.scale_out) if self.scale_out > 1 else y

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Some published weights were trained without biases: that is a bias of zero.
        for name, parameter in self.named_parameters():
            if name.endswith("bias") and f"{prefix}{name.rsplit('.', 1)[0]}.weight" in state_dict:
                state_dict.setdefault(prefix + name, torch.zeros_like(parameter))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the options that matter."""
        shown = [
            f"{self.in_channels}, {self.out_channels}, K={self.K}, stride={self.stride}",
            f"padding={self.padding}, sampling_type={self.sampling_type}",
        ]
        if self.sampling_type != "all":
            shown.append(f"num_samples={self.num_samples}")
        if self.sampling_type == "spatial":
            shown.append(f"sample_padding={self.sample_padding}")
        if self.shuffle_pattern != "NA":
            shown.append(f"shuffle={self.shuffle_pattern} by {self.shuffle_scale}")
        shown.append(f"magnitude_type={self.magnitude_type}")
        shown.append(f"aggregation_type={self.aggregation_type}")
        return ", ".join(shown)


def with_coordinates(keys: Tensor, key_shape: tuple[int, ...]) -> Tensor:
    """Append the coordinates of the padded map: (B, N, C) -> (B, N, C + ndim)."""
    coords = coordinate_channels(key_shape, dtype=keys.dtype, device=keys.device)
    coords = coords.flatten(1).T  # (N, ndim)
    return torch.cat([keys, coords.expand(keys.shape[0], *coords.shape)], dim=2)
