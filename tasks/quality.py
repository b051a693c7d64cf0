"""Image quality: PSNR and SSIM, per image and in float32 whatever the precision of the network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mse_to_psnr", "psnr", "ssim"]


def mse_to_psnr(mse: float) -> float:
    """Return the PSNR in dB of a mean square error of values in [0, 1]."""
    return float("inf") if mse == 0 else -10 * math.log10(mse)


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,), of images (B, C, H, W) in [0, 1].

    10 log10(1 / (MSE + 1e-10)) over all pixels and channels; nothing is clipped.
    """
    error = (images.float() - clean.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error + 1e-10)


def ssim(images: Tensor, clean: Tensor, *, border: str = "zeros") -> Tensor:
    """Return the structural similarity, (B,), of images (B, C, H, W) in [0, 1].

    Gaussian window of 11×11, σ 1.5; C1 = 0.01², C2 = 0.03². "zeros" averages over the full map,
    zeros around the image (the published denoising numbers); "valid" only where the window fits.
    """
    x = torch.cat((images, clean)).float()
    at = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    window = torch.exp(-at.square() / (2 * 1.5**2))
    window = window / window.sum()
    b, channels = images.shape[:2]
    padding = 5 if border == "zeros" else 0

    def blur(maps: Tensor) -> Tensor:  # (n, C, H, W), separably
        maps = maps.flatten(0, 1)[:, None]
        maps = F.conv2d(maps, window.view(1, 1, 11, 1), padding=(padding, 0))
        maps = F.conv2d(maps, window.view(1, 1, 1, 11), padding=(0, padding))
        return maps.view(-1, channels, *maps.shape[-2:])

    mean = blur(x)
    squares = blur(x.square()) - mean.square()
    mean_a, mean_b = mean[:b], mean[b:]
    product = mean_a * mean_b
    covariance = blur(x[:b] * x[b:]) - product
    c1, c2 = 0.01**2, 0.03**2
    result = (2 * product + c1) / (mean_a.square() + mean_b.square() + c1)
    result = result * (2 * covariance + c2) / (squares[:b] + squares[b:] + c2)
    return result.flatten(1).mean(1)
