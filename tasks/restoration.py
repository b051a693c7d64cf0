"""Restoration: pairs of clean and degraded pictures, and a model that undoes the damage.

Images lie in [0, 1], float32. What differs between restoration tasks is the damage, `degrade`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from dataset import Data, DataError, read_image, read_image_folders
from options import Options, option
from tasks.quality import psnr, ssim
from tasks.task import Evaluate, Finding, Needs, Task
from tasks.tiling import check_tiles, forward_in_tiles
from utils import CsvLog, RunFolder, atomic_path, save_panels

__all__ = [
    "CleanFoldersOptions",
    "DegradedCrops",
    "DegradedImages",
    "ImageReport",
    "RestorationOptions",
    "RestorationTask",
    "build_denoise",
    "build_photos",
]

# Damages clean images (B, C, H, W) or (C, H, W), drawing from a generator or the global one.
Degrade = Callable[[Tensor, torch.Generator | None], Tensor]


# ---------------------------------------------------------------------------------------------
# Data


class DegradedCrops(Dataset):
    """Random crops of clean images in one of eight orientations, damaged afresh.

    Args:
        images: Clean images (C, H, W) uint8, of any sizes.
        names: Their names.
        crop: Side of the square crops in pixels.
        degrade: The damage.
        repeat: Crops of each image in an epoch.
    """

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
            piece = piece.rot90(turns, (1, 2))
            crops.append(piece.flip(2) if mirror else piece)
        clean = torch.stack(crops).float().div_(255)
        return self.degrade(clean, None), clean

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
            DegradedCrops(*pick(train), self.crop, self.degrade, self.repeat),
            DegradedImages(*pick(val), self.degrade, seed),
        )


class DegradedImages(Dataset):
    """Whole images, damaged in a way that depends on the seed and the position in the set.

    Sizes differ, so that a batch is one image.

    Args:
        images: Clean images (C, H, W) uint8.
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
        clean = self.images[index].float().div_(255)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return self.degrade(clean, generator), clean

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch of equally large images: degraded and clean (B, C, H, W) float32."""
        pairs = [self[i] for i in indices]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


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
    test = read_image_folders(test_dir, options["color"], "--test_dir")
    train = read_image_folders(train_dir, options["color"], "--train_dir") if train_dir else None
    return restoration_data("denoise", train, test, **options)


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
    color = options["color"]
    train = read_image_folders([str(f) for f in train_files if f.is_file()], color, "training")
    test = read_image_folders([str(pictures / "flower.jpg")], color, "test")
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
) -> Data:
    """Wrap clean pictures as data of a restoration task.

    Args:
        name: Name of the data set.
        train: Images (C, H, W) uint8, their names, and notes; None for nothing to train on.
        test: The same for testing.
        task: Name of the task.
        color: Three channels instead of one.
        degrade: The damage.
        crop_size: Side of training crops in pixels.
        crops_per_image: Crops of each image in an epoch.
        seed: Seed of the damage to test images.
    """
    channels = 3 if color else 1
    crops = None
    if train is not None:
        crops = DegradedCrops(train[0], train[1], crop_size, degrade, crops_per_image)
    return Data(
        name=name,
        task=task,
        train=crops,
        test=DegradedImages(test[0], test[1], degrade, seed),
        sample_shape=(channels, crop_size, crop_size),
        num_outputs=channels,
        notes=[*(train[2] if train else []), *test[2]],
    )


# ---------------------------------------------------------------------------------------------
# The task


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
    loss_reduction: str = option(
        "sum",
        "squared error: half the sum over an image times --loss_scale (published), or mean",
        choices=("sum", "mean"),
    )
    loss_scale: float = option(0.25, "see --loss_reduction", least=0, most=1e12)
    tile: int = option(0, "evaluate by tiles of this side; 0: whole", least=0, most=8192)
    tile_overlap: int = option(
        None,
        "pixels that tiles share; not given: 64, or half a small tile",
        kind=int,
        least=0,
        most=8192,
    )
    save_images: bool = option(False, "draw degraded, restored and clean test images side by side")
    input: str = option(None, "with --test_only: restore this picture", metavar="FILE", of_run=True)
    output: str = option(None, "where the restored --input goes", metavar="FILE", of_run=True)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse runs that cannot work."""
        source, target = values["input"], values["output"]
        if (source is None) != (target is None):
            raise ValueError(
                "--input and --output go together: the noisy picture and the denoised one."
            )
        if source is not None and not values["test_only"]:
            raise ValueError(
                "--input needs --test_only, and --pretrained or the folder of a trained run."
            )
        if source is not None and not Path(source).is_file():
            raise ValueError(f"--input {source}: there is no such file.")


