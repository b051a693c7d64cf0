"""Point clouds to be classified: generated shapes, and clouds or meshes from files.

A sample is (3, P): x, y, z of P points, centered, its farthest point at distance 1. Where clouds
have fewer points than P, `pad` says what fills the places: "repeat" takes the cloud's own points
again, "mask" zeros, with a fourth channel that is 1 for points that are there.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset import Data, check_num_classes
from files import DataError, NpzFile, shown
from options import OptionError, Options, option
from tasks.clouds import CLOUD_SUFFIXES, Surface, read_cloud, sample_mesh

__all__ = [
    "SHAPES",
    "CloudOptions",
    "PointArray",
    "ShapesOptions",
    "build_pointcloud",
    "build_shapes3d",
]

PADS = ("refuse", "repeat", "mask")


@dataclass(frozen=True)
class PointOptions(Options):
    """How many points a sample has."""

    title = "Point clouds (shapes3d, pointcloud)"
    num_points: int = option(256, "points of a cloud; of larger ones so many", least=1, most=10**6)
    pad: str = option(
        "refuse",
        "what fills clouds of fewer points: their own points again (repeat), or zeros that a "
        "fourth channel marks (mask)",
        choices=PADS,
    )
    augment: bool = option(
        False,
        "clouds are turned about the vertical axis, and their axes scaled by 0.8 to 1.25",
        trainers=("gradient", "growth"),
    )


@dataclass(frozen=True)
class ShapesOptions(PointOptions):
    """Ten surfaces in any pose, sampled with noise, parts of them out of sight."""

    num_train: int = option(2000, "generated training samples", least=1, most=10**7)
    num_test: int = option(500, "generated test samples", least=1, most=10**7)
    point_noise: float = option(
        0.02, "shapes3d: standard deviation of noise on coordinates", least=0, most=10
    )
    stretch: float = option(
        0.3, "shapes3d: how much longer or shorter an axis may be, as a share", least=0, below=1
    )
    occlusion: float = option(
        0.3,
        "shapes3d: largest part of a surface that is out of sight, behind a plane",
        least=0,
        most=0.9,
    )
    rotation: str = option(
        "any",
        "shapes3d: poses: as they are, turned about the vertical axis, or in any way",
        choices=("none", "upright", "any"),
    )
    fewest_points: int = option(
        None,
        "shapes3d: clouds have from so many to num_points points; not given: all as many",
        kind=int,
        least=1,
        most=10**6,
    )

    def __post_init__(self) -> None:
        """Refuse clouds of unequal sizes without a rule for the places that are left."""
        super().__post_init__()
        if self.fewest_points is None:
            return
        if self.fewest_points > self.num_points:
            raise OptionError(
                f"fewest_points {self.fewest_points} is more than num_points {self.num_points}: "
                "clouds have from the one to the other. Lower it."
            )
        if self.pad == "refuse":
            raise OptionError(
                f"fewest_points {self.fewest_points} makes clouds of unequal sizes, and nothing "
                "says what fills them: try --pad mask or --pad repeat."
            )


@dataclass(frozen=True)
class CloudOptions(PointOptions):
    """Clouds or meshes from one .npz file, or from class folders of .off, .ply and .xyz files."""

    data_path: str = option("./Data", "folder or .npz file of the point clouds", resumable=True)


# ---------------------------------------------------------------------------------------------
# Clouds in memory


class PointArray(Dataset):
    """Labelled clouds in memory, handed over a batch at a time.

    Args:
        points: (S, P, 3) float32, the points that are there first.
        counts: (S,) how many are there, at least one.
        labels: (S,) int64.
        mask: Add the channel that says which points are there; otherwise the cloud's own points
            fill the places of those that are not.
        augment: Turn about the vertical axis and scale, anew each time.
    """

    def __init__(
        self,
        points: Tensor,
        counts: Tensor,
        labels: Tensor,
        *,
        mask: bool = False,
        augment: bool = False,
    ) -> None:
        self.points, self.counts, self.labels = points, counts, labels
        self.mask, self.augment = mask, augment

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clouds, labels = self.__getitems__([index])
        return clouds[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch: clouds (B, 3 or 4, P) and labels (B,)."""
        indices = torch.as_tensor(indices)
        points, counts = self.points[indices], self.counts[indices]
        places = torch.arange(points.shape[1])
        there = places < counts[:, None]  # (B, P)
        if self.augment:
            points = points @ random_turns(len(points))
            points = points * torch.empty(len(points), 1, 3).uniform_(0.8, 1.25)
        if self.mask:
            channels = torch.cat([points * there[..., None], there[..., None].float()], 2)
        else:
            again = (places % counts[:, None])[..., None].expand_as(points)
            channels = points.gather(1, again)
        return channels.transpose(1, 2).contiguous(), self.labels[indices]


