"""Datasets and loaders: every dataset names its task and is built by a row of ``DATASETS``.

Small image sets are held in memory as 8-bit tensors and are cropped, flipped, resized and
normalised a batch at a time; folders of images are decoded one by one through torchvision.
"""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, default_collate

__all__ = [
    "DATASETS",
    "Data",
    "DataError",
    "DatasetEntry",
    "EpochSampler",
    "FeatureArray",
    "ImageArray",
    "NoisyCrops",
    "NoisyImages",
    "TextEncoder",
    "TextWindows",
    "build_loader",
    "encode_data",
    "load_data",
    "split_train",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".webp")


class DataError(ValueError):
    """Data that is missing, damaged or of the wrong form; the message says how to mend it."""


@dataclass
class Data:
    """What a run needs to know of its data.

    Attributes:
        name: Name in ``DATASETS``.
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


# ---------------------------------------------------------------------------------------------
# Images in memory


class ImageArray(Dataset):
    """Labelled images in memory, transformed a batch at a time.

    Order of the steps: crop and flip, resize, add noise, normalise.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        side: Resize to side × side (bilinear, antialiased); None keeps the size.
        crop: Pad by an eighth of the side and crop back at a random place.
        flip: Flip left to right with probability 1/2.
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
        noise: float = 0.0,
        noise_seed: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.side, self.crop, self.flip = side, crop, flip
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
        images = self.images[indices].float().div_(255)
        if self.crop:
            images = random_crop(images, padding=max(1, images.shape[-1] // 8))
        if self.flip:
            flipped = torch.rand(len(images)) < 0.5
            images[flipped] = images[flipped].flip(-1)
        if self.side is not None and images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        if self.noise > 0:
            images += self.noise * self._draw_noise(images, indices)
        if self.mean is not None:
            images.sub_(self.mean).div_(self.std)
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
            "noise": self.noise,
            "noise_seed": self.noise_seed,
            "mean": None if self.mean is None else self.mean.flatten().tolist(),
            "std": None if self.std is None else self.std.flatten().tolist(),
        }
        return ImageArray(images, labels, **(options | changes))


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
    """
    _, c, h, w = train[0].shape
    notes = []
    side = resize
    if resize is None and min(h, w) < min_side:
        side = min_side
        notes.append(
            f"{name} images are {h}x{w}; the model needs at least {min_side}x{min_side}, "
            f"so they are resized up (--resize chooses another size)."
        )
    mean, std = channel_statistics(train[0]) if normalize else (None, None)
    common = {"side": side, "noise": noise, "mean": mean, "std": std}
    return Data(
        name=name,
        task="classification",
        train=ImageArray(*train, crop=augment, flip=augment and flip, **common),
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
    # AssertionError and KeyError are what its parsers raise on a damaged file.
    except (OSError, RuntimeError, ValueError, EOFError, AssertionError, KeyError) as error:
        raise DataError(
            f"{class_name} could not be read or downloaded ({type(error).__name__}: {error}). "
            f"Put these files there by hand, then run again:\n  {wanted}"
        ) from error


def to_image_tensor(images: Any) -> Tensor:
    """Turn (N, H, W) or (N, H, W, C) 8-bit images into a (N, C, H, W) tensor."""
    images = torch.as_tensor(np.asarray(images))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous()


def _torchvision_builder(
    name: str, class_name: str, files: Sequence[str], *, flip: bool
) -> Callable[..., Data]:
    def build(*, data_path: str, **options: Any) -> Data:
        train, test = load_torchvision(data_path, class_name, files)
        arrays = [
            (to_image_tensor(part.data), torch.as_tensor(part.targets, dtype=torch.int64))
            for part in (train, test)
        ]
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


def build_npz(*, data_path: str, **options: Any) -> Data:
    """Load ``x_train, y_train, x_test, y_test`` (and ``class_names``) from one ``.npz`` file."""
    path = Path(data_path)
    if path.suffix != ".npz" or not path.is_file():
        raise DataError(
            f"--dataset npz reads one file: --data_path must name an existing .npz file "
            f"(got {data_path})."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged, or no .npz file: {error}") from error

    missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays)
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(sorted(missing))}; it holds "
            f"{', '.join(sorted(arrays)) or 'nothing'}."
        )
    parts = []
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if (
            x.dtype != np.uint8
            or x.ndim not in (3, 4)
            or (x.ndim == 4 and x.shape[3] not in (1, 3))
        ):
            raise DataError(
                f"{path}: x_{part} must be uint8 of shape (N, H, W) or (N, H, W, 1 or 3), "
                f"got {x.dtype} {x.shape}."
            )
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise DataError(
                f"{path}: y_{part} must hold one integer per image, ({len(x)},), "
                f"got {y.dtype} {y.shape}."
            )
        if len(x) == 0:
            raise DataError(f"{path}: x_{part} is empty.")
        parts.append((to_image_tensor(x), torch.as_tensor(y.astype(np.int64))))
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise DataError(
            f"{path}: training and test images differ in shape: "
            f"{tuple(parts[0][0].shape[1:])} and {tuple(parts[1][0].shape[1:])} (C, H, W)."
        )
    lowest = min(int(y.min()) for _, y in parts)
    highest = max(int(y.max()) for _, y in parts)
    names = arrays.get("class_names")
    num_classes = highest + 1 if names is None else len(names)
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            f"{path}: labels must lie in 0 … {num_classes - 1}, found {lowest} … {highest}."
        )
    names = [str(i) for i in range(num_classes)] if names is None else [str(n) for n in names]
    return build_array_data("npz", *parts, names, flip=True, **options)


# ---------------------------------------------------------------------------------------------
# Folders of images


def _load_image(path: str) -> Any:
    from PIL import Image

    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except OSError as error:  # UnidentifiedImageError is one
        raise DataError(f"{path} cannot be read as an image: {error}") from error


class _AddNoise:
    """Add Gaussian noise to a float image in [0, 1]; with a seed, the same for every image."""

    def __init__(self, sigma: float, seed: int | None) -> None:
        self.sigma, self.seed = sigma, seed

    def __call__(self, image: Tensor) -> Tensor:
        if self.seed is None:
            return image + self.sigma * torch.randn(image.shape)
        generator = torch.Generator().manual_seed(self.seed)
        return image + self.sigma * torch.randn(image.shape, generator=generator)


def _folder_transforms(
    side: int, *, augment: bool, noise: float, normalize: bool, seed: int
) -> tuple[Callable, Callable]:
    from torchvision.transforms import v2

    def finish(noise_seed: int | None) -> list[Callable]:
        steps: list[Callable] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        if noise > 0:
            steps.append(_AddNoise(noise, noise_seed))
        if normalize:
            steps.append(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))
        return [*steps, v2.ToPureTensor()]

    center = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    random = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()]
    return (
        v2.Compose((random if augment else center) + finish(None)),
        v2.Compose(center + finish(seed)),
    )


def _build_folders(
    name: str,
    make: Callable[[str, Callable], Dataset],
    *,
    resize: int | None,
    min_side: int,
    augment: bool,
    noise: float,
    normalize: bool,
    seed: int,
) -> Data:
    side = resize or max(224, min_side)
    options = {"augment": augment, "noise": noise, "normalize": normalize, "seed": seed}
    train_transform, test_transform = _folder_transforms(side, **options)
    train, test = make("train", train_transform), make("test", test_transform)
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
        extra={"evaluation_train": make("train", test_transform)},
    )


def build_imagefolder(*, data_path: str, **options: Any) -> Data:
    """Load ``<data_path>/train/<class>/*`` and ``<data_path>/test|val/<class>/*``."""
    from torchvision.datasets import ImageFolder

    def make(part: str, transform: Callable) -> Dataset:
        names = ("train",) if part == "train" else ("test", "val")
        folder = next((Path(data_path, n) for n in names if Path(data_path, n).is_dir()), None)
        if folder is None:
            raise DataError(
                f"--dataset imagefolder needs {Path(data_path, names[0])}/<class>/*"
                + ("." if part == "train" else " (or val/<class>/*).")
            )
        try:
            return ImageFolder(folder, transform=transform, loader=_load_image)
        except FileNotFoundError as error:
            raise DataError(f"{folder}: {error}") from error

    return _build_folders("imagefolder", make, **options)


def build_imagenet(*, data_path: str, **options: Any) -> Data:
    """Load ImageNet 2012: ``train/`` and ``val/`` class folders, or the official archives."""
    if Path(data_path, "train").is_dir() and Path(data_path, "val").is_dir():
        data = build_imagefolder(data_path=data_path, **options)
        data.name = "imagenet"
        return data
    import torchvision

    def make(part: str, transform: Callable) -> Dataset:
        try:
            return torchvision.datasets.ImageNet(
                data_path,
                split="train" if part == "train" else "val",
                transform=transform,
                loader=_load_image,
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

LUMA = (0.2989, 0.5870, 0.1140)  # the weights that the published grayscale sets were made with


def read_image(path: str | os.PathLike, color: bool) -> tuple[Tensor, bool]:
    """Read a picture as (C, H, W) uint8; return it, and whether its colors had to change.

    Args:
        path: Any file that Pillow reads; 16-bit gray is rounded to 8 bits.
        color: Three channels; otherwise one, of the usual luma.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                array = np.asarray(image, dtype=np.float64)
                levels = 65535 if array.max() > 255 else 255
                array = np.round(array * (255 / levels)).clip(0, 255).astype(np.uint8)
            elif image.mode in ("L", "1"):
                array = np.asarray(image.convert("L"))
            else:
                array = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    changed = (array.ndim == 3) != color
    if changed and color:
        array = np.repeat(array[:, :, None], 3, axis=2)
    elif changed:
        array = np.round(array @ np.array(LUMA)).clip(0, 255).astype(np.uint8)
    array = array.transpose(2, 0, 1) if color else array[None]
    return torch.from_numpy(array.copy()), changed


def read_image_folders(
    folders: Sequence[str], color: bool, flag: str
) -> tuple[list[Tensor], list[str], list[str]]:
    """Read all pictures of some folders.

    Args:
        folders: The folders, or single files.
        color: See :func:`read_image`.
        flag: The flag that named them, for messages.

    Returns:
        Images (C, H, W) uint8, their names (``folder/file``), and notes for the user.
    """
    images: list[Tensor] = []
    names: list[str] = []
    changed = 0
    for folder in map(Path, folders):
        if not folder.exists():
            raise DataError(f"{flag} {folder}: there is no such folder.")
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
        files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
        if not files:
            raise DataError(
                f"{flag} {folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})."
            )
        for file in files:
            image, other = read_image(file, color)
            changed += other
            images.append(image)
            names.append(f"{file.parent.name}/{file.name}")
    notes = []
    if changed:
        wanted, way = (
            ("color", "all channels equal") if color else ("gray", "luma; --color keeps it")
        )
        notes.append(f"{flag}: {changed} of {len(images)} images converted to {wanted} ({way}).")
    return images, names, notes


class NoisyCrops(Dataset):
    """Random crops of clean images in one of eight orientations, with fresh Gaussian noise.

    Noisy images are not clipped to [0, 1].

    Args:
        images: Clean images (C, H, W) uint8, of any sizes.
        names: Their names.
        crop: Side of the square crops in pixels.
        sigma: Standard deviation of the noise on the 0-255 scale.
        repeat: Crops of each image in an epoch.
    """

    def __init__(
        self, images: Sequence[Tensor], names: Sequence[str], crop: int, sigma: float, repeat: int
    ) -> None:
        for image, name in zip(images, names, strict=True):
            if min(image.shape[1:]) < crop:
                height, width = image.shape[1:]
                raise DataError(
                    f"{name} is {height}x{width}, too small for crops of {crop}x{crop} pixels: "
                    f"choose --crop_size {min(height, width)} or less, or leave the image out."
                )
        self.images, self.names = list(images), list(names)
        self.crop, self.sigma, self.repeat = crop, sigma, repeat

    def __len__(self) -> int:
        return len(self.images) * self.repeat

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noisy, clean = self.__getitems__([index])
        return noisy[0], clean[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: noisy and clean crops (B, C, crop, crop) float32, clean in [0, 1]."""
        crops = []
        for index in indices:
            image = self.images[index % len(self.images)]
            top = int(torch.randint(image.shape[1] - self.crop + 1, ()))
            left = int(torch.randint(image.shape[2] - self.crop + 1, ()))
            turns, mirror = divmod(int(torch.randint(8, ())), 2)
            piece = image[:, top : top + self.crop, left : left + self.crop]
            piece = piece.rot90(turns, (1, 2))
            crops.append(piece.flip(2) if mirror else piece)
        clean = torch.stack(crops).float().div_(255)
        return clean + torch.randn(clean.shape) * (self.sigma / 255), clean

    def hold_out(self, fraction: float, seed: int) -> tuple["NoisyCrops", "NoisyImages"]:
        """Split off whole images: crops of those that stay, and those held out."""
        n = len(self.images)
        held_out = round(n * fraction)
        if not 0 < held_out < n:
            raise DataError(
                f"--val_split {fraction} leaves {n - held_out} training and {held_out} validation "
                f"images of {n}: both must be at least 1."
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        val, train = sorted(order[:held_out]), sorted(order[held_out:])
        return (
            NoisyCrops(
                [self.images[i] for i in train],
                [self.names[i] for i in train],
                self.crop,
                self.sigma,
                self.repeat,
            ),
            NoisyImages(
                [self.images[i] for i in val], [self.names[i] for i in val], self.sigma, seed
            ),
        )


class NoisyImages(Dataset):
    """Whole images with Gaussian noise that depends on the seed and the position in the set.

    Sizes differ, so that a batch is one image. Noisy images are not clipped to [0, 1].

    Args:
        images: Clean images (C, H, W) uint8.
        names: Their names.
        sigma: Standard deviation of the noise on the 0-255 scale.
        seed: Seed of the noise.
    """

    max_batch_size = 1

    def __init__(
        self, images: Sequence[Tensor], names: Sequence[str], sigma: float, seed: int
    ) -> None:
        self.images, self.names = list(images), list(names)
        self.sigma, self.seed = sigma, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean = self.images[index].float().div_(255)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        noise = torch.randn(clean.shape, generator=generator)
        return clean + noise * (self.sigma / 255), clean

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch, of equally large images: noisy and clean (B, C, H, W) float32."""
        pairs = [self[i] for i in indices]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def build_denoise(
    *,
    train_dirs: Sequence[str] | None,
    test_dirs: Sequence[str],
    color: bool,
    sigma: float,
    crop_size: int,
    repeat: int,
    seed: int,
) -> Data:
    """Load folders of clean pictures; noise is drawn on the fly.

    Args:
        train_dirs: Folders (or files) to train on; None loads nothing to train on.
        test_dirs: Folders (or files) to test on.
        color: Three channels instead of one.
        sigma: Standard deviation of the noise on the 0-255 scale.
        crop_size: Side of training crops in pixels.
        repeat: Crops of each image in an epoch.
        seed: Seed of the test noise.
    """
    test = read_image_folders(test_dirs, color, "--test_dir")
    train = read_image_folders(train_dirs, color, "--train_dir") if train_dirs else None
    return _denoising_data("denoise", train, test, color, sigma, crop_size, repeat, seed)


def build_photos(
    *, color: bool, sigma: float, crop_size: int, repeat: int, seed: int, **_: Any
) -> Data:
    """Load photographs that ship with scikit-learn and matplotlib: two to train on, one to test.

    Args:
        color: Three channels instead of one.
        sigma: Standard deviation of the noise on the 0-255 scale.
        crop_size: Side of training crops in pixels.
        repeat: Crops of each image in an epoch.
        seed: Seed of the test noise.
        **_: Folders, which this set does not read.
    """
    import matplotlib
    import sklearn

    pictures = Path(sklearn.__file__).parent / "datasets" / "images"
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    train_files = [pictures / "china.jpg", samples / "grace_hopper.jpg"]
    train = read_image_folders([str(f) for f in train_files if f.is_file()], color, "training")
    test = read_image_folders([str(pictures / "flower.jpg")], color, "test")
    data = _denoising_data("photos", train, test, color, sigma, crop_size, repeat, seed)
    data.notes = [f"Photographs: trains on {', '.join(train[1])}; tests on {test[1][0]}."]
    return data


def _denoising_data(
    name: str,
    train: tuple[list[Tensor], list[str], list[str]] | None,
    test: tuple[list[Tensor], list[str], list[str]],
    color: bool,
    sigma: float,
    crop_size: int,
    repeat: int,
    seed: int,
) -> Data:
    channels = 3 if color else 1
    return Data(
        name=name,
        task="denoising",
        train=None if train is None else NoisyCrops(train[0], train[1], crop_size, sigma, repeat),
        test=NoisyImages(test[0], test[1], sigma, seed),
        sample_shape=(channels, crop_size, crop_size),
        num_outputs=channels,
        notes=[*(train[2] if train else []), *test[2]],
    )


# ---------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class DatasetEntry:
    """A row of ``DATASETS``: the task and the function that builds the data."""

    task: str
    build: Callable[..., Data]


_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DATASETS: dict[str, DatasetEntry] = {
    name: DatasetEntry("classification", build)
    for name, build in {
        "cifar10": _torchvision_builder(
            "cifar10", "CIFAR10", ["cifar-10-python.tar.gz"], flip=True
        ),
        "cifar100": _torchvision_builder(
            "cifar100", "CIFAR100", ["cifar-100-python.tar.gz"], flip=True
        ),
        "imagenet": build_imagenet,
        "mnist": _torchvision_builder(
            "mnist", "MNIST", [f"MNIST/raw/{file}.gz" for file in _MNIST_FILES], flip=False
        ),
        "fashionmnist": _torchvision_builder(
            "fashionmnist",
            "FashionMNIST",
            [f"FashionMNIST/raw/{file}.gz" for file in _MNIST_FILES],
            flip=True,
        ),
        "digits": build_digits,
        "imagefolder": build_imagefolder,
        "npz": build_npz,
    }.items()
}
DATASETS["denoise"] = DatasetEntry("denoising", build_denoise)
DATASETS["photos"] = DatasetEntry("denoising", build_photos)


# ---------------------------------------------------------------------------------------------
# Features, pictures and text for models that compare samples as they are


class FeatureArray(Dataset):
    """Samples in memory as they are: features (N, D) and targets (N, ...)."""

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


def encode_data(
    data: Data,
    function: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Data:
    """Replace every sample of classification data by its features, once and for all.

    Args:
        data: The data; random augmentation is drawn once.
        function: Maps a batch of samples on the device to features (B, D).
        device: Where it is evaluated; the features are kept on the CPU.
        batch_size: Samples at a time.
    """

    def encode(part: Dataset | None) -> FeatureArray | None:
        if part is None:
            return None
        features, targets = [], []
        for x, y in build_loader(part, batch_size=batch_size):
            features.append(function(x.to(device)).cpu())
            targets.append(y)
        return FeatureArray(torch.cat(features), torch.cat(targets))

    train, val, test = (encode(part) for part in (data.train, data.val, data.test))
    shape = tuple(test.features.shape[1:])
    return replace(data, train=train, val=val, test=test, sample_shape=shape)


def build_image(*, image_path: str | None, **_: Any) -> Data:
    """Load one picture as a function: (row, column), counted in pixels -> RGB in [0, 1].

    Args:
        image_path: The picture; None takes a photograph that ships with scikit-learn.
        **_: Options of other datasets.
    """
    notes = []
    if image_path is None:
        import sklearn

        image_path = str(Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg")
        notes.append(f"Picture: {image_path} (--image_path chooses another).")
    pixels, changed = read_image(image_path, color=True)
    if changed:
        notes.append(f"{image_path} is gray: it is learnt with three equal channels.")
    _, height, width = pixels.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([rows, columns], dim=-1).float().reshape(-1, 2)
    array = FeatureArray(positions, pixels.permute(1, 2, 0).reshape(-1, 3).float() / 255)
    return Data(
        name="image",
        task="approximation",
        train=array,
        test=array,
        sample_shape=(2,),
        num_outputs=3,
        notes=notes,
        extra={"image": pixels.float() / 255, "positions": positions},
    )


class TextEncoder:
    """Turn the last characters of a text into features. Characters are ASCII, 128 classes.

    Args:
        num_features: Characters that are looked at.
        encoding: "ascii": their codes, 0 … 127 (published); "onehot": one column for each position
            and character of the alphabet.
        alphabet: Codes that have a column in "onehot", ascending; others are all zeros.
        decay: "onehot" only: a character counts by this factor less than the one after it, so
            that recent characters decide which contexts are alike.
    """

    num_classes = 128

    def __init__(
        self, num_features: int, encoding: str, alphabet: Sequence[int], decay: float = 1.0
    ) -> None:
        self.num_features, self.encoding = num_features, encoding
        self.alphabet = list(alphabet)
        self.columns = torch.full((self.num_classes,), len(self.alphabet))  # the last: unknown
        self.columns[torch.tensor(self.alphabet, dtype=torch.int64)] = torch.arange(
            len(self.alphabet)
        )
        self.weights = decay ** torch.arange(num_features - 1, -1, -1, dtype=torch.float32)

    @property
    def width(self) -> int:
        """Number of features."""
        factor = len(self.alphabet) if self.encoding == "onehot" else 1
        return self.num_features * factor

    def encode(self, codes: Tensor) -> Tensor:
        """Encode windows of character codes: (B, num_features) -> (B, width) float32."""
        if self.encoding == "ascii":
            return codes.float()
        one_hot = F.one_hot(self.columns[codes.long()], len(self.alphabet) + 1)[..., :-1]
        return (one_hot * self.weights[:, None]).flatten(1)

    @staticmethod
    def codes(text: str) -> Tensor:
        """Return the codes of a text's ASCII characters; others are left out."""
        return torch.tensor(list(text.encode("ascii", "ignore")), dtype=torch.uint8)


class TextWindows(Dataset):
    """All places of a text: the characters before as features, and the next character's code.

    Args:
        codes: Character codes of the text, (N,) uint8.
        encoder: How windows are encoded.
    """

    def __init__(self, codes: Tensor, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.windows = codes.unfold(0, encoder.num_features, 1)[:-1]
        self.labels = codes[encoder.num_features :].long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch: features (B, D) and codes (B,)."""
        indices = torch.as_tensor(indices)
        return self.encoder.encode(self.windows[indices]), self.labels[indices]


def read_text(path: str, flag: str) -> str:
    """Read a text file (UTF-8).

    Args:
        path: The file.
        flag: The flag that named it, for messages.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path} cannot be read as UTF-8 text: {error}") from error


def build_text(
    *,
    text_path: str | None,
    test_text_path: str | None,
    num_features: int,
    encoding: str,
    decay: float,
    **_: Any,
) -> Data:
    """Load a text: the last characters -> the next one.

    Args:
        text_path: Training text; None takes the documentation that ships with Python.
        test_text_path: Test text; None takes the last tenth of the training text away for it.
        num_features: Characters that are looked at.
        encoding: See :class:`TextEncoder`.
        decay: See :class:`TextEncoder`.
        **_: Options of other datasets.
    """
    notes = []
    if text_path is None:
        from pydoc_data.topics import topics

        train = "".join(topics[name] for name in sorted(topics))
        notes.append("Text: the documentation inside Python (--text_path chooses another).")
    else:
        train = read_text(text_path, "--text_path")
    if test_text_path is None:
        cut = len(train) - len(train) // 10
        train, test = train[:cut], train[cut:]
    else:
        test = read_text(test_text_path, "--test_text_path")
    codes = []
    for text, flag in ((train, "--text_path"), (test, "--test_text_path")):
        codes.append(TextEncoder.codes(text))
        left_out = len(text) - len(codes[-1])
        if left_out:
            notes.append(
                f"{flag}: {left_out:,} of {len(text):,} characters are not ASCII: left out."
            )
        if len(codes[-1]) <= num_features:
            raise DataError(
                f"{flag}: the text has {len(codes[-1])} characters, which is not enough to look at "
                f"{num_features} and predict the next. Use a longer text or fewer --num_features."
            )
    encoder = TextEncoder(num_features, encoding, codes[0].unique().tolist(), decay)
    return Data(
        name="text",
        task="language",
        train=TextWindows(codes[0], encoder),
        test=TextWindows(codes[1], encoder),
        sample_shape=(encoder.width,),
        num_outputs=encoder.num_classes,
        notes=notes,
        extra={"encoder": encoder},
    )


DATASETS["image"] = DatasetEntry("approximation", build_image)
DATASETS["text"] = DatasetEntry("language", build_text)


def load_data(name: str, **options: Any) -> Data:
    """Build a dataset of ``DATASETS`` by name.

    Args:
        name: The dataset.
        **options: What its builder takes.

    Raises:
        DataError: If files are missing, damaged or of the wrong form.
    """
    return DATASETS[name].build(**options)


def limit(dataset: Dataset | None, count: int | None) -> Dataset | None:
    """Keep the first ``count`` samples; None keeps all."""
    if dataset is None or count is None or count >= len(dataset):
        return dataset
    if isinstance(dataset, ImageArray):
        return dataset.replaced(dataset.images[:count], dataset.labels[:count])
    return Subset(dataset, range(count))


def split_train(data: Data, fraction: float, seed: int) -> Data:
    """Hold a random part of the training set out as ``data.val``, without its augmentation.

    Args:
        data: The data; its test set is left alone.
        fraction: The part to hold out, in (0, 1).
        seed: Seed of the choice.
    """
    if isinstance(data.train, NoisyCrops):
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
                array.images[val], array.labels[val], crop=False, flip=False, noise_seed=seed
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


def _collate(batch: Any) -> Any:
    """Pass on what came as a batch already; stack single samples."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def build_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = -1,
    pin_memory: bool = False,
    balanced: int = 0,
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
    """
    base = dataset.dataset if isinstance(dataset, Subset) else dataset
    batch_size = min(batch_size, getattr(base, "max_batch_size", batch_size))
    if num_workers < 0:
        num_workers = 0 if hasattr(base, "__getitems__") else min(4, os.cpu_count() or 1)
    sampler = EpochSampler(dataset, seed) if shuffle else None
    if shuffle and balanced:
        sampler = BalancedStartSampler(dataset, seed, sample_labels(dataset), balanced)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),
    )
