"""Strategies that draw cases: mostly whole inputs with one or two things wrong."""

import contextlib
import functools
import io
import itertools
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

import models
from builders import all_options
from checkpoints import content_digest
from main import main
from tests.conftest import TinyNet
from tests.fuzz.harness import PIPE, Case
from utils import WriteError, format_args

WILD_NUMBERS = ["-1", "0", "1", "2", "3", "7", "0.5", "1e-9", "-0.0", "1e30", "1000000000"]
WILD_NUMBERS += ["100000000000000000000", "-9223372036854775809", "inf", "-inf", "nan", "x", ""]
WILD_NUMBERS += ["0x10", "1_000", "1,3", "[1]", "[]", "\uff11"]
WILD_WORDS = (
    st.sampled_from(
        ["", " ", "None", "True", "a: b", '"', "/dev/zero", "/proc/self/mem", "x" * 300]
    )
    | st.sampled_from(
        ["x" * 300, "a\0b", "é", "\udcff", "pca:0", "pca:99999999999", "pca:²", "raw", "%s"]
    )
    | st.sampled_from([".", "..", "{}", "[1, 2]", "5"])
    | st.text(max_size=8)
)
BASE = ("--device", "cpu", "--dry_run")
TINY = ("--model", "tiny", "--layer", "Conv2d", "--batch_size", "4", "--num_workers", "0", *BASE)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8])


# ---------------------------------------------------------------------------------------------
# Flags and args files


def _words(each: Any) -> st.SearchStrategy[str]:
    if each.choices is not None:
        return st.sampled_from([*map(str, each.choices)] * 2 + ["nothing", ""])
    if each.kind in (int, float):
        return st.sampled_from(WILD_NUMBERS)
    return WILD_WORDS


@st.composite
def flags(draw: st.DrawFn) -> Case:
    """Any flags with any values, up to the point where work would begin; some runs in full."""
    known = {name: each for name, (_, each) in all_options().items()}
    model = draw(st.sampled_from([*models.MODELS, "tiny", "tiny"]))
    argv = ["--model", model, "--dataset", "digits", "--device", "cpu"]
    whole = draw(st.integers(0, 3)) == 0
    if whole:
        argv = ["--model", "tiny", "--dataset", "digits", "--limit_train", "12"]
        argv += ["--limit_test", "6", *BASE, "--batch_size", "5"]
        names = ("layer", "K", "kernel_size", "padding", "sampling_type", "num_samples", "lr")
        names += ("magnitude_type", "similarity_type", "aggregation_type", "lambda_param", "noise")
        names += ("shuffle_pattern", "shuffle_scale", "branch_ratio", "optimizer", "scheduler")
        names += ("criterion", "val_split", "augment", "seed", "lr_step", "momentum", "use_amp")
    else:
        names = tuple(known)
    for name in draw(st.lists(st.sampled_from(names), max_size=6)):
        each = known[name]
        argv.append(f"--{name}")
        if each.kind is bool:
            continue
        words = _words(each)
        if whole and each.choices is None:
            words = st.sampled_from(["-1", "0", "1", "2", "3", "9", "0.5", "nan", "x"])
        argv += draw(st.lists(words, min_size=1, max_size=1 if each.several != "list" else 3))
    if not whole and draw(st.booleans()):
        argv.insert(draw(st.integers(0, len(argv))), draw(WILD_WORDS | st.just("--")))
    return Case(tuple(argv), checks_only=not whole)


@st.composite
def args_files(draw: st.DrawFn) -> Case:
    """An args.txt with some values exchanged, lines of its own, or cut anywhere."""
    known = {name: each for name, (_, each) in all_options().items()}
    values: dict[str, Any] = {name: each.default for name, each in known.items()}
    values |= {"model": "tiny", "dataset": "digits", "layer": "Conv2d"}
    lines = format_args(values).splitlines()
    for name in draw(st.lists(st.sampled_from(list(known)), max_size=4)):
        lines.append(f"{name}: {draw(_words(known[name]) | WILD_WORDS)}")
    for junk in draw(st.lists(WILD_WORDS, max_size=2)):
        lines.insert(draw(st.integers(0, len(lines))), junk)
    content: bytes | str = "\n".join(lines).encode("utf-8", "surrogateescape")
    content = draw(st.sampled_from([content] * 6 + [_spoilt(draw, content), PIPE]))
    return Case(("--config", "args.txt", *BASE), {"args.txt": content}, checks_only=True)