def random_turns(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw rotations about the z axis: (count, 3, 3)."""
    angles = 2 * torch.pi * torch.rand(count, generator=generator)
    turns = torch.eye(3).repeat(count, 1, 1)
    turns[:, 0, 0] = turns[:, 1, 1] = angles.cos()
    turns[:, 0, 1], turns[:, 1, 0] = angles.sin(), -angles.sin()
    return turns


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Draw rotations, all equally likely: (count, 3, 3), from unit quaternions."""
    w, x, y, z = torch.nn.functional.normalize(
        torch.randn(count, 4, generator=generator), dim=1
    ).unbind(1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, 1).view(count, 3, 3)


def normalize_points(points: Tensor, counts: Tensor) -> Tensor:
    """Center the points that are there, and put the farthest at distance 1: (S, P, 3)."""
    there = (torch.arange(points.shape[1]) < counts[:, None])[..., None]
    centered = (points - (points * there).sum(1, keepdim=True) / counts[:, None, None]) * there
    size = centered.norm(dim=2).amax(1).clamp(min=1e-12)
    return centered / size[:, None, None]


def point_data(
    name: str,
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    *,
    pad: str,
    augment: bool,
) -> Data:
    """Wrap clouds as classification data.

    Args:
        name: Name of the data set.
        parts: Points (S, P, 3), counts (S,) and labels (S,), for training and for testing.
        class_names: One name per class.
        pad: One of `PADS`; "refuse" means here that nothing is to be filled.
        augment: Turn and scale training clouds.
    """
    mask = pad == "mask"
    arrays = [
        PointArray(
            normalize_points(points.float(), counts),
            counts,
            labels,
            mask=mask,
            augment=augment and first,
        )
        for first, (points, counts, labels) in zip((True, False), parts, strict=True)
    ]
    train = arrays[0]
    return Data(
        name=name,
        task="classification",
        train=train,
        test=arrays[1],
        sample_shape=(3 + mask, train.points.shape[1]),
        num_outputs=len(class_names),
        class_names=tuple(class_names),
        extra={"evaluation_train": PointArray(*parts_of(train), mask=mask)},
    )


def parts_of(array: PointArray) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, counts and labels."""
    return array.points, array.counts, array.labels


# ---------------------------------------------------------------------------------------------
# Generated shapes


def polyhedron(
    vertices: Sequence[Sequence[float]], faces: Sequence[Sequence[int]]
) -> Callable[[int, torch.Generator], Tensor]:
    """Make what samples the surface of a polyhedron; faces are convex."""
    corners = torch.tensor(vertices, dtype=torch.float32)
    triangles = torch.tensor(
        [[face[0], face[i], face[i + 1]] for face in faces for i in range(1, len(face) - 1)]
    )
    return lambda count, generator: sample_mesh(corners, triangles, count, generator)


def on_circle(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draw x, y evenly from a ring: (count, 2)."""
    u, angle = torch.rand(2, count, generator=generator)
    radius = (low**2 + u * (high**2 - low**2)).sqrt()
    angle = 2 * torch.pi * angle
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def sphere(count: int, generator: torch.Generator) -> Tensor:
    """Sample a unit sphere."""
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)


def cylinder(count: int, generator: torch.Generator) -> Tensor:
    """Sample a cylinder of radius 0.6 and height 2 with its caps."""
    radius, height = 0.6, 2.0
    z = torch.rand(count, generator=generator) * height - height / 2
    rim = on_circle(count, generator, radius, radius)
    caps = torch.rand(count, generator=generator) < radius / (radius + height)
    flat = on_circle(count, generator, 0.0, radius)
    xy = torch.where(caps[:, None], flat, rim)
    return torch.cat([xy, torch.where(caps, z.sign() * height / 2, z)[:, None]], 1)


