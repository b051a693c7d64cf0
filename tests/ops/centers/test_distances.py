"""Distance kernels against slow loops written from their formulas, and at their limits."""

import math

import pytest
import torch

from ops.centers.distances import (
    KERNELS,
    DistanceKernel,
    cosine_kernel,
    dot_kernel,
    euclidean_distances,
    euclidean_kernel,
    euclidean_pyramid_kernel,
    influence_cone_kernel,
    power_,
)
from ops.cpu import build


def slow_weight(kernel, c, x, centers):
    """One weight, in plain Python floats, from the table of formulas."""
    eps, p = kernel.epsilon, kernel.exponent

    def euclidean(a, b):
        return math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b, strict=True)))

    if kernel.kernel_type == "euclidean":
        return (euclidean(x, c) + eps) ** p
    if kernel.kernel_type == "euclidean_pyramid":
        levels = [euclidean(x[:: 2**s], c[:: 2**s]) for s in range(kernel.scales)]
        return sum((d + eps) ** p for d in levels) / kernel.scales
    product = sum(u * v for u, v in zip(x, c, strict=True))
    if kernel.kernel_type == "cosine":
        norms = math.hypot(*x) * math.hypot(*c)
        return (1 - abs(product / norms if norms else 0.0) + eps) ** p
    if kernel.kernel_type == "dot":
        return (abs(1 - abs(product)) + eps) ** p
    nearest = min(euclidean(x, other) + eps for other in centers)
    return max(0.0, kernel.factor * nearest - (euclidean(x, c) + eps))


@pytest.mark.parametrize("features", [1, 2, 7, 40])
@pytest.mark.parametrize("exponent", [-4.0, -1.0, -3.0, -8.0, -2.5])
@pytest.mark.parametrize("kernel_type", KERNELS)
def test_weights_equal_a_slow_loop(kernel_type, exponent, features):
    generator = torch.Generator().manual_seed(features)
    keys = torch.rand(9, features, generator=generator, dtype=torch.float64) - 0.3
    queries = torch.rand(5, features, generator=generator, dtype=torch.float64)
    kernel = DistanceKernel(kernel_type, epsilon=1e-2, exponent=exponent, scales=3, factor=1.7)
    rows = keys.tolist()
    expected = [[slow_weight(kernel, c, x, rows) for c in rows] for x in queries.tolist()]
    before = keys.clone(), queries.clone()
    torch.testing.assert_close(
        kernel(keys, queries), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close((keys, queries), before, rtol=0, atol=0)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (4, 3), (5, 4), (7, 13), (64, 6)])
