"""Pruning of centers."""

import pytest
import torch

from layers.dynamic import DynamicNeighbors
from layers.prune import prune_centers
from ops.centers.distances import DistanceKernel


@pytest.mark.parametrize("kernel_type", ["cosine", "euclidean", "euclidean_pyramid"])
def test_pruning_changes_no_prediction(kernel_type):
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(3, (240,), generator=generator)
    x = torch.eye(3)[label].repeat(1, 7) + 0.35 * torch.rand(240, 21, generator=generator)
    layer = DynamicNeighbors(num_features=21, num_classes=3, kernel=DistanceKernel(kernel_type))
    layer.grow(x[:120], label[:120])  # the first batch is kept whole: plenty to drop
    before = layer(x).argmax(dim=1)
    kept = prune_centers(layer, x, label)
    assert 0 < kept.sum() < 60
    layer.keep(kept)
    assert layer(x).argmax(dim=1).tolist() == before.tolist()


def test_pruning_a_regression_keeps_the_tolerance():
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(2)) * 10
    y = torch.stack([(x[:, 0] / 4).sin(), x[:, 1] / 10], dim=1)
    layer = DynamicNeighbors(
        num_features=2, num_outputs=2, kernel=DistanceKernel("euclidean"), tolerance=0.3
    )
    layer.grow(x, y, 100)
    before = layer.correct(layer(x), y)
    layer.keep(prune_centers(layer, x, y))
    assert 0 < layer.num_centers < 60
    assert (layer.correct(layer(x), y) | ~before).all()


def test_pruning_is_refused_where_sums_do_not_add_up():
    layer = DynamicNeighbors(num_features=2, num_classes=2, predictor="nearest")
    with pytest.raises(ValueError, match="pruning needs predictor interp"):
        prune_centers(layer, torch.rand(3, 2), torch.zeros(3).long())
