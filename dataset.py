"""Image sets, splits, samplers, loaders. The table of data sets is in `tasks`.

Small image sets are held in memory as 8-bit tensors and are cropped, flipped, resized and
normalised a batch at a time; folders of images are decoded one by one through torchvision.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, default_collate

from files import (
    MOST_PIXELS,
    DataError,
    Member,
    NpzFile,
    check_picture_size,
    open_picture,
    read_image,
    read_image_folders,
    shown,
)
from options import Options, option

__all__ = [
    "Data",
    "DataError",
    "DataOptions",
    "EpochSampler",
    "FeatureArray",
    "ImageArray",
    "ImageOptions",
    "build_digits",
    "build_imagefolder",
    "build_imagenet",
    "build_loader",
    "build_npz",
    "check_num_classes",
    "full_dataset",
    "image_side",
    "limit",
    "read_image",
    "read_image_folders",
    "split_train",
    "torchvision_builder",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Data:
    """What a run needs to know of its data.

    Attributes:
        name: Name in `tasks.DATASETS`.
        task: Name of the task, e.g. "classification".
        train: Training set.
        test: Test set.
        sample_shape: Shape of one input, e.g. (C, H, W).
        num_outputs: Number of classes or output channels.
        val: Part held out of the training set, if asked for.
        class_names: Names of the classes.
        notes: Lines the user should see once.
        extra: What only one task needs.
    """

    name: str
    task: str
    train: Dataset | None
    test: Dataset | None
    sample_shape: tuple[int, ...]
    num_outputs: int
    val: Dataset | None = None
    class_names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataOptions(Options):
    """How much of a data set is used, and for what."""

    title = "Data"
    val_split: float = option(
        0.0,
        "part of the training set held out to choose the best checkpoint; "
        "0 chooses on the test set, as the published runs do",
        least=0,
        below=1,
    )
    limit_train: int = option(
        None, "use the first N training samples", kind=int, least=1, most=10**12
    )
    limit_test: int = option(None, "use the first N test samples", kind=int, least=1, most=10**12)


@dataclass(frozen=True)
class ImageOptions(Options):
    """Labelled images."""

    title = "Labelled images"
    data_path: str = option(
        "./Data",
        "folder of the data (downloads go there), or the file of --dataset npz",
        resumable=True,
    )
    resize: int = option(
        None, "side of the square images are resized to", kind=int, least=1, most=4096
    )
    augment: bool = option(
        False,
        "random crops, and flips where a mirrored image is still of its class",
        trainers=("gradient", "growth"),
    )
    auto_augment: str = option(
        None,
        "change colors and shape of training images at random: by one operation each "
        "(TrivialAugment) or two of one strength (RandAugment)",
        choices=("trivial", "rand"),
        trainers=("gradient", "growth"),
    )
    random_erasing: float = option(
        0.0,
        "probability that a rectangle of a training image is blanked",
        least=0,
        most=1,
        trainers=("gradient", "growth"),
    )
    noise: float = option(
        0.0,
        "standard deviation of Gaussian noise on images in [0, 1], in training and testing",
        least=0,
        most=100,
    )


# ---------------------------------------------------------------------------------------------
# Images in memory


class ImageArray(Dataset):
    """Labelled images in memory, transformed a batch at a time.

    Order of the steps: crop and flip, auto-augment, resize, add noise, normalise, erase.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        side: Resize to side × side (bilinear, antialiased); None keeps the size.
        crop: Pad by an eighth of the side and crop back at a random place.
        flip: Flip left to right with probability 1/2.
        auto_augment: See :func:`augmentation`.
        erasing: Probability that a rectangle of an image becomes 0 (Z. Zhong et al., "Random
            Erasing Data Augmentation", https://arxiv.org/abs/1708.04896).
        noise: Standard deviation of Gaussian noise added to pixels in [0, 1].
        noise_seed: Draw the noise of sample i from seed ``noise_seed + i`` (repeatable, for
            evaluation); None draws afresh.
        mean: Per-channel mean of pixels in [0, 1] to subtract; None leaves pixels in [0, 1].
        std: Per-channel standard deviation to divide by.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        side: int | None = None,
        crop: bool = False,
        flip: bool = False,
        auto_augment: str | None = None,
        erasing: float = 0.0,
        noise: float = 0.0,
        noise_seed: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.side, self.crop, self.flip = side, crop, flip
        self.auto_augment, self.erasing = auto_augment, erasing
        self._augment, self._erase = augmentation(auto_augment), eraser(erasing)
        self.noise, self.noise_seed = noise, noise_seed
        self.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.std = None if std is None else torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch: images (B, C, H, W) float32 and labels (B,)."""
        indices = torch.as_tensor(indices)
        images = self.images[indices]
        if self.crop:
            images = random_crop(images, padding=max(1, images.shape[-1] // 8))
        if self.flip:
            flipped = torch.rand(len(images)) < 0.5
            images[flipped] = images[flipped].flip(-1)
        if self._augment is not None:
            images = torch.stack([self._augment(image) for image in images])
        images = images.float().div_(255)
        if self.side is not None and images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        if self.noise > 0:
            images += self.noise * self._draw_noise(images, indices)
        if self.mean is not None:
            images.sub_(self.mean).div_(self.std)
        if self._erase is not None:
            images = torch.stack([self._erase(image) for image in images])
        return images, self.labels[indices]

    def _draw_noise(self, images: Tensor, indices: Tensor) -> Tensor:
        if self.noise_seed is None:
            return torch.randn(images.shape)
        generator = torch.Generator()
        return torch.stack(
            [
                torch.randn(images.shape[1:], generator=generator.manual_seed(self.noise_seed + i))
                for i in indices.tolist()
            ]
        )

    def replaced(self, images: Tensor, labels: Tensor, **changes: Any) -> "ImageArray":
        """Return a set of other images with the same transforms, but for ``changes``."""
        options = {
            "side": self.side,
            "crop": self.crop,
            "flip": self.flip,
            "auto_augment": self.auto_augment,
            "erasing": self.erasing,
            "noise": self.noise,
            "noise_seed": self.noise_seed,
            "mean": None if self.mean is None else self.mean.flatten().tolist(),
            "std": None if self.std is None else self.std.flatten().tolist(),
        }
        return ImageArray(images, labels, **(options | changes))


NOT_AUGMENTED = {"crop": False, "flip": False, "auto_augment": None, "erasing": 0.0}


def augmentation(name: str | None) -> Callable[[Any], Any] | None:
    """Return what changes colors and shape of an image (C, H, W) uint8, or of a PIL image.

    It draws from PyTorch's global generator.

    Args:
        name: "trivial" (S. Müller, F. Hutter, "TrivialAugment", https://arxiv.org/abs/2103.10158),
            "rand" (E. Cubuk et al., "RandAugment", https://arxiv.org/abs/1909.13719) or None.
    """
    if name is None:
        return None
    from torchvision.transforms import v2

    return {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[name]()


def eraser(probability: float) -> Callable[[Tensor], Tensor] | None:
    """Return what blanks a rectangle of an image (C, H, W) with a probability; None for 0."""
    if probability == 0:
        return None
    from torchvision.transforms import v2

    return v2.RandomErasing(probability)


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pad by zeros and crop every image of a batch back to its size at a place of its own."""
    b, _, h, w = images.shape
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, b, 1))
    rows = (top + torch.arange(h))[:, :, None]
    columns = (left + torch.arange(w))[:, None, :]
    cropped = padded[torch.arange(b)[:, None, None], :, rows, columns]  # (B, H, W, C)
    return cropped.permute(0, 3, 1, 2).contiguous()


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of uint8 images, on the [0, 1] scale."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        average = (counts * levels).sum() / counts.sum()
        mean.append(average.item())
        variance = (counts * (levels - average) ** 2).sum() / counts.sum()
        std.append(max(variance.sqrt().item(), 1e-6))
    return mean, std


def image_side(sides: Sequence[int], resize: int | None, min_side: int) -> int | None:
    """Return the side that images are resized to; None keeps their size.

    Args:
        sides: Height and width as they come.
        resize: The side asked for, or None.
        min_side: The smallest side the model accepts: smaller images are resized up to it.
    """
    return min_side if resize is None and min(sides) < min_side else resize


def build_array_data(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    *,
    resize: int | None,
    min_side: int,
    augment: bool,
    flip: bool,
    noise: float,
    normalize: bool,
    seed: int,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
) -> Data:
    """Wrap in-memory images as classification data.

    Args:
        name: Name of the dataset.
        train: Images (N, C, H, W) uint8 and labels (N,).
        test: The same for testing.
        class_names: One name per class.
        resize: Side to resize to; None keeps the size, or goes up to ``min_side``.
        min_side: The smallest side the model accepts.
        augment: Random crops (and flips) in training.
        flip: Whether a mirrored image is still of its class.
        noise: Standard deviation of Gaussian noise on pixels in [0, 1], in training and testing.
        normalize: Subtract the training set's mean and divide by its standard deviation.
        seed: Seed of the test noise.
        auto_augment: See :func:`augmentation`.
        random_erasing: Probability that a rectangle of a training image is blanked.
    """
    _, c, h, w = train[0].shape
    notes = []
    side = image_side((h, w), resize, min_side)
    if side is not None and resize is None:
        notes.append(
            f"{name} images are {h}x{w}; the model needs at least {min_side}x{min_side}, "
            f"so they are resized up (--resize chooses another size)."
        )
    mean, std = channel_statistics(train[0]) if normalize else (None, None)
    common = {"side": side, "noise": noise, "mean": mean, "std": std}
    return Data(
        name=name,
        task="classification",
        train=ImageArray(
            *train,
            crop=augment,
            flip=augment and flip,
            auto_augment=auto_augment,
            erasing=random_erasing,
            **common,
        ),
        test=ImageArray(*test, noise_seed=seed, **common),
        sample_shape=(c, h, w) if side is None else (c, side, side),
        num_outputs=len(class_names),
        class_names=tuple(class_names),
        notes=notes,
    )


def load_torchvision(data_path: str, class_name: str, files: Sequence[str]) -> tuple:
    """Read a torchvision dataset, downloading it first if it is not there.

    A download goes to a temporary folder and is moved when it is complete.

    Args:
        data_path: Folder that holds the data.
        class_name: Name in ``torchvision.datasets``.
        files: What must be below ``data_path``, for the error message; archives among them
            are used if they are there.

    Returns:
        The training and the test dataset.
    """
    import torchvision

    cls = getattr(torchvision.datasets, class_name)
    root = Path(data_path)
    wanted = "\n  ".join(str(root / file) for file in files)

    def read() -> tuple:
        try:
            return cls(root, train=True), cls(root, train=False)
        except RuntimeError as missing:
            if "not found" in str(missing).lower():
                raise FileNotFoundError from missing
            raise

    try:
        try:
            return read()
        except FileNotFoundError:
            print(f"{class_name} is not in {root}: downloading it")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            for file in files:  # archives that are already here need no download
                if (root / file).is_file():
                    link = Path(temporary, file)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to((root / file).resolve())
            cls(temporary, train=True, download=True)
            for source in sorted(Path(temporary).rglob("*")):
                if source.is_file() and not source.is_symlink():
                    target = root / source.relative_to(temporary)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(source, target)
        return read()
    except Exception as error:  # its parsers raise what they like: assertions, keys, types, …
        raise DataError(
            f"{class_name} could not be read or downloaded ({type(error).__name__}: {error}). "
            f"Put these files there by hand, then run again:\n  {wanted}"
        ) from error


def to_image_tensor(images: Any) -> Tensor:
    """Turn (N, H, W) or (N, H, W, C) 8-bit images into a (N, C, H, W) tensor."""
    images = torch.as_tensor(np.asarray(images))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous()


def torchvision_builder(
    name: str, class_name: str, files: Sequence[str], shape: tuple[int, ...], *, flip: bool
) -> Callable[..., Data]:
    """Make the builder of a data set of `torchvision.datasets`.

    Args:
        name: Its name here.
        class_name: Its name there.
        files: See :func:`load_torchvision`.
        shape: Shape (C, H, W) of its images.
        flip: Whether a mirrored image is still of its class.
    """

    def build(*, data_path: str, **options: Any) -> Data:
        train, test = load_torchvision(data_path, class_name, files)
        arrays = []
        for part in (train, test):
            images = to_image_tensor(part.data)
            labels = torch.as_tensor(part.targets, dtype=torch.int64)
            what = f"{data_path}: the {'training' if part is train else 'test'} set of {name}"
            if len(images) == 0 or labels.shape != images.shape[:1]:
                raise DataError(
                    f"{what} has {len(images)} images and {labels.numel()} labels: it needs one "
                    "label per image. The files are damaged: replace them."
                )
            check_picture_size(f"{what}: every image", *images.shape[2:])
            if images.shape[1:] != shape:
                raise DataError(
                    f"{what} has images of {tuple(images.shape[1:])} (C, H, W), not of {shape}. "
                    "The files are damaged, or of another data set (--dataset npz takes any size)."
                )
            if labels.min() < 0 or labels.max() >= len(train.classes):
                raise DataError(
                    f"{what} has labels in {int(labels.min())} … {int(labels.max())}, and there "
                    f"are {len(train.classes)} classes. The files are damaged: replace them."
                )
            arrays.append((images, labels))
        return build_array_data(name, *arrays, train.classes, flip=flip, **options)

    return build


def build_digits(*, data_path: str, **options: Any) -> Data:
    """Load scikit-learn's 1,797 handwritten digits (8×8); every fifth one is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = to_image_tensor((digits.images * (255 / 16)).round().astype(np.uint8))
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 4
    return build_array_data(
        "digits",
        (images[~test], labels[~test]),
        (images[test], labels[test]),
        [str(n) for n in digits.target_names],
        flip=False,
        **options,
    )


MOST_CLASSES = 50_000


def build_npz(*, data_path: str, **options: Any) -> Data:
    """Load ``x_train, y_train, x_test, y_test`` (and ``class_names``) from one ``.npz`` file."""
    path = Path(data_path)
    if path.suffix != ".npz" or not path.is_file():
        raise DataError(
            f"--dataset npz reads one file: --data_path must name an existing .npz file "
            f"(got {data_path})."
        )
    needed = {f"{kind}_{part}" for kind in "xy" for part in ("train", "test")}
    file = NpzFile(path, [*sorted(needed), "class_names"])
    if missing := needed - set(file.members):
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}; it holds {shown(file.names)}.")
    for part in ("train", "test"):
        _check_labelled_images(path, part, file.members[f"x_{part}"], file.members[f"y_{part}"])
    shapes = [(*file.members[f"x_{part}"].shape[1:], 1)[:3] for part in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{path}: training and test images differ in shape: "
            f"{shapes[0]} and {shapes[1]} (H, W, C)."
        )
    named = file.members.get("class_names")
    if named is not None and (len(named.shape) != 1 or named.dtype.kind not in "USiu"):
        raise DataError(
            f"{path}: class_names must be a list of names, one a class, got {named.dtype} "
            f"{named.shape}."
        )
    file.check_memory(copies=3)
    labels = {part: file.read(f"y_{part}") for part in ("train", "test")}
    lowest = min(int(y.min()) for y in labels.values())
    highest = max(int(y.max()) for y in labels.values())
    num_classes = highest + 1 if named is None else named.shape[0]
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            f"{path}: labels must lie in 0 … {num_classes - 1}, found {lowest} … {highest}."
        )
    check_num_classes(num_classes, sum(map(len, labels.values())), f"{path}: the labels")
    names = (
        [str(i) for i in range(num_classes)]
        if named is None
        else [
            n.decode("latin-1") if isinstance(n, bytes) else str(n)
            for n in file.read("class_names")
        ]
    )
    parts = [
        (to_image_tensor(file.read(f"x_{part}")), torch.as_tensor(y.astype(np.int64)))
        for part, y in labels.items()
    ]
    return build_array_data("npz", *parts, names, flip=True, **options)


def _check_labelled_images(path: Path, part: str, x: Member, y: Member) -> None:
    """Refuse arrays that are no 8-bit images with one label each, by their headers."""
    if (
        x.dtype != np.uint8
        or len(x.shape) not in (3, 4)
        or (len(x.shape) == 4 and x.shape[3] not in (1, 3))
    ):
        raise DataError(
            f"{path}: x_{part} must be uint8 of shape (N, H, W) or (N, H, W, 1 or 3), "
            f"got {x.dtype} {x.shape}."
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise DataError(
            f"{path}: y_{part} must hold one integer per image, ({x.shape[0]},), "
            f"got {y.dtype} {y.shape}."
        )
    if x.shape[0] == 0:
        raise DataError(f"{path}: x_{part} is empty.")
    check_picture_size(f"{path}: an image of x_{part}", *x.shape[1:3])


def check_num_classes(number: int, samples: int, what: str) -> None:
    """Refuse labels that name more classes than samples could ever show.

    Args:
        number: Classes.
        samples: Samples, of all sets.
        what: Where the labels are, for the message.
    """
    most = min(MOST_CLASSES, max(1000, samples))
    if number > most:
        raise DataError(
            f"{what} name {number:,} classes, and there are {samples:,} samples: up to {most:,} "
            "classes are learnt from so many. Number the classes 0, 1, 2, …"
        )


# ---------------------------------------------------------------------------------------------
# Pictures in files

# ---------------------------------------------------------------------------------------------
# Folders of images


def _load_image(path: str, side: int) -> Any:
    """Read an image of a class folder as RGB.

    Args:
        path: The file.
        side: What the shorter side is resized to afterwards.
    """
    with open_picture(path) as image:
        width, height = image.size
        longer = side * max(width, height) // min(width, height)
        if side * longer > MOST_PIXELS:
            raise DataError(
                f"{path} is {height}x{width}, so narrow that it would be {side}x{longer} once its "
                "shorter side is resized. Cut it, or leave it out."
            )
        return image.convert("RGB")


class _AddNoise:
    """Add Gaussian noise to a float image in [0, 1]; with a seed, the same for every image."""

    def __init__(self, sigma: float, seed: int | None) -> None:
        self.sigma, self.seed = sigma, seed

    def __call__(self, image: Tensor) -> Tensor:
        if self.seed is None:
            return image + self.sigma * torch.randn(image.shape)
        generator = torch.Generator().manual_seed(self.seed)
        return image + self.sigma * torch.randn(image.shape, generator=generator)


def _resized(side: int) -> int:
    """Return what the shorter side of an image is resized to before the center is cut out."""
    return round(side * 256 / 224)


def _folder_transforms(
    side: int,
    *,
    augment: bool,
    noise: float,
    normalize: bool,
    seed: int,
    auto_augment: str | None,
    random_erasing: float,
) -> tuple[Callable, Callable]:
    from torchvision.transforms import v2

    def finish(noise_seed: int | None) -> list[Callable]:
        steps: list[Callable] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        if noise > 0:
            steps.append(_AddNoise(noise, noise_seed))
        if normalize:
            steps.append(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))
        return [*steps, v2.ToPureTensor()]

    center = [v2.Resize(_resized(side)), v2.CenterCrop(side)]
    random = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()] if augment else center
    changes = [augmentation(auto_augment)] if auto_augment else []
    erasing = [eraser(random_erasing)] if random_erasing else []
    return (
        v2.Compose([*random, *changes, *finish(None), *erasing]),
        v2.Compose(center + finish(seed)),
    )


def _build_folders(
    name: str,
    make: Callable[[str, Callable, Callable], Dataset],
    *,
    resize: int | None,
    min_side: int,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    **options: Any,
) -> Data:
    side = resize or max(224, min_side)
    train_transform, test_transform = _folder_transforms(
        side, auto_augment=auto_augment, random_erasing=random_erasing, **options
    )
    load = partial(_load_image, side=_resized(side))
    train, test = make("train", train_transform, load), make("test", test_transform, load)
    if train.classes != test.classes:
        differing = set(train.classes) ^ set(test.classes)
        raise DataError(
            f"the class folders for training and testing differ: {', '.join(sorted(differing))}."
        )
    classes = [c if isinstance(c, str) else c[0] for c in train.classes]
    return Data(
        name=name,
        task="classification",
        train=train,
        test=test,
        sample_shape=(3, side, side),
        num_outputs=len(classes),
        class_names=tuple(classes),
        extra={"evaluation_train": make("train", test_transform, load)},
    )


def build_imagefolder(*, data_path: str, **options: Any) -> Data:
    """Load ``<data_path>/train/<class>/*`` and ``<data_path>/test|val/<class>/*``."""
    from torchvision.datasets import ImageFolder

    def make(part: str, transform: Callable, load: Callable) -> Dataset:
        names = ("train",) if part == "train" else ("test", "val")
        folder = next((Path(data_path, n) for n in names if Path(data_path, n).is_dir()), None)
        if folder is None:
            raise DataError(
                f"--dataset imagefolder needs {Path(data_path, names[0])}/<class>/*"
                + ("." if part == "train" else " (or val/<class>/*).")
            )
        try:
            return ImageFolder(folder, transform=transform, loader=load)
        except OSError as error:  # no classes, or none that may be read
            raise DataError(f"{folder}: {error}") from error

    return _build_folders("imagefolder", make, **options)


def build_imagenet(*, data_path: str, **options: Any) -> Data:
    """Load ImageNet 2012: ``train/`` and ``val/`` class folders, or the official archives."""
    if Path(data_path, "train").is_dir() and Path(data_path, "val").is_dir():
        data = build_imagefolder(data_path=data_path, **options)
        data.name = "imagenet"
        return data
    import torchvision

    def make(part: str, transform: Callable, load: Callable) -> Dataset:
        try:
            return torchvision.datasets.ImageNet(
                data_path,
                split="train" if part == "train" else "val",
                transform=transform,
                loader=load,
            )
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"ImageNet is not in {data_path}: put ILSVRC2012_img_train.tar, "
                "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz there (they need an "
                "account at image-net.org), or train/<class>/* and val/<class>/*. "
                f"({type(error).__name__}: {error})"
            ) from error

    return _build_folders("imagenet", make, **options)


# ---------------------------------------------------------------------------------------------
# Images to denoise

# ---------------------------------------------------------------------------------------------
# Features


class FeatureArray(Dataset):
    """Samples in memory as they are: features (N, ...) and targets (N, ...)."""

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self.features, self.labels = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch."""
        indices = torch.as_tensor(indices)
        return self.features[indices], self.labels[indices]


def limit(dataset: Dataset | None, count: int | None) -> Dataset | None:
    """Keep the first ``count`` samples; None keeps all."""
    if dataset is None or count is None or count >= len(dataset):
        return dataset
    if isinstance(dataset, ImageArray):
        return dataset.replaced(dataset.images[:count], dataset.labels[:count])
    return Subset(dataset, range(count))


def full_dataset(dataset: Dataset) -> Dataset:
    """Return the data set that a part, or a part of a part, was taken from."""
    return full_dataset(dataset.dataset) if isinstance(dataset, Subset) else dataset


def split_train(data: Data, fraction: float, seed: int) -> Data:
    """Hold a random part of the training set out as ``data.val``, without its augmentation.

    Args:
        data: The data; its test set is left alone.
        fraction: The part to hold out, in (0, 1).
        seed: Seed of the choice.
    """
    if hasattr(data.train, "hold_out"):  # crops: whole images are held out
        train, val = data.train.hold_out(fraction, seed)
        return replace(data, train=train, val=val)
    n = len(data.train)
    held_out = round(n * fraction)
    if not 0 < held_out < n:
        raise DataError(
            f"--val_split {fraction} leaves {n - held_out} training and {held_out} validation "
            f"samples of {n}: both must be at least 1."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    val, train = order[:held_out].sort().values, order[held_out:].sort().values
    if isinstance(data.train, ImageArray):
        array = data.train
        return replace(
            data,
            train=array.replaced(array.images[train], array.labels[train]),
            val=array.replaced(
                array.images[val], array.labels[val], noise_seed=seed, **NOT_AUGMENTED
            ),
        )
    plain = data.extra.get("evaluation_train", data.train)  # the same files, not augmented
    return replace(data, train=Subset(data.train, train.tolist()), val=Subset(plain, val.tolist()))


# ---------------------------------------------------------------------------------------------
# Loaders


class EpochSampler(RandomSampler):
    """A random order that depends on the seed and the epoch alone, so that a run can be resumed."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.seed = seed
        super().__init__(dataset, generator=torch.Generator())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)


class BalancedStartSampler(EpochSampler):
    """A random order whose first samples hold all classes equally often, as far as they go.

    Args:
        dataset: The data.
        seed: Seed of the order.
        labels: Class of every sample, (N,).
        count: How many samples to balance.
    """

    def __init__(self, dataset: Dataset, seed: int, labels: Tensor, count: int) -> None:
        super().__init__(dataset, seed)
        self.labels, self.count = labels, count

    def __iter__(self) -> Iterator[int]:
        order = torch.tensor(list(super().__iter__()))
        labels = self.labels[order]
        turn = torch.empty_like(labels)  # how many of its class came before each sample
        for label in labels.unique():
            members = (labels == label).nonzero().flatten()
            turn[members] = torch.arange(len(members))
        first = turn.argsort(stable=True)[: self.count]
        rest = torch.ones(len(order), dtype=torch.bool)
        rest[first] = False
        yield from order[first].tolist()
        yield from order[rest].tolist()


def sample_labels(dataset: Dataset) -> Tensor:
    """Return the class of every sample of a dataset, (N,)."""
    if isinstance(dataset, Subset):
        return sample_labels(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if hasattr(dataset, "labels"):
        return dataset.labels
    return torch.as_tensor(dataset.targets)


class _Loader(DataLoader):
    """A loader whose processes hand on what is wrong with the data, not where they found it."""

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except DataError as error:
            # Where it was raised by another process, its text is that of a traceback.
            *_, message = re.split(r"^(?:\w+\.)*DataError: ", str(error), flags=re.MULTILINE)
            raise DataError(message.strip()) from error


def _collate(batch: Any, mix: Callable[[Any, Any], Any] | None = None) -> Any:
    """Pass on what came as a batch already, stack single samples; mix the samples if asked to."""
    batch = batch if isinstance(batch, tuple) else default_collate(batch)
    return batch if mix is None else mix(*batch)


def loading_processes(dataset: Dataset, wanted: int) -> int:
    """Return how many processes load a data set; -1 asks for as many as serve it."""
    if wanted >= 0:
        return wanted
    return 0 if hasattr(full_dataset(dataset), "__getitems__") else min(4, os.cpu_count() or 1)


def build_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = -1,
    pin_memory: bool = False,
    balanced: int = 0,
    mix: Callable[[Any, Any], Any] | None = None,
) -> DataLoader:
    """Build a loader.

    Args:
        dataset: The data.
        batch_size: Samples per batch; the last batch may be shorter.
        shuffle: Draw a new order every epoch (see :class:`EpochSampler`).
        seed: Seed of that order and of the workers.
        num_workers: Loading processes; -1 means none for data in memory and up to 4 otherwise.
        pin_memory: Page-locked memory, for copies to a GPU.
        balanced: With shuffle: that many samples at the start hold all classes equally often.
        mix: Makes a batch (samples, targets) of another one, where it is loaded: its random numbers
            are those of loading, and a batch is mixed whole before processes share it.
    """
    batch_size = min(batch_size, getattr(full_dataset(dataset), "max_batch_size", batch_size))
    num_workers = loading_processes(dataset, num_workers)
    sampler = EpochSampler(dataset, seed) if shuffle else None
    if shuffle and balanced:
        sampler = BalancedStartSampler(dataset, seed, sample_labels(dataset), balanced)
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate if mix is None else partial(_collate, mix=mix),
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),
    )


# ---------------------------------------------------------------------------------------------
# Checking
