"""NLRN: the published size, the recurrence written out, options, runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from checkpoints import load_checkpoint
from layers.nonlocal_window import WindowNonlocal
from layers.record import record_neighbors
from main import main
from models import NLRN
from models.n3net import PRESETS
from ops.maps.windowed import MapWindows

close = torch.testing.assert_close
TINY = {"features": 6, "embed_channels": 4, "recurrences": 2, "window": 3, "K": 4}


def count(model):
    return sum(p.numel() for p in model.parameters())


def wake(model):
    """Weights that start at zero get others, so that every path counts."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


def test_published_size():
    state = 128 * 128 * 9 + 128
    nonlocal_part = 128 * (64 + 64 + 128) + 64 + 64 + 128
    ends = (9 * 128 + 128) + (9 * 128 + 1)
    norms = 2 * (1 + 12 * 3 * 128 + 128)
    model = NLRN()
    assert count(model) == 2 * state + nonlocal_part + ends + norms == 340_099
    statistics = sum(b.numel() for name, b in model.named_buffers() if "running" in name)
    assert count(model) + statistics == 349_573  # published: 0.35 M
    # All but the norms is shared: an update more is three norms more.
    assert count(NLRN(recurrences=13)) - count(model) == 3 * 2 * 128
    assert count(NLRN(**PRESETS["nlrn_small"][1])) <= 0.9e6


@pytest.mark.parametrize("K", [4, 9])
def test_values(K):
    torch.manual_seed(0)
    net = wake(NLRN(2, 3, **(TINY | {"K": K}))).double().eval()
    x = torch.rand(2, 2, 5, 7, dtype=torch.float64)
    before = x.clone()
    start = state = F.conv2d(net.norm_in(x), net.conv_in.weight, net.conv_in.bias, padding=1)
    weight, bias = net.nonlocal_layer.project.weight, net.nonlocal_layer.project.bias
    for first, second, third in net.norms:
        h = F.relu(first(state))
        theta, phi, g = F.conv2d(h, weight[:, :, None, None], bias).split([4, 4, 6], 1)
        z = h.clone()
        for r in range(5):
            for c in range(7):
                r0, c0 = min(max(r - 1, 0), 2), min(max(c - 1, 0), 4)
                keys = phi[:, :, r0 : r0 + 3, c0 : c0 + 3].flatten(2)
                scores = (theta[:, :, r, c, None] * keys).sum(1)  # (B, 9)
                best = scores.topk(K, 1)
                values = g[:, :, r0 : r0 + 3, c0 : c0 + 3].flatten(2)
                taken = values.gather(2, best.indices[:, None].expand(-1, 6, -1))
                z[:, :, r, c] += (taken * best.values.softmax(1)[:, None]).sum(2)
        h = F.conv2d(second(z), net.conv1.weight, net.conv1.bias, padding=1)
        h = F.conv2d(F.relu(third(h)), net.conv2.weight, net.conv2.bias, padding=1)
        state = start + h
    out = F.relu(net.norm_out(state))
    out = F.conv2d(out, net.conv_out.weight, net.conv_out.bias, padding=1)
    out[:, :2] += x
    close(net(x), out)
    close(x, before, rtol=0, atol=0)


def test_training_starts_at_the_input():
    x = torch.rand(1, 1, 9, 8)
    close(NLRN(**TINY)(x), x)


def test_layer_gradients():
    torch.manual_seed(0)
    layer = wake(WindowNonlocal(3, 2, K=4)).double()
    windows = MapWindows((4, 5), 3)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t, windows), (x,))


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("channels", [(1, 1), (3, 3), (2, 1)])
def test_any_size_trains(fold, channels):
    torch.manual_seed(0)
    model = wake(NLRN(*channels, fold=fold, **TINY))
    x = torch.rand(2, channels[0], 11, 8)
    out = model(x)
    assert out.shape == (2, channels[1], 11, 8)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_folded_blocks_are_channels():
    torch.manual_seed(0)
    folded = wake(NLRN(fold=2, **TINY)).eval()
    plain = NLRN(4, **TINY).eval()
    plain.load_state_dict(folded.state_dict())
    x = torch.rand(1, 1, 10, 8)
    close(folded(x), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2)), 2))


