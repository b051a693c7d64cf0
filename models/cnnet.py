"""CNNet: which of many putative matches between two pictures are right.

K. M. Yi et al., "Learning to Find Good Correspondences", CVPR 2018,
https://arxiv.org/abs/1711.05971; with a neural nearest neighbors block in its middle: T. Plötz, S.
Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018, https://arxiv.org/abs/1810.12575, section
5.4.

Symbols: B pairs of pictures, N matches, C channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layers.selection import HardNeighbors, NeuralNearestNeighbors
from options import OptionError, Options, option

__all__ = ["CNNet", "CNNetOptions", "ContextNorm", "MatchBlock", "MatchNeighbors"]


@dataclass(frozen=True)
class CNNetOptions(Options):
    """Residual blocks over matches, and the nonlocal block between them."""

    title = "Network for correspondences (cnnet)"
    depth: int = option(12, "cnnet: residual blocks", least=2, most=100)
    features: int = option(128, "cnnet: channels of a match", least=2, most=8192)
    nonlocal_block: str = option(
        "n3", "cnnet: neural or hard nearest neighbors, or nothing", choices=("n3", "knn", "none")
    )
    num_volumes: int = option(3, "cnnet: neighbors of a match", least=1, most=10_000)
    embed_channels: int = option(8, "cnnet: channels of the embedding", least=1, most=8192)
    distance_bn: bool = option(True, "cnnet: batch norm of distances")

    def __post_init__(self) -> None:
        """Refuse channels that do not divide among the volumes."""
        super().__post_init__()
        if self.nonlocal_block != "none" and self.features % (self.num_volumes + 1):
            raise OptionError(
                f"features {self.features} is not divided by num_volumes + 1 = "
                f"{self.num_volumes + 1}: the block's input and its volumes share them equally."
            )


class ContextNorm(nn.Module):
    """Each channel normalised over the matches of its pair: (B, C, N) -> (B, C, N)."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the mean away and divide by the standard deviation."""
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-3)


class MatchBlock(nn.Module):
    """Twice convolution 1×1, context norm, batch norm, ReLU, beside the input.

    Args:
        channels: Channels C.
        out_channels: Channels that come out; where they are fewer, as many of the input are added.
        norms: Context and batch norm.
    """

    def __init__(self, channels: int, out_channels: int | None = None, norms: bool = True) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.out_channels = out_channels
        steps: list[nn.Module] = []
        for outputs in (channels, out_channels):
            steps.append(nn.Conv1d(channels, outputs, 1))
            if norms:
                steps += [ContextNorm(), nn.BatchNorm1d(outputs)]
            steps.append(nn.ReLU(inplace=True))
        self.steps = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> (B, out_channels, N)."""
        return self.steps(x) + x[:, : self.out_channels]


class MatchNeighbors(nn.Module):
    """Neighbor volumes of matches: every other match is a candidate. Memory O(B·K·N²).

    Args:
        channels: Channels C of the input; (K + 1)·C come out.
        K: Neighbor volumes.
        kind: "n3" compares matches by an embedding, under a temperature of each; "knn" takes the K
            nearest by the input itself.
        features: Channels inside the networks for embedding and temperature.
        embed_channels: Channels of the embedding.
        distance_bn: Scale distances by a batch norm.
    """

    def __init__(
        self,
        channels: int,
        K: int = 3,
        kind: str = "n3",
        features: int = 128,
        embed_channels: int = 8,
        distance_bn: bool = True,
    ) -> None:
        super().__init__()
        self.embed = self.inverse_temperature = None
        if kind == "knn":
            self.nnn: nn.Module = HardNeighbors(K)
            return
        self.nnn = NeuralNearestNeighbors(K, distance_bn=distance_bn)

        def network(outputs: int) -> nn.Sequential:
            blocks = [MatchBlock(features, norms=False) for _ in range(3)]
            return nn.Sequential(
                nn.Conv1d(channels, features, 1), *blocks, nn.Conv1d(features, outputs, 1)
            )

        self.embed = network(embed_channels)
        self.inverse_temperature = network(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> x, then each volume minus x: (B, (K + 1)·C, N)."""
        matched = x if self.embed is None else self.embed(x)
        squares = matched.square().sum(1)
        products = matched.transpose(1, 2) @ matched
        distances = (squares[:, :, None] + squares[:, None] - 2 * products).clamp(min=0)
        log_temp = None
        if self.inverse_temperature is not None:
            log_temp = -self.inverse_temperature(x)[:, 0]
        n = x.shape[-1]
        barred = torch.zeros(n, n, device=x.device, dtype=distances.dtype)
        barred.fill_diagonal_(float("-inf"))
        weights = self.nnn(distances, log_temp, barred)  # (B, N, K, N)
        volumes = torch.einsum("bqko,bco->bkcq", weights.to(x.dtype), x)
        return torch.cat((x, (volumes - x[:, None]).flatten(1, 2)), 1)


class CNNet(nn.Module):
    """Logits of matches; their order does not matter.

    Args:
        depth: Residual blocks; the nonlocal block stands after the first half of them.
        features: Channels of a match.
        nonlocal_block: "n3", "knn" or "none".
        num_volumes: Neighbor volumes K; the block before gives features / (K + 1) channels.
        embed_channels: Channels of the embedding.
        distance_bn: Scale distances by a batch norm.

    Shape:
        Matches (B, N, 4) in normalised camera coordinates -> logits (B, N), positive if right.
    """

    Options = CNNetOptions
    defaults: ClassVar[dict] = {"dataset": "scenes"}
    family = "CNNet"
    tasks = ("correspondence",)
    training = "gradient"
    uses_layer = False
    min_input_size = 1

    def __init__(
        self,
        depth: int = 12,
        features: int = 128,
        nonlocal_block: str = "n3",
        num_volumes: int = 3,
        embed_channels: int = 8,
        distance_bn: bool = True,
    ) -> None:
        super().__init__()
        CNNetOptions(
            depth=depth,
            features=features,
            nonlocal_block=nonlocal_block,
            num_volumes=num_volumes,
            embed_channels=embed_channels,
            distance_bn=distance_bn,
        )
        narrow = features
        self.neighbors: nn.Module = nn.Identity()
        if nonlocal_block != "none":
            narrow = features // (num_volumes + 1)
            self.neighbors = MatchNeighbors(
                narrow, num_volumes, nonlocal_block, features, embed_channels, distance_bn
            )
        middle = depth // 2
        blocks = [MatchBlock(features) for _ in range(depth)]
        blocks[middle - 1] = MatchBlock(features, narrow)
        self.first = nn.Conv1d(4, features, 1)
        self.before = nn.Sequential(*blocks[:middle])
        self.after = nn.Sequential(*blocks[middle:])
        self.last = nn.Conv1d(features, 1, 1)

    def forward(self, matches: Tensor) -> Tensor:
        """Judge matches (B, N, 4)."""
        x = self.before(self.first(matches.transpose(1, 2)))
        return self.last(self.after(self.neighbors(x)))[:, 0]
