"""Denoising: pictures with Gaussian noise.

The protocol is that of T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575: noisy images are not clipped.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from options import option
from tasks.restoration import RestorationOptions, RestorationTask

__all__ = ["DenoisingOptions", "DenoisingTask"]


@dataclass(frozen=True)
class DenoisingOptions(RestorationOptions):
    """The noise, and what all restoration takes."""

    sigma: float = option(25.0, "standard deviation of noise, on 0-255; > 0", above=0, most=10_000)


class DenoisingTask(RestorationTask):
    """Gaussian noise of one standard deviation; see `RestorationTask`.

    Args:
        sigma: Standard deviation of the noise on the 0-255 scale.
        **options: See `RestorationTask`.
    """

    name = "denoising"
    before, after, done = "noisy", "denoised", "Denoised"
    Options = DenoisingOptions

    def __init__(self, *, sigma: float = 25.0, **options: Any) -> None:
        super().__init__(**options)
        self.sigma = sigma

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Add noise; the result is not clipped."""
        return clean + torch.randn(clean.shape, generator=generator) * (self.sigma / 255)

    def describe_damage(self) -> str:
        """Word the noise."""
        return f"noise of sigma {self.sigma:g} on the 0-255 scale"
