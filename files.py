"""Files that nobody should trust: archives of arrays, and pictures, judged by their headers."""

import contextlib
import math
import os
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import memory_size

__all__ = ["DataError", "check_picture_size", "open_picture", "read_image", "read_image_folders"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".webp")
MOST_PIXELS = 2**26  # of one picture: 8192 x 8192
# What Pillow may take a file for, whatever its name says: pictures, and no programs (EPS).
PICTURE_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Weights of R, G, B and what is added, on 0-255: "photo" made the published grayscale sets, "bt601"
# is the luma of video that super-resolution is measured on.
LUMA = {
    "photo": ((0.2989, 0.5870, 0.1140), 0.0),
    "bt601": ((65.481 / 255, 128.553 / 255, 24.966 / 255), 16.0),
}
LUMA_NOTES = {"photo": "luma; --color keeps it", "bt601": "luma of BT.601"}


class DataError(ValueError):
    """Data that is missing, damaged or of the wrong form; the message says how to mend it."""


def shown(names: Iterable[str]) -> str:
    """List names from a file: the first ten, in a form that fits a line."""
    names = sorted(names)
    shown = ", ".join(n if n.isprintable() and len(n) <= 40 else repr(n)[:40] for n in names[:10])
    return (shown or "nothing") + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@dataclass(frozen=True)
class Member:
    """An array inside an .npz file, known by its header alone."""

    info: zipfile.ZipInfo
    start: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """The arrays of an .npz file; every header is read and judged before any array is.

    Nothing is unpickled, members that nobody asks for are left alone, and what a header says must
    agree with the size that the archive gives for that member.

    Args:
        path: The file.
        names: The arrays that are wanted.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        with self._damage(), zipfile.ZipFile(path) as archive:
            infos = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            self.names = set(infos)
            self.members = {
                name: self._read_header(archive, infos[name]) for name in names if name in infos
            }

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        # What zip files and headers of arrays raise on damage: bad sums, encryption, methods.
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
            raise DataError(
                f"{self.path} is damaged, or no .npz file of numpy.savez: {e}. Write it anew."
            ) from e

    @staticmethod
    def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        name = info.filename
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is packed by a method that numpy.savez does not use")
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"{name} has a header of the unknown version {version}")
            try:
                shape, fortran, dtype = readers[version](file)
            except Exception as error:  # a header is a Python expression: syntax, tokens, types
                raise ValueError(f"the header of {name} cannot be read") from error
            member = Member(info, file.tell(), shape, fortran, dtype)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read")
        if any(side < 0 for side in shape) or member.start + member.size != info.file_size:
            raise ValueError(
                f"the header of {name} speaks of {dtype} {shape}, and the file has "
                f"{info.file_size - member.start:,} bytes for it"
            )
        return member

    def check_memory(self, copies: int) -> None:
        """Refuse arrays that do not fit into the machine.

        Args:
            copies: How often they are held at once.
        """
        size = sum(member.size for member in self.members.values())
        there = memory_size(torch.device("cpu"))
        if there is not None and size * copies > there:
            raise DataError(
                f"{self.path} holds {size / 1e9:,.1f} GB, and reading it takes "
                f"{size * copies / 1e9:,.1f} GB; this machine has {there / 1e9:,.1f} GB. Make a "
                "file of fewer or smaller images."
            )

    def read(self, name: str) -> np.ndarray:
        """Read an array."""
        member = self.members[name]
        buffer = np.empty(member.size, dtype=np.uint8)
        with self._damage(), zipfile.ZipFile(self.path) as archive:
            with archive.open(member.info) as file:
                file.read(member.start)
                at = 0
                while chunk := file.read(2**20):  # the last one checks the sum
                    buffer[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
                    at += len(chunk)
            if at != member.size:
                raise ValueError(f"{name} ends after {at:,} of {member.size:,} bytes")
        return np.ndarray(member.shape, member.dtype, buffer, order="F" if member.fortran else "C")


@contextlib.contextmanager
def open_picture(path: str | os.PathLike) -> Iterator[Any]:
    """Open a picture; its size is checked by the header before any pixel is decoded.

    Args:
        path: A regular file: others (pipes, devices) are never opened, they could wait for ever.

    Raises:
        DataError: If it is missing, damaged, of no known format, or too large.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            Image.init()  # which formats there are
            image = Image.open(path, formats=[f for f in PICTURE_FORMATS if f in Image.OPEN])
        with image:
            check_picture_size(f"{path}: the picture", image.height, image.width)
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow documents no error types: OSError, SyntaxError, struct, …
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image: {reason}") from error


