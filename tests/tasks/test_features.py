"""PCA and features of networks."""

import pytest
import torch

from tasks.features import PCA, penultimate_features


def test_pca_finds_the_directions():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 2.0, 0.1])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    x = (torch.randn(4000, 3, generator=generator) * spread) @ turn + 7
    pca = PCA.fit(x, 2)
    z = pca(x)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(dim=0), torch.tensor([5.0, 2.0]), rtol=0.05, atol=0)
    overlap = (pca.components * turn[:2]).sum(dim=1).abs()
    torch.testing.assert_close(overlap, torch.ones(2), rtol=0.01, atol=0)
    with pytest.raises(ValueError, match="PCA to 4 components"):
        PCA.fit(x, 4)


def test_penultimate_features():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    x = torch.rand(5, 2, 3)
    torch.testing.assert_close(penultimate_features(network, x), network[1](x.flatten(1)))
    with pytest.raises(ValueError, match="no linear layer"):
        penultimate_features(torch.nn.ReLU(), x)
