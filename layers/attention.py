"""Attention over nearest neighbors: softmax over the K positions a learned similarity ranks first.

Reference: Kang & Farias, Attention via Convolutional Nearest Neighbors,
https://arxiv.org/abs/2511.14137. Symbols as in `layers.convnn`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from layers.neighbor_layer import NeighborLayer, NeighborOptions, with_coordinates
from layers.record import recording
from ops.maps.attend import attend_neighbors
from ops.maps.search import nearest_neighbors
from options import option

__all__ = ["AttentionOptions", "Conv1d_NN_Attn", "Conv2d_NN_Attn"]

# Score of a position with itself, before the softmax: above every cosine, and above minus every
# squared distance.
SELF_SCORES = {"cosine": 1.1, "euclidean": 0.1}


def _project(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Apply a 1x1 convolution to rows: (B, N, C) -> (B, N, O)."""
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


@dataclass(frozen=True)
class AttentionOptions(NeighborOptions):
    """Attention over neighbors."""

    attention_dropout: float = option(
        0.1,
        "dropout on attention weights (ConvNN_Attn, Branching_Attn), in [0, 1]",
        least=0,
        most=1,
    )


class _ConvNNAttention(NeighborLayer):
    """Attention over nearest neighbors, for any number of axes."""

    Options = AttentionOptions

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
        aggregation_type: str = "Col",
        attention_dropout: float = 0.1,
    ):
        options = AttentionOptions(
            K=K,
            padding=padding,
            sampling_type=sampling_type,
            num_samples=num_samples,
            sample_padding=sample_padding,
            shuffle_pattern=shuffle_pattern,
            shuffle_scale=shuffle_scale,
            magnitude_type=magnitude_type,
            aggregation_type=aggregation_type,
            attention_dropout=attention_dropout,
        )
        super().__init__(in_channels, out_channels, stride, options)
        c, o = self.in_channels_1d, self.out_channels_1d
        self.w_q = nn.Conv1d(c, c, kernel_size=1, bias=False)
        self.w_k = nn.Conv1d(c, c, kernel_size=1, bias=False)
        self.w_v = nn.Conv1d(c, c, kernel_size=1, bias=False)
        # One weight a channel and neighbor, all 1 at first: plain attention.
        self.conv1d_layer = nn.Conv1d(c, c, kernel_size=K, stride=K, groups=c)
        nn.init.ones_(self.conv1d_layer.weight)
        nn.init.zeros_(self.conv1d_layer.bias)
        self.pointwise_conv = nn.Conv1d(c, o, kernel_size=1)
        self.w_o = nn.Conv1d(o, o, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within `x`: (B, C, L) -> (B, O, L/s) or (B, C, H, W) -> (B, O, H/s, W/s)."""
        x, key_shape = self.pad_and_flatten(x)  # (B, C, H, W) -> (B, N, C)
        if x.is_meta:
            return self.shape_only(x, key_shape)
        if self.aggregation_type == "Loc_Col":
            x = with_coordinates(x, key_shape)  # (B, N, C) -> (B, N, C')
        own = self.self_index(key_shape, x.device)  # (M,)
        q, v = _project(x, self.w_q), _project(x, self.w_v)  # (B, N, C')
        k = _project(x[:, own], self.w_k)  # (B, M, C'): rows are needed for queries alone
        indices = self.find_neighbors(k, q, own, key_shape)
        y, attention = attend_neighbors(
            q,
            k,
            v,
            indices,
            self.conv1d_layer.weight[:, 0],
            self.conv1d_layer.bias,
            metric=self.magnitude_type,
            self_score=SELF_SCORES[self.magnitude_type],
            dropout_p=self.attention_dropout,
            training=self.training,
            with_attention=True,
        )  # (B, M, C'), (B, M, K)
        if recording():
            self.note_neighbors(indices, key_shape, weights=attention, taken="k·q")
        y = _project(_project(y, self.pointwise_conv), self.w_o)  # (B, M, C') -> (B, M, O)
        return self.unflatten(y, key_shape)  # (B, M, O) -> (B, O, H/s, W/s)

    def find_neighbors(
        self, k: Tensor, q: Tensor, own: Tensor, key_shape: tuple[int, ...]
    ) -> Tensor:
        """Rank all j for row i by similarity(k_i, q_j), itself first: (B, M, K) or (M, K)."""
        if self.K == 1:
            return own[:, None]
        return nearest_neighbors(
            k.detach(),
            q.detach(),
            self.K,
            self.magnitude_type,
            self_index=own,
            candidates=self.candidates(key_shape, q.device),
        )[1]


class Conv2d_NN_Attn(_ConvNNAttention):
    """Attend over the K positions of a map that a learned similarity ranks first.

    Projections q, k, v of the padded map (1×1, without bias); row i ranks all j by the
    similarity of k_i and q_j and takes itself and the K-1 best others. Weights are the softmax
    over these K of the cosine similarity or of minus the squared distance, with the position's
    own score fixed at 1.1 or 0.1; dropout acts on the weights. The weighted v go through a
    depthwise convolution over the K neighbors (starting at 1), a pointwise one, and `w_o`.
    Gradients reach q and k through the softmax.

    Published code aggregated x instead of v and normalised over positions when sampling, never
    applied the dropout, and let the farthest neighbors weigh most with the Euclidean distance;
    this layer does not.

    Args:
        in_channels: C.
        out_channels: O.
        K: neighbors of a position, itself included.
        stride: s, outputs are made for every s-th row and column; a pair: for each axis.
        padding: width of the border of zeros, whose positions are candidates too.
        sampling_type: "all", "random" or "spatial" candidates, see `Conv2d_NN`.
        num_samples: -1 with "all"; else the number of candidates or the side of the grid.
        sample_padding: margin left out of the "spatial" grid.
        shuffle_pattern: "B", "A", "BA" or "NA", see `Conv2d_NN`.
        shuffle_scale: r.
        magnitude_type: "cosine" similarity or squared "euclidean" distance.
        aggregation_type: projections of features ("Col") or features and coordinates ("Loc_Col").
        attention_dropout: share of the attention weights dropped in training.

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s)); "B" divides the sides by r, "A" multiplies.

    Raises:
        ValueError: for options that cannot work; in forward, if K exceeds the candidates (both
            numbers are named) or r does not divide the map.

    References:
        Kang & Farias, Attention via Convolutional Nearest Neighbors, arXiv 2511.14137.
    """

    ndim = 2


class Conv1d_NN_Attn(_ConvNNAttention):
    """Attend over the K positions of a sequence ranked first; see `Conv2d_NN_Attn`.

    Shape:
        (B, C, L) -> (B, O, ceil(L/s)); one coordinate channel; a "spatial" grid has
        `num_samples` positions.
    """

    ndim = 1