def test_norms_are_of_one_update_each():
    torch.manual_seed(0)
    model = wake(NLRN(bn_momentum=1.0, **TINY)).train()
    model(torch.rand(2, 1, 8, 8))
    means = [norms[0].running_mean for norms in model.norms]
    assert not torch.allclose(*means)
    assert all(m.momentum == 1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("K", [4, 9])
def test_compiled_and_exported(K):
    model = wake(NLRN(**(TINY | {"K": K}))).eval()
    x = torch.rand(1, 1, 20, 18)  # of several tiles
    exported = torch.export.export(model, (x,)).module()
    close(exported(x), model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(x), model(x))


def test_neighbors_are_seen():
    model = wake(NLRN(**TINY)).eval()
    x = torch.rand(1, 1, 9, 7)
    with torch.no_grad(), record_neighbors(model) as records:
        seen = model(x)
    close(seen, model(x))
    assert [r.name for r in records] == ["nonlocal_layer"] * 2
    at = records[0].at(4, 3, shape=(9, 7))
    assert at.positions.shape == (1, 4, 2)
    assert (at.positions - at.query).abs().max() <= 1
    assert at.weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window 4 is even"),
        ({"K": 0}, r"K must be at least 1 \(got 0\)"),
        ({"recurrences": 0}, r"recurrences must be at least 1 \(got 0\)"),
        ({"features": 0}, r"features must be at least 1 \(got 0\)"),
        ({"embed_channels": 0}, r"embed_channels must be at least 1 \(got 0\)"),
        ({"fold": 0}, r"fold must be at least 1 \(got 0\)"),
        ({"bn_momentum": 2.0}, r"bn_momentum must lie in \[0, 1\] \(got 2.0\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NLRN(**(TINY | options))


SHORT = ["--model", "nlrn", "--features", "8", "--embed_channels", "4", "--recurrences", "2"]
SHORT += ["--window", "5", "--K", "4", "--dataset", "denoise", "--train_dir", ".", "--test_dir"]
SHORT += [".", "--crop_size", "16", "--device", "cpu", "--num_workers", "0"]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(f"smooth{i}.png")


@pytest.mark.parametrize(
    "flags",
    [[], ["--fold", "2"], ["--color"], ["--sigma_map", "--sigma", "5", "55"], ["--K", "25"]],
    ids=lambda flags: "_".join(flags[:1]).strip("-") or "plain",
)
def test_two_epochs_lower_the_loss(pictures, flags):
    words = [*SHORT, "--crops_per_image", "64", "--num_epochs", "2", "--batch_size", "8"]
    history = main([*words, "--lr", "0.003", *flags, "--output_dir", "run"])["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_a_run_goes_on_and_is_used(pictures):
    words = [*SHORT, "--crops_per_image", "4", "--batch_size", "4", "--lr_final", "1"]
    words += ["--bn_momentum", "0.1"]
    straight = main([*words, "--num_epochs", "2", "--output_dir", "a"])["history"]
    main([*words, "--num_epochs", "1", "--output_dir", "b"])
    main([*words, "--num_epochs", "2", "--output_dir", "b", "--resume"])
    a, b = (load_checkpoint(f"{run}/last.pt")["model"] for run in "ab")
    close(a, b, rtol=0, atol=0)
    assert len(straight) == 2
    use = ["--test_only", "--output_dir", "a", "--device", "cpu", "--input", "smooth0.png"]
    main([*use, "--output", "clean.png", "--self_ensemble", "--tile", "20", "--tile_overlap", "8"])
    assert Image.open("clean.png").size == (32, 32)
    assert "WindowNonlocal" in Path("a/model.txt").read_text()


def test_enlarging(pictures):
    words = [*SHORT, "--task", "super_resolution", "--scale", "2", "--crops_per_image", "1"]
    assert main([*words, "--num_epochs", "1", "--output_dir", "a"])["history"]


def test_refusals(pictures, refused):
    for flags, message in [
        (["--window", "6"], "--window 6 is even"),
        (["--K", "0"], "--K: must be at least 1 (got 0)"),
        (["--recurrences", "0"], "--recurrences: must be at least 1 (got 0)"),
        (["--preset", "n3net"], "--preset n3net is a n3net, not a nlrn"),
    ]:
        code, said = refused(main, [*SHORT, *flags])
        assert code == 2
        assert message in said, said