def cone(count: int, generator: torch.Generator) -> Tensor:
    """Sample a cone of radius 0.8 and height 2 with its base."""
    radius, height = 0.8, 2.0
    slant = (radius**2 + height**2) ** 0.5
    xy = on_circle(count, generator, 0.0, radius)  # a cone's side unrolls to a disk's density
    base = torch.rand(count, generator=generator) < radius / (radius + slant)
    z = height * (1 - xy.norm(dim=1) / radius)
    return torch.cat([xy, torch.where(base, 0.0, z)[:, None]], 1)


def torus(count: int, generator: torch.Generator) -> Tensor:
    """Sample a torus of radii 1 and 0.35."""
    big, small = 1.0, 0.35
    # Where the tube is farther out there is more of it: tries are kept by that.
    tries = torch.rand(4 * count + 64, 2, generator=generator)
    angle = 2 * torch.pi * tries[:, 0]
    kept = angle[tries[:, 1] < (big + small * angle.cos()) / (big + small)][:count]
    round_ = 2 * torch.pi * torch.rand(count, generator=generator)
    away = big + small * kept.cos()
    return torch.stack([away * round_.cos(), away * round_.sin(), small * kept.sin()], 1)


def capsule(count: int, generator: torch.Generator) -> Tensor:
    """Sample a cylinder of radius 0.6 and height 1 that ends in half spheres."""
    radius, height = 0.6, 1.0
    ball = radius * sphere(count, generator)
    ball[:, 2] += ball[:, 2].sign() * height / 2
    rim = on_circle(count, generator, radius, radius)
    z = (torch.rand(count, generator=generator) - 0.5) * height
    ends = torch.rand(count, generator=generator) < 2 * radius / (2 * radius + height)
    return torch.where(ends[:, None], ball, torch.cat([rim, z[:, None]], 1))


def helix(count: int, generator: torch.Generator) -> Tensor:
    """Sample a tube of radius 0.15 along two turns of a helix."""
    t, angle = torch.rand(2, count, generator=generator)
    t, angle = 4 * torch.pi * t, 2 * torch.pi * angle
    away = 0.8 + 0.15 * angle.cos()
    z = 2 * t / (4 * torch.pi) - 1 + 0.15 * angle.sin()
    return torch.stack([away * t.cos(), away * t.sin(), z], 1)


CORNERS = list(itertools.product((-0.8, 0.8), repeat=3))
TRIPLES = list(itertools.combinations(range(4), 3))
SHAPES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "sphere": sphere,
    "cube": polyhedron(
        CORNERS,
        [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)],
    ),
    "cylinder": cylinder,
    "cone": cone,
    "torus": torus,
    "pyramid": polyhedron(
        [(-0.8, -0.8, 0), (0.8, -0.8, 0), (0.8, 0.8, 0), (-0.8, 0.8, 0), (0, 0, 1.6)],
        [(0, 1, 2, 3), (0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 0, 4)],
    ),
    "tetrahedron": polyhedron([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)], TRIPLES),
    "octahedron": polyhedron(
        [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)],
        list(itertools.product((0, 1), (2, 3), (4, 5))),
    ),
    "capsule": capsule,
    "helix": helix,
}