class RestorationTask(Task):
    """Degraded and clean images in [0, 1]; squared error, PSNR and SSIM.

    A subclass says `degrade` and words the damage.

    Args:
        color: Three channels instead of one.
        crop_size: Side of training crops in pixels.
        crops_per_image: Crops of each image in an epoch.
        loss_reduction: "sum": half the sum of squares of each image times `loss_scale`, averaged
            over images (published); "mean": the mean square.
        loss_scale: See loss_reduction; published is 0.25 for crops of 80×80.
        tile: Restore in evaluation by tiles of this side; 0: whole images.
        tile_overlap: Pixels that tiles share; None: 64, or half a small tile.
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

    def __init__(
        self,
        *,
        color: bool = False,
        crop_size: int = 80,
        crops_per_image: int = 128,
        loss_reduction: str = "sum",
        loss_scale: float = 0.25,
        tile: int = 0,
        tile_overlap: int | None = None,
        save_images: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        self.color, self.crop_size, self.crops_per_image = color, crop_size, crops_per_image
        self.loss_reduction, self.loss_scale = loss_reduction, loss_scale
        self.tile, self.save_images = tile, save_images
        self.tile_overlap = min(64, tile // 2) if tile_overlap is None else tile_overlap

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
            "evaluation_only": needs.evaluation_only,
        }

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return channels, and samples of an epoch."""
        return {
            "in_channels": data.sample_shape[0],
            "num_samples": 0 if data.train is None else len(data.train),
        }

    @property
    def known_shape(self) -> tuple[int, int, int]:
        """Shape of a training sample, known before anything is loaded."""
        return (3 if self.color else 1, self.crop_size, self.crop_size)

    def check_model(self, model: nn.Module) -> None:
        """Refuse tiles that the model cannot work with."""
        if not self.tile:
            return
        try:
            check_tiles(model, self.tile, self.tile_overlap)
        except ValueError as error:
            raise ValueError(
                f"--tile {self.tile} --tile_overlap {self.tile_overlap}: {error}"
            ) from error

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Restore whole images, by tiles if they are asked for."""
        if not self.tile:
            return model(inputs)
        return forward_in_tiles(model, inputs, tile=self.tile, overlap=self.tile_overlap)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over images of their squared error."""
        squares = (outputs.float() - targets).square()
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

    def examine(
        self, model: nn.Module, data: Data, run: RunFolder, evaluate: Evaluate
    ) -> tuple[dict[str, float], list[str]]:
        """Evaluate on the test set, with a table of images, and pictures if they are asked for."""
        base = data.test.dataset if isinstance(data.test, Subset) else data.test
        report = ImageReport(base.names, run, self.before, self.after, pictures=self.save_images)
        metrics = evaluate(data.test, observe=report.add)
        tiles = (
            f"tiles of {self.tile}, overlap {self.tile_overlap}" if self.tile else "whole images"
        )
        protocol = (
            f"Protocol: {self.describe_damage()}, seed {self.seed} and "
            f"position in the set; {'color' if self.color else 'gray'} images in [0, 1], float32, "
            f"{tiles}, no border cropped; "
            f"neither {self.before} nor {self.after} images clipped; PSNR and SSIM per image, then "
            "averaged; SSIM with a Gaussian window of 11x11, sigma 1.5, zeros beyond the border."
        )
        return metrics, [protocol, *report.lines()]

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
        metrics, lines = self.examine(model, data, run, evaluate)
        return Finding(
            {"test": metrics}, [f"Test images with the weights of epoch {epoch}:", *lines]
        )

    def apply(self, model: nn.Module, source: str, target: str, device: torch.device) -> str:
        """Restore one picture; nothing is added to it."""
        from PIL import Image

        try:
            image, converted = read_image(source, self.color)
            if converted:
                print(f"{source} is converted to {'color' if self.color else 'gray'}.")
            with torch.no_grad():
                out = self.predict(model.eval(), image[None].to(device).float() / 255)[0]
        except ValueError as error:  # no picture, or too small for the window, say
            raise ValueError(f"--input {source}: {error}") from error
        pixels = (out.clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
        Path(target).absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_path(target) as temporary:
                Image.fromarray(pixels if self.color else pixels[:, :, 0]).save(temporary)
        except ValueError as error:  # a suffix that names no format
            raise ValueError(f"--output {target}: {error}") from error
        return f"{self.done} {source} ({image.shape[1]}x{image.shape[2]}) into {target}."


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
            name = self.names[len(self.rows)]
            after = {key: values[i].item() for key, values in metrics.items() if key != "loss"}
            self.rows.append({"image": name, f"{self.before}_psnr": before, **after})
            if self.pictures:
                path = self.run.file(f"{self.PICTURES}/{len(self.rows):03d}_{Path(name).stem}.png")
                save_panels(
                    path,
                    {
                        f"{self.before} {before:.2f} dB": degraded[i],
                        f"{self.after} {after['psnr']:.2f} dB": outputs[i],
                        "clean": clean[i],
                    },
                )

    def lines(self) -> list[str]:
        """Write the table; return a line an image and a line a folder."""
        table = CsvLog(self.run.file(self.TABLE), self.rows)
        assert table.fields, "an evaluation has at least one image"
        lines = []
        folders: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            folders.setdefault(row["image"].rpartition("/")[0], []).append(row)
            lines.append(self._line(row["image"], [row]))
        for folder, rows in folders.items():
            lines.append(self._line(f"Average of {folder} ({len(rows)} images)", rows))
        return lines

    def _line(self, title: str, rows: Sequence[Mapping[str, Any]]) -> str:
        before, after, similar = (
            sum(row[key] for row in rows) / len(rows)
            for key in (f"{self.before}_psnr", "psnr", "ssim")
        )
        return (
            f"{title}: PSNR: {after:.4f} dB, SSIM: {similar:.4f} ({self.before}: {before:.4f} dB)"
        )
