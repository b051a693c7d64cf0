"""Generated shapes and clouds from files as data sets."""

import numpy as np
import pytest
import torch

from dataset import build_loader
from files import DataError
from main import main
from tasks import DATASETS
from tasks.points import SHAPES, PointArray, ShapesOptions, draw_shapes

PLAIN = {"point_noise": 0.0, "stretch": 0.0, "occlusion": 0.0, "rotation": "none"}
NEEDS = {"min_side": 1, "normalize": True}


def shapes(count=20, seed=0, **options):
    options = ShapesOptions(**(PLAIN | {"num_points": 300} | options))
    return draw_shapes(count, options, torch.Generator().manual_seed(seed))


# What is zero on the surface of each shape, written from its equation.
def distance_of(name, p):
    x, y, z = p.double().unbind(1)
    r = (x * x + y * y).sqrt()
    if name == "sphere":
        return p.norm(dim=1) - 1
    if name == "cube":
        return p.abs().amax(1) - 0.8
    if name == "cylinder":
        return torch.maximum(r / 0.6, z.abs()) - 1
    if name == "cone":
        return torch.minimum(z.abs(), (r / 0.8 + z / 2 - 1).abs())
    if name == "torus":
        return ((r - 1) ** 2 + z * z).sqrt() - 0.35
    if name == "pyramid":
        side = torch.maximum(x.abs(), y.abs())
        return torch.minimum(z.abs(), (side / 0.8 + z / 1.6 - 1).abs())
    if name == "tetrahedron":
        return torch.stack([-x - y - z, -x + y + z, x - y + z, x + y - z]).amax(0) - 1
    if name == "octahedron":
        return p.abs().sum(1) - 1
    if name == "capsule":
        return (r**2 + (z.abs() - 0.5).clamp(min=0) ** 2).sqrt() - 0.6
    t = torch.linspace(0, 4 * torch.pi, 20001)
    line = torch.stack([0.8 * t.cos(), 0.8 * t.sin(), t / (2 * torch.pi) - 1], 1)
    return torch.cdist(p, line).amin(1) - 0.15


@pytest.mark.parametrize("name", SHAPES)
def test_points_lie_on_the_surface(name):
    points = SHAPES[name](500, torch.Generator().manual_seed(0))
    assert points.shape == (500, 3)
    far = distance_of(name, points)
    if name == "helix":  # the tube is cut upright, not across
        assert (far < 1e-3).all()
        assert (far > -0.05).all()
    else:
        torch.testing.assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-5)
    assert points.std(0).min() > 0.1


def test_a_cylinder_is_covered_evenly():
    points = SHAPES["cylinder"](20000, torch.Generator().manual_seed(0))
    caps = (points[:, 2].abs() == 1).float().mean().item()
    assert abs(caps - 0.6 / 2.6) < 0.015
    cone = SHAPES["cone"](20000, torch.Generator().manual_seed(0))
    base = (cone[:, 2] == 0).float().mean().item()
    assert abs(base - 0.8 / (0.8 + 4.64**0.5)) < 0.015


