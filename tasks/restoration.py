"""Restoration: pairs of clean and degraded pictures, and a model that undoes the damage.

Images lie in [0, 1], float32. What differs between restoration tasks is the damage, `degrade`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset import Data, DataError, full_dataset, read_image_folders
from options import Options, option
from run_folder import RunFolder
from tasks.pictures import (
    check_target,
    find_pictures,
    join_levels,
    read_levels,
    read_picture,
    to_unit,
    write_picture,
)
from tasks.quality import psnr, ssim
from tasks.task import Evaluate, Finding, Needs, Task
from tasks.tiling import check_tiles, forward_in_tiles, largest_tile
from utils import csv_text, save_panels

__all__ = [
    "CleanFoldersOptions",
    "DegradedCrops",
    "DegradedImages",
    "ImageReport",
    "PairedCrops",
    "PairedFoldersOptions",
    "PairedImages",
    "RestorationOptions",
    "RestorationTask",
    "build_denoise",
    "build_pairs",
    "build_photos",
]

# A network that changes less, as a share of the damage, has not learnt to restore.
LEAST_CHANGE = 0.25
LEAST_SQUARE = 1e-8  # added to the mean square of a crop: its PSNR as a loss ends at 80 dB

# Damages clean images (B, C, H, W) or (C, H, W), drawing from a generator or the global one.
Degrade = Callable[[Tensor, torch.Generator | None], Tensor]


# ---------------------------------------------------------------------------------------------
# Data


class DegradedImages(Dataset):
    """Whole images, damaged in a way that depends on the seed and the position in the set.

    Sizes differ, so that a batch is one image.

    Args:
        images: Clean images (C, H, W), see `tasks.pictures.read_levels`.
        names: Their names.
        degrade: The damage.
        seed: Seed of the damage.
    """

    max_batch_size = 1

    def __init__(
        self, images: Sequence[Tensor], names: Sequence[str], degrade: Degrade, seed: int
    ) -> None:
        self.images, self.names = list(images), list(names)
        self.degrade, self.seed = degrade, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean = to_unit(self.images[index])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return self.degrade(clean, generator), clean

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch of equally large images: degraded and clean (B, C, H, W) float32."""
        pairs = [self[i] for i in indices]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


