"""Metrics, averages, optimizers, schedules, trainers."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluation
from tasks.classification import ClassificationTask
from train_eval import Pace, evaluate, seconds_left, train_one_epoch
from trainers import GradientTrainer

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


def test_time_to_the_end_of_a_run():
    # 30 s for the first half of the first epoch: another 30, and two more epochs of 60.
    assert seconds_left(0.5, 30.0, [], 2) == pytest.approx(150)
    # Epochs before it took 80 s, evaluation included.
    assert seconds_left(0.25, 30.0, [70.0, 90.0], 1) == pytest.approx(60 + 80)
    assert seconds_left(1.0, 30.0, [], 0) == 0


def test_pace_counts_what_is_new():
    pace = Pace(100)
    pace.start -= 10
    assert pace.rate(600) == pytest.approx(50, rel=0.01)


def test_the_bar_shows_loss_rate_and_both_ends(monkeypatch):
    shown = []

    class Bar(evaluation.tqdm):
        def __init__(self, loader, **options):
            super().__init__(loader, **(options | {"disable": False, "file": io.StringIO()}))

        def set_postfix(self, texts):
            shown.append((self.n, texts))

    monkeypatch.setattr(evaluation, "tqdm", Bar)
    monkeypatch.setattr(evaluation, "SHOWN_EVERY", 0.0)
    trainer = GradientTrainer(nn.Linear(7, 7), ClassificationTask(), device=CPU, num_epochs=1)
    done = train_one_epoch(trainer, batches([4, 4, 4]), epoch=1, outlook=lambda part: 100 * part)
    assert len(shown) == 3
    for number, (_, texts) in enumerate(shown, start=1):
        assert list(texts) == ["loss", "top1", "lr", "samples/s", "run ends in"]
        minutes, seconds = divmod(int(100 * number / 3), 60)
        assert texts["run ends in"] == f"{minutes:02d}:{seconds:02d}"
    assert shown[-1][1]["loss"] == f"{done['loss']:.4g}"
    assert shown[-1][1]["top1"] == f"{done['top1']:.4g}"
