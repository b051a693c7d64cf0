import pytest
import torch

from options import OptionError
from tasks.denoising import DenoisingOptions, DenoisingTask
from tasks.noise import NOISE_TYPES, add_noise, draw_level, measure_sigma

close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(side=96, channels=1):
    """A picture with soft and hard edges."""
    at = torch.linspace(0, 6, side)
    picture = 0.5 + 0.3 * torch.sin(at[:, None] + at) * (at[None] > 2)
    return picture.expand(channels, -1, -1).clone()


@pytest.mark.parametrize(("kind", "factor"), [("gaussian", 1.0), ("uniform", 1.0)])
def test_sigma_is_the_standard_deviation(kind, factor):
    clean = torch.full((1, 300, 300), 0.5)
    noise = add_noise(clean, kind, 20.0, generator()) - clean
    assert noise.std().item() * 255 == pytest.approx(20 * factor, rel=0.02)
    assert noise.mean().abs() < 1e-3


def test_gaussian_is_the_formula():
    clean = torch.rand(3, 9, 7)
    want = clean + torch.randn(clean.shape, generator=generator(3)) * (25 / 255)
    close(DenoisingTask().degrade(clean, generator(3)), want, rtol=0, atol=0)


def test_photon_noise_has_the_variance_of_counts():
    clean = torch.full((1, 400, 400), 0.25)
    noise = add_noise(clean, "poisson_gaussian", 10.0, generator(), peak=30.0) - clean
    assert noise.var().item() == pytest.approx(0.25 / 30 + (10 / 255) ** 2, rel=0.02)


def test_salt_and_pepper_replaces_a_share():
    clean = torch.full((1, 400, 400), 0.5)
    noisy = add_noise(clean, "salt_pepper", 0.2, generator())
    assert (noisy == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert (noisy == 1).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert (noisy == 0.5).float().mean().item() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_of_lower_quality_is_farther_away(channels):
    clean = smooth(64, channels) + 0.1 * torch.rand(channels, 64, 64)
    errors = [(add_noise(clean, "jpeg", q) - clean).square().mean() for q in (5, 40, 95)]
    assert errors[0] > errors[1] > errors[2]
    both = add_noise(torch.stack((clean, clean)), "jpeg", torch.tensor([5.0, 95.0]))
    close(both[0], add_noise(clean, "jpeg", 5))
    close(both[1], add_noise(clean, "jpeg", 95))


@pytest.mark.parametrize("kind", NOISE_TYPES)
@pytest.mark.parametrize("shape", [(1, 17, 12), (2, 3, 8, 9)])
def test_shapes_seeds_and_input(kind, shape):
    clean = torch.rand(shape)
    before = clean.clone()
    level = {"salt_pepper": 0.3, "jpeg": 30}.get(kind, 25.0)
    a, b = (add_noise(clean, kind, level, generator(1)) for _ in range(2))
    assert a.shape == shape
    assert a.dtype == torch.float32
    close(a, b, rtol=0, atol=0)
    close(clean, before, rtol=0, atol=0)


def test_levels_of_a_range_differ_by_image():
    images = torch.zeros(500, 1, 4, 4)
    levels = draw_level([5.0, 55.0], images, generator())
    assert levels.shape == (500, 1, 1, 1)
    assert levels.min() >= 5
    assert levels.max() <= 55
    assert levels.std() > 10
    assert draw_level(25.0, images, None) == 25.0
    noisy = DenoisingTask(sigma=[1.0, 100.0]).degrade(torch.zeros(50, 1, 40, 40), None)
    stds = noisy.flatten(1).std(1) * 255
    assert stds.max() > 3 * stds.min()


def test_a_map_of_the_level_is_a_channel():
    task = DenoisingTask(sigma=[5.0, 55.0], sigma_map=True, color=True)
    noisy = task.degrade(torch.zeros(4, 3, 50, 50), None)
    assert noisy.shape == (4, 4, 50, 50)
    close(noisy[:, 3].flatten(1).std(1), torch.zeros(4))
    close(noisy[:, :3].flatten(1).std(1), noisy[:, 3, 0, 0], rtol=0.05, atol=0)
    assert task.known_shape == (4, 80, 80)
    assert task.visible(noisy).shape == (4, 3, 50, 50)


@pytest.mark.parametrize("sigma", [5, 15, 50])
def test_the_level_is_found_again(sigma):
    clean = smooth(128)
    noisy = add_noise(clean, "gaussian", float(sigma), generator(1))
    assert measure_sigma(noisy) == pytest.approx(sigma, rel=0.06)
    assert measure_sigma(noisy.expand(3, -1, -1)) == pytest.approx(measure_sigma(noisy))


def test_too_small_to_measure():
    with pytest.raises(ValueError, match="noise of 20x40 pixels cannot be estimated"):
        measure_sigma(torch.rand(1, 20, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": [55.0, 5.0]}, "sigma 55 5 is the wrong way round"),
        ({"sigma": [5.0, 5.0]}, "sigma 5 5 is no range"),
        ({"sigma": [0.0, 5.0]}, "sigma must be above 0"),
        ({"noise_amount": 1.5}, "noise_amount must be at most 1|noise_amount must lie in"),
        ({"jpeg_quality": 0}, "jpeg_quality must"),
        ({"noise_type": "rain"}, "noise_type must be one of gaussian"),
        ({"noise_type": "jpeg", "sigma_map": True}, "sigma_map shows the network"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        DenoisingOptions(**options)


def test_protocol_words():
    words = DenoisingTask().describe_damage()
    assert words == "noise of sigma 25 on the 0-255 scale"
    assert "5 to 55" in DenoisingTask(sigma=[5.0, 55.0]).describe_damage()
    for kind in NOISE_TYPES:
        assert DenoisingTask(noise_type=kind).describe_damage()