class DegradedCrops(Dataset):
    """Random crops of clean images in one of eight orientations, damaged afresh.

    Args:
        images: Clean images (C, H, W) of any sizes, see `tasks.pictures.read_levels`.
        names: Their names.
        crop: Side of the square crops in pixels.
        degrade: The damage.
        repeat: Crops of each image in an epoch.
    """

    whole = DegradedImages  # what is held out

    def __init__(
        self,
        images: Sequence[Tensor],
        names: Sequence[str],
        crop: int,
        degrade: Degrade,
        repeat: int,
    ) -> None:
        for image, name in zip(images, names, strict=True):
            if min(image.shape[1:]) < crop:
                height, width = image.shape[1:]
                raise DataError(
                    f"{name} is {height}x{width}, too small for crops of {crop}x{crop} pixels: "
                    f"choose --crop_size {min(height, width)} or less, or leave the image out."
                )
        self.images, self.names = list(images), list(names)
        self.crop, self.degrade, self.repeat = crop, degrade, repeat

    def __len__(self) -> int:
        return len(self.images) * self.repeat

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        degraded, clean = self.__getitems__([index])
        return degraded[0], clean[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: degraded and clean crops (B, C, crop, crop) float32, clean in [0, 1]."""
        crops = []
        for index in indices:
            image = self.images[index % len(self.images)]
            top = int(torch.randint(image.shape[1] - self.crop + 1, ()))
            left = int(torch.randint(image.shape[2] - self.crop + 1, ()))
            turns, mirror = divmod(int(torch.randint(8, ())), 2)
            piece = image[:, top : top + self.crop, left : left + self.crop]
            piece = to_unit(piece.rot90(turns, (1, 2)))
            crops.append(piece.flip(2) if mirror else piece)
        return self.pair(torch.stack(crops))

    def pair(self, crops: Tensor) -> tuple[Any, Any]:
        """Make a batch of crops (B, C, crop, crop) in [0, 1]."""
        return self.degrade(crops, None), crops

    def hold_out(self, fraction: float, seed: int) -> tuple["DegradedCrops", "DegradedImages"]:
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

        def pick(chosen: list[int]) -> tuple[list[Tensor], list[str]]:
            return [self.images[i] for i in chosen], [self.names[i] for i in chosen]

        return (
            type(self)(*pick(train), self.crop, self.degrade, self.repeat),
            self.whole(*pick(val), self.degrade, seed),
        )


class PairedImages(DegradedImages):
    """Whole images with real noise: noisy above clean in one image (2C, H, W)."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        both = to_unit(self.images[index])
        noisy, clean = both.chunk(2)
        return noisy, clean


class PairedCrops(DegradedCrops):
    """Crops of them; nothing is drawn but where they lie, and how they are turned."""

    whole = PairedImages

    def pair(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Take crops (B, 2C, crop, crop) apart."""
        noisy, clean = crops.chunk(2, 1)
        return noisy, clean


@dataclass(frozen=True)
class CleanFoldersOptions(Options):
    """Folders of clean pictures."""

    title = "Clean pictures (--dataset denoise)"
    train_dir: list[str] = option(
        None, "folders of clean images", several="list", metavar="DIR", resumable=True
    )
    test_dir: list[str] = option(
        None, "folders of clean images", several="list", metavar="DIR", resumable=True
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse a run that lacks its folders."""
        if values["input"] is not None:
            return
        if not values["test_dir"]:
            raise ValueError("--dataset denoise needs --test_dir: folders of clean images.")
        if not values["train_dir"] and not values["test_only"]:
            raise ValueError("--dataset denoise needs --train_dir: folders of clean images.")


@dataclass(frozen=True)
class PairedFoldersOptions(Options):
    """Folders of pictures with real noise, and of the same pictures without."""

    title = "Pairs of pictures (--dataset pairs)"
    noisy_dir: list[str] = option(
        None, "folders of noisy images to train on", several="list", metavar="DIR", resumable=True
    )
    clean_dir: list[str] = option(
        None, "folders of the same images, clean", several="list", metavar="DIR", resumable=True
    )
    test_noisy_dir: list[str] = option(
        None, "folders of noisy images to test on", several="list", metavar="DIR", resumable=True
    )
    test_clean_dir: list[str] = option(
        None, "folders of the same images, clean", several="list", metavar="DIR", resumable=True
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse a run that lacks its folders."""
        if values["input"] is not None:
            return
        for start in ("", "test_"):
            noisy, clean = values[f"{start}noisy_dir"], values[f"{start}clean_dir"]
            if bool(noisy) != bool(clean):
                raise ValueError(
                    f"--{start}noisy_dir and --{start}clean_dir go together: noisy pictures, and "
                    "the same ones clean."
                )
        if not values["test_noisy_dir"]:
            raise ValueError(
                "--dataset pairs needs --test_noisy_dir and --test_clean_dir: pictures to test on."
            )
        if not values["noisy_dir"] and not values["test_only"]:
            raise ValueError(
                "--dataset pairs needs --noisy_dir and --clean_dir: pictures to train on."
            )


Pictures = tuple[list[Tensor], list[str], list[str]]  # images, names, notes


def build_denoise(
    *, train_dir: Sequence[str] | None, test_dir: Sequence[str], **options: Any
) -> Data:
    """Load folders of clean pictures; the damage is drawn on the fly.

    Args:
        train_dir: Folders (or files) to train on; None loads nothing to train on.
        test_dir: Folders (or files) to test on.
        **options: See :func:`restoration_data`; and `evaluation_only`: leave out training data.
    """
    if options.pop("evaluation_only"):
        train_dir = None
    luma = options.pop("luma", "photo")
    reading = {"color": options["color"], "luma": luma, "read": read_levels}
    test = read_image_folders(test_dir, flag="--test_dir", **reading)
    train = read_image_folders(train_dir, flag="--train_dir", **reading) if train_dir else None
    return restoration_data("denoise", train, test, **options)


def build_pairs(
    *,
    noisy_dir: Sequence[str] | None,
    clean_dir: Sequence[str] | None,
    test_noisy_dir: Sequence[str],
    test_clean_dir: Sequence[str],
    **options: Any,
) -> Data:
    """Load folders of pictures with real noise beside folders of the same pictures without.

    Args:
        noisy_dir: Folders to train on; None loads nothing to train on.
        clean_dir: Their clean twins, by file name (suffixes may differ).
        test_noisy_dir: Folders to test on.
        test_clean_dir: Their clean twins.
        **options: See :func:`restoration_data`; and `evaluation_only`: leave out training data.
    """
    color, train = options["color"], None
    if noisy_dir and not options.pop("evaluation_only"):
        train = read_pairs(noisy_dir, clean_dir, color, ("--noisy_dir", "--clean_dir"))
    options.pop("evaluation_only", None)
    flags = ("--test_noisy_dir", "--test_clean_dir")
    test = read_pairs(test_noisy_dir, test_clean_dir, color, flags)
    return restoration_data("pairs", train, test, kinds=(PairedCrops, PairedImages), **options)


def read_pairs(
    noisy: Sequence[str], clean: Sequence[str], color: bool, flags: tuple[str, str]
) -> Pictures:
    """Read pictures and their clean twins, found by name.

    Args:
        noisy: Folders of noisy pictures.
        clean: Folders of clean ones.
        color: See `tasks.pictures.read_levels`.
        flags: The flags that named the folders, for messages.

    Returns:
        Noisy above clean, (2C, H, W), their names, and notes for the user.

    Raises:
        DataError: If a picture has no twin, or one of another size.
    """
    images, names, notes = read_image_folders(noisy, color, flags[0], read=read_levels)
    clean_images, clean_names, clean_notes = read_image_folders(
        clean, color, flags[1], read=read_levels
    )
    twins: list[dict[str, int]] = []  # positions by name, noisy and clean
    for found, flag in ((names, flags[0]), (clean_names, flags[1])):
        twins.append({Path(name).stem: i for i, name in enumerate(found)})
        if len(twins[-1]) < len(found):
            twice = next(n for i, n in enumerate(found) if twins[-1][Path(n).stem] != i)
            raise DataError(f"{flag} holds two pictures of the name {Path(twice).stem}.")
    for mine, others, all_names, flag, other_flag in (
        (*twins, names, *flags),
        (*reversed(twins), clean_names, *reversed(flags)),
    ):
        if lonely := sorted(set(mine) - set(others)):
            raise DataError(
                f"{flag} holds {all_names[mine[lonely[0]]]}, and {other_flag} no picture of that "
                "name: every picture needs its twin, noisy and clean."
            )
    stacked = []
    for image, name in zip(images, names, strict=True):
        position = twins[1][Path(name).stem]
        twin = clean_images[position]
        if twin.shape != image.shape:
            raise DataError(
                f"{name} is {image.shape[1]}x{image.shape[2]} and its clean twin "
                f"{clean_names[position]} is {twin.shape[1]}x{twin.shape[2]}: a pair shows the "
                "same pixels."
            )
        stacked.append(join_levels(image, twin))
    return stacked, names, [*notes, *clean_notes]


def build_photos(*, evaluation_only: bool = False, **options: Any) -> Data:
    """Load photographs that ship with scikit-learn and matplotlib: two to train on, one to test.

    Args:
        evaluation_only: Nothing is trained; the pictures are few, so that they are read anyway.
        **options: See :func:`restoration_data`.
    """
    import matplotlib
    import sklearn

    pictures = Path(sklearn.__file__).parent / "datasets" / "images"
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    train_files = [pictures / "china.jpg", samples / "grace_hopper.jpg"]
    luma = options.pop("luma", "photo")
    reading = {"color": options["color"], "luma": luma, "read": read_levels}
    there = [str(file) for file in train_files if file.is_file()]
    train = read_image_folders(there, flag="training", **reading)
    test = read_image_folders([str(pictures / "flower.jpg")], flag="test", **reading)
    data = restoration_data("photos", train, test, **options)
    data.notes = [f"Photographs: trains on {', '.join(train[1])}; tests on {test[1][0]}."]
    return data


def restoration_data(
    name: str,
    train: Pictures | None,
    test: Pictures,
    *,
    task: str,
    color: bool,
    degrade: Degrade,
    crop_size: int,
    crops_per_image: int,
    seed: int,
    extra_channels: int = 0,
    kinds: tuple[type[DegradedCrops], type[DegradedImages]] = (DegradedCrops, DegradedImages),
) -> Data:
    """Wrap clean pictures as data of a restoration task.

    Args:
        name: Name of the data set.
        train: Images (C, H, W), their names, and notes; None for nothing to train on.
        test: The same for testing.
        task: Name of the task.
        color: Three channels instead of one.
        degrade: The damage.
        crop_size: Side of training crops in pixels.
        crops_per_image: Crops of each image in an epoch.
        seed: Seed of the damage to test images.
        extra_channels: Channels that the damage adds to the input.
        kinds: Classes of training and test sets.
    """
    channels = 3 if color else 1
    crops = None
    if train is not None:
        crops = kinds[0](train[0], train[1], crop_size, degrade, crops_per_image)
    return Data(
        name=name,
        task=task,
        train=crops,
        test=kinds[1](test[0], test[1], degrade, seed),
        sample_shape=(channels + extra_channels, crop_size, crop_size),
        num_outputs=channels,
        notes=[*(train[2] if train else []), *test[2]],
    )


# ---------------------------------------------------------------------------------------------
# The task


def tile_side(text: str) -> int | str:
    """Read a whole number or "auto"."""
    return text if text == "auto" else int(text)


@dataclass(frozen=True)
class RestorationOptions(Options):
    """Crops, loss and evaluation of networks that restore pictures."""

    title = "Restoration: data, loss, evaluation"
    color: bool = option(False, "three channels; without it gray (luma)", fixed=True)
    crop_size: int = option(80, "side of training crops, in pixels", least=1, most=4096)
    crops_per_image: int = option(
        128,
        "crops of each training image in an epoch, flipped and turned by 90 degrees at random",
        least=1,
        most=10**6,
    )
    loss: str = option(
        "mse",
        "squared error, absolute error, or minus the PSNR of each crop: every level of damage "
        "then weighs the same",
        choices=("mse", "l1", "psnr"),
    )
    loss_reduction: str = option(
        "sum",
        "of --loss mse: half the sum over an image times --loss_scale (published), or mean",
        choices=("sum", "mean"),
    )
    loss_scale: float = option(0.25, "see --loss_reduction", least=0, most=1e12)
    tile: int | str = option(
        0,
        "evaluate by tiles of this side; 0: whole; auto: as large as half the free memory allows",
        kind=tile_side,
        least=0,
        most=8192,
    )
    tile_overlap: int = option(
        None,
        "pixels that tiles share; not given: 64, or half a small tile",
        kind=int,
        least=0,
        most=8192,
    )
    self_ensemble: bool = option(
        False, "in evaluation: average what the eight flips and turns of an image give"
    )
    save_images: bool = option(False, "draw degraded, restored and clean test images side by side")
    input: str = option(
        None,
        "restore these pictures: files, folders or patterns, with the weights of --test_only or "
        "--pretrained, or with those that come along",
        several="list",
        metavar="FILE",
        of_run=True,
    )
    output: str = option(
        None, "where the restored --input goes: a file or a folder", metavar="FILE", of_run=True
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse runs that cannot work."""
        if values["loss"] != "mse" and values["loss_reduction"] != "sum":
            raise ValueError(
                f"--loss_reduction {values['loss_reduction']} is of --loss mse, not of --loss "
                f"{values['loss']}, which is a mean anyway: leave it out."
            )
        source, target = values["input"], values["output"]
        if (source is None) != (target is None):
            raise ValueError(
                "--input and --output go together: the noisy picture and the denoised one."
            )
        if source is not None and not values["test_only"]:
            raise ValueError(
                "--input needs --test_only, and --pretrained or the folder of a trained run."
            )
        if source is not None:
            find_pictures(source, target)


class RestorationTask(Task):
    """Degraded and clean images in [0, 1]; a loss, PSNR and SSIM.

    A subclass says `degrade` and words the damage.

    Args:
        color: Three channels instead of one.
        crop_size: Side of training crops in pixels.
        crops_per_image: Crops of each image in an epoch.
        loss: "mse": squared error; "l1": the mean absolute error; "psnr": minus the PSNR of each
            image in dB, averaged, so that all levels of damage weigh the same.
        loss_reduction: Of "mse". "sum": half the sum of squares of each image times `loss_scale`,
            averaged over images (published); "mean": the mean square.
        loss_scale: See loss_reduction; published is 0.25 for crops of 80×80.
        tile: Restore in evaluation by tiles of this side; 0: whole images; "auto": whole images as
            far as half the free memory goes, then tiles as large as it allows.
        tile_overlap: Pixels that tiles share; None: 64, or half a small tile.
        self_ensemble: Restore in evaluation all eight flips and turns, and average.
        save_images: Draw test images when a run ends.
        seed: Seed of the damage to test images.
    """

    headline, headline_name, headline_unit = "psnr", "PSNR", " dB"
    defaults: ClassVar[dict[str, Any]] = {
        "layer": "Conv2d",
        "batch_size": 32,
        "num_epochs": 51,
        "clip_grad_norm": 0.0,
        "optimizer": "adam",
        "weight_decay": 1e-4,
        "decay_bias": False,
        "scheduler": "exponential",
    }
    treats_files = True
    before, after, done = "degraded", "restored", "Restored"
    extra_channels = 0  # channels of the input beside those of the picture

    def __init__(
        self,
        *,
        color: bool = False,
        crop_size: int = 80,
        crops_per_image: int = 128,
        loss: str = "mse",
        loss_reduction: str = "sum",
        loss_scale: float = 0.25,
        tile: int | str = 0,
        tile_overlap: int | None = None,
        self_ensemble: bool = False,
        save_images: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        self.color, self.crop_size, self.crops_per_image = color, crop_size, crops_per_image
        self.loss_kind, self.loss_reduction, self.loss_scale = loss, loss_reduction, loss_scale
        self.tile, self.save_images, self.self_ensemble = tile, save_images, self_ensemble
        self.tile_overlap = tile_overlap
        self.shows_tiles = False

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Damage clean images."""
        raise NotImplementedError

    def describe_damage(self) -> str:
        """Word the damage for the protocol."""
        raise NotImplementedError

    def data_options(self, needs: Needs) -> dict[str, Any]:
        """Return what builders of clean pictures take beside their own options."""
        return {
            "task": self.name,
            "color": self.color,
            "degrade": self.degrade,
            "crop_size": self.crop_size,
            "crops_per_image": self.crops_per_image,
            "extra_channels": self.extra_channels,
            "evaluation_only": needs.evaluation_only,
        }

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return channels, and samples of an epoch."""
        return {
            "in_channels": data.sample_shape[0],
            "out_channels": self.channels,
            "num_samples": 0 if data.train is None else len(data.train),
        }

    @property
    def channels(self) -> int:
        """Channels of a picture."""
        return 3 if self.color else 1

    @property
    def known_shape(self) -> tuple[int, int, int]:
        """Shape of a training sample, known before anything is loaded."""
        return (self.channels + self.extra_channels, self.crop_size, self.crop_size)

    def overlap(self, tile: int) -> int:
        """Pixels that tiles of this side share."""
        return min(64, tile // 2) if self.tile_overlap is None else self.tile_overlap

    def check_model(self, model: nn.Module) -> None:
        """Refuse tiles that the model cannot work with."""
        if not self.tile or self.tile == "auto":
            return
        overlap = self.overlap(self.tile)
        try:
            check_tiles(model, self.tile, overlap)
        except ValueError as error:
            raise ValueError(f"--tile {self.tile} --tile_overlap {overlap}: {error}") from error

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Restore whole images, by tiles and in eight orientations if that is asked for."""
        if not self.self_ensemble:
            return self._predict(model, inputs)
        total: Any = 0
        for turns in range(4):
            for mirrored in (False, True):
                turned = inputs.rot90(turns, (-2, -1))
                out = self._predict(model, turned.flip(-1) if mirrored else turned)
                total = total + (out.flip(-1) if mirrored else out).rot90(-turns, (-2, -1))
        return total / 8

    def _predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        if self.tile == "auto":
            self.tile = largest_tile(model, inputs.shape[1], inputs.device)
            print(f"Tiles of up to {self.tile} pixels fit into half the memory that is free.")
        if not self.tile or max(inputs.shape[-2:]) <= self.tile:
            return model(inputs)
        overlap = self.overlap(self.tile)
        return forward_in_tiles(
            model, inputs, tile=self.tile, overlap=overlap, progress=self.shows_tiles
        )

    def restore(self, model: nn.Module, images: Tensor) -> Tensor:
        """Restore the channels of one picture nothing is known of: (B, C, H, W)."""
        return self.predict(model, images)

    def visible(self, inputs: Tensor) -> Tensor:
        """Return the picture that an input (B, C, H, W) shows."""
        return inputs[:, : self.channels]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of what ``--loss`` says over images."""
        errors = outputs.float() - targets
        if self.loss_kind == "l1":
            return errors.abs().mean()
        squares = errors.square()
        if self.loss_kind == "psnr":
            return 10 * (squares.flatten(1).mean(1) + LEAST_SQUARE).log10().mean()
        if self.loss_reduction == "mean":
            return squares.mean()
        return squares.sum() * (0.5 * self.loss_scale / len(squares))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return PSNR in dB and SSIM of every image."""
        return {"psnr": psnr(outputs, targets), "ssim": ssim(outputs, targets)}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        loss = f"Loss: {metrics['loss']:.8f} " if "loss" in metrics else ""
        return f"{loss}PSNR: {metrics['psnr']:.4f} dB, SSIM: {metrics['ssim']:.4f}"

    def brief(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the line of an epoch; all digits are in metrics.csv."""
        loss = f"Loss: {metrics['loss']:.4f} " if "loss" in metrics else ""
        return f"{loss}PSNR: {metrics['psnr']:.2f} dB SSIM: {metrics['ssim']:.4f}"

    def examine(
        self, model: nn.Module, data: Data, run: RunFolder, evaluate: Evaluate
    ) -> tuple[dict[str, float], Finding]:
        """Evaluate on the test set, with a table of images, and pictures if they are asked for."""
        base = full_dataset(data.test)
        report = ImageReport(base.names, run, self.before, self.after, pictures=self.save_images)
        squares = torch.zeros(2, dtype=torch.float64)  # of what was changed, and of the damage

        def observe(inputs: Tensor, outputs: Tensor, clean: Tensor, metrics: Mapping) -> None:
            seen = self.visible(inputs)
            report.add(seen, outputs, clean, metrics)
            for i, other in enumerate((outputs, clean)):
                squares[i] += (other.float() - seen).square().sum().item()

        metrics = evaluate(data.test, observe=observe)
        tiles = (
            f"tiles of {self.tile}, overlap {self.overlap(self.tile)}"
            if self.tile
            else "whole images"
        )
        if self.self_ensemble:
            tiles += ", average of eight flips and turns"
        damage = (
            "pictures as they were taken"
            if isinstance(base, PairedImages)
            else f"{self.describe_damage()}, seed {self.seed} and position in the set"
        )
        protocol = (
            f"Protocol: {damage}; {'color' if self.color else 'gray'} images in [0, 1], float32, "
            f"{tiles}, no border cropped; "
            f"neither {self.before} nor {self.after} images clipped; PSNR and SSIM per image, then "
            "averaged; SSIM with a Gaussian window of 11x11, sigma 1.5, zeros beyond the border."
        )
        lines = [protocol, *report.lines()]
        if squares[0] < LEAST_CHANGE**2 * squares[1]:
            share = 100 * (squares[0] / squares[1]).sqrt()
            lines.append(
                f"note: the network all but returns its input: what it changes is {share:.0f} % of "
                "the damage (root mean square). It is untrained, or trained for other pictures."
            )
        return metrics, Finding({}, lines)

    def finish(
        self,
        model: nn.Module,
        data: Data,
        run: RunFolder,
        evaluate: Evaluate,
        use_best: Callable[[], int],
    ) -> Finding:
        """Draw the test images with the best weights, if that is asked for."""
        if not self.save_images:
            return Finding({}, [])
        epoch = use_best()
        metrics, found = self.examine(model, data, run, evaluate)
        first = f"Test images with the weights of epoch {epoch}:"
        return Finding({"test": metrics}, [first, *found.lines])

    def files(self, inputs: Sequence[str], output: str) -> list[tuple[Path, Path]]:
        """Return the pictures to restore, each with the file it goes to."""
        return find_pictures(inputs, output)

    def apply(self, model: nn.Module, source: str, target: str, device: torch.device) -> str:
        """Restore one picture; nothing is added to it."""
        try:
            picture = read_picture(source)
            check_target(target, picture)
            self.shows_tiles = True
            with torch.no_grad():
                pixels, how = self.treat(model.eval(), picture.pixels.to(device))
        except ValueError as error:  # no picture, or too small for the window, say
            raise ValueError(f"--input {source}: {error}") from error
        height, width = picture.pixels.shape[1:]
        picture.pixels = pixels.cpu()
        if picture.alpha is not None:
            picture.alpha = self.treat_alpha(picture.alpha)
        try:
            lost = write_picture(target, picture)
        except (ValueError, OSError) as error:  # a format that does not take these channels, say
            raise ValueError(f"--output {target}: {error}") from error
        return f"{self.done} {source} ({width}x{height}{how}) into {target}{lost}."

    def treat_alpha(self, alpha: Tensor) -> Tensor:
        """Return the alpha channel (1, H, W) of a restored picture."""
        return alpha

    def treat(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, str]:
        """Restore the pixels (C, H, W) of a picture, gray or color, whatever the network takes.

        Returns:
            The restored pixels, and how channels were matched, for the user.
        """
        if self.color and len(pixels) == 1:
            out = self.restore(model, pixels.expand(3, -1, -1)[None])[0]
            return out.mean(0, keepdim=True), ", gray by a network for color"
        if not self.color and len(pixels) == 3:
            out = self.restore(model, pixels[:, None])
            return out[:, 0], ", channel by channel by a network for gray"
        return self.restore(model, pixels[None])[0], ""


class ImageReport:
    """Quality of every image of a test set, as a table, lines and pictures.

    Give :meth:`add` to `train_eval.evaluate` as its observer.

    Args:
        names: Names of the images (``folder/file``), in the order of the loader.
        run: Where ``per_image.csv`` and pictures go.
        before: What degraded images are called, e.g. "noisy".
        after: What restored images are called.
        pictures: Draw degraded, restored and clean side by side, below ``images/``.
    """

    TABLE, PICTURES = "per_image.csv", "images"
    MOST_LINES = 100  # of images that have a line each; of more there are averages alone

    def __init__(
        self,
        names: Sequence[str],
        run: RunFolder,
        before: str = "noisy",
        after: str = "denoised",
        *,
        pictures: bool = False,
    ) -> None:
        self.names, self.run, self.pictures = names, run, pictures
        self.before, self.after = before, after
        self.rows: list[dict[str, Any]] = []

    def add(self, degraded: Tensor, outputs: Tensor, clean: Tensor, metrics: Mapping) -> None:
        """Take note of a batch."""
        for i, before in enumerate(psnr(degraded, clean).tolist()):
            after = {key: values[i].item() for key, values in metrics.items()}
            self.enter(before, after, {}, degraded[i], outputs[i], {"clean": clean[i]})

    def enter(
        self,
        before: float,
        metrics: Mapping[str, float],
        first: Mapping[str, Tensor],
        degraded: Tensor,
        output: Tensor,
        last: Mapping[str, Tensor],
    ) -> None:
        """Take note of an image.

        Args:
            before: PSNR of the degraded image.
            metrics: What the restored image has.
            first: Pictures left of the degraded one, by caption.
            degraded: The degraded image (C, H, W).
            output: The restored one.
            last: Pictures right of it.
        """
        name = self.names[len(self.rows)]
        after = {key: value for key, value in metrics.items() if key != "loss"}
        self.rows.append({"image": name, f"{self.before}_psnr": before, **after})
        if self.pictures:
            path = self.run.file(f"{self.PICTURES}/{len(self.rows):03d}_{Path(name).stem}.png")
            between = {
                f"{self.before} {before:.2f} dB": degraded,
                f"{self.after} {after['psnr']:.2f} dB": output,
            }
            save_panels(path, {**first, **between, **last})

    def lines(self) -> list[str]:
        """Write the table; return a line an image, if they are few, and a line a folder."""
        assert self.rows, "an evaluation has at least one image"
        self.run.write_result(self.TABLE, csv_text(self.rows))
        lines = []
        folders: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            folders.setdefault(row["image"].rpartition("/")[0], []).append(row)
            if len(self.rows) <= self.MOST_LINES:
                lines.append(self._line(row["image"], [row]))
        for folder, rows in folders.items():
            number = "1 image" if len(rows) == 1 else f"{len(rows)} images"
            lines.append(self._line(f"Average of {folder} ({number})", rows))
        return lines

    def _line(self, title: str, rows: Sequence[Mapping[str, Any]]) -> str:
        before, after, similar = (
            sum(row[key] for row in rows) / len(rows)
            for key in (f"{self.before}_psnr", "psnr", "ssim")
        )
        return (
            f"{title}: PSNR: {after:.4f} dB, SSIM: {similar:.4f} ({self.before}: {before:.4f} dB)"
        )
