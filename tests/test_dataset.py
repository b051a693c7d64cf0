"""Datasets: embedded, npz, folders of images, torchvision's files; their errors; loaders."""

import gzip
import io
import os
import re
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import files
from dataset import DataError, ImageArray, build_loader, split_train
from tasks import DATASETS

OPTIONS = {
    "resize": None,
    "min_side": 1,
    "augment": False,
    "noise": 0.0,
    "normalize": True,
    "seed": 0,
}


def load_data(name, **options):
    return DATASETS[name].build(**options)


def array(n=20, side=8, channels=1, **options):
    generator = torch.Generator().manual_seed(1)
    shape = (n, channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageArray(images, torch.arange(n) % 3, **options)


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(4) % 3,
        **changes,
    }
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


# ---------------------------------------------------------------------------------------------
# Images in memory


def test_digits():
    data = load_data("digits", data_path="", **OPTIONS)
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.sample_shape == (1, 8, 8)
    assert data.num_outputs == 10
    whole = torch.stack([data.train[i][0] for i in range(len(data.train))])
    assert whole.mean().item() == pytest.approx(0, abs=1e-5)
    assert whole.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_pixels_stay_raw_without_normalisation():
    data = load_data("digits", data_path="", **(OPTIONS | {"normalize": False}))
    image, _ = data.train[0]
    assert image.min() >= 0
    assert 0.9 < image.max() <= 1


def test_small_images_go_up_to_what_the_model_needs():
    data = load_data("digits", data_path="", **(OPTIONS | {"min_side": 32}))
    assert data.sample_shape == (1, 32, 32)
    assert data.train[0][0].shape == (1, 32, 32)
    assert "needs at least 32x32" in data.notes[0]
    assert load_data("digits", data_path="", **(OPTIONS | {"resize": 12})).notes == []


def test_batches_equal_single_samples():
    images = array(mean=[0.5], std=[0.25])
    batch, labels = images.__getitems__([3, 1])
    torch.testing.assert_close(batch[0], images[3][0])
    assert labels.tolist() == [0, 1]
    expected = (images.images[3].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch[0], expected)


