"""Noise: what spoils pictures, and how strong it is in a picture nobody knows.

Pictures are float32 in [0, 1], (C, H, W) or (B, C, H, W); σ is on the 0-255 scale. Nothing is
clipped but salt and pepper and JPEG, which end within [0, 1] by themselves.
"""

import io
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NOISE_TYPES", "add_noise", "draw_level", "measure_sigma"]


def draw_level(
    level: float | Sequence[float], images: Tensor, generator: torch.Generator | None
) -> float | Tensor:
    """Return a level for every image: the number there is, or one drawn evenly from a range.

    Args:
        level: A number, which nothing is drawn for, or the two ends of a range.
        images: (C, H, W) or (B, C, H, W).
        generator: Source of randomness; None: the global one.

    Returns:
        The number, or levels (1, 1, 1) or (B, 1, 1, 1).
    """
    if not isinstance(level, list | tuple):
        return level
    low, high = level
    shape = (*images.shape[:-3], 1, 1, 1)
    return low + (high - low) * torch.rand(shape, generator=generator)


def _gaussian(
    clean: Tensor, sigma: float | Tensor, generator: torch.Generator | None, peak: float
) -> Tensor:
    return clean + torch.randn(clean.shape, generator=generator) * (sigma / 255)


def _poisson_gaussian(
    clean: Tensor, sigma: float | Tensor, generator: torch.Generator | None, peak: float
) -> Tensor:
    counted = torch.poisson(clean.clamp(min=0) * peak, generator=generator) / peak
    return _gaussian(counted, sigma, generator, peak)


def _uniform(
    clean: Tensor, sigma: float | Tensor, generator: torch.Generator | None, peak: float
) -> Tensor:
    width = 12**0.5 * sigma / 255
    return clean + (torch.rand(clean.shape, generator=generator) - 0.5) * width


def _salt_pepper(
    clean: Tensor, amount: float | Tensor, generator: torch.Generator | None, peak: float
) -> Tensor:
    drawn = torch.rand(clean.shape, generator=generator)
    white = (drawn < amount / 2).to(clean.dtype)
    return torch.where(drawn < amount, white, clean)


def _jpeg(
    clean: Tensor, quality: float | Tensor, generator: torch.Generator | None, peak: float
) -> Tensor:
    images = clean if clean.ndim == 4 else clean[None]
    levels = torch.as_tensor(quality).flatten().expand(len(images)).round().int().tolist()
    coded = [_through_jpeg(i, q) for i, q in zip(images, levels, strict=True)]
    return torch.stack(coded).view_as(clean)


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Write an image (C, H, W) as JPEG and read it again."""
    import numpy as np
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    array = pixels[:, :, 0] if len(image) == 1 else pixels
    Image.fromarray(array.contiguous().numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as again:
        read = np.array(again)
    read = read[None] if read.ndim == 2 else read.transpose(2, 0, 1)
    return torch.from_numpy(read.copy()).to(image.dtype) / 255


# Each takes clean images, the level, a generator and the peak of poisson_gaussian. A level is the
# sigma, but the share of pixels of salt_pepper and the quality of jpeg.
NOISE_TYPES: dict[str, Callable[..., Tensor]] = {
    "gaussian": _gaussian,
    "poisson_gaussian": _poisson_gaussian,
    "uniform": _uniform,
    "salt_pepper": _salt_pepper,
    "jpeg": _jpeg,
}


def add_noise(
    clean: Tensor,
    noise_type: str,
    level: float | Tensor,
    generator: torch.Generator | None = None,
    *,
    peak: float = 60.0,
) -> Tensor:
    """Spoil clean images.

    Args:
        clean: (C, H, W) or (B, C, H, W) in [0, 1].
        noise_type: A name of `NOISE_TYPES`: "gaussian"; "poisson_gaussian": photons counted, then
            Gaussian noise; "uniform", of the same standard deviation; "salt_pepper": some values
            become 0 or 1; "jpeg": compression.
        level: σ on the 0-255 scale; for salt_pepper the share of values, for jpeg the quality.
        generator: Source of randomness; None: the global one.
        peak: Photons that white stands for (poisson_gaussian).

    Returns:
        Noisy images of the same shape.
    """
    return NOISE_TYPES[noise_type](clean, level, generator, peak)


PATCH = 7  # side of the patches whose covariance tells the noise
WEAK = 2.33  # normal quantile of the texture that noise alone has in 99 % of patches


def measure_sigma(image: Tensor) -> float:
    """Estimate the standard deviation of Gaussian noise in one picture, on the 0-255 scale.

    Patches of a clean picture lie near a space of few dimensions; across it there is noise alone.
    The eigenvalues of the patches' covariance that belong to noise are those whose mean is their
    median: the largest are left out until that holds (Chen). Patches with more texture than noise
    of the level found so far explains are left out, and the level is found anew (Liu). It errs less
    on textured pictures than the median of wavelet coefficients, which takes texture for noise.

    Args:
        image: (C, H, W) in [0, 1], at least 32×32 pixels.

    Raises:
        ValueError: If it is smaller.

    References:
        G. Chen, F. Zhu, P. A. Heng, "An Efficient Statistical Method for Image Noise Level
        Estimation", ICCV 2015.
        X. Liu, M. Tanaka, M. Okutomi, "Single-Image Noise Level Estimation for Blind Denoising",
        IEEE TIP 2013.
    """
    channels, height, width = image.shape
    if min(height, width) < 32:
        raise ValueError(
            f"the noise of {height}x{width} pixels cannot be estimated: it takes at least 32x32. "
            "Name the level by --sigma."
        )
    return 255 * (sum(map(_noise_variance, image.double())) / channels) ** 0.5


def _noise_variance(channel: Tensor) -> float:
    """Estimate the variance of the noise in (H, W)."""
    patches = F.unfold(channel[None, None], PATCH)[0]  # (49, patches)
    across = F.unfold((channel[:, 2:] - channel[:, :-2])[None, None], (PATCH, PATCH - 2))[0]
    down = F.unfold((channel[2:] - channel[:-2])[None, None], (PATCH - 2, PATCH))[0]
    texture = across.square().sum(0) + down.square().sum(0)
    # Of noise alone it is nearly gamma distributed, with this shape and mean: Wilson and Hilferty.
    shape, mean = PATCH**2 / 2, 2.0 * (len(across) + len(down))
    limit = mean * (1 - 1 / (9 * shape) + WEAK * (1 / (9 * shape)) ** 0.5) ** 3
    variance = _eigenvalues(patches)[0].item()
    for _ in range(3):
        weak = texture < limit * variance
        if weak.sum() < 4 * PATCH**2:
            break
        values = _eigenvalues(patches[:, weak])
        counts = range(len(values), 0, -1)
        count = next(n for n in counts if values[:n].mean() <= values[:n].median() or n == 1)
        variance = values[:count].mean().item()
    return variance


def _eigenvalues(patches: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of patches (F, n), the smallest first."""
    return torch.linalg.eigvalsh(torch.cov(patches)).clamp(min=0)
