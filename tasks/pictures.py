"""Pictures on disk at their full depth: 8 or 16 bits, gray or color, with or without alpha."""

import glob
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from files import IMAGE_SUFFIXES, LUMA, DataError, open_picture, read_image
from utils import atomic_path

__all__ = [
    "Picture",
    "check_target",
    "find_pictures",
    "join_levels",
    "read_levels",
    "read_picture",
    "to_unit",
    "write_picture",
]

TIFF = (".tif", ".tiff")
DEEP_SUFFIXES = (".png", *TIFF)  # formats that hold 16 bits
ALPHA_SUFFIXES = (".png", ".webp", *TIFF)


@dataclass
class Picture:
    """A picture in memory.

    Attributes:
        pixels: (C, H, W) float32 in [0, 1], one or three channels.
        alpha: (1, H, W) float32 in [0, 1], where there is one.
        bits: Depth of a value in its file: 8 or 16.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    bits: int = 8


# ---------------------------------------------------------------------------------------------
# Reading


def read_picture(path: str | Path) -> Picture:
    """Read a picture, with the turn its camera noted.

    Raises:
        DataError: If it is none, or of a kind whose values would have to be guessed.
    """
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with open_picture(path) as image:
            if image.format == "PNG" and _png_depth(path) == 16:
                return _from_levels(_decode_png(path), 16)
            deep = image.mode.startswith("I;16")
            if image.mode == "F" or (image.mode.startswith("I") and not deep):
                raise DataError(
                    f"{path} holds values of mode {image.mode}, and where white lies among them "
                    "is not known. Save it as PNG or TIFF of 8 or 16 bits."
                )
            if deep:
                return _from_levels(np.array(image).astype(np.uint16), 16)
            if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) > 8:
                return _read_deep_tiff(path)
            image = ImageOps.exif_transpose(image)
            clear = "transparency" in image.info or image.mode in ("LA", "RGBA", "PA", "La", "RGBa")
            gray = image.mode in ("1", "L", "LA", "La")
            mode = ("L" if gray else "RGB") + ("A" if clear else "")
            array = np.array(image.convert(mode))
    except DataError as error:
        unknown = isinstance(error.__cause__, UnidentifiedImageError)
        if unknown and Path(path).suffix.lower() in TIFF:
            return _read_deep_tiff(path)  # gray with alpha of 16 bits, for one
        raise
    return _from_levels(array, 8)


def read_levels(path: str | Path, color: bool, luma: str = "photo") -> tuple[Tensor, bool]:
    """Read the levels of a picture at the depth of its file; see `files.read_image`.

    Returns:
        (C, H, W), one or three channels: uint8, or int32 of 0 to 65535 where the file holds 16
        bits; and whether its colors had to change.

    Raises:
        DataError: See `read_picture`.
    """
    with open_picture(path) as image:
        if image.format == "PNG":
            deep = _png_depth(path) == 16
        else:
            tags = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)
            deep = image.mode.startswith(("I", "F")) or max(tags) > 8
    if not deep:
        return read_image(path, color, luma)
    levels = read_picture(path).pixels.double() * 65535
    changed = (len(levels) == 3) != color
    if changed and color:
        levels = levels.expand(3, -1, -1)
    elif changed:
        weights, offset = LUMA[luma]
        mixed = torch.tensordot(levels.new_tensor(weights), levels, 1)[None]
        levels = (mixed + offset * 257).clamp(0, 65535)
    return levels.round().int(), changed


def to_unit(levels: Tensor) -> Tensor:
    """Turn levels of 8 bits (uint8) or 16 (int32) into float32 in [0, 1]."""
    return levels.float().div_(255 if levels.dtype == torch.uint8 else 65535)


def join_levels(*levels: Tensor) -> Tensor:
    """Join the channels of pictures, on the scale of the deepest: white is 255 or 65535."""
    if len({part.dtype for part in levels}) > 1:
        levels = tuple(p.int() * 257 if p.dtype == torch.uint8 else p for p in levels)
    return torch.cat(levels)


def _png_depth(path: str | Path) -> int:
    """Return the bits of a value in a PNG file: the 25th byte."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def _decode_png(path: str | Path) -> np.ndarray:
    """Read a PNG of 16 bits as (H, W, C) uint16; Pillow would drop half of them."""
    from torchvision.io import ImageReadMode, decode_png, read_file

    try:
        with warnings.catch_warnings():  # it is to move into another package some day
            warnings.simplefilter("ignore", DeprecationWarning)
            data = decode_png(read_file(str(path)), ImageReadMode.UNCHANGED)
    except RuntimeError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    return data.permute(1, 2, 0).numpy()


