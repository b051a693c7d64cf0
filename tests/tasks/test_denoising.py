"""Denoising: loss, crops, noise."""

import math

import pytest
import torch
from small_n3 import TINY

from models import N3Net
from tasks.denoising import DenoisingTask
from tasks.quality import psnr
from tasks.restoration import DegradedCrops, DegradedImages
from trainers import build_optimizer, build_scheduler

close = torch.testing.assert_close


def test_loss_optimizer_and_schedule():
    task = DenoisingTask()
    a, b = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    close(task.loss(a, b), 0.25 * 0.5 * (a - b).square().sum((1, 2, 3)).mean())
    close(DenoisingTask(loss_reduction="mean").loss(a, b), (a - b).square().mean())
    close(DenoisingTask(loss="l1").loss(a, b), (a - b).abs().mean())
    close(DenoisingTask(loss="psnr").loss(a, b), -psnr(a, b).mean(), rtol=1e-5, atol=1e-5)
    a.requires_grad_()
    DenoisingTask(loss="psnr").loss(a, b).backward()
    # Each image weighs by the inverse of its own mean square.
    expected = torch.stack(
        [2 * (x - y) / (x - y).square().sum() for x, y in zip(a, b, strict=True)]
    )
    close(a.grad, expected.detach() * 10 / math.log(10) / 3, rtol=1e-4, atol=1e-7)
    assert DenoisingTask(loss="psnr").loss(b, b) == -80
    model = N3Net(**TINY)
    options = {"lr": 1e-3, "weight_decay": 1e-4, "momentum": 0.9}
    optimizer = build_optimizer(model, "adam", decay_bias=False, **options)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    schedule = build_scheduler(
        optimizer, "exponential", num_epochs=51, lr_step=1, lr_gamma=1, lr_final=1e-3
    )
    factor = schedule.lr_lambdas[0]
    assert factor(0) == 1
    assert factor(50) == pytest.approx(1e-3)
    assert factor(10) == pytest.approx(10 ** (-3 * 10 / 50))


def test_crops_are_of_every_orientation_and_noise_is_fresh():
    torch.manual_seed(0)
    image = torch.arange(12 * 9, dtype=torch.uint8).view(1, 12, 9)
    data = DegradedCrops(
        [image], ["a"], crop=9, degrade=DenoisingTask(sigma=25).degrade, repeat=200
    )
    noisy, clean = data.__getitems__(range(200))
    assert len({tuple(c.flatten().tolist()) for c in clean}) == 4 * 8  # places × orientations
    assert (noisy - clean).std().item() == pytest.approx(25 / 255, rel=0.05)
    assert (data[0][0] - data[0][1] != data[0][0] - data[0][1]).any()
    test = DegradedImages(
        [image, image], ["a", "b"], degrade=DenoisingTask(sigma=25).degrade, seed=3
    )
    close(test[1][0], test[1][0], rtol=0, atol=0)
    assert (test[0][0] != test[1][0]).any()
    assert test[0][0].min() < 0  # not clipped
