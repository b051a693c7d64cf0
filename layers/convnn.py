"""Convolution over nearest neighbors: the K taps are the K most similar positions of the map.

Reference: Kang & Farias, Attention via Convolutional Nearest Neighbors,
https://arxiv.org/abs/2511.14137. Symbols: B batch, C channels, C' channels aggregated, N positions
of the padded map (keys), M queries, K neighbors, O output channels, r shuffle scale, s stride.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.neighbor_layer import NeighborLayer, NeighborOptions, with_coordinates
from layers.record import recording
from ops.maps.aggregate import aggregate_neighbors
from ops.maps.locations import location_neighbors
from ops.maps.search import nearest_neighbors
from options import option

__all__ = ["Conv1d_NN", "Conv2d_NN", "ConvNNOptions"]

SIMILARITY_TYPES = ("Loc", "Col", "Loc_Col")


@dataclass(frozen=True)
class ConvNNOptions(NeighborOptions):
    """What is compared."""

    similarity_type: str = option(
        "Col",
        "what is compared: coordinates, features, or both (ConvNN, Branching)",
        choices=SIMILARITY_TYPES,
    )
    lambda_param: float = option(
        0.5,
        "weight of features against coordinates in --similarity_type Loc_Col, in [0, 1]",
        least=0,
        most=1,
        when={"similarity_type": ("Loc_Col",)},
    )


class _ConvNN(NeighborLayer):
    """The convolution over nearest neighbors, for any number of axes."""

    Options = ConvNNOptions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        K: int = 9,
        stride: int | Sequence[int] = 1,
        padding: int = 1,
        sampling_type: str = "all",
        num_samples: int = -1,
        sample_padding: int = 0,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 0,
        magnitude_type: str = "cosine",
        similarity_type: str = "Col",
        aggregation_type: str = "Col",
        lambda_param: float = 0.5,
    ):
        options = ConvNNOptions(
            K=K,
            padding=padding,
            sampling_type=sampling_type,
            num_samples=num_samples,
            sample_padding=sample_padding,
            shuffle_pattern=shuffle_pattern,
            shuffle_scale=shuffle_scale,
            magnitude_type=magnitude_type,
            similarity_type=similarity_type,
            aggregation_type=aggregation_type,
            lambda_param=lambda_param,
        )
        super().__init__(in_channels, out_channels, stride, options)
        # Holds the weights (O, C', K); the layer never lays out what this convolution would read.
        self.conv1d_layer = nn.Conv1d(
            self.in_channels_1d, self.out_channels_1d, kernel_size=K, stride=K
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`: (B, C, L) -> (B, O, L/s) or (B, C, H, W) -> (B, O, H/s, W/s)."""
        keys, key_shape = self.pad_and_flatten(x)  # (B, C, H, W) -> (B, N, C)
        if x.is_meta:
            return self.shape_only(keys, key_shape)
        indices = self.find_neighbors(keys.detach(), key_shape)  # (B, M, K)
        if recording():
            self._note(keys.detach(), key_shape, indices)
        if self.aggregation_type == "Loc_Col":
            keys = with_coordinates(keys, key_shape)  # (B, N, C) -> (B, N, C')
        y = aggregate_neighbors(keys, indices, self.conv1d_layer.weight, self.conv1d_layer.bias)
        return self.unflatten(y, key_shape)  # (B, M, O) -> (B, O, H/s, W/s)

    def find_neighbors(self, keys: Tensor, key_shape: tuple[int, ...]) -> Tensor:
        """Find the K neighbors of every query: (B, M, K), or (M, K) if all samples agree."""
        candidates = None if self.K == 1 else self.candidates(key_shape, keys.device)
        return self._rank(keys, key_shape, self.similarity_type, candidates)

    def _rank(
        self,
        keys: Tensor,
        key_shape: tuple[int, ...],
        similarity_type: str,
        candidates: Tensor | None,
    ) -> Tensor:
        """Take the first K of the candidates by a similarity: (B, M, K) or (M, K)."""
        own = self.self_index(key_shape, keys.device)
        if self.K == 1:
            return own[:, None]
        if similarity_type == "Loc":
            return location_neighbors(
                key_shape,
                self.K,
                self.magnitude_type,
                padding=self.padding,
                stride=self.stride,
                candidates=candidates,
                device=keys.device,
            )
        if similarity_type == "Loc_Col":
            keys = _mix_coordinates(keys, key_shape, self.lambda_param)
        return nearest_neighbors(
            None,  # the queries are the keys at `own`
            keys,
            self.K,
            self.magnitude_type,
            self_index=own,
            candidates=candidates,
        )[1]

    def _note(self, keys: Tensor, key_shape: tuple[int, ...], indices: Tensor) -> None:
        """Tell what was chosen, and by features if it was not chosen so."""
        beside = {}
        if self.similarity_type != "Col":
            beside["Col"] = self._rank(keys, key_shape, "Col", None)
        self.note_neighbors(indices, key_shape, taken=self.similarity_type, beside=beside)


