"""Metrics, averages, optimizers, schedules, trainers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.classification import ClassificationTask
from train_eval import evaluate

CPU = torch.device("cpu")


def batches(sizes, classes=7):
    torch.manual_seed(0)
    return [(torch.randn(n, classes), torch.randint(classes, (n,))) for n in sizes]


def test_averages_weight_every_sample_equally():
    parts = batches([8, 8, 3])
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    task = ClassificationTask()
    measured = evaluate(nn.Identity(), task, parts, device=CPU)
    assert measured["loss"] == pytest.approx(F.cross_entropy(*whole).item(), rel=1e-6)
    hits = (whole[0].argmax(1) == whole[1]).double().mean().item()
    assert measured["top1"] == pytest.approx(100 * hits)


def test_max_batches():
    parts = batches([4, 4, 4])
    task = ClassificationTask()
    assert evaluate(nn.Identity(), task, parts, device=CPU, max_batches=1) == evaluate(
        nn.Identity(), task, parts[:1], device=CPU
    )
