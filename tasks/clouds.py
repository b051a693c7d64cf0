"""Point clouds from files that nobody should trust: OFF and PLY meshes or clouds, and XYZ lists.

Of meshes points are drawn from the faces, evenly over their area; clouds are taken as they are.
Formats: OFF as ModelNet has it (text; also where the counts follow "OFF" without a space); PLY 1.0
as text or binary (vertices with x, y, z, faces with one list); XYZ, a point a line, further
numbers left alone.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files import DataError

__all__ = ["CLOUD_SUFFIXES", "Surface", "read_cloud", "sample_mesh"]

CLOUD_SUFFIXES = (".off", ".ply", ".xyz")
MOST_BYTES = 2**28
PLY_TYPES = {
    **{"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2"},
    **{"ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}


@dataclass(frozen=True)
class Surface:
    """Vertices (V, 3) float64, and the triangles (F, 3) of a mesh; none of a cloud."""

    vertices: Tensor
    triangles: Tensor | None = None

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw so many points of a mesh; of a cloud at most so many of its own: (P, 3)."""
        if self.triangles is not None:
            return sample_mesh(self.vertices, self.triangles, count, generator)
        order = torch.randperm(len(self.vertices), generator=generator)[:count]
        return self.vertices[order]


def sample_mesh(
    vertices: Tensor, triangles: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Draw points from triangles, evenly over their area: (V, 3), (F, 3) -> (count, 3)."""
    corners = vertices[triangles]  # (F, 3, 3)
    first, sides = corners[:, 0], corners[:, 1:] - corners[:, :1]
    areas = torch.linalg.cross(sides[:, 0], sides[:, 1]).norm(dim=1)
    totals = areas.cumsum(0)
    draws = torch.rand(count, 3, generator=generator, dtype=vertices.dtype)
    chosen = torch.searchsorted(totals, draws[:, 0] * totals[-1]).clamp(max=len(areas) - 1)
    u, v = draws[:, 1:].unbind(1)
    outside = u + v > 1  # of the triangle, in the other half of the parallelogram
    u, v = torch.where(outside, 1 - u, u), torch.where(outside, 1 - v, v)
    return first[chosen] + u[:, None] * sides[chosen, 0] + v[:, None] * sides[chosen, 1]


def read_cloud(path: str | os.PathLike) -> Surface:
    """Read a file by its suffix.

    Args:
        path: A regular file: others (pipes, devices) are never opened, they could wait for ever.

    Raises:
        DataError: If it is missing, damaged, too large, or holds no points.
    """
    path = Path(path)
    readers = {".off": read_off, ".ply": read_ply, ".xyz": read_xyz}
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if found.st_size > MOST_BYTES:
            raise ValueError(
                f"it has {found.st_size:,} bytes, and up to {MOST_BYTES:,} are read; thin it out"
            )
        surface = readers[path.suffix.lower()](path.read_bytes())
        check_surface(surface)
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read as a point cloud: {reason}.") from error
    return surface


def check_surface(surface: Surface) -> None:
    """Refuse what has no points, points that are no numbers, and faces without area."""
    vertices, triangles = surface.vertices, surface.triangles
    if len(vertices) == 0:
        raise ValueError("it holds no points")
    if not vertices.isfinite().all() or vertices.abs().max() > 1e15:
        raise ValueError("it has coordinates that are no finite numbers, or beyond 1e15")
    if triangles is None:
        return
    if triangles.min() < 0 or triangles.max() >= len(vertices):
        raise ValueError(
            f"its faces name vertices {int(triangles.min())} … {int(triangles.max())}, and there "
            f"are {len(vertices):,}"
        )
    sides = vertices[triangles[:, 1:]] - vertices[triangles[:, :1]]
    if not torch.linalg.cross(sides[:, 0], sides[:, 1]).norm(dim=1).sum() > 0:
        raise ValueError("its faces have no area")


def text_rows(content: bytes) -> Iterator[list[str]]:
    """Yield the words of every line, without comments and empty lines."""
    for line in content.decode("ascii").splitlines():
        if words := line.partition("#")[0].split():
            yield words


def fan(polygon: list[int]) -> list[list[int]]:
    """Cut a polygon into triangles that share its first corner."""
    if len(polygon) < 3:
        raise ValueError(f"it has a face of {len(polygon)} corners")
    return [[polygon[0], *polygon[i : i + 2]] for i in range(1, len(polygon) - 1)]


def read_off(content: bytes) -> Surface:
    """Read OFF."""
    rows = list(text_rows(content))
    if not rows or not rows[0][0].upper().startswith("OFF"):
        raise ValueError("it does not begin with OFF")
    head = [w for w in (rows[0][0][3:], *rows[0][1:]) if w]  # counts glued to the name
    body = 1 if head else 2
    counts = head or (rows[1] if len(rows) > 1 else [])
    if len(counts) < 2:
        raise ValueError("its numbers of vertices and faces are missing")
    num_vertices, num_faces = int(counts[0]), int(counts[1])
    there = len(rows) - body
    if num_vertices < 0 or num_faces < 0 or num_vertices + num_faces > there:
        raise ValueError(
            f"it speaks of {num_vertices:,} vertices and {num_faces:,} faces, and {there:,} lines "
            "follow"
        )
    vertices = points_of(rows[body : body + num_vertices])
    triangles: list[list[int]] = []
    for row in rows[body + num_vertices : body + num_vertices + num_faces]:
        triangles += face_of(row)
    return Surface(vertices, torch.tensor(triangles) if triangles else None)


def points_of(rows: list[list[str]]) -> Tensor:
    """Turn the first three words of every row into numbers: (V, 3)."""
    if short := next((row for row in rows if len(row) < 3), None):
        raise ValueError(f"it has a point of {len(short)} numbers ({' '.join(short)[:40]!r})")
    return torch.tensor([[float(w) for w in row[:3]] for row in rows], dtype=torch.float64)


def face_of(row: list[str]) -> list[list[int]]:
    """Read a face, "3 0 1 2", as triangles."""
    corners = int(row[0])
    if not 0 <= corners <= len(row) - 1:
        raise ValueError(f"it has a face of {corners} corners with {len(row) - 1} numbers")
    return fan([int(w) for w in row[1 : 1 + corners]])


def read_xyz(content: bytes) -> Surface:
    """Read XYZ."""
    return Surface(points_of(list(text_rows(content))))


@dataclass(frozen=True)
class Element:
    """An element of a PLY header: its name, how often it follows, its properties.

    A property is (name, type), or (name, type of the length, type of the entries) of a list.
    """

    name: str
    count: int
    properties: list[tuple[str, ...]]


def read_ply(content: bytes) -> Surface:
    """Read PLY."""
    order, elements, body = read_ply_header(content)
    if elements[0].name != "vertex" or not all(len(p) == 2 for p in elements[0].properties):
        raise ValueError("it does not begin with vertices of plain numbers")
    names = [p[0] for p in elements[0].properties]
    if missing := [axis for axis in "xyz" if axis not in names]:
        raise ValueError(f"its vertices lack {', '.join(missing)}")
    columns = [names.index(axis) for axis in "xyz"]
    faces = elements[1] if len(elements) > 1 and elements[1].name == "face" else None
    if faces is not None and [len(p) for p in faces.properties] != [3]:
        faces = None  # of another kind: the vertices are a cloud
    read = read_ply_text if order is None else read_ply_binary
    vertices, triangles = read(body, elements[0], columns, faces, order)
    return Surface(vertices, torch.tensor(triangles) if triangles else None)


def read_ply_header(content: bytes) -> tuple[str | None, list[Element], bytes]:
    """Read a header: byte order (None: text), elements, and what follows it."""
    head, mark, body = content.partition(b"end_header")
    rows = [line.split() for line in head.decode("ascii").splitlines()]
    if not mark or not rows or rows[0] != ["ply"]:
        raise ValueError("it has no PLY header")
    orders = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
    order: str | None = "missing"
    elements: list[Element] = []
    for row in rows[1:]:
        match row:
            case ["format", kind, "1.0"] if kind in orders:
                order = orders[kind]
            case ["element", name, count]:
                elements.append(Element(name, int(count), []))
                if int(count) < 0:
                    raise ValueError(f"it speaks of {count} elements {name}")
            case ["property", "list", length, kind, name] if elements and {length, kind} <= set(
                PLY_TYPES
            ):
                elements[-1].properties.append((name, PLY_TYPES[length], PLY_TYPES[kind]))
            case ["property", kind, name] if elements and kind in PLY_TYPES:
                elements[-1].properties.append((name, PLY_TYPES[kind]))
            case ["comment" | "obj_info", *_] | []:
                pass
            case _:
                raise ValueError(f"its header has a line that says nothing: {' '.join(row)[:60]!r}")
    if order == "missing" or not elements:
        raise ValueError("its header says no format, or no elements")
    return order, elements, body.lstrip(b"\r").removeprefix(b"\n")


def read_ply_text(
    body: bytes, vertex: Element, columns: list[int], faces: Element | None, _: str | None
) -> tuple[Tensor, list[list[int]]]:
    """Read the vertices and triangles of a text PLY."""
    rows = list(text_rows(body))
    wanted = vertex.count + (faces.count if faces else 0)
    if len(rows) < wanted:
        raise ValueError(f"its header speaks of {wanted:,} lines, and {len(rows):,} follow")
    mine = rows[: vertex.count]
    if any(len(row) < len(vertex.properties) for row in mine):
        raise ValueError("it has a vertex with fewer numbers than its header says")
    vertices = points_of([[row[c] for c in columns] for row in mine])
    triangles: list[list[int]] = []
    for row in rows[vertex.count : wanted]:
        triangles += face_of(row)
    return vertices, triangles


def read_ply_binary(
    body: bytes, vertex: Element, columns: list[int], faces: Element | None, order: str
) -> tuple[Tensor, list[list[int]]]:
    """Read the vertices and triangles of a binary PLY."""
    dtype = np.dtype([(f"p{i}", order + p[1]) for i, p in enumerate(vertex.properties)])
    size = vertex.count * dtype.itemsize
    if len(body) < size:
        raise ValueError(
            f"its header speaks of {vertex.count:,} vertices of {dtype.itemsize} bytes, and "
            f"{len(body):,} bytes follow"
        )
    table = np.frombuffer(body, dtype, vertex.count)
    points = np.stack([table[f"p{c}"].astype(np.float64) for c in columns], 1)
    triangles: list[list[int]] = []
    if faces is None:
        return torch.from_numpy(points), triangles
    length, entry = (np.dtype(order + kind) for kind in faces.properties[0][1:])
    for _ in range(faces.count):
        if size + length.itemsize > len(body):
            raise ValueError("it ends amid its faces")
        corners = int(np.frombuffer(body, length, 1, size)[0])
        size += length.itemsize
        if corners < 0 or size + corners * entry.itemsize > len(body):
            raise ValueError("it ends amid its faces")
        triangles += fan(np.frombuffer(body, entry, corners, size).astype(np.int64).tolist())
        size += corners * entry.itemsize
    return torch.from_numpy(points), triangles
