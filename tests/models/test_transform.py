"""Features whose votes are right: the loss beside a slow loop, and growth on what was learnt."""

import math

import pytest
import torch

from main import main
from models import DynamicNetwork
from models.transform import Transform, vote_loss
from trainers.votes import VoteLearner


def slow_vote_loss(features, labels, temperature):
    losses = []
    for i, mine in enumerate(features):
        weights = [
            math.exp(-(mine - other).square().sum().item() / (2 * temperature)) if i != j else 0.0
            for j, other in enumerate(features)
        ]
        right = sum(w for w, label in zip(weights, labels, strict=True) if label == labels[i])
        if any(labels[i] == label for j, label in enumerate(labels) if j != i):
            losses.append(-math.log(right / sum(weights)))
    return sum(losses) / len(losses)


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 0], [0, 1, 2, 0, 3], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_is_that_of_a_slow_loop(labels, temperature):
    features = unit(5, 3)
    loss = vote_loss(features, torch.tensor(labels), temperature)
    assert loss.item() == pytest.approx(slow_vote_loss(features, labels, temperature), abs=1e-12)


def test_gradients_of_the_loss():
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 3])
    torch.autograd.gradcheck(lambda x: vote_loss(x, labels, 0.5), features)


def test_nobody_has_a_companion():
    features = unit(3, 2).requires_grad_()
    loss = vote_loss(features, torch.arange(3), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 2, 2), (2, 13)])
def test_a_transform_takes_samples_of_any_shape(shape):
    torch.manual_seed(0)
    transform = Transform(shape, learned_dim=5, learned_width=4).eval()
    x = torch.rand(6, *shape)
    features = transform(x)
    assert features.shape == (6, 5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(transform.features(x.flatten(1), rows=4), features)
    assert transform.features(x[:0]).shape == (0, 5)


def test_a_network_leaves_the_mode_of_its_transform_alone():
    model = DynamicNetwork(
        num_inputs=4, num_classes=2, features="learned", in_channels=1, image_size=(2, 2)
    )
    assert model.train().training
    assert not model.transform.training


LEARNED = ("--dynamic_features", "learned", "--learned_width", 16, "--learned_batch", 64)
LEARNED += ("--learned_epochs", 5, "--limit_train", 1400, "--limit_test", 350, "--num_epochs", 1)


def test_fewer_centers_and_more_of_them_right(run):
    raw = run(*LEARNED[-6:], "--output_dir", "raw", model="dynamic")
    learned = run(*LEARNED, "--output_dir", "learned", model="dynamic")
    assert learned["centers"][0] < raw["centers"][0]
    assert learned["best"] >= raw["best"]
    tested = main(["--test_only", "--output_dir", "learned", "--device", "cpu"])
    assert tested["test"]["top1"] == learned["best"]


def test_a_run_stopped_while_it_learns_goes_on_to_the_same(run, monkeypatch):
    whole = run(*LEARNED, "--output_dir", "whole", model="dynamic")
    epoch = VoteLearner._epoch

    def stopped(self, loader):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return epoch(self, loader)

    monkeypatch.setattr(VoteLearner, "_epoch", stopped)
    with pytest.raises(SystemExit):
        run(*LEARNED, "--output_dir", "parts", model="dynamic")
    monkeypatch.setattr(VoteLearner, "_epoch", epoch)
    resumed = main(["--resume", "--output_dir", "parts", "--device", "cpu"])
    assert resumed["history"] == whole["history"]
    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert "learner" not in one["trainer"]


def test_features_of_signals_and_deep_networks(run):
    flags = (*LEARNED[:-2], "--num_layers", 2, "--num_epochs", 2)
    result = run(*flags, model="dynamic", dataset="mnist1d")
    assert len(result["centers"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "knn", "--knn_features", "learned"), "is neither raw, pca:N nor an existing"),
        (("--model", "dynamic", "--dynamic_features", "x"), "raw, pca:N, learned nor an existing"),
        (
            ("--model", "dynamic", "--dynamic_features", "learned", "--learned_temperature", "0"),
            "--learned_temperature",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused(refused, flags, message):
    code, text = refused(main, [*flags, "--dataset", "digits", "--device", "cpu"])
    assert code == 2
    assert message in text
