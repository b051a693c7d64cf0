"""Point clouds from files: every format, and what is wrong with files that nobody trusts."""

import os
import struct

import pytest
import torch

from files import DataError
from tasks.clouds import MOST_BYTES, read_cloud, sample_mesh

SQUARE = "0 0 0\n2 0 0\n2 2 0\n0 2 0\n"
HEAD = "ply\nformat {}\ncomment by hand\nelement vertex 4\nproperty float x\nproperty float y\n"
HEAD += "property uchar red\nproperty float z\nelement face 1\n"
HEAD += "property list uchar int vertex_indices\nend_header\n"
ASCII = HEAD.format("ascii 1.0") + "0 0 9 0\n2 0 9 0\n2 2 9 0\n0 2 9 0\n4 0 1 2 3\n"


def binary(order):
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    body = b"".join(
        struct.pack(f"{order}ffBf", *row)
        for row in ((0, 0, 9, 0), (2, 0, 9, 0), (2, 2, 9, 0), (0, 2, 9, 0))
    )
    return HEAD.format(f"{name} 1.0").encode() + body + struct.pack(f"{order}B4i", 4, 0, 1, 2, 3)


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_cloud(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.off", f"OFF\n# a square\n4 1 0\n{SQUARE}4 0 1 2 3\n"),
        ("glued.off", f"OFF4 1 0\n{SQUARE}4 0 1 2 3 255 0 0\n"),
        ("same_line.OFF", f"OFF 4 2 0\n{SQUARE}3 0 1 2\n3 0 2 3\n"),
        ("text.ply", ASCII),
        ("little.ply", binary("<")),
        ("big.ply", binary(">")),
    ],
)
def test_meshes(tmp_path, name, content):
    surface = read(tmp_path, name, content)
    assert surface.vertices.tolist() == [[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0]]
    assert surface.triangles.tolist() == [[0, 1, 2], [0, 2, 3]]
    points = surface.sample(4000, torch.Generator().manual_seed(0))
    assert points.shape == (4000, 3)
    assert (points[:, 2] == 0).all()
    cells = (points[:, :2] // 1).long().clamp(0, 1) @ torch.tensor([2, 1])
    assert torch.bincount(cells).sub(1000).abs().max() < 120  # four standard deviations


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xyz", "# x y z\n1 2 3 0.5\n\n4 5 6 0.5\n"),
        ("a.off", "OFF\n2 0 0\n1 2 3\n4 5 6\n"),
        (
            "a.ply",
            "ply\nformat ascii 1.0\nelement vertex 2\nproperty double x\nproperty double y\n"
            "property double z\nend_header\n1 2 3\n4 5 6\n",
        ),
    ],
)
def test_clouds(tmp_path, name, content):
    surface = read(tmp_path, name, content)
    assert surface.triangles is None
    assert surface.vertices.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert len(surface.sample(9, torch.Generator())) == 2


def test_large_triangles_get_more_points():
    corners = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 3, 0], [9, 0, 0], [10, 0, 0], [9, 1, 0]])
    triangles = torch.tensor([[0, 1, 2], [3, 4, 5]])  # nine areas to one
    points = sample_mesh(corners, triangles, 10000, torch.Generator().manual_seed(0))
    assert abs((points[:, 0] < 5).float().mean().item() - 0.9) < 0.012


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", "", "it holds no points"),
        ("a.xyz", "1 2\n", r"a point of 2 numbers \('1 2'\)"),
        ("a.xyz", "1 2 x\n", "could not convert string to float: 'x'"),
        ("a.xyz", "1 2 nan\n", "no finite numbers"),
        ("a.xyz", "1e300 2 3\n", "beyond 1e15"),
        ("a.xyz", b"\xff\xfe1 2 3", "'ascii' codec can't decode"),
        ("a.off", "COFF\n", "does not begin with OFF"),
        ("a.off", "", "does not begin with OFF"),
        ("a.off", "OFF\n", "numbers of vertices and faces are missing"),
        (
            "a.off",
            "OFF\n1000000000 1 0\n1 2 3\n",
            "1,000,000,000 vertices and 1 faces, and 1 lines",
        ),
        ("a.off", "OFF\n-1 1 0\n1 2 3\n", "-1 vertices"),
        ("a.off", f"OFF\n4 1 0\n{SQUARE}3 0 1 4\n", "name vertices 0 … 4, and there are 4"),
        ("a.off", f"OFF\n4 1 0\n{SQUARE}3 0 -1 2\n", "name vertices -1 … 2"),
        ("a.off", f"OFF\n4 1 0\n{SQUARE}9 0 1 2\n", "a face of 9 corners with 3 numbers"),
        ("a.off", f"OFF\n4 1 0\n{SQUARE}2 0 1\n", "a face of 2 corners"),
        ("a.off", f"OFF\n4 1 0\n{SQUARE}3 0 0 0\n", "faces have no area"),
        ("a.off", f"OFF\n4 1 0\n{SQUARE}3 0 1 99999999999999999999\n", "cannot be read"),
        ("a.ply", "", "no PLY header"),
        ("a.ply", ASCII[: ASCII.index("end_header")], "no PLY header"),
        ("a.ply", ASCII.replace("ascii 1.0", "ebcdic 1.0"), "a line that says nothing"),
        ("a.ply", ASCII.replace("property float y", "property half y"), "that says nothing"),
        ("a.ply", ASCII.replace("list uchar", "list uber"), "that says nothing"),
        ("a.ply", ASCII.replace("property float z", "property float w"), "vertices lack z"),
        ("a.ply", ASCII.replace("vertex 4", "vertex 400"), "speaks of 401 lines, and 5 follow"),
        ("a.ply", ASCII.replace("vertex 4", "vertex -4"), "speaks of -4 elements vertex"),
        ("a.ply", ASCII.replace("vertex 4", "vertex x"), "invalid literal for int"),
        ("a.ply", ASCII.replace("2 0 9 0", "2 0"), "a vertex with fewer numbers"),
        ("a.ply", ASCII.replace("element vertex 4", "element edge 4"), "not begin with vertices"),
        ("a.ply", ASCII.replace("format ascii 1.0\n", ""), "says no format, or no elements"),
        ("a.ply", binary("<")[:-6], "ends amid its faces"),
        ("a.ply", binary("<")[:-30], "speaks of 4 vertices of 13 bytes"),
        ("a.ply", binary("<").replace(b"vertex 4", b"vertex 999999999"), "bytes follow"),
        (
            "a.ply",
            binary("<").replace(b"uchar int", b"uchar float"),
            "name vertices|cannot be read",
        ),
    ],
)
def test_hostile_files(tmp_path, name, content, message):
    if "float" in message or b"uchar float" in (content if isinstance(content, bytes) else b""):
        surface = None
        try:
            surface = read(tmp_path, name, content)
        except DataError:
            return
        assert surface is None, "indices that are no whole numbers"
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, name, content)
    assert str(tmp_path / name) in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.off")
    for name, message in (("pipe.off", "no regular file"), ("none.off", "No such file")):
        with pytest.raises(DataError, match=message):
            read_cloud(tmp_path / name)
    with open(tmp_path / "huge.xyz", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(DataError, match="268,435,457 bytes, and up to 268,435,456 are read"):
        read_cloud(tmp_path / "huge.xyz")
