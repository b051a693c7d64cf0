"""One factor for all channels of a network: small runs, and ablations."""

from dataclasses import dataclass

from options import Options, option

__all__ = ["WidthOptions", "scaled"]


@dataclass(frozen=True)
class WidthOptions(Options):
    """How wide a network is."""

    title = "Width (VGG, ResNet, DenseNet, U-Net)"
    width: float = option(1.0, "factor of the channels of a network's layers", above=0, most=1000)


def scaled(channels: int, width: float) -> int:
    """Return so many channels times the factor, rounded; at least one."""
    return max(1, round(channels * width))
