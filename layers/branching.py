"""Two branches side by side: one looks at similar positions, the other at adjacent ones.

Reference: Kang & Farias, Attention via Convolutional Nearest Neighbors,
https://arxiv.org/abs/2511.14137. Symbols as in `layers.convnn`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.attention import AttentionOptions, Conv1d_NN_Attn, Conv2d_NN_Attn
from layers.conv import WINDOW, ConvOptions, same_conv
from layers.convnn import Conv1d_NN, Conv2d_NN, ConvNNOptions
from layers.neighbor_layer import NeighborLayer
from layers.sampling import per_axis
from options import check_at_least, option

__all__ = ["Conv1d_Attn_Branching", "Conv1d_Branching", "Conv2d_Attn_Branching", "Conv2d_Branching"]


@dataclass(frozen=True)
class BranchOptions(ConvOptions):
    """How the output channels are shared."""

    branch_ratio: float = option(
        0.5,
        "part of the output channels made by the neighbor branch (Branching layers), in [0, 1]",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class BranchingOptions(BranchOptions, ConvNNOptions):
    """A ConvNN branch beside a convolution."""

    title = ConvNNOptions.title


@dataclass(frozen=True)
class AttentionBranchingOptions(BranchOptions, AttentionOptions):
    """An attention branch beside a convolution."""

    title = AttentionOptions.title


class _Branching(nn.Module):
    """Concatenate a neighbor branch and a convolution, and mix them by a 1x1 convolution."""

    neighbor_layer: type[NeighborLayer]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int | Sequence[int],
        branch_ratio: float,
        **options,
    ):
        super().__init__()
        for side in per_axis("kernel_size", kernel_size, self.neighbor_layer.ndim, WINDOW, 1):
            BranchOptions(kernel_size=side, branch_ratio=branch_ratio)
        check_at_least("out_channels", out_channels, 1, "number of output channels")
        ndim = self.neighbor_layer.ndim
        self.branch_ratio = branch_ratio
        channels1 = int(out_channels * branch_ratio)
        channels2 = out_channels - channels1
        # Building it even where no channel is left for it checks its options.
        branch1 = self.neighbor_layer(in_channels, max(1, channels1), **options)
        if channels1 and channels2 and branch1.scale_in != branch1.scale_out:
            raise ValueError(
                f"shuffle_pattern {branch1.shuffle_pattern} cannot be used with branch_ratio "
                f"{branch_ratio}: it changes the size of the map in one branch and not in the "
                "other. Try shuffle_pattern BA or NA."
            )
        self.branch1 = branch1 if channels1 else None
        stride = branch1.stride
        self.branch2 = (
            same_conv(in_channels, channels2, kernel_size, stride, ndim=ndim) if channels2 else None
        )
        pointwise = nn.Conv1d if ndim == 1 else nn.Conv2d
        self.pointwise_conv = pointwise(out_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` in both branches: (B, C, ...) -> (B, O, ...)."""
        branches = [b(x) for b in (self.branch1, self.branch2) if b is not None]
        return self.pointwise_conv(torch.cat(branches, dim=1))

    def extra_repr(self) -> str:
        """Show the options that matter."""
        return f"branch_ratio={self.branch_ratio}"


class _ConvNNBranching(_Branching):
    """A ConvNN branch beside a convolution, for any number of axes."""

    Options = BranchingOptions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
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
        branch_ratio: float = 0.5,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            branch_ratio=branch_ratio,
            K=K,
            stride=stride,
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


class _AttentionBranching(_Branching):
    """An attention branch beside a convolution, for any number of axes."""

    Options = AttentionBranchingOptions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
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
        branch_ratio: float = 0.5,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            branch_ratio=branch_ratio,
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
            attention_dropout=attention_dropout,
        )


class Conv2d_Branching(_ConvNNBranching):
    """Let `Conv2d_NN` make a part of the output channels, an ordinary convolution the rest.

    Both branches see all input channels; their outputs are concatenated and mixed by a 1×1
    convolution.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: of the ordinary convolution, odd; a pair: for each axis.
        K: neighbors of a position; this and the options that follow go to `Conv2d_NN`.
        stride: s, for both branches, or a pair.
        padding: border of zeros of the neighbor branch.
        sampling_type: "all", "random" or "spatial" candidates.
        num_samples: see `Conv2d_NN`.
        sample_padding: see `Conv2d_NN`.
        shuffle_pattern: "BA" or "NA" ("B" and "A" only with a single branch).
        shuffle_scale: see `Conv2d_NN`.
        magnitude_type: "cosine" or "euclidean".
        similarity_type: "Col", "Loc" or "Loc_Col".
        aggregation_type: "Col" or "Loc_Col".
        lambda_param: λ.
        branch_ratio: int(O · branch_ratio) channels come from the neighbor branch. A branch left
            without channels (ratio 0 or 1) is not built.

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s))

    Raises:
        ValueError: for options that cannot work.
    """

    neighbor_layer = Conv2d_NN


class Conv1d_Branching(_ConvNNBranching):
    """Let `Conv1d_NN` make a part of the output channels; see `Conv2d_Branching`.

    Shape:
        (B, C, L) -> (B, O, ceil(L/s))
    """

    neighbor_layer = Conv1d_NN


class Conv2d_Attn_Branching(_AttentionBranching):
    """Let `Conv2d_NN_Attn` make a part of the output channels, an ordinary convolution the rest.

    As `Conv2d_Branching`, with `attention_dropout` in place of the options of the similarity.

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s))
    """

    neighbor_layer = Conv2d_NN_Attn


class Conv1d_Attn_Branching(_AttentionBranching):
    """Let `Conv1d_NN_Attn` make a part of the output channels; see `Conv2d_Attn_Branching`.

    Shape:
        (B, C, L) -> (B, O, ceil(L/s))
    """

    neighbor_layer = Conv1d_NN_Attn