def draw_shapes(
    count: int, options: ShapesOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw clouds from surfaces.

    Args:
        count: Number of clouds.
        options: Their options.
        generator: What draws.

    Returns:
        Points (count, P, 3), counts (count,) and labels (count,) in the order of `SHAPES`, every
        class equally often. A plane with a random normal hides a part of each surface, drawn
        between 0 and `occlusion`: points are drawn until enough are in sight.
    """
    labels = torch.arange(count) % len(SHAPES)
    most = options.num_points
    counts = torch.full((count,), most)
    if options.fewest_points is not None:
        counts = torch.randint(options.fewest_points, most + 1, (count,), generator=generator)
    hidden = options.occlusion * torch.rand(count, generator=generator)
    normals = sphere(count, generator)
    stretches = 1 + options.stretch * (2 * torch.rand(count, 3, generator=generator) - 1)
    surfaces = list(SHAPES.values())
    clouds = torch.empty(count, most, 3)
    for i, label in enumerate(labels.tolist()):
        drawn = -int(-most // (1 - hidden[i].item()))
        surface = surfaces[label](drawn, generator) * stretches[i]
        order = (surface @ normals[i]).argsort()[:most]
        clouds[i] = surface[order[torch.randperm(most, generator=generator)]]
    clouds += options.point_noise * torch.randn(clouds.shape, generator=generator)
    if options.rotation == "any":
        clouds = clouds @ random_rotations(count, generator)
    elif options.rotation == "upright":
        clouds = clouds @ random_turns(count, generator)
    return clouds, counts, labels


def build_shapes3d(
    *, seed: int, num_train: int, num_test: int, min_side: int, normalize: bool, **others: Any
) -> Data:
    """Generate the clouds of both sets, from seeds of their own."""
    options = ShapesOptions(num_train=num_train, num_test=num_test, **others)
    parts = [
        draw_shapes(count, options, torch.Generator().manual_seed(2 * seed + part))
        for part, count in enumerate((num_train, num_test))
    ]
    return point_data("shapes3d", parts, list(SHAPES), pad=options.pad, augment=options.augment)


# ---------------------------------------------------------------------------------------------
# Clouds in files


def build_pointcloud(
    *, data_path: str, seed: int, min_side: int, normalize: bool, **others: Any
) -> Data:
    """Load `x_train, y_train, x_test, y_test` of one `.npz`, or `train|test/<class>/*` files."""
    options = CloudOptions(data_path=data_path, **others)
    path = Path(data_path)
    if path.suffix == ".npz" and path.is_file():
        parts, names = read_npz_clouds(path)
        clouds = {
            part: [(f"{path}: cloud {i} of x_{part}", Surface(cloud)) for i, cloud in enumerate(x)]
            for part, (x, _) in parts.items()
        }
        labels = {part: y for part, (_, y) in parts.items()}
    elif path.is_dir():
        clouds, labels, names = read_cloud_folders(path)
    else:
        raise DataError(
            "--dataset pointcloud reads an .npz file, or a folder with train/<class>/* and "
            f"test/<class>/*: --data_path must name one of them (got {data_path})."
        )
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (*stack_clouds(clouds[part], options, generator), labels[part])
        for part in ("train", "test")
    ]
    return point_data("pointcloud", parts, names, pad=options.pad, augment=options.augment)


def stack_clouds(
    clouds: Sequence[tuple[str, Surface]], options: PointOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `num_points` of every cloud, or fewer where there are fewer and a rule to fill them.

    Args:
        clouds: What each is called in messages, and its surface.
        options: How many points, and the rule.
        generator: What draws.

    Returns:
        Points (S, P, 3) with zeros where there are none, and counts (S,).
    """
    points = torch.zeros(len(clouds), options.num_points, 3)
    counts = torch.empty(len(clouds), dtype=torch.int64)
    for i, (name, surface) in enumerate(clouds):
        drawn = surface.sample(options.num_points, generator)
        if len(drawn) < options.num_points and options.pad == "refuse":
            raise DataError(
                f"{name} has {len(drawn):,} points, fewer than --num_points {options.num_points}, "
                "and nothing says what fills the places: add --pad repeat or --pad mask, or lower "
                f"--num_points to {len(drawn)}."
            )
        size = (drawn - drawn.mean(0)).abs().max().clamp(min=1e-300)
        points[i, : len(drawn)] = ((drawn - drawn.mean(0)) / size).float()
        counts[i] = len(drawn)
    return points, counts


def read_cloud_folders(
    path: Path,
) -> tuple[dict[str, list[tuple[str, Surface]]], dict[str, Tensor], list[str]]:
    """Read `train/<class>/*` and `test/<class>/*`: clouds, labels and class names."""
    folder = path / "train"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names:
        raise DataError(f"--dataset pointcloud needs {folder}/<class>/*, and there is none.")
    check_num_classes(len(names), 10**9, f"{folder}: the folders")
    clouds: dict[str, list[tuple[str, Surface]]] = {}
    labels: dict[str, Tensor] = {}
    for part in ("train", "test"):
        others = {p.name for p in (path / part).iterdir()} if (path / part).is_dir() else set()
        if extra := others - set(names):
            raise DataError(
                f"{path / part} has {shown(extra)}, which is no class of {folder}: the classes are "
                f"{shown(names)}."
            )
        files = [
            (file, label)
            for label, name in enumerate(names)
            for file in sorted((path / part / name).glob("*"))
            if file.suffix.lower() in CLOUD_SUFFIXES
        ]
        if not files:
            raise DataError(
                f"{path / part}/<class>/ holds no point clouds (looked for "
                f"{', '.join(CLOUD_SUFFIXES)})."
            )
        clouds[part] = [(str(file), read_cloud(file)) for file, _ in files]
        labels[part] = torch.tensor([label for _, label in files])
    return clouds, labels, names


def read_npz_clouds(path: Path) -> tuple[dict[str, tuple[list[Tensor], Tensor]], list[str]]:
    """Read arrays (S, P, 3) with labels (S,), of each cloud the first n_train or n_test points.

    `n_train` and `n_test` (S,) may be missing: then all clouds have P points.
    """
    needed = [f"{kind}_{part}" for kind in "xy" for part in ("train", "test")]
    file = NpzFile(path, [*needed, "n_train", "n_test", "class_names"])
    if missing := set(needed) - set(file.members):
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}; it holds {shown(file.names)}.")
    for part in ("train", "test"):
        check_npz_part(path, part, file)
    file.check_memory(copies=4)
    found: dict[str, tuple[list[Tensor], Tensor]] = {}
    for part in ("train", "test"):
        x = torch.from_numpy(file.read(f"x_{part}").astype(np.float64))
        if not x.isfinite().all() or x.abs().max() > 1e15:
            raise DataError(
                f"{path}: x_{part} has coordinates that are no finite numbers, or beyond 1e15."
            )
        counts = np.full(len(x), x.shape[1])
        if f"n_{part}" in file.members:
            counts = file.read(f"n_{part}").astype(np.int64)
        if counts.min() < 1 or counts.max() > x.shape[1]:
            raise DataError(
                f"{path}: n_{part} must lie in 1 … {x.shape[1]}, the points of a cloud, found "
                f"{counts.min()} … {counts.max()}."
            )
        labels = torch.from_numpy(file.read(f"y_{part}").astype(np.int64))
        clouds = [cloud[:count] for cloud, count in zip(x, counts.tolist(), strict=True)]
        found[part] = (clouds, labels)
    return found, class_names_of(path, file, [labels for _, labels in found.values()])


