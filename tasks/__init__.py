"""Tasks, one a file, and the data sets that they are learnt from.

`TASKS` maps names to classes (see `tasks.task`), `DATASETS` to rows: the tasks a data set serves,
the first one by default, its builder, its options, and what is known of it before it is loaded.
A new task is a file and a row, a new data set a builder and a row.
"""

from collections.abc import Callable
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
from tasks.language import LanguageTask, TextOptions, build_text
from tasks.restoration import (
    CleanFoldersOptions,
    PairedFoldersOptions,
    build_denoise,
    build_pairs,
    build_photos,
)
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
    """

    tasks: tuple[str, ...]
    build: Callable[..., Data]
    Options: type[Options] = Options
    shape: tuple[int, ...] | None = None
    num_classes: int | None = None


def _labelled(
    build: Callable[..., Data],
    shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
) -> DatasetEntry:
    return DatasetEntry(("classification",), build, ImageOptions, shape, num_classes)


_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)

DATASETS: dict[str, DatasetEntry] = {
    "cifar10": _labelled(
        torchvision_builder("cifar10", "CIFAR10", ["cifar-10-python.tar.gz"], flip=True),
        (3, 32, 32),
        10,
    ),
    "cifar100": _labelled(
        torchvision_builder("cifar100", "CIFAR100", ["cifar-100-python.tar.gz"], flip=True),
        (3, 32, 32),
        100,
    ),
    "imagenet": _labelled(build_imagenet, (3, 224, 224), 1000),
    "mnist": _labelled(
        torchvision_builder(
            "mnist", "MNIST", [f"MNIST/raw/{file}" for file in _MNIST_FILES], flip=False
        ),
        (1, 28, 28),
        10,
    ),
    "fashionmnist": _labelled(
        torchvision_builder(
            "fashionmnist",
            "FashionMNIST",
            [f"FashionMNIST/raw/{file}" for file in _MNIST_FILES],
            flip=True,
        ),
        (1, 28, 28),
        10,
    ),
    "digits": _labelled(build_digits, (1, 8, 8), 10),
    "imagefolder": _labelled(build_imagefolder),
    "npz": _labelled(build_npz),
    "denoise": DatasetEntry(("denoising", "super_resolution"), build_denoise, CleanFoldersOptions),
    "pairs": DatasetEntry(("denoising",), build_pairs, PairedFoldersOptions),
    "photos": DatasetEntry(("denoising", "super_resolution"), build_photos),
    "scenes": DatasetEntry(("correspondence",), build_scenes, SceneOptions),
    "matches": DatasetEntry(("correspondence",), build_matches, MatchOptions),
    "image": DatasetEntry(("approximation",), build_image, PictureOptions),
    "text": DatasetEntry(("language",), build_text, TextOptions),
}