@pytest.mark.parametrize("features", [17, 32, 53, 784])
def test_euclidean_distances_of_small_blocks(monkeypatch, native, rows, keys, features):
    monkeypatch.setenv("NEIGHBORS_NATIVE", native)
    generator = torch.Generator().manual_seed(rows + keys)
    x = torch.rand(rows, features, generator=generator)
    c = torch.rand(keys, features, generator=generator)
    c[0], c[-1] = x[-1], x[0] + 1e-5  # a duplicate and a near one
    expected = (x[:, None].double() - c.double()).norm(dim=2)
    found = euclidean_distances(c, x)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-9)
    assert keys == 1 or found[-1, 0] == 0
    columns = c.t().contiguous().t()  # not contiguous: the compiled path must step aside
    torch.testing.assert_close(euclidean_distances(columns, x), found, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("exponent", [-1.0, -2.0, -4.0, -8.0])
@pytest.mark.parametrize(("rows", "keys", "features"), [(1, 1, 3), (5, 300, 2), (37, 19, 53)])
def test_compiled_votes_equal_weights_times_values(exponent, rows, keys, features):
    if build.library() is None:
        pytest.skip(f"compiled kernels: {build.status()}")
    generator = torch.Generator().manual_seed(keys)
    kernel = DistanceKernel("euclidean", epsilon=0.1, exponent=exponent)
    x = torch.rand(rows, features, generator=generator)
    c = torch.rand(keys, features, generator=generator)
    values = torch.rand(keys, 7, generator=generator)
    sums = torch.ones(rows, 7)
    assert kernel.add_votes(c, x, values, sums)
    distances = (x[:, None].double() - c.double()).norm(dim=2)
    expected = 1 + (distances + 0.1).pow(exponent) @ values.double()
    torch.testing.assert_close(sums.double(), expected, rtol=2e-5, atol=0)
    for other in (DistanceKernel("cosine"), DistanceKernel("euclidean", exponent=-3)):
        assert not other.add_votes(c, x, values, sums)


def test_functions_are_the_kernels():
    keys, queries = torch.rand(6, 20), torch.rand(3, 20)
    settings = {"epsilon": 1e-3, "exponent": -2.0}
    functions = {
        "euclidean": euclidean_kernel(keys, queries, **settings),
        "euclidean_pyramid": euclidean_pyramid_kernel(keys, queries, **settings, scales=4),
        "cosine": cosine_kernel(keys, queries, **settings),
        "dot": dot_kernel(keys, queries, **settings),
        "influence_cone": influence_cone_kernel(keys, queries, epsilon=1e-3),
    }
    for name, weights in functions.items():
        torch.testing.assert_close(weights, DistanceKernel(name, **settings)(keys, queries))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kernel_type", KERNELS)
@pytest.mark.parametrize("exponent", [-4.0, -8.0])
def test_weights_are_finite_and_not_negative(kernel_type, exponent, relative):
    keys = torch.cat([torch.zeros(2, 24), torch.rand(5, 24), 1e4 * torch.rand(2, 24)])
    queries = torch.cat([keys, torch.rand(3, 24)])  # zero vectors and exact duplicates among them
    weights = DistanceKernel(kernel_type, exponent=exponent)(keys, queries, relative=relative)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights.sum(dim=1) > 0).all()
    assert weights.sum(dim=1).isfinite().all()


@pytest.mark.parametrize("kernel_type", [k for k in KERNELS if k != "influence_cone"])
def test_relative_weights_have_the_same_ratios(kernel_type):
    keys, queries = torch.rand(8, 30).double(), torch.rand(4, 30).double()
    kernel = DistanceKernel(kernel_type, epsilon=1e-3)
    plain, relative = kernel(keys, queries), kernel(keys, queries, relative=True)
    torch.testing.assert_close(plain / plain.amax(dim=1, keepdim=True), relative)


def test_distances_of_near_duplicates_are_exact():
    """Where the expansion of the square leaves no digit, the distance is right all the same."""
    keys = 50 + torch.rand(300, 100)
    for step in (0.0, 1e-4, 1e-2):
        queries = keys[:40] + step * torch.randn(40, 100)
        exact = (queries.double()[:, None] - keys.double()).norm(dim=2)
        torch.testing.assert_close(
            euclidean_distances(keys, queries).double(), exact, rtol=1e-4, atol=0
        )
    assert (euclidean_distances(keys, keys).diagonal() == 0).all()


def test_few_near_duplicates_among_many_keys():
    keys = torch.randn(4000, 100)
    queries = torch.cat([keys[5:8] + 1e-5, torch.randn(20, 100)])
    exact = (queries.double()[:, None] - keys.double()).norm(dim=2)
    torch.testing.assert_close(
        euclidean_distances(keys, queries).double(), exact, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("exponent", [-1.0, -2.0, -3.0, -4.0, -8.0, -0.5])
def test_power(exponent):
    x = torch.rand(50).double() + 0.1
    torch.testing.assert_close(power_(x.clone(), exponent), x**exponent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_type": "manhattan"}, "kernel_type must be one of .*euclidean.*'manhattan'"),
        ({"epsilon": 0.0}, "epsilon must be .* > 0, got 0.0: .*divide by zero"),
        ({"epsilon": math.nan}, "epsilon must be"),
        ({"exponent": 4.0}, "exponent must be < 0 for the cosine kernel, got 4.0"),
        ({"exponent": 0.0}, "exponent must be < 0"),
        ({"kernel_type": "euclidean_pyramid", "scales": 0}, "scales must be >= 1, got 0"),
        ({"kernel_type": "influence_cone", "factor": 1.0}, "factor must be > 1, got 1.0"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DistanceKernel(**settings)


def test_the_cone_needs_no_exponent():
    assert not DistanceKernel("influence_cone", exponent=4.0).inverse