def _mix_coordinates(keys: Tensor, key_shape: tuple[int, ...], lam: float) -> Tensor:
    """Weigh features of unit spread against coordinates: (B, N, C) -> (B, N, C + ndim)."""
    keys = keys if keys.dtype == torch.float64 else keys.float()  # half precision moves ranks
    spread = keys.std(dim=(1, 2), keepdim=True) + 1e-6
    mixed = with_coordinates(lam * keys / spread, key_shape)
    scale = torch.ones_like(mixed[0, 0])
    scale[keys.shape[2] :] = 1 - lam
    return mixed * scale


class Conv2d_NN(_ConvNN):
    """Convolve a map over the K positions most similar to each, wherever they lie.

    A position is always its own first neighbor; the others follow from most to least similar, and
    the zeros of the border are candidates like any other position. No gradient flows through the
    choice. With `similarity_type="Loc"`, `magnitude_type="euclidean"`, K = k² (k = 1, 3, 5) and
    padding (k-1)/2 the layer equals `nn.Conv2d` on square maps, since neighbors chosen by
    location are taken in the order of their index, ties going to the lower one.

    Memory is O(N) a query at a time beside the output: the search goes by chunks.
    Published code indexed the padded map with the unpadded width when sampling a grid, and took
    grid positions twice; this layer does not.

    Args:
        in_channels: C.
        out_channels: O.
        K: neighbors of a position, itself included.
        stride: s, outputs are made for every s-th row and column; a pair: for each axis.
        padding: width of the border of zeros.
        sampling_type: candidates are "all" positions of the padded map, `num_samples` "random"
            ones (drawn anew at each forward in training, always the same in evaluation), or a
            "spatial" grid of `num_samples` × `num_samples` over the unpadded map. With more
            samples than positions, all compete.
        num_samples: see above; -1 with "all".
        sample_padding: margin left out of the "spatial" grid.
        shuffle_pattern: "B" unshuffles the map before (channels × r²), "A" shuffles after, "BA"
            both, "NA" neither.
        shuffle_scale: r.
        magnitude_type: "cosine" similarity or squared "euclidean" distance.
        similarity_type: neighbors alike in features ("Col"), location ("Loc") or both
            ("Loc_Col": λ · features / (their spread + 1e-6) beside (1-λ) · coordinates).
        aggregation_type: what is aggregated, features ("Col") or features and coordinates
            ("Loc_Col").
        lambda_param: λ, for "Loc_Col" similarity.

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s)); "B" divides the sides by r, "A" multiplies.

    Raises:
        ValueError: for options that cannot work; in forward, if K exceeds the candidates (both
            numbers are named) or r does not divide the map.

    References:
        Kang & Farias, Attention via Convolutional Nearest Neighbors, arXiv 2511.14137.

    Example:
        >>> layer = Conv2d_NN(in_channels=3, out_channels=8, K=9)
        >>> layer(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    ndim = 2


class Conv1d_NN(_ConvNN):
    """Convolve a sequence over the K positions most similar to each; see `Conv2d_NN`.

    Shape:
        (B, C, L) -> (B, O, ceil(L/s)); one coordinate channel; a "spatial" grid has
        `num_samples` positions.
    """

    ndim = 1
