import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DataError
from tasks.pictures import Picture, check_target, find_pictures, read_picture, write_picture

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(channels, alpha, bits):
    levels = 2**bits - 1
    values = (torch.rand(channels + alpha, 13, 9) * levels).round() / levels
    return Picture(values[:channels], values[channels:] if alpha else None, bits)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [0, 1])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_round_trip(channels, alpha, bits, suffix):
    if suffix == ".tif" and bits == 16 and channels + alpha > 1:
        pytest.importorskip("tifffile")
    before = picture(channels, alpha, bits)
    check_target(f"x{suffix}", before)
    assert write_picture(f"x{suffix}", before) == ""
    after = read_picture(f"x{suffix}")
    assert after.bits == bits
    close(after.pixels, before.pixels)
    assert (after.alpha is None) == (not alpha)
    if alpha:
        close(after.alpha, before.alpha)


def test_sixteen_bits_are_what_pillow_reads_too():
    before = picture(1, 0, 16)
    write_picture("x.png", before)
    with Image.open("x.png") as image:
        array = np.array(image).astype(np.int64)
    close(torch.from_numpy(array / 65535).float(), before.pixels[0])


def test_values_are_clipped():
    write_picture("x.png", Picture(torch.tensor([[[-1.0, 0.5, 2.0]]])))
    close(read_picture("x.png").pixels, torch.tensor([[[0.0, 128 / 255, 1.0]]]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_modes(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    image.convert(mode).save("x.tif" if mode == "CMYK" else "x.png")
    read = read_picture("x.tif" if mode == "CMYK" else "x.png")
    assert read.pixels.shape == (1 if mode in ("1", "L", "LA") else 3, 8, 6)
    assert (read.alpha is not None) == mode.endswith("A")


def test_a_camera_turned_on_its_side():
    image = Image.fromarray(np.zeros((8, 6), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    image.save("x.jpg", exif=exif)
    assert read_picture("x.jpg").pixels.shape == (1, 6, 8)


def test_what_a_format_cannot_hold_is_said():
    lost = write_picture("x.jpg", picture(3, 1, 16))
    assert lost == " (16 bits became 8, alpha was dropped: .jpg holds no more)"
    assert read_picture("x.jpg").bits == 8


def test_refused_files():
    Path("broken.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((4, 4), np.float32)).save("float.tif")
    with pytest.raises(DataError, match=r"broken.png cannot be read as an image"):
        read_picture("broken.png")
    with pytest.raises(DataError, match=r"float.tif .*where white lies"):
        read_picture("float.tif")
    with pytest.raises(DataError, match=r"the suffix .xyz names no format"):
        check_target("x.xyz", picture(1, 0, 8))


def test_deep_color_tiff_without_tifffile(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match="pip install tifffile"):
        check_target("x.tif", picture(3, 0, 16))


def test_finding():
    for name in ("a/1.png", "a/2.jpg", "a/notes.txt", "b/3.png", "empty/x.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")

    def found(inputs, output):
        return [(str(s), str(t)) for s, t in find_pictures(inputs, output)]

    assert found(["b/3.png"], "out.png") == [("b/3.png", "out.png")]
    assert found(["b/3.png"], "out/") == [("b/3.png", "out/3.png")]
    assert found(["b/3.png"], "a") == [("b/3.png", "a/3.png")]
    assert found(["a"], "out") == [("a/1.png", "out/1.png"), ("a/2.jpg", "out/2.jpg")]
    assert found(["*/*.png"], "out") == [("a/1.png", "out/1.png"), ("b/3.png", "out/3.png")]
    for inputs, output, message in [
        (["empty"], "out", "--input empty is a folder without images"),
        (["none.png"], "x.png", "--input none.png: there is no such file"),
        (["a"], "x.png", "name a folder"),
        (["a/1.png"], "a/1.png", "would replace the picture a/1.png itself"),
        (["a", "a/1.png"], "out", "two pictures 1.png"),
    ]:
        with pytest.raises(DataError, match=message):
            find_pictures(inputs, output)