def test_what_seeds_and_flags_decide():
    first, again, other = shapes(seed=1), shapes(seed=1), shapes(seed=2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.bincount(first[2]).tolist() == [2] * 10
    turned = shapes(rotation="any")[0]
    torch.testing.assert_close(turned[0].norm(dim=1), torch.ones(300))  # a sphere stays one
    upright = shapes(rotation="upright")[0]
    torch.testing.assert_close(upright[..., 2], shapes()[0][..., 2])
    noisy = shapes(point_noise=0.1)[0]
    assert abs((noisy - shapes()[0]).std().item() - 0.1) < 0.01
    assert shapes(stretch=0.5)[0][0].norm(dim=1).std() > 0.01


def test_what_is_out_of_sight():
    hidden = shapes(occlusion=0.9, count=200)[0][::10]  # spheres, all of 300 points
    assert hidden.mean(1).norm(dim=1).max() > 0.5
    assert shapes(count=200)[0][::10].mean(1).norm(dim=1).max() < 0.25


def data(**options):
    row = DATASETS["shapes3d"]
    values = {**row.Options.defaults(), "num_train": 30, "num_test": 10, "num_points": 40}
    return row.build(seed=0, **NEEDS, **(values | options))


def test_samples_are_centered_and_of_size_one():
    made = data()
    clouds, labels = next(iter(build_loader(made.train, batch_size=30)))
    assert clouds.shape == (30, 3, 40)
    assert made.sample_shape == (3, 40)
    torch.testing.assert_close(clouds.mean(2), torch.zeros(30, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(clouds.norm(dim=1).amax(1), torch.ones(30))
    assert labels.unique().numel() == 10


def test_padding():
    masked = data(fewest_points=10, pad="mask")
    clouds, _ = masked.train.__getitems__(range(30))
    assert masked.sample_shape == (4, 40)
    counts = clouds[:, 3].sum(1).long()
    assert counts.min() >= 10
    assert counts.unique().numel() > 5
    repeated, _ = data(fewest_points=10, pad="repeat").train.__getitems__(range(30))
    for i, count in enumerate(counts.tolist()):
        assert clouds[i, 3, :count].all()
        assert not clouds[i, :, count:].any()
        for place in range(40):
            assert torch.equal(repeated[i, :, place], clouds[i, :3, place % count])


def test_augmentation_turns_about_the_vertical_axis():
    torch.manual_seed(0)
    made = data(augment=True)
    one, two = (made.train.__getitems__([0])[0] for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(*(made.test.__getitems__([0])[0] for _ in range(2)))
    ratio = (one[0, 2] / made.extra["evaluation_train"].points[0, :, 2])[:40]
    torch.testing.assert_close(ratio, ratio[:1].expand(40), rtol=1e-3, atol=1e-3)
    assert isinstance(made.test, PointArray)


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.normal(size=(12, 30, 3)),
        "y_train": np.arange(12) % 3,
        "x_test": rng.normal(size=(6, 30, 3)),
        "y_test": np.arange(6) % 3,
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def load(path, **options):
    row = DATASETS["pointcloud"]
    values = {**row.Options.defaults(), "data_path": str(path), "num_points": 20}
    return row.build(seed=0, **NEEDS, **(values | options))


def test_npz(tmp_path):
    names = np.array(["a", "b", "c"])
    counts = np.array([30, 5, *[20] * 10])
    arrays = write_npz(tmp_path / "a.npz", class_names=names, n_train=counts)
    made = load(tmp_path / "a.npz", pad="mask")
    assert made.class_names == ("a", "b", "c")
    assert made.train.counts.tolist() == [20, 5, *[20] * 10]
    cloud = torch.from_numpy(arrays["x_train"][1, :5]).float()
    cloud = cloud - cloud.mean(0)
    cloud = cloud / cloud.norm(dim=1).max()
    mine = made.train.points[1, :5]
    torch.testing.assert_close(torch.cdist(mine, cloud).amin(1), torch.zeros(5), atol=1e-3, rtol=0)
    with pytest.raises(DataError, match="cloud 1 of x_train has 5 points, fewer than --num_points"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "lacks x_train"),
        ({"x_train": np.zeros((12, 30, 2))}, "must be floating-point of shape"),
        ({"x_train": np.zeros((12, 30, 3), np.int64)}, "must be floating-point"),
        ({"x_test": np.full((6, 30, 3), np.nan)}, "no finite numbers"),
        ({"y_train": np.arange(11)}, "one integer per cloud"),
        ({"y_train": np.arange(12) - 1}, r"labels must lie in 0 … 10, found -1 … 10"),
        ({"y_train": np.arange(12) * 10**9}, "classes are learnt from so many"),
        ({"n_train": np.arange(12)}, r"n_train must lie in 1 … 30, .* found 0 … 11"),
        ({"n_test": np.arange(5)}, "n_test must hold one integer per cloud"),
        ({"class_names": np.array(["a"])}, r"labels must lie in 0 … 0, found 0 … 2"),
        ({"class_names": np.arange(3)}, "class_names must be a list of names"),
    ],
)
def test_hostile_npz(tmp_path, changes, message):
    write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npz")


def write_folders(path):
    for part, count in (("train", 4), ("test", 2)):
        for name in ("ball", "box"):
            folder = path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                points = torch.randn(25, 3)
                text = "\n".join(" ".join(map(str, row)) for row in points.tolist())
                (folder / f"{i}.xyz").write_text(text)
    return path


def test_folders_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "clouds")
    argv = ["--model", "dgcnn", "--dataset", "pointcloud", "--data_path", "clouds"]
    argv += ["--num_points", "20", "--K", "4", "--width", "0.1", "--device", "cpu"]
    main([*argv, "--batch_size", "4", "--num_epochs", "1", "--output_dir", "run"])
    main([*argv, "--check_data"])
    assert "train: 8 samples of 2 classes: ball: 4, box: 4." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "train/ball/0.xyz").write_text("1 2"), r"0\.xyz cannot be read"),
        (lambda p: (p / "test/cone").mkdir(), "has cone, which is no class"),
        (lambda p: [f.unlink() for f in p.glob("test/*/*")], "holds no point clouds"),
        (lambda p: (p / "train/ball/0.xyz").write_text("1 2 3\n"), "has 1 points, fewer than"),
        (lambda p: (p / "train").rename(p / "other"), "needs .*train/<class>/"),
    ],
)
def test_hostile_folders(tmp_path, spoil, message):
    spoil(write_folders(tmp_path))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="must name one of them"):
        load(tmp_path / "none")