def check_npz_part(path: Path, part: str, file: NpzFile) -> None:
    """Refuse arrays that are no labelled clouds, by their headers."""
    x, y = file.members[f"x_{part}"], file.members[f"y_{part}"]
    if x.dtype.kind != "f" or len(x.shape) != 3 or x.shape[2] != 3 or 0 in x.shape:
        raise DataError(
            f"{path}: x_{part} must be floating-point of shape (clouds, points, 3), got {x.dtype} "
            f"{x.shape}."
        )
    for name in (f"y_{part}", f"n_{part}"):
        y = file.members.get(name)
        if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
            raise DataError(
                f"{path}: {name} must hold one integer per cloud, ({x.shape[0]},), got {y.dtype} "
                f"{y.shape}."
            )


def class_names_of(path: Path, file: NpzFile, labels: Sequence[Tensor]) -> list[str]:
    """Return the names of the classes, or their numbers; refuse labels without one."""
    lowest, highest = min(int(y.min()) for y in labels), max(int(y.max()) for y in labels)
    named = file.members.get("class_names")
    if named is not None and (len(named.shape) != 1 or named.dtype.kind not in "US"):
        raise DataError(
            f"{path}: class_names must be a list of names, got {named.dtype} {named.shape}."
        )
    number = highest + 1 if named is None else named.shape[0]
    if lowest < 0 or highest >= number:
        raise DataError(f"{path}: labels must lie in 0 … {number - 1}, found {lowest} … {highest}.")
    check_num_classes(number, sum(map(len, labels)), f"{path}: the labels")
    if named is None:
        return [str(i) for i in range(number)]
    return [
        n.decode("latin-1") if isinstance(n, bytes) else str(n) for n in file.read("class_names")
    ]