def check_picture_size(what: str, height: int, width: int) -> None:
    """Refuse pictures without pixels, and with so many that no memory holds what is made of them.

    Args:
        what: The picture, for the message.
        height: Its height in pixels.
        width: Its width.
    """
    if min(height, width) < 1:
        raise DataError(f"{what} is {height}x{width}: it has no pixels. Leave it out.")
    if height * width > MOST_PIXELS:
        raise DataError(
            f"{what} is {height}x{width}, {height * width:,} pixels, and pictures of up to "
            f"{MOST_PIXELS:,} are read. Make it smaller, or leave it out."
        )


def _by_rows(function: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    """Compute 8-bit pixels (H, W) in float64, some rows at a time: whole pictures take much."""
    result = np.empty(array.shape[:2], np.uint8)
    step = max(1, 2**20 // array.shape[1])
    for top in range(0, len(array), step):
        rows = function(array[top : top + step].astype(np.float64))
        result[top : top + step] = rows.clip(0, 255)
    return result


def read_image(path: str | os.PathLike, color: bool, luma: str = "photo") -> tuple[Tensor, bool]:
    """Read a picture as (C, H, W) uint8; return it, and whether its colors had to change.

    Args:
        path: See :func:`open_picture`; 16-bit gray is rounded to 8 bits.
        color: Three channels; otherwise one, of the luma.
        luma: What a color picture becomes where one channel is wanted: a name of `LUMA`.
    """
    with open_picture(path) as image:
        if image.mode.startswith("I"):
            array = np.asarray(image)
            levels = 65535 if array.max() > 255 else 255
            array = _by_rows(lambda rows: np.round(rows * (255 / levels)), array)
        elif image.mode in ("L", "1"):
            array = np.asarray(image.convert("L"))
        else:
            array = np.asarray(image.convert("RGB"))
    changed = (array.ndim == 3) != color
    if changed and color:
        array = np.repeat(array[:, :, None], 3, axis=2)
    elif changed:
        weights, offset = LUMA[luma]
        array = _by_rows(lambda rows: np.round(rows @ np.array(weights) + offset), array)
    array = array.transpose(2, 0, 1) if color else array[None]
    return torch.from_numpy(array.copy()), changed


def read_image_folders(
    folders: Sequence[str],
    color: bool,
    flag: str,
    luma: str = "photo",
    read: Callable[..., tuple[Tensor, bool]] = read_image,
) -> tuple[list[Tensor], list[str], list[str]]:
    """Read all pictures of some folders.

    Args:
        folders: The folders, or single files.
        color: See :func:`read_image`.
        flag: The flag that named them, for messages.
        luma: See :func:`read_image`.
        read: What reads a picture; :func:`tasks.pictures.read_levels` keeps 16 bits.

    Returns:
        Images (C, H, W) as `read` gives them, their names (``folder/file``), and notes for the
        user.
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
            image, other = read(file, color, luma)
            changed += other
            images.append(image)
            names.append(f"{file.parent.name}/{file.name}")
    notes = []
    if changed:
        wanted, way = ("color", "all channels equal") if color else ("gray", LUMA_NOTES[luma])
        notes.append(f"{flag}: {changed} of {len(images)} images converted to {wanted} ({way}).")
    return images, names, notes