def test_random_crops_are_shifts():
    images = torch.rand(50, 2, 8, 8)
    cropped = dataset.random_crop(images, padding=2)
    padded = torch.nn.functional.pad(images, [2] * 4)
    for image, original in zip(cropped, padded, strict=True):
        shifts = [original[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        assert any(torch.equal(image, shift) for shift in shifts)


def test_flips_mirror_half():
    images = array(n=200, flip=True)
    batch, _ = images.__getitems__(range(200))
    plain = images.images.float() / 255
    same = (batch == plain).flatten(1).all(1)
    mirrored = (batch == plain.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 60 < same.sum() < 140


def test_test_noise_is_repeatable_and_training_noise_is_not():
    fixed, fresh = array(noise=0.5, noise_seed=3), array(noise=0.5)
    torch.testing.assert_close(fixed[4][0], fixed.__getitems__([1, 4])[0][1])
    assert not torch.equal(fresh[4][0], fresh[4][0])
    spread = (fixed.__getitems__(range(20))[0] - fixed.images / 255).std()
    assert spread.item() == pytest.approx(0.5, rel=0.05)


def test_statistics_weight_every_pixel():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = dataset.channel_statistics(images)
    pixels = images.double() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(std, pixels.std((0, 2, 3), unbiased=False))


def test_val_split_is_disjoint_and_not_augmented():
    data = load_data("digits", data_path="", **(OPTIONS | {"augment": True}))
    everything = len(data.train)
    parts = split_train(data, 0.25, seed=0)
    assert len(parts.train) + len(parts.val) == everything
    assert len(parts.val) == round(everything * 0.25)
    torch.testing.assert_close(parts.val[0][0], parts.val[0][0])
    assert parts.train.crop
    assert not parts.val.crop
    with pytest.raises(DataError, match=r"both must be at least 1"):
        split_train(data, 0.0001, seed=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["trivial", "rand"])
def test_auto_augment_changes_every_image_by_itself(name, channels):
    plain, changed = array(channels=channels), array(channels=channels, auto_augment=name)
    indices = list(range(20))
    torch.manual_seed(0)
    images, labels = changed.__getitems__(indices)
    torch.manual_seed(0)
    again = torch.stack([dataset.augmentation(name)(image) for image in plain.images])
    assert images.equal(again / 255)
    assert labels.equal(plain.labels)
    assert images.min() >= 0
    assert images.max() <= 1
    different = (images != plain.__getitems__(indices)[0]).flatten(1).any(1)
    assert different.sum() > 5


def test_erasing_blanks_one_rectangle():
    erased = array(n=50, side=16, erasing=0.5, mean=[0.25], std=[0.5])
    plain = array(n=50, side=16, mean=[0.25], std=[0.5])
    indices = list(range(50))
    torch.manual_seed(0)
    images, wanted = erased.__getitems__(indices)[0], plain.__getitems__(indices)[0]
    blank = images != wanted
    share = blank.flatten(1).any(1).double().mean()
    assert 0.2 < share < 0.8
    assert (images[blank] == 0).all()
    for mask in blank[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert inside.double().mean() > 0.9  # a pixel may have been 0 before


def test_nothing_held_out_or_tested_is_augmented():
    changes = {"augment": True, "auto_augment": "rand", "random_erasing": 1.0}
    data = load_data("digits", data_path="", **(OPTIONS | changes))
    parts = split_train(data, 0.25, seed=0)
    for part in (parts.val, parts.test):
        assert part[3][0].equal(part[3][0])
        assert not part.crop
        assert part.auto_augment is None
        assert part.erasing == 0
    assert parts.train.auto_augment == "rand"
    assert parts.train.erasing == 1
    assert (parts.train[3][0] == 0).any()


def test_a_loader_mixes_whole_batches():
    def mix(images, labels):
        return images + images.flip(0), labels + labels.flip(0)

    for data in (array(), [array()[i] for i in range(20)]):
        plain = list(build_loader(data, batch_size=6, shuffle=True))
        mixed = list(build_loader(data, batch_size=6, shuffle=True, mix=mix))
        for (x, y), (found, labels) in zip(plain, mixed, strict=True):
            assert found.equal(x + x.flip(0))
            assert labels.equal(y + y.flip(0))


def test_limit_keeps_the_first():
    limited = dataset.limit(array(), 4)
    assert len(limited) == 4
    torch.testing.assert_close(limited[3][0], array()[3][0])
    assert len(dataset.limit(array(), 400)) == 20


# ---------------------------------------------------------------------------------------------
# npz


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    arrays = write_npz(path, class_names=np.array(["a", "b", "c"]))
    data = load_data("npz", data_path=str(path), **(OPTIONS | {"normalize": False}))
    assert data.sample_shape == (3, 6, 5)
    assert data.class_names == ("a", "b", "c")
    image, label = data.train[7]
    np.testing.assert_allclose(image, arrays["x_train"][7].transpose(2, 0, 1) / 255, rtol=1e-6)
    assert label == 1
    gray = np.zeros((4, 6, 5), np.uint8)
    write_npz(path, x_train=np.zeros((12, 6, 5), np.uint8), x_test=gray)
    assert load_data("npz", data_path=str(path), **OPTIONS).sample_shape == (1, 6, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test; it holds x_test"),
        ({"x_train": np.zeros((12, 6, 5, 3))}, "must be uint8 .* got float64"),
        ({"x_train": np.zeros((12, 30), np.uint8)}, r"must be uint8 of shape .* \(12, 30\)"),
        ({"x_train": np.zeros((12, 6, 5, 2), np.uint8)}, r"1 or 3\), got uint8 \(12, 6, 5, 2\)"),
        ({"x_train": np.zeros((12, 9, 9, 3), np.uint8)}, "training and test images differ"),
        ({"y_train": np.arange(11)}, r"one integer per image, \(12,\), got int64 \(11,\)"),
        ({"y_train": np.zeros(12)}, "one integer per image"),
        ({"y_train": np.arange(12) - 1}, r"labels must lie in 0 … 10, found -1 … 10"),
        ({"class_names": np.array(["a", "b"])}, r"labels must lie in 0 … 1, found 0 … 2"),
        (
            {"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)},
            "x_test is empty",
        ),
    ],
)
def test_bad_npz(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    write_npz(path, **changes)
    with pytest.raises(DataError, match=message):
        load_data("npz", data_path=str(path), **OPTIONS)


def test_missing_and_damaged_npz(tmp_path):
    with pytest.raises(DataError, match=r"must name an existing .npz file"):
        load_data("npz", data_path=str(tmp_path), **OPTIONS)
    path = tmp_path / "a.npz"
    write_npz(path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            load_data("npz", data_path=str(path), **OPTIONS)


def write_archive(path, **members):
    """Write members as they are: arrays, or bytes of a .npy file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            if not isinstance(member, bytes):
                file = io.BytesIO()
                np.save(file, member)
                member = file.getvalue()
            archive.writestr(f"{name}.npy", member)


def header(shape, dtype="|u1"):
    """Return the head of a .npy file that says what it likes."""
    file = io.BytesIO()
    content = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.array([0] * 11 + [10**9])}, r"name 1,000,000,001 classes, .* 16 samples"),
        ({"class_names": np.array("all")}, r"class_names must be a list of names.*\(\)"),
        ({"class_names": np.zeros((3, 2))}, "class_names must be a list of names"),
        ({"class_names": np.array([None, {}])}, "holds Python objects"),
        ({"x_train": np.zeros((12, 0, 0, 3), np.uint8)}, "is 0x0: it has no pixels"),
        ({"x_train": header((10**12, 6, 5, 3))}, "speaks of uint8 .* and the file has 0 bytes"),
        ({"x_train": header((-12, 6, 5, 3))}, "speaks of uint8"),
        ({"y_train": header((2**62, 2**62), "<i8")}, "speaks of int64"),
        ({"x_train": b"\x93NUMPY\x01\x00\xff\xff"}, "damaged"),
        ({"x_train": b"\x93NUMPY\x01\x00\x06\x00((((\n "}, "the header of x_train.npy"),
        ({"x_train": b"\x93NUMPY\x09\x00"}, "unknown version"),
        ({"x_train": b""}, "damaged"),
        ({"y_test": np.array([0, 1, 2, 2**63], np.uint64)}, r"name 9,223.* classes"),
        ({"x_test": np.zeros((4, 1, 2**27, 1), np.uint8)}, "pictures of up to 67,108,864 are read"),
    ],
)
def test_hostile_npz(tmp_path, changes, message):
    path = tmp_path / "hostile.npz"
    arrays = {
        "x_train": np.zeros((12, 6, 5, 3), np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": np.zeros((4, 6, 5, 3), np.uint8),
        "y_test": np.arange(4) % 3,
    }
    write_archive(path, **{**arrays, **changes})
    with pytest.raises(DataError, match=message):
        load_data("npz", data_path=str(path), **OPTIONS)


def test_an_array_named_npz(tmp_path):
    path = tmp_path / "a.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros((3, 4)))
    with pytest.raises(DataError, match=r"damaged, or no \.npz file"):
        load_data("npz", data_path=str(path), **OPTIONS)


def test_members_nobody_asked_for_stay_packed(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    arrays = {
        "x_train": np.asfortranarray(np.arange(12 * 90).astype(np.uint8).reshape(12, 6, 5, 3)),
        "y_train": np.arange(12, dtype=">i2") % 3,
        "x_test": np.zeros((4, 6, 5, 3), np.uint8),
        "y_test": np.arange(4) % 3,
    }
    write_archive(path, **arrays, bomb=bytes(10**6), objects=np.array([{}]))
    opened = []
    original = zipfile.ZipFile.open

    def watched(self, name, *args, **kwargs):
        opened.append(name.filename)
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", watched)
    data = load_data("npz", data_path=str(path), **(OPTIONS | {"normalize": False}))
    assert set(opened) == {f"{name}.npy" for name in arrays}
    image, label = data.train[7]
    np.testing.assert_allclose(image * 255, arrays["x_train"][7].transpose(2, 0, 1), rtol=1e-6)
    assert label == 1


def test_more_than_the_memory_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_npz(path)
    monkeypatch.setattr(files, "memory_size", lambda device: 1000)
    with pytest.raises(DataError, match=r"this machine has 0\.0 GB"):
        load_data("npz", data_path=str(path), **OPTIONS)


# ---------------------------------------------------------------------------------------------
# Folders


def make_folders(root, parts=("train", "test"), classes=("cat", "dog"), side=40):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_folders(tmp_path, name):
    make_folders(tmp_path, parts=("train", "val"))
    data = load_data(name, data_path=str(tmp_path), **(OPTIONS | {"resize": 32, "augment": True}))
    assert data.name == name
    assert data.class_names == ("cat", "dog")
    assert data.sample_shape == (3, 32, 32)
    assert data.train[0][0].shape == data.test[5][0].shape == (3, 32, 32)
    torch.testing.assert_close(data.test[5][0], data.test[5][0])
    assert not torch.equal(data.train[0][0], data.train[0][0])
    parts = split_train(data, 0.5, seed=0)
    assert (len(parts.train), len(parts.val)) == (3, 3)
    torch.testing.assert_close(parts.val[0][0], parts.val[0][0])
    images, labels = next(iter(build_loader(data.test, batch_size=4, num_workers=1)))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1]


def test_folders_are_augmented_and_erased(tmp_path):
    make_folders(tmp_path)
    changes = {"resize": 32, "auto_augment": "rand", "random_erasing": 1.0}
    data = load_data("imagefolder", data_path=str(tmp_path), **(OPTIONS | changes))
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert (data.train[0][0] == 0).all(0).any()
    torch.testing.assert_close(data.test[0][0], data.test[0][0])
    parts = split_train(data, 0.5, seed=0)
    torch.testing.assert_close(parts.val[0][0], parts.val[0][0])


def test_bad_folders(tmp_path):
    def load():
        return load_data("imagefolder", data_path=str(tmp_path), **OPTIONS)

    with pytest.raises(DataError, match=r"needs .*train/<class>"):
        load()
    make_folders(tmp_path, parts=("train",))
    with pytest.raises(DataError, match=r"test/<class>/\* \(or val"):
        load()
    make_folders(tmp_path, parts=("test",), classes=("cat", "cow"))
    with pytest.raises(DataError, match=r"differ: cow, dog"):
        load()
    (tmp_path / "test/dog").mkdir()
    with pytest.raises(DataError, match=r"test: .*\bdog"):
        load()


def test_a_damaged_image_is_named(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "test/cat/1.png").write_bytes(b"no image")
    data = load_data("imagefolder", data_path=str(tmp_path), **(OPTIONS | {"resize": 16}))
    with pytest.raises(DataError, match=r"test/cat/1\.png cannot be read as an image"):
        data.test[1]


def test_imagenet_missing(tmp_path):
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val\.tar"):
        load_data("imagenet", data_path=str(tmp_path), **OPTIONS)


def bomb(height, width):
    """Return a PNG file that speaks of more pixels than it holds."""

    def chunk(kind, content):
        return (
            len(content).to_bytes(4, "big")
            + kind
            + content
            + zlib.crc32(kind + content).to_bytes(4, "big")
        )

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def spoil(path, how):
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "folder":
        path.mkdir()
    elif how == "gone":
        path.symlink_to("nowhere")
    else:
        content = {
            "huge": bomb(50_000, 50_000),
            "large": bomb(13_000, 13_000),
            "empty": bomb(0, 0),
            "short": bomb(300, 300),
            "narrow": bomb(1, 2**20),
            "text": b"no image",
            "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        }
        path.write_bytes(content[how])


SPOILT = {
    "pipe": "no regular file",
    "device": "no regular file",
    "huge": "cannot be read as an image: .*2500000000 pixels",
    "large": r"is 13000x13000, 169,000,000 pixels, and pictures of up to 67,108,864 are read",
    "empty": "cannot be read as an image|has no pixels",
    "short": "cannot be read as an image",
    "narrow": r"is 1x1048576, so narrow that it would be 18x18874368",
    "text": "cannot be read as an image",
    "program": "cannot be read as an image",
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_images_in_class_folders(tmp_path, how, workers):
    if workers and how not in ("pipe", "large"):
        pytest.skip("two kinds in a loading process are enough")
    make_folders(tmp_path, classes=("cat", "dog"))
    spoil(tmp_path / "test/cat/1.png", how)
    data = load_data("imagefolder", data_path=str(tmp_path), **(OPTIONS | {"resize": 16}))
    with pytest.raises(DataError, match=SPOILT[how]) as failure:
        list(build_loader(data.test, batch_size=2, num_workers=workers))
    message = str(failure.value)
    assert message.startswith(str(tmp_path / "test/cat/1.png"))
    assert "Traceback" not in message
    assert "\n" not in message


@pytest.mark.parametrize("how", [*SPOILT, "gone", "folder"])
def test_spoilt_pictures(tmp_path, how):
    make_folders(tmp_path, classes=("cat",))
    path = tmp_path / "test/cat/1.png"
    spoil(path, how)
    if how == "narrow":  # nothing is resized here: half a picture stays half a picture
        message = "cannot be read as an image"
    else:
        message = SPOILT.get(how, "cannot be read as an image")
    with pytest.raises(DataError, match=message):
        dataset.read_image(path, color=False)
    # What is no file is no picture of a folder; everything else is refused by name.
    if how in ("pipe", "device", "gone", "folder"):
        _, names, _ = dataset.read_image_folders([str(path.parent)], True, "--test_dir")
        assert names == ["cat/0.png", "cat/2.png"]
    else:
        with pytest.raises(DataError, match=r"1\.png"):
            dataset.read_image_folders([str(path.parent)], True, "--test_dir")


def test_pixels_are_those_of_whole_pictures(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (700, 1900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    weights, offset = files.LUMA["photo"]
    luma = np.round(pixels @ np.array(weights) + offset).clip(0, 255).astype(np.uint8)
    image, changed = dataset.read_image(tmp_path / "a.png", color=False)
    assert changed
    np.testing.assert_array_equal(image[0], luma)
    deep = rng.integers(0, 65536, (700, 1900), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "b.png")
    image, _ = dataset.read_image(tmp_path / "b.png", color=False)
    np.testing.assert_array_equal(image[0], np.round(deep * (255 / 65535)).astype(np.uint8))


# ---------------------------------------------------------------------------------------------
# torchvision


def write_mnist(folder, counts=(30, 10)):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for prefix, n in zip(("train", "t10k"), counts, strict=True):
        header = np.array([0x803, n, 28, 28], ">u4").tobytes()
        images = rng.integers(0, 256, n * 28 * 28, dtype=np.uint8).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images)
        labels = np.array([0x801, n], ">u4").tobytes() + (np.arange(n) % 10).astype("u1").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_mnist_from_files_on_disk(tmp_path, name, folder):
    write_mnist(tmp_path / folder / "raw")
    data = load_data(name, data_path=str(tmp_path), **OPTIONS)
    assert (len(data.train), len(data.test)) == (30, 10)
    assert data.sample_shape == (1, 28, 28)
    assert data.train[3][1] == 3


def write_idx(path, array, kind=8, shape=None):
    shape = array.shape if shape is None else shape
    head = bytes([0, 0, kind, len(shape)]) + np.array(shape, ">u4").tobytes()
    path.write_bytes(head + array.tobytes())


IMAGES = np.zeros((30, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("kind", "array", "details", "message"),
    [
        ("labels-idx1", np.zeros(20, np.uint8), {}, "30 images and 20 labels"),
        ("labels-idx1", np.full(30, 255, np.uint8), {}, "labels in 255 … 255, and there are 10"),
        ("labels-idx1", np.zeros((30, 1), np.uint8), {}, "could not be read"),
        ("labels-idx1", np.zeros(30, ">f4"), {"kind": 13}, "could not be read"),
        ("images-idx3", np.zeros((30, 28, 28), ">f4"), {"kind": 13}, "could not be read"),
        ("images-idx3", IMAGES, {"kind": 10}, "could not be read"),
        ("images-idx3", IMAGES, {"shape": (2**31, 28, 28)}, "could not be read"),
        ("images-idx3", IMAGES, {"shape": (0, 28, 28)}, "could not be read"),
        ("images-idx3", np.zeros((0, 28, 28), np.uint8), {}, "0 images|could not be read"),
        ("images-idx3", np.zeros((30, 5, 28), np.uint8), {}, r"images of \(1, 5, 28\)"),
        ("images-idx3", np.zeros((30, 0, 0), np.uint8), {}, "no pixels|could not be read"),
    ],
)
def test_hostile_idx(tmp_path, monkeypatch, kind, array, details, message):
    import torchvision

    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    write_mnist(tmp_path / "MNIST/raw")
    write_idx(tmp_path / f"MNIST/raw/train-{kind}-ubyte", array, **details)
    with pytest.raises(DataError, match=message):
        load_data("mnist", data_path=str(tmp_path), **OPTIONS)


def test_damaged_mnist(tmp_path):
    write_mnist(tmp_path / "MNIST/raw")
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"xx")
    with pytest.raises(DataError, match=re.escape("train-images-idx3-ubyte.gz")):
        load_data("mnist", data_path=str(tmp_path), **OPTIONS)


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-python.tar.gz"), ("mnist", "train-images-idx3-ubyte.gz")],
)
def test_a_failed_download_names_the_files_and_leaves_nothing(tmp_path, monkeypatch, name, file):
    import torchvision

    def fail(self):
        half = tmp_path / ".download-x/half"
        assert any(tmp_path.iterdir())
        half.parent.mkdir(exist_ok=True)
        raise OSError("no network")

    class_name = {"cifar10": "CIFAR10", "mnist": "MNIST"}[name]
    monkeypatch.setattr(getattr(torchvision.datasets, class_name), "download", fail)
    with pytest.raises(DataError, match=r"no network(?s:.*)Put these files") as failure:
        load_data(name, data_path=str(tmp_path), **OPTIONS)
    assert str(tmp_path) in str(failure.value)
    assert file in str(failure.value)
    (tmp_path / ".download-x").rmdir()
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_moved_when_complete(tmp_path, monkeypatch):
    import torchvision

    def download(self):
        write_mnist(tmp_path / "source")
        self_raw = tmp_path / self.raw_folder
        self_raw.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source").rename(self_raw)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    data = load_data("mnist", data_path=str(tmp_path), **OPTIONS)
    assert len(data.train) == 30
    assert {path.name for path in tmp_path.iterdir()} == {"MNIST"}


def test_archives_on_disk_need_no_download(tmp_path, monkeypatch):
    write_mnist(tmp_path / "plain")
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for path in (tmp_path / "plain").iterdir():
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))

    import torchvision

    def download(self):  # what the real one does with files that are there already
        for path in sorted(self_path.glob("*.gz") if (self_path := raw) else []):
            from pathlib import Path

            here = Path(self.raw_folder, path.name)
            assert here.read_bytes() == path.read_bytes()
            here.with_suffix("").write_bytes(gzip.decompress(here.read_bytes()))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(load_data("mnist", data_path=str(tmp_path / "data"), **OPTIONS).test) == 10


# ---------------------------------------------------------------------------------------------
# Loaders


def order(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return torch.cat([labels for _, labels in loader]).tolist()


def test_order_depends_on_seed_and_epoch_alone():
    images = ImageArray(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.arange(30))
    first = build_loader(images, batch_size=8, shuffle=True, seed=1)
    second = build_loader(images, batch_size=8, shuffle=True, seed=1)
    torch.rand(7)
    assert order(first, 1) != order(first, 2)
    assert order(second, 2) == order(first, 2)
    assert sorted(order(first, 3)) == list(range(30))
    assert order(build_loader(images, batch_size=8, shuffle=True, seed=2), 2) != order(first, 2)


def test_workers_give_the_same_batches():
    images = array(noise=0.1, noise_seed=0)
    plain = [x for x, _ in build_loader(images, batch_size=6)]
    worked = [x for x, _ in build_loader(images, batch_size=6, num_workers=2)]
    for a, b in zip(plain, worked, strict=True):
        torch.testing.assert_close(a, b)
    assert [len(x) for x in plain] == [6, 6, 6, 2]
