"""Warm-up, mixed samples, smoothed labels, averaged weights, memory formats, and resuming them."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_eval
from checkpoints import content_digest, load_checkpoint
from layers import LAYERS
from main import main
from tasks.classification import ClassificationTask
from trainers import GradientTrainer
from trainers.recipe import build_mix, set_channels_last

CPU = torch.device("cpu")
EVERYTHING = (
    *("--warmup_epochs", "1.5", "--mixup", "0.2", "--cutmix", "1.0", "--ema", "0.9"),
    *("--label_smoothing", "0.1", "--augment", "--auto_augment", "rand", "--random_erasing", "0.5"),
    *("--noise", "0.05", "--channels_last", "--scheduler", "cosine"),
)


def trainer_of(model, task=None, **options):
    sgd = {"optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0}
    return GradientTrainer(
        model, task or ClassificationTask(), device=CPU, **(sgd | {"num_epochs": 4} | options)
    )


# ---------------------------------------------------------------------------------------------
# Warm-up


def test_warmup_steps_by_hand():
    model = nn.Linear(4, 3)
    trainer = trainer_of(model, warmup_epochs=1.5, steps_per_epoch=2, clip_grad_norm=0)
    for number, factor in enumerate((1 / 3, 2 / 3, 1, 1), start=1):
        x, y = torch.randn(5, 4), torch.randint(3, (5,))
        weight = model.weight.detach().clone()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])
        trainer.step((x, y))
        torch.testing.assert_close(model.weight, weight - 0.5 * factor * gradient)
        assert trainer.columns() == {"lr": pytest.approx(0.5 * factor)}
        assert trainer.warmup.done == number


def test_warmup_multiplies_the_schedule():
    trainer = trainer_of(
        *(nn.Linear(4, 3),), warmup_epochs=2, steps_per_epoch=2, scheduler="step", lr_step=1
    )
    seen = []
    for _ in range(3):
        for _ in range(2):
            trainer.step((torch.randn(5, 4), torch.randint(3, (5,))))
        seen.append(trainer.columns()["lr"])
        trainer.end_epoch(50.0)
    assert seen == pytest.approx([0.5 * 0.5, 0.5 * 0.1, 0.5 * 0.01])


# ---------------------------------------------------------------------------------------------
# Targets


def test_smoothed_labels_are_learnt_and_not_evaluated():
    task = ClassificationTask(label_smoothing=0.2)
    scores, labels = torch.randn(6, 4), torch.randint(4, (6,))
    shares = 0.8 * F.one_hot(labels, 4) + 0.2 / 4
    by_hand = -(shares * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.objective(scores, labels), by_hand)
    torch.testing.assert_close(task.loss(scores, labels), F.cross_entropy(scores, labels))


@pytest.mark.parametrize("criterion", ["CrossEntropy", "MSE"])
def test_losses_of_mixed_labels(criterion):
    task = ClassificationTask(criterion=criterion)
    scores, labels = torch.randn(6, 4), torch.randint(4, (6,))
    whole = F.one_hot(labels, 4).float()
    torch.testing.assert_close(task.loss(scores, whole), task.loss(scores, labels))
    mixed = 0.7 * whole + 0.3 * whole.roll(1, 0)
    if criterion == "MSE":
        by_hand = (scores - mixed).square().mean()
    else:
        by_hand = 0.7 * task.loss(scores, labels) + 0.3 * task.loss(scores, labels.roll(1))
    torch.testing.assert_close(task.loss(scores, mixed), by_hand)
    assert task.metrics(scores, mixed)["top1"].equal(task.metrics(scores, labels)["top1"])


def test_mixing_blends_images_as_it_blends_classes():
    mix = build_mix(0.4, 0.0, 6, (1, 2, 2))
    images = torch.arange(6.0)[:, None, None, None].expand(6, 1, 2, 2)
    mixed, shares = mix(images, torch.arange(6))
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ torch.arange(6.0))
    mix = build_mix(0.0, 1.0, 6, (1, 8, 8))
    images = torch.arange(6.0)[:, None, None, None].expand(6, 1, 8, 8)
    mixed, shares = mix(images, torch.arange(6))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(6.0))
    assert set(mixed.flatten().tolist()) <= set(range(6))


def test_both_ways_of_mixing_occur():
    mix = build_mix(0.4, 1.0, 2, (1, 8, 8))
    images, kinds = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 8, 8), set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, _ = mix(images, torch.arange(2))
        kinds.add(set(mixed.flatten().tolist()) <= {0.0, 1.0})
    assert kinds == {True, False}


def test_what_has_no_classes_or_no_images_is_refused(run, refused):
    for flag in ("--mixup", "--cutmix", "--label_smoothing"):
        words = ("--model", "dncnn", "--dataset", "photos", "--device", "cpu", flag, "0.3")
        code, text = refused(main, words)
        assert code == 2
        assert f"{flag} 0.3 changes the classes of samples, and the task of this run" in text
    code, text = refused(run, "--label_smoothing", "0.1", "--criterion", "MSE")
    assert "--label_smoothing 0.1 is for criterion CrossEntropy (got MSE)" in text
    with pytest.raises(ValueError, match=r"cutmix mixes images .* the shape \(3, 40\)"):
        build_mix(0.0, 1.0, 5, (3, 40))


# ---------------------------------------------------------------------------------------------
# Averaged weights


def test_averages_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    trainer = trainer_of(model, ema=0.8)
    means = None
    for _ in range(4):
        trainer.step((torch.randn(5, 4), torch.randint(3, (5,))))
        now = {name: value.clone() for name, value in model.state_dict().items()}
        if means is None:
            means = now
        means = {
            name: 0.8 * mean + 0.2 * now[name] if mean.is_floating_point() else now[name]
            for name, mean in means.items()
        }
    found = trainer.evaluated.state_dict()
    assert found["1.num_batches_tracked"] == 4
    for name, mean in means.items():
        torch.testing.assert_close(found[name], mean)
    assert not torch.equal(found["0.weight"], model.state_dict()["0.weight"])


def test_averages_go_on_where_they_were():
    def learn(model, trainer):
        torch.manual_seed(1)
        for _ in range(3):
            trainer.step((torch.randn(5, 4), torch.randint(3, (5,))))

    model = nn.Linear(4, 3)
    trainer = trainer_of(model, ema=0.8, warmup_epochs=1, steps_per_epoch=5)
    learn(model, trainer)
    weights = copy.deepcopy(trainer.evaluated.state_dict())
    state = copy.deepcopy(trainer.state_dict())
    learn(model, trainer)
    other = nn.Linear(4, 3)
    again = trainer_of(other, ema=0.8, warmup_epochs=1, steps_per_epoch=5)
    again.evaluated.load_state_dict(weights)
    again.load_state_dict(state)
    learn(other, again)
    assert other.weight.equal(model.weight)
    assert again.evaluated.weight.equal(trainer.evaluated.weight)


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("flags", [EVERYTHING, (*EVERYTHING, "--num_workers", "2")])
def test_everything_is_resumed_to_the_digit(run, monkeypatch, flags, save_every):
    flags = (*flags, "--val_split", "0.2", "--num_epochs", "3", "--batch_size", "8")
    whole = run(*flags, "--output_dir", "whole")
    original, steps = GradientTrainer.step, 0

    def step(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == 9:  # the fourth of the second epoch's five
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(GradientTrainer, "step", step)
    with pytest.raises(SystemExit):
        run(*flags, "--save_every", save_every, "--output_dir", "broken")
    assert ("place" in load_checkpoint("broken/last.pt")) == bool(save_every)
    monkeypatch.setattr(GradientTrainer, "step", original)
    resumed = main(["--resume", "--output_dir", "broken", "--device", "cpu"])
    assert Path("broken/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert resumed["test"] == whole["test"]
    ours, theirs = (load_checkpoint(f"{name}/last.pt") for name in ("broken", "whole"))
    for part in ("model", "trainer", "random_state"):
        assert content_digest(ours[part]) == content_digest(theirs[part])


def test_the_average_is_what_is_tested(run):
    run("--ema", "0.8", "--num_epochs", "2", "--output_dir", "a")
    last = load_checkpoint("a/last.pt")
    name = "classifier.weight"
    assert not last["model"][name].equal(last["trainer"]["weights"][name])
    again = main(["--test_only", "--output_dir", "a", "--checkpoint", "a/last.pt"])
    expected = last["progress"]["history"][-1]
    assert again["test"] == {
        metric: expected[f"test_{metric}"] for metric in ("loss", "top1", "top5")
    }


@pytest.mark.parametrize("words", [(), ("--task", "super_resolution", "--scale", "2")])
def test_averages_of_networks_that_restore(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "dncnn", "--depth", "3", "--features", "4", "--dataset", "photos"]
    flags += ["--crop_size", "16", "--crops_per_image", "4", "--batch_size", "4", *words]
    flags += ["--device", "cpu", "--ema", "0.5", "--num_epochs", "2", "--tile", "64"]
    original = train_eval.train_one_epoch

    def interrupted(trainer, loader, *, epoch, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(trainer, loader, epoch=epoch, **options)

    monkeypatch.setattr("tasks.restoration.ssim", lambda outputs, targets: outputs.mean((1, 2, 3)))
    whole = main([*flags, "--output_dir", "whole"])
    monkeypatch.setattr(train_eval, "train_one_epoch", interrupted)
    with pytest.raises(SystemExit):
        main([*flags, "--output_dir", "broken"])
    monkeypatch.setattr(train_eval, "train_one_epoch", original)
    resumed = main(["--resume", "--output_dir", "broken", "--device", "cpu"])
    assert resumed["history"] == whole["history"]
    assert "weights" in load_checkpoint("whole/last.pt")["trainer"]


# ---------------------------------------------------------------------------------------------
# Memory formats, threads, and what is said


@pytest.mark.parametrize("name", list(LAYERS))
def test_channels_last_changes_no_number(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), LAYERS[name](in_channels=4, out_channels=6), nn.Flatten()
    ).eval()
    other = copy.deepcopy(model)
    set_channels_last(other)
    x = torch.randn(2, 3, 6, 6)
    expected, found = model(x), other(x)
    torch.testing.assert_close(found, expected)
    for each in (expected, found):
        each.square().sum().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_threads_are_those_asked_for_and_given_back(run, capsys):
    before = torch.get_num_threads()
    run("--threads", before + 1, "--num_epochs", 1)
    assert f"Device: cpu, {before + 1} threads;" in capsys.readouterr().out
    assert torch.get_num_threads() == before


def test_a_first_epoch_of_too_large_steps_says_what_helps(run):
    flags = ("--layer", "Conv2d", "--optimizer", "sgd", "--clip_grad_norm", 0, "--num_epochs", 2)
    folder = Path(run(*flags, "--lr", 100)["output_dir"])
    lines = (folder / "train_eval_results.txt").read_text().splitlines()
    (note,) = [line for line in lines if line.startswith("note: ")]
    assert f"guessing among 10 classes has a loss of {math.log(10):.2f}" in note
    assert note.endswith("What helps: --warmup_epochs 1, or a smaller --lr, say 10.")
    folder = Path(run(*flags, "--lr", 0.001)["output_dir"])
    assert "note: " not in (folder / "train_eval_results.txt").read_text()
