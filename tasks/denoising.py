"""Denoising: pictures with noise of a known kind, of one level or of a range of levels.

The protocol is that of T. Plötz, S. Roth, "Neural Nearest Neighbors Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12575: noisy images are not clipped. A map of the level as an input
channel is the idea of K. Zhang et al., "FFDNet", IEEE TIP 2018, https://arxiv.org/abs/1710.04026.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from options import OptionError, check_range, option
from tasks.noise import NOISE_TYPES, add_noise, draw_level, measure_sigma
from tasks.restoration import RestorationOptions, RestorationTask

__all__ = ["DenoisingOptions", "DenoisingTask"]

# The option that holds the level of a type of noise, where it is not sigma.
LEVELS = {"salt_pepper": "noise_amount", "jpeg": "jpeg_quality"}


@dataclass(frozen=True)
class DenoisingOptions(RestorationOptions):
    """The noise, and what all restoration takes."""

    sigma: float = option(
        25.0,
        "standard deviation of noise, on 0-255; > 0; two values: drawn between them for every "
        "crop and test image",
        several="range",
        above=0,
        most=10_000,
    )
    noise_type: str = option(
        "gaussian",
        "what spoils the pictures; uniform has that standard deviation too",
        choices=tuple(NOISE_TYPES),
    )
    peak: float = option(
        60.0,
        "photons that white stands for",
        above=0,
        most=1e12,
        when={"noise_type": ("poisson_gaussian",)},
    )
    noise_amount: float = option(
        0.1,
        "share of values that become black or white; two values: drawn between them",
        several="range",
        above=0,
        most=1,
        when={"noise_type": ("salt_pepper",)},
    )
    jpeg_quality: int = option(
        10,
        "quality of the compression; two values: drawn between them",
        several="range",
        least=1,
        most=100,
        when={"noise_type": ("jpeg",)},
    )
    sigma_map: bool = option(False, "the network sees sigma as one more input channel", fixed=True)
    estimate_sigma: bool = option(
        False, "with --input: estimate sigma from the picture instead of taking --sigma"
    )

    def __post_init__(self) -> None:
        """Refuse a map of a level that the noise does not have."""
        super().__post_init__()
        if self.sigma_map and self.noise_type in LEVELS:
            raise OptionError(
                f"sigma_map shows the network a standard deviation, and noise_type "
                f"{self.noise_type} has none. Leave one of them out."
            )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse levels that nobody knows."""
        super().check(values)
        for name in ("sigma", *LEVELS.values()):
            if isinstance(values[name], list | tuple):
                check_range(name, values[name])
        if values["estimate_sigma"] and values["input"] is None:
            raise ValueError(
                "--estimate_sigma is for --input: the level of test images is known, --sigma."
            )
        unknown = isinstance(values["sigma"], list | tuple) and not values["estimate_sigma"]
        if values["input"] is not None and values["sigma_map"] and unknown:
            raise ValueError(
                "--sigma_map: the network wants to be told the level of --input, and --sigma is a "
                "range. Name one value, or add --estimate_sigma."
            )
        if values["sigma_map"] and values["dataset"] == "pairs":
            raise ValueError(
                "--sigma_map needs noise of a known level, and that of --dataset pairs is not "
                "known. Leave it out."
            )


class DenoisingTask(RestorationTask):
    """Noise of one kind; see `tasks.noise` and `RestorationTask`.

    Args:
        sigma: Standard deviation of the noise on the 0-255 scale, or the two ends of a range from
            which every crop and test image gets its own.
        noise_type: A name of `tasks.noise.NOISE_TYPES`.
        peak: Photons that white stands for (poisson_gaussian).
        noise_amount: Share of values that become 0 or 1 (salt_pepper), or a range.
        jpeg_quality: Quality of compression (jpeg), or a range.
        sigma_map: σ / 255 is a further channel of the input.
        estimate_sigma: The level of pictures to restore is measured, not taken from `sigma`.
        **options: See `RestorationTask`.
    """

    name = "denoising"
    before, after, done = "noisy", "denoised", "Denoised"
    Options = DenoisingOptions

    def __init__(
        self,
        *,
        sigma: float | Sequence[float] = 25.0,
        noise_type: str = "gaussian",
        peak: float = 60.0,
        noise_amount: float | Sequence[float] = 0.1,
        jpeg_quality: int | Sequence[int] = 10,
        sigma_map: bool = False,
        estimate_sigma: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sigma, self.noise_type, self.peak = sigma, noise_type, peak
        self.noise_amount, self.jpeg_quality = noise_amount, jpeg_quality
        self.sigma_map = sigma_map
        self.extra_channels = int(sigma_map)
        self.estimate_sigma = estimate_sigma

    @property
    def level(self) -> float | Sequence[float]:
        """How strong the noise is."""
        return getattr(self, LEVELS.get(self.noise_type, "sigma"))

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Add noise; the result is not clipped."""
        level = draw_level(self.level, clean, generator)
        noisy = add_noise(clean, self.noise_type, level, generator, peak=self.peak)
        return self._with_map(noisy, level) if self.sigma_map else noisy

    @staticmethod
    def _with_map(noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """Put σ / 255 beside the channels of (…, C, H, W)."""
        channel = torch.zeros_like(noisy[..., :1, :, :]) + sigma / 255
        return torch.cat((noisy, channel), -3)

    def restore(self, model: nn.Module, images: Tensor) -> Tensor:
        """Denoise images (B, C, H, W) of one unknown picture."""
        sigma = self.sigma
        if self.estimate_sigma:
            sigma = measure_sigma(images.flatten(0, 1).cpu())
            print(f"Noise: sigma {sigma:.1f} on the 0-255 scale, estimated.")
            self._warn(sigma)
        if self.sigma_map:
            images = self._with_map(images, sigma)
        return self.predict(model, images)

    def _warn(self, sigma: float) -> None:
        """Say if the network was trained for another level."""
        ends = self.sigma if isinstance(self.sigma, list | tuple) else (self.sigma, self.sigma)
        if self.noise_type == "gaussian" and not 0.8 * ends[0] <= sigma <= 1.2 * ends[1]:
            trained = " to ".join(f"{end:g}" for end in dict.fromkeys(ends))
            print(f"note: the network is for sigma {trained}: others may leave noise or blur.")

    def describe_damage(self) -> str:
        """Word the noise."""
        level = self.level
        text = (
            f"{level:g}"
            if not isinstance(level, list | tuple)
            else (f"{level[0]:g} to {level[1]:g} (drawn for each image)")
        )
        return {
            "gaussian": f"noise of sigma {text} on the 0-255 scale",
            "uniform": f"uniform noise of sigma {text} on the 0-255 scale",
            "poisson_gaussian": f"photon noise of peak {self.peak:g} and Gaussian noise of sigma "
            f"{text} on the 0-255 scale",
            "salt_pepper": f"salt and pepper in a share {text} of the values",
            "jpeg": f"JPEG of quality {text}",
        }[self.noise_type]
