"""A small plain network in which every layer fits: for studies that take minutes.

Symbols: B batch, C channels, H/W height and width, L length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from models.ndim import BATCH_NORMS, MAX_POOLS
from options import Options, option

__all__ = ["CNN1d", "ConvNet", "ConvNetOptions"]


@dataclass(frozen=True)
class ConvNetOptions(Options):
    """How deep and how wide."""

    title = "Small plain networks (convnet, cnn1d)"
    depth: int = option(4, "layers of a small plain network", least=1, most=1000)
    width: int = option(
        24, "channels of every layer of a small plain network", least=1, most=10**10
    )
    pool_after: int = option(
        2,
        "layers of a small plain network that a max pooling by 2 follows: one number, or 1,2; "
        "0: none",
        least=0,
        most=1000,
        several="commas",
    )

    def __post_init__(self) -> None:
        """Refuse a pooling after a layer that is not there."""
        super().__post_init__()
        if max(self.poolings, default=0) > self.depth:
            raise ValueError(
                f"pool_after {max(self.poolings)} asks for a pooling after a layer that is not "
                f"there: depth is {self.depth}. Try pool_after {self.depth}, or a larger depth."
            )

    @property
    def poolings(self) -> set[int]:
        """Numbers of the layers that a pooling follows, from 1."""
        several = isinstance(self.pool_after, Sequence)
        return set(self.pool_after if several else [self.pool_after]) - {0}


class ConvNet(nn.Module):
    """Classify images by a few layers of one width and a global average.

    Every layer is followed by BatchNorm and ReLU.

    Args:
        layer: `layer(in_channels=, out_channels=, stride=1) -> nn.Module`, keeping the map's size.
        in_channels: channels of the images.
        num_classes: number of outputs.
        depth: number of layers.
        width: channels of each.
        pool_after: numbers of the layers, from 1, that a 2×2 max pooling follows; 0: none.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes); H, W at least 2 for every pooling.

    Raises:
        ValueError: for sizes that cannot be built, or (in forward) for images too small to pool.
    """

    Options = ConvNetOptions
    family = "ConvNet"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    min_input_size = 1
    ndim = 2

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        in_channels: int = 3,
        num_classes: int = 10,
        depth: int = 4,
        width: int = 24,
        pool_after: int | Sequence[int] = 2,
    ):
        super().__init__()
        options = ConvNetOptions(depth=depth, width=width, pool_after=pool_after)
        modules: list[nn.Module] = []
        for number in range(1, depth + 1):
            modules += [
                layer(in_channels=in_channels if number == 1 else width, out_channels=width),
                BATCH_NORMS[self.ndim](width),
                nn.ReLU(inplace=True),
            ]
            if number in options.poolings:
                modules.append(MAX_POOLS[self.ndim](kernel_size=2, stride=2))
        self.smallest = 2 ** len(options.poolings)
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"this network pools to 1/{self.smallest} of every side, and a sample has "
                f"{' x '.join(map(str, x.shape[2:]))} positions: pool after fewer layers "
                "(pool_after), or take larger samples."
            )
        return self.classifier(
            self.features(x).flatten(2).mean(2)
        )  # (B, C, H, W) -> (B, num_classes)


class CNN1d(ConvNet):
    """Classify signals by a few layers of one width and a global average; see `ConvNet`.

    Shape:
        (B, in_channels, L) -> (B, num_classes); L at least 2 for every pooling.
    """

    family = "CNN1d"
    inputs = ("signals",)
    layer_kind = "signals"
    defaults: ClassVar[dict] = {"dataset": "mnist1d"}
    ndim = 1