def _spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut a file, or change some of its bytes."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    changed = bytearray(content)
    for at in draw(st.lists(st.integers(0, max(0, len(content) - 1)), min_size=1, max_size=4)):
        if changed:
            changed[at] ^= draw(st.integers(1, 255))
    return bytes(changed)


# ---------------------------------------------------------------------------------------------
# Arrays


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _header(descr: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    content = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, content)
    return file.getvalue()


@functools.cache
def _strange_members() -> list[bytes]:
    return [
        *[_npy(np.zeros(shape, np.uint8)) for shape in ((), (0,), (9,), (9, 0, 0), (9, 3, 5))],
        *[_npy(np.zeros((9, 8, 8, c), np.uint8)) for c in (0, 1, 2, 3)],
        _npy(np.zeros((9, 8, 8))),
        _npy(np.asfortranarray(np.zeros((9, 8, 8), np.uint8))),
        _npy(np.zeros((9, 1, 2**20), np.uint8)),
        *[_npy(np.array([value] * 9)) for value in (0, 255, -1, 10**9, 2**63, "a", 0.5, None)],
        _npy(np.array(["a", "b", "c"])),
        _npy(np.array("all")),
        _npy(np.zeros(9, [("a", "u1")])),
        _npy(np.zeros(9, "M8[s]")),
        *[_header("|u1", shape) for shape in ((10**12, 8, 8), (-9, 8, 8), (2**40, 2**40))],
        _header("<i8", (9,)),
        _header("<i8", (0,)),
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\x06\x00((((\n ",
        b"\x93NUMPY\x03\x00" + b"\xff" * 8,
    ]


@st.composite
def npz(draw: st.DrawFn) -> Case:
    """A whole .npz file in which members are missing, strange, lying or damaged."""
    members = {
        "x_train": _npy(np.full((9, 8, 8), 7, np.uint8)),
        "y_train": _npy(np.arange(9) % 3),
        "x_test": _npy(np.full((4, 8, 8), 9, np.uint8)),
        "y_test": _npy(np.arange(4) % 3),
    }
    names = [*members, "class_names", "other"]
    for name in draw(st.lists(st.sampled_from(names), max_size=2)):
        how = draw(st.integers(0, 3))
        if how == 0:
            members.pop(name, None)
        elif how == 1 and name in members:
            members[name] = _spoilt(draw, members[name])
        else:
            members[name] = draw(st.sampled_from(_strange_members()))
    file = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2]))
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    content = file.getvalue()
    how = draw(st.integers(0, 5))
    content = {0: _spoilt(draw, content), 1: members.get("x_train", b"")}.get(how, content)
    return Case((*TINY, "--dataset", "npz", "--data_path", "a.npz"), {"a.npz": content})


@st.composite
def idx(draw: st.DrawFn) -> Case:
    """The four files of MNIST, with heads and contents that do not belong together."""
    files: dict[str, bytes | str] = {}
    for part, count in (("train", 9), ("t10k", 5)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = np.arange(np.prod(shape)).reshape(shape) % 10
            content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            files[f"MNIST/raw/{part}-{kind}-ubyte"] = content + array.astype("u1").tobytes()
    for name in draw(st.lists(st.sampled_from(list(files)), max_size=2)):
        how, content = draw(st.integers(0, 5)), files[name]
        if how == 0:
            del files[name]
            break
        if how == 1 or content == PIPE:
            files[name] = PIPE
        elif how == 2:
            files[name] = _spoilt(draw, content)
        elif how == 3:
            files[name] = content[:8] + bytes([draw(st.integers(0, 255))]) * (len(content) - 8)
        else:  # another head
            code, axes = draw(st.integers(0, 15)), draw(st.integers(0, 4))
            shape = draw(st.lists(SIZES | st.just(2**31), min_size=axes, max_size=axes))
            files[name] = bytes([0, 0, code, axes]) + np.array(shape, ">u4").tobytes() + content[8:]
    return Case((*TINY, "--dataset", "mnist", "--data_path", "."), files)


# ---------------------------------------------------------------------------------------------
# Pictures


@functools.cache
def _picture(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1 if mode in ("1", "L", "I;16") else None).save(file, format=kind)
    return file.getvalue()


def _bomb(height: int, width: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        total = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + total

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    body = chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@st.composite
def images(draw: st.DrawFn) -> Case:
    """Folders of pictures of any kind, some of them cut, changed, enormous, or no pictures."""
    whole = st.sampled_from(
        [
            *[("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
            *[("JPEG", mode) for mode in ("L", "RGB", "CMYK")],
            *[("BMP", "RGB"), ("GIF", "P"), ("TIFF", "L"), ("TIFF", "F"), ("TIFF", "RGB")],
            *[("PPM", "RGB"), ("WEBP", "RGB")],
        ]
    )
    size = st.sampled_from([(12, 12), (12, 12), (20, 9), (1, 1), (1, 400), (300, 2)])
    bombs = st.sampled_from([(50_000, 50_000), (13_000, 13_000), (0, 0), (1, 2**25), (9, 2**31)])

    def picture() -> bytes | str:
        how = draw(st.integers(0, 11))
        if how == 0:
            return PIPE
        if how == 1:
            return _bomb(*draw(bombs))
        if how == 2:
            return draw(st.binary(max_size=30))
        content = _picture(*draw(whole), draw(size))
        return _spoilt(draw, content) if how < 5 else content

    files = {
        f"{part}/{name}/{i}{draw(st.sampled_from(['.png', '.jpg', '.tif', '.PNG', '.txt']))}": (
            picture() if draw(st.booleans()) else _picture("PNG", "RGB", (12, 12))
        )
        for part in ("train", "test")
        for name in ("a", "b")
        for i in range(2)
    }
    kind = draw(st.sampled_from(["imagefolder", "denoise", "image"]))
    if kind == "imagefolder":
        argv = (*TINY, "--dataset", kind, "--data_path", ".", "--resize", "16")
    elif kind == "denoise":
        folders = ("--train_dir", "train/a", "train/b", "--test_dir", "test/a")
        argv = ("--model", "dncnn", "--depth", "2", "--features", "2", "--dataset", kind, *folders)
        argv += ("--crop_size", "8", "--crops_per_image", "2", "--batch_size", "2", *BASE)
    else:
        argv = ("--model", "dynamic", "--dataset", kind, "--image_path", next(iter(files)))
        argv += ("--limit_train", "200", "--limit_test", "50", *BASE)
    return Case(argv, files)


@st.composite
def clouds(draw: st.DrawFn) -> Case:
    """Folders of point clouds and meshes, some of them cut, changed, or none at all."""
    square = "0 0 0\n2 0 0\n2 2 0\n0 2 1\n"
    head = "ply\nformat {} 1.0\nelement vertex 4\n" + "".join(
        f"property float {axis}\n" for axis in "xyz"
    )
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    table = np.array(square.split(), "<f4").tobytes() + b"\3" + np.arange(3, dtype="<i4").tobytes()
    whole = {
        ".xyz": square.encode(),
        ".off": f"OFF\n4 1 0\n{square}4 0 1 2 3\n".encode(),
        ".ply": f"{head.format('ascii')}{square}3 0 1 2\n".encode(),
        ".PLY": head.format("binary_little_endian").encode() + table,
    }
    files: dict[str, bytes | str] = {}
    for part, name, i in itertools.product(("train", "test"), ("a", "b"), range(2)):
        suffix = draw(st.sampled_from(list(whole)))
        how = draw(st.integers(0, 9))
        content: bytes | str = whole[suffix] if how > 2 else _spoilt(draw, whole[suffix])
        files[f"{part}/{name}/{i}{suffix}"] = PIPE if how == 9 and i else content
    argv = ("--model", "dgcnn", "--width", "0.05", "--K", "2", "--dataset", "pointcloud")
    argv += ("--data_path", ".", "--num_points", draw(st.sampled_from(["2", "4", "9"])), *BASE)
    pad = draw(st.sampled_from([(), ("--pad", "mask"), ("--pad", "repeat")]))
    return Case((*argv, "--batch_size", "4", *pad), files)


# ---------------------------------------------------------------------------------------------
# Checkpoints


@functools.cache
def _checkpoint(kind: str) -> bytes:
    """Return the last.pt of a small run: after an epoch, amid one, or of a network that grew."""
    argv = ["--model", "tiny", "--layer", "Conv2d", "--scheduler", "plateau"]
    if kind == "grown":
        argv = ["--model", "dynamic", "--num_layers", "1"]
    argv += ["--dataset", "digits", "--device", "cpu", "--limit_train", "12", "--limit_test", "6"]
    argv += ["--batch_size", "5", "--save_every", "2", "--num_epochs", "1"]
    stop = WriteError("what was saved amid the epoch stays the last") if kind == "amid" else None
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(models.MODELS, tiny=TinyNet),
        mock.patch("builtins.print"),
        mock.patch("tqdm.tqdm.write"),
        mock.patch("train_eval.check_measured", side_effect=stop),
    ):
        with contextlib.nullcontext() if stop is None else pytest.raises(SystemExit):
            main([*argv, "--output_dir", folder])
        return Path(folder, "last.pt").read_bytes()


def _branches(table: Any, path: tuple = ()) -> list[tuple]:
    """Return the places of all entries of nested tables, and of the first ones of lists."""
    found = []
    entries = table.items() if isinstance(table, dict) else list(enumerate(table))[:3]
    for key, value in entries:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += _branches(value, (*path, key))
    return found


def _holds(table: Any, key: Any) -> bool:
    """Say whether a table or list still has an entry."""
    if isinstance(table, list):
        return isinstance(key, int) and key < len(table)
    return isinstance(table, dict) and key in table


@st.composite
def checkpoints(draw: st.DrawFn) -> Case:
    """A checkpoint that is cut, changed, or lacks entries or holds strange ones."""
    content = _checkpoint(draw(st.sampled_from(["ended", "amid", "grown"])))
    if draw(st.booleans()):
        content = _spoilt(draw, content)
    else:
        table = torch.load(io.BytesIO(content), weights_only=True)
        strange = st.sampled_from(
            [None, "x", -1, 10**20, 0.5, float("nan"), True, [], [1], {}, {"a": 1}, b"x"]
        ) | st.sampled_from([torch.zeros(0), torch.zeros(3, 3), torch.zeros(2, dtype=torch.int64)])
        groups = [[p for p in _branches(table) if p[0] == name] for name in table]
        places = st.sampled_from(groups).flatmap(st.sampled_from)
        for place in draw(st.lists(places, min_size=1, max_size=2)):
            inner: Any = table
            for key in place[:-1]:
                inner = inner[key] if _holds(inner, key) else None
            if not _holds(inner, place[-1]):
                continue
            if draw(st.booleans()):
                del inner[place[-1]]
            else:
                inner[place[-1]] = draw(strange)
        if draw(st.integers(0, 3)):  # no hostile file lacks a right digest
            table.pop("digest", None)
            table["digest"] = content_digest(table)
        else:
            table.pop("digest", None)
            table["format"] = 1
        file = io.BytesIO()
        torch.save(draw(st.sampled_from([table] * 9 + [[table], table.get("model")])), file)
        content = file.getvalue()
    flags = draw(st.sampled_from(CHECKPOINT_FLAGS))
    return Case((*flags, "--device", "cpu"), {"a.pt": content})


CHECKPOINT_FLAGS = [
    ("--test_only", "--checkpoint", "a.pt", "--output_dir", "out"),
    ("--pretrained", "a.pt", "--dry_run", "--dataset", "digits", "--limit_train", "9"),
    ("--resume", "--checkpoint", "a.pt", "--output_dir", "out", "--num_epochs", "2"),
    ("--resume", "--checkpoint", "a.pt", "--output_dir", "out", "--num_epochs", "2"),
]

KINDS = {
    "flags": flags(),
    "args": args_files(),
    "npz": npz(),
    "idx": idx(),
    "images": images(),
    "clouds": clouds(),
    "checkpoints": checkpoints(),
}
