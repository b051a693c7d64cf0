"""A small network whose features let the votes of other samples be right.

J. Goldberger et al., "Neighbourhood Components Analysis", NeurIPS 2004, with a network in place of
the linear map; the distances as in N. Frosst et al., "Analyzing and Improving Representations with
the Soft Nearest Neighbor Loss", ICML 2019, https://arxiv.org/abs/1902.01889.

Symbols: B samples of a batch, C channels, D features, T temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ndim import AVERAGES, BATCH_NORMS, CONVS, MAX_POOLS
from options import Options, option

__all__ = ["Transform", "TransformOptions", "vote_loss"]


@dataclass(frozen=True)
class TransformOptions(Options):
    """The network that learns features."""

    learned_dim: int = option(32, "learned features: numbers a sample", least=1, most=65536)
    learned_width: int = option(
        32, "learned features: channels of the first layer", least=1, most=8192
    )
    learned_depth: int = option(
        3, "learned features: convolutions, each of twice the channels", least=1, most=12
    )


def vote_loss(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return minus the log of the share of right votes, each sample left out of its own vote.

    Sample j has the weight exp(-|f_i - f_j|² / (2 T)) in the vote on sample i. Samples alone of
    their class in the batch have no right vote and do not count.

    Args:
        features: (B, D), of unit length.
        labels: (B,) classes.
        temperature: T.

    Returns:
        The mean over samples, a scalar; 0 where nobody has a companion.
    """
    logits = features @ features.T / temperature  # 1 - |f_i - f_j|² / 2, over T
    logits = logits.masked_fill(
        torch.eye(len(labels), dtype=torch.bool, device=labels.device), -torch.inf
    )
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    counted = same.any(1)
    if not counted.any():
        return features.sum() * 0
    logits, same = logits[counted], same[counted]
    right = logits.masked_fill(~same, -torch.inf).logsumexp(1)
    return (logits.logsumexp(1) - right).mean()


class Transform(nn.Module):
    """Map samples to features of unit length by a few convolutions.

    Each convolution of 3 taps a side is followed by BatchNorm, ReLU and, as long as the sides allow
    it, a max pooling by 2; then come an average over what is left and a linear map. Inputs are
    normalised by statistics over the training samples.

    Args:
        shape: Shape of a sample: (C, H, W), or (C, L).
        learned_dim: D.
        learned_width: Channels of the first convolution.
        learned_depth: Convolutions; the channels double from one to the next.

    Attributes:
        finished: Whether all epochs of learning are over; kept with the weights.

    Shape:
        (B, C, H, W), or the same flattened -> (B, D)
    """

    def __init__(
        self,
        shape: Sequence[int],
        learned_dim: int = 32,
        learned_width: int = 32,
        learned_depth: int = 3,
    ) -> None:
        super().__init__()
        ndim = len(shape) - 1
        self.shape = tuple(shape)
        channels, side = shape[0], min(shape[1:])
        modules: list[nn.Module] = [BATCH_NORMS[ndim](channels, affine=False)]
        for layer in range(learned_depth):
            wide = learned_width * 2**layer
            modules += [
                CONVS[ndim](channels, wide, 3, padding=1, bias=False),
                BATCH_NORMS[ndim](wide),
                nn.ReLU(inplace=True),
            ]
            if side >= 4:
                modules.append(MAX_POOLS[ndim](2))
                side //= 2
            channels = wide
        modules += [AVERAGES[ndim](1), nn.Flatten(), nn.Linear(channels, learned_dim)]
        self.network = nn.Sequential(*modules)
        self.register_buffer("finished", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of unit length."""
        return F.normalize(self.network(x.reshape(len(x), *self.shape)), dim=1)

    def features(self, x: Tensor, rows: int = 1024) -> Tensor:
        """Return features without gradients, by a bounded number of samples at a time."""
        with torch.no_grad():
            return torch.cat([self(part) for part in x.split(rows)]) if len(x) else self(x)

    def vote_loss(self, x: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return the loss of a batch, see :func:`vote_loss`."""
        return vote_loss(self(x), labels, temperature)
