"""Optimizers, schedules, trainers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from tasks.classification import ClassificationTask
from train_eval import train_one_epoch
from trainers import GradientTrainer, GrowthTrainer, TrainingError

CPU = torch.device("cpu")


def trainer_of(model, **options):
    sgd = {"optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0}
    return GradientTrainer(
        model, ClassificationTask(), device=CPU, **(sgd | {"num_epochs": 1} | options)
    )


def test_a_step_by_hand():
    model = nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    weight = model.weight.detach().clone()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])
    trainer_of(model, clip_grad_norm=0).step((x, y))
    torch.testing.assert_close(model.weight, weight - 0.5 * gradient)


def test_gradients_are_clipped():
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    trainer_of(model, clip_grad_norm=0.01).step((torch.randn(5, 4) * 50, torch.zeros(5).long()))
    assert (model.weight - before).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_loss_that_is_not_finite_names_epoch_and_step():
    trainer = trainer_of(nn.Linear(2, 3))
    good, bad = torch.ones(1, 2), torch.full((1, 2), math.inf)
    label = torch.zeros(1).long()
    loader = DataLoader([0] * 3, batch_size=1, collate_fn=lambda b: b)
    steps = iter([(good, label), (bad, label), (good, label)])
    original = trainer.step
    trainer.step = lambda batch: original(next(steps))
    with pytest.raises(TrainingError, match="not finite in epoch 4, step 2"):
        train_one_epoch(trainer, loader, epoch=4)


def rates(name, epochs=6, **options):
    options = {"num_epochs": epochs, "lr_step": 2, "lr_gamma": 0.1} | options
    trainer = trainer_of(nn.Linear(2, 3), scheduler=name, lr=1.0, **options)
    seen = []
    for _ in range(epochs):
        seen.append(trainer.columns()["lr"])
        trainer.optimizer.step()
        trainer.end_epoch(50.0)
    return seen


def test_schedules():
    assert rates("none") == [1.0] * 6
    assert rates("step") == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates("cosine") == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)]
    )
    assert rates("plateau", lr_step=1) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])


def test_plateau_keeps_the_rate_while_accuracy_rises():
    schedule = {"scheduler": "plateau", "lr_step": 1, "lr_gamma": 0.1}
    trainer = trainer_of(nn.Linear(2, 3), lr=1.0, num_epochs=9, **schedule)
    for accuracy in range(10, 90, 10):
        trainer.end_epoch(float(accuracy))
    assert trainer.columns()["lr"] == 1.0


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_lower_a_loss(name):
    torch.manual_seed(0)
    trainer = trainer_of(nn.Linear(4, 3), optimizer=name, lr=0.1, momentum=0.9)
    batch = (torch.randn(30, 4), torch.randint(3, (30,)))
    losses = [trainer.step(batch)["loss"].mean().item() for _ in range(20)]
    assert losses[-1] < losses[0]
    trainer.finite(1, 20)


def test_growth_trainer_reports_centers():
    class Memory(nn.Module):
        num_centers, finished = 0, False

        def grow(self, inputs, targets):
            self.num_centers += len(inputs)
            return F.one_hot(targets, 3).float()

    trainer = GrowthTrainer(Memory(), ClassificationTask(), device=CPU)
    metrics = trainer.step((torch.zeros(5, 2), torch.tensor([0, 1, 2, 0, 1])))
    assert metrics["top1"].tolist() == [100] * 5
    assert trainer.columns() == {"centers": 5}
    assert trainer.end_epoch(100.0) is False
