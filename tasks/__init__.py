"""Tasks, one a file, and the data sets that they are learnt from.

`TASKS` maps names to classes (see `tasks.task`), `DATASETS` to rows: the tasks a data set serves,
the first one by default, its builder, its options, and what is known of it before it is loaded.
A new task is a file and a row, a new data set a builder and a row.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset import (
    Data,
    ImageOptions,
    build_digits,
    build_imagefolder,
    build_imagenet,
    build_npz,
    torchvision_builder,
)
from options import Options
from tasks.approximation import ApproximationTask, PictureOptions, build_image
from tasks.classification import ClassificationTask
from tasks.correspondence import (
    CorrespondenceTask,
    MatchOptions,
    SceneOptions,
    build_matches,
    build_scenes,
)
from tasks.denoising import DenoisingTask
from tasks.generated import (
    CopyOptions,
    RecallOptions,
    build_copy,
    build_match,
    build_recall,
)
from tasks.generated import MatchOptions as MatchPictureOptions
from tasks.language import LanguageTask, TextOptions, build_text
from tasks.points import CloudOptions, ShapesOptions, build_pointcloud, build_shapes3d
from tasks.restoration import (
    CleanFoldersOptions,
    PairedFoldersOptions,
    build_denoise,
    build_pairs,
    build_photos,
)
from tasks.signals import MNIST1DOptions, UCROptions, build_mnist1d, build_ucr
from tasks.super_resolution import SuperResolutionTask
from tasks.task import Finding, Needs, Task

__all__ = ["DATASETS", "TASKS", "DatasetEntry", "Finding", "Needs", "Task"]

TASKS: dict[str, type[Task]] = {
    "classification": ClassificationTask,
    "denoising": DenoisingTask,
    "super_resolution": SuperResolutionTask,
    "correspondence": CorrespondenceTask,
    "approximation": ApproximationTask,
    "language": LanguageTask,
}


@dataclass(frozen=True)
class DatasetEntry:
    """A row of `DATASETS`.

    Attributes:
        tasks: The tasks it serves; the first one unless `--task` names another.
        build: Builds the data; takes the fields of `Options` and what the task adds.
        Options: Its options.
        shape: Shape (C, H, W) of its samples where it is the same for everybody.
        num_classes: Number of classes, likewise.
        inputs: Kind of its samples: "images", "signals" (C, L) or "points" (3 or 4, P).
    """

    tasks: tuple[str, ...]
    build: Callable[..., Data]
    Options: type[Options] = Options
    shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    inputs: str = "images"


def _labelled(
    build: Callable[..., Data],
    shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
) -> DatasetEntry:
    return DatasetEntry(("classification",), build, ImageOptions, shape, num_classes)


def _torchvision(
    name: str,
    class_name: str,
    files: Sequence[str],
    shape: tuple[int, ...],
    num_classes: int,
    *,
    flip: bool,
) -> DatasetEntry:
    build = torchvision_builder(name, class_name, files, shape, flip=flip)
    return _labelled(build, shape, num_classes)


def _idx_files(folder: str) -> list[str]:
    parts = itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1"))
    return [f"{folder}/raw/{part}-{kind}-ubyte.gz" for part, kind in parts]


DATASETS: dict[str, DatasetEntry] = {
    "cifar10": _torchvision(
        "cifar10", "CIFAR10", ["cifar-10-python.tar.gz"], (3, 32, 32), 10, flip=True
    ),
    "cifar100": _torchvision(
        "cifar100", "CIFAR100", ["cifar-100-python.tar.gz"], (3, 32, 32), 100, flip=True
    ),
    "imagenet": _labelled(build_imagenet, (3, 224, 224), 1000),
    "mnist": _torchvision("mnist", "MNIST", _idx_files("MNIST"), (1, 28, 28), 10, flip=False),
    "fashionmnist": _torchvision(
        "fashionmnist", "FashionMNIST", _idx_files("FashionMNIST"), (1, 28, 28), 10, flip=True
    ),
    "digits": _labelled(build_digits, (1, 8, 8), 10),
    "imagefolder": _labelled(build_imagefolder),
    "npz": _labelled(build_npz),
    "recall": DatasetEntry(("classification",), build_recall, RecallOptions),
    "match": DatasetEntry(("classification",), build_match, MatchPictureOptions),
    "copy": DatasetEntry(("classification",), build_copy, CopyOptions),
    "mnist1d": DatasetEntry(("classification",), build_mnist1d, MNIST1DOptions, inputs="signals"),
    "ucr": DatasetEntry(("classification",), build_ucr, UCROptions, inputs="signals"),
    "shapes3d": DatasetEntry(("classification",), build_shapes3d, ShapesOptions, inputs="points"),
    "pointcloud": DatasetEntry(
        ("classification",), build_pointcloud, CloudOptions, inputs="points"
    ),
    "denoise": DatasetEntry(("denoising", "super_resolution"), build_denoise, CleanFoldersOptions),
    "pairs": DatasetEntry(("denoising",), build_pairs, PairedFoldersOptions),
    "photos": DatasetEntry(("denoising", "super_resolution"), build_photos),
    "scenes": DatasetEntry(("correspondence",), build_scenes, SceneOptions),
    "matches": DatasetEntry(("correspondence",), build_matches, MatchOptions),
    "image": DatasetEntry(("approximation",), build_image, PictureOptions),
    "text": DatasetEntry(("language",), build_text, TextOptions),
}
