"""PSNR and SSIM."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from tasks.quality import mse_to_psnr, psnr, ssim

close = torch.testing.assert_close


def test_mse_to_psnr():
    assert mse_to_psnr(0.01) == pytest.approx(20)
    assert mse_to_psnr(0) == float("inf")


def test_quality():
    torch.manual_seed(0)
    clean = torch.rand(3, 2, 40, 31)
    noisy = clean + 0.1 * torch.randn(clean.shape)
    want = 10 * np.log10(1 / ((noisy - clean) ** 2).mean((1, 2, 3)).double().numpy())
    close(psnr(noisy, clean).double().numpy(), want, rtol=1e-5, atol=1e-4)
    assert psnr(clean, clean)[0] == pytest.approx(100)
    flat = torch.zeros(1, 1, 5, 5)
    assert psnr(flat + 0.1, flat).item() == pytest.approx(20, abs=1e-4)
    reference = structural_similarity_index_measure(noisy, clean, data_range=1.0, reduction="none")
    mirrored = (torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect") for x in (noisy, clean))
    close(ssim(*mirrored, border="valid"), reference, rtol=1e-4, atol=1e-5)
    assert ssim(clean, clean)[0] == pytest.approx(1)