def _read_deep_tiff(path: str | Path) -> Picture:
    """Read a color TIFF of more than 8 bits, half of which Pillow would drop."""
    tifffile = _tifffile(path)
    try:
        array = tifffile.imread(path)
    except (tifffile.TiffFileError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    if array.dtype != np.uint16 or array.ndim not in (2, 3):
        raise DataError(
            f"{path} holds {array.dtype} values of shape {array.shape}: only TIFF of 8 or 16 bits "
            "with one picture in it can be read."
        )
    return _from_levels(array, 16)


def _tifffile(path: str | Path) -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{path}: color TIFF of 16 bits needs tifffile, which is not installed (pip install "
            "tifffile). PNG holds 16 bits without it."
        ) from error
    return tifffile


def _from_levels(array: np.ndarray, bits: int) -> Picture:
    """Make a picture of (H, W) or (H, W, C) whole numbers."""
    levels = array[:, :, None] if array.ndim == 2 else array
    values = torch.from_numpy(levels.astype(np.int32)).permute(2, 0, 1).float() / (2**bits - 1)
    channels = 1 if len(values) < 3 else 3
    alpha = values[channels:].clone() if len(values) > channels else None
    return Picture(values[:channels].contiguous(), alpha, bits)


# ---------------------------------------------------------------------------------------------
# Writing


def check_target(path: str | Path, picture: Picture) -> None:
    """Refuse a file that cannot be written, before the work is done."""
    from PIL import Image

    suffix = Path(path).suffix.lower()
    if suffix not in Image.registered_extensions():
        raise DataError(
            f"--output {path}: the suffix {suffix or '(none)'} names no format of pictures. Try "
            f"{Path(path).stem}.png."
        )
    several = len(picture.pixels) == 3 or picture.alpha is not None
    if suffix in TIFF and picture.bits == 16 and several:
        _tifffile(path)


def write_picture(path: str | Path, picture: Picture) -> str:
    """Write a picture, clipped to [0, 1], with the depth and the alpha that its format can hold.

    Returns:
        What could not be kept, as the end of a sentence; empty if all was.
    """
    from PIL import Image

    path = Path(path)
    suffix, lost = path.suffix.lower(), []
    bits, alpha = picture.bits, picture.alpha
    if bits == 16 and suffix not in DEEP_SUFFIXES:
        bits = 8
        lost.append("16 bits became 8")
    if alpha is not None and suffix not in ALPHA_SUFFIXES:
        alpha = None
        lost.append("alpha was dropped")
    values = picture.pixels if alpha is None else torch.cat((picture.pixels, alpha))
    levels = (values.clamp(0, 1).double() * (2**bits - 1)).round().permute(1, 2, 0).cpu().numpy()
    array = np.ascontiguousarray(levels.astype(np.uint16 if bits == 16 else np.uint8))
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if bits == 16 and suffix == ".png":
            temporary.write_bytes(_encode_png16(array))
        elif bits == 16 and array.shape[2] > 1:
            kind = "rgb" if array.shape[2] > 2 else "minisblack"
            extra = {"extrasamples": ["unassalpha"]} if array.shape[2] in (2, 4) else {}
            _tifffile(path).imwrite(temporary, array, photometric=kind, planarconfig=1, **extra)
        else:
            flat = array[:, :, 0] if array.shape[2] == 1 else array
            Image.fromarray(flat).save(temporary)
    return f" ({', '.join(lost)}: {suffix} holds no more)" if lost else ""


def _encode_png16(array: np.ndarray) -> bytes:
    """Encode (H, W, C) uint16 as PNG; Pillow and torchvision write colors of 8 bits only."""
    height, width, channels = array.shape
    rows = array.astype(">u2").reshape(height, -1).view(np.uint8)
    change = rows.copy()  # each row as its difference from the row above: filter 2
    change[1:] -= rows[:-1]
    lines = np.concatenate((np.full((height, 1), 2, np.uint8), change), 1)
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------------------------------------
# Finding


def find_pictures(inputs: Sequence[str], output: str) -> list[tuple[Path, Path]]:
    """Pair pictures with the files they are turned into.

    Args:
        inputs: Files, folders, or patterns such as ``"photos/*.jpg"``.
        output: A file; a folder if there are several pictures, or if it ends in a slash or is one.

    Returns:
        Sources and targets; in a folder they keep their names.

    Raises:
        DataError: If there is no picture, or a target would be a source or serve two of them.
    """
    sources: list[Path] = []
    for word in inputs:
        path = Path(word)
        if path.is_dir():
            found = [f for f in sorted(path.iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise DataError(
                    f"--input {word} is a folder without images (looked for "
                    f"{', '.join(IMAGE_SUFFIXES)})."
                )
        elif path.is_file():
            found = [path]
        else:
            found = [f for f in map(Path, sorted(glob.glob(word, recursive=True))) if f.is_file()]
            if not found:
                raise DataError(f"--input {word}: there is no such file.")
        sources += found
    into = Path(output)
    many = len(sources) > 1 or any(Path(word).is_dir() for word in inputs)
    if many or output.endswith("/") or into.is_dir():
        if into.is_file() or (many and into.suffix.lower() in IMAGE_SUFFIXES):
            raise DataError(
                f"--output {output} is one file, and --input names {len(sources)} pictures: name a "
                "folder."
            )
        targets = [into / source.name for source in sources]
    else:
        targets = [into]
    for source, target in zip(sources, targets, strict=True):
        if target.exists() and target.samefile(source):
            raise DataError(f"--output {output} would replace the picture {source} itself.")
    if len(set(targets)) < len(targets):
        twice = next(t.name for t in targets if targets.count(t) > 1)
        raise DataError(f"--input names two pictures {twice}: in --output one would replace other.")
    return list(zip(sources, targets, strict=True))
