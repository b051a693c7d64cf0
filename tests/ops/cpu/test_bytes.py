"""Products of bytes against loops over Python's integers, for every kind of processor at hand."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from ops.cpu import build

SOURCE = """
#include "bytes.h"
extern "C" {
int panel() { return kPanel; }
int rows() { return kRows; }
int most(int small) { return small ? Small::kMost : Whole::kMost; }
int words(int small) { return small ? Small::kWords : Whole::kWords; }
void dots(int small, const uint8_t* keys, const int8_t* q, int64_t stride, int64_t words,
          const int32_t* start, int32_t* out) {
  small ? dot_tile<Small>(keys, q, stride, words, start, out)
        : dot_tile<Whole>(keys, q, stride, words, start, out);
}
void near(int small, const uint8_t* keys, const int8_t* q, int64_t stride, int64_t words,
          const int32_t* start, const int32_t* squares, const int32_t* limit, int32_t* out,
          uint64_t* hit) {
  small ? near_tile<Small>(keys, q, stride, words, start, squares, limit, out, hit)
        : near_tile<Whole>(keys, q, stride, words, start, squares, limit, out, hit);
}
int64_t sum(int difference, int type, const void* x, const void* y, int64_t d) {
  const uint8_t *a = (const uint8_t*)x, *b = (const uint8_t*)y;
  const int8_t *c = (const int8_t*)x, *e = (const int8_t*)y;
  if (type) return difference ? sum_bytes<true>(c, e, d) : sum_bytes<false>(c, e, d);
  return difference ? sum_bytes<true>(a, b, d) : sum_bytes<false>(a, b, d);
}
}
"""
# AVX2, and neither that nor AVX-512; "" is the processor there is.
ARCHITECTURES = ("", "x86-64-v3", "x86-64")


def runs_here(arch):
    """Whether code for a kind of processor runs on this one."""
    if not arch:
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return " avx2 " in flags if arch == "x86-64-v3" else " sse2 " in flags


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: arch or "native")
def tile(request, tmp_path_factory):
    """The functions of bytes.h, compiled for one kind of processor."""
    compilers = build._compilers()
    if not compilers or not runs_here(request.param):
        pytest.skip("no compiler, or another kind of processor")
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "tile.cpp").write_text(SOURCE)
    kinds = [[f"-march={request.param}"]] if request.param else build._arch_flags()
    for flags in kinds:
        include = ["-I", str(build.SOURCES), "-fno-trapping-math"]
        words = build._compile(
            compilers[0], flags + include, folder / "tile.cpp", folder / "tile.so"
        )
        if not words:
            break
    assert not words
    library = ctypes.CDLL(str(folder / "tile.so"))
    library.sum.restype = ctypes.c_int64
    return library


def at(array):
    return ctypes.c_void_p(array.ctypes.data)


def drawn(kind, rng, low, high, shape):
    """Numbers from low to high: any, the extremes, or one extreme."""
    if kind == "any":
        return rng.integers(low, high + 1, shape)
    if kind == "extremes":
        return rng.choice([low, high], shape)
    return np.full(shape, high if kind == "highest" else low)


@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("key_kind", ["any", "extremes", "highest"])
@pytest.mark.parametrize("query_kind", ["any", "extremes", "highest", "lowest"])
def test_tiles_are_exact(tile, query_kind, key_kind, small):
    rng = np.random.default_rng(0)
    panel, rows, most = tile.panel(), tile.rows(), tile.most(small)
    for words in [tile.words(small) * n for n in (1, 3, 16, 33)]:
        d, stride = 4 * words, 4 * words + 3  # rows of queries that are not aligned
        keys = drawn(key_kind, rng, 0, 2 * most + 1, (panel, d))
        queries = drawn(query_kind, rng, -most, most, (rows, d))
        start = rng.integers(-1000, 1000, rows).astype(np.int32)
        squares = rng.integers(0, 10**6, panel).astype(np.int32)
        packed = np.empty((words, panel, 4), np.uint8)
        packed[:] = keys.reshape(panel, words, 4).transpose(1, 0, 2)
        spread = np.zeros(rows * stride + 1, np.int8)[1:]
        for r in range(rows):
            spread[r * stride : r * stride + d] = queries[r]
        expected = np.array(
            [
                [int(s) + sum(int(a) * int(b) for a, b in zip(q, k, strict=True)) for k in keys]
                for q, s in zip(queries, start, strict=True)
            ]
        )
        out = np.empty((rows, panel), np.int32)
        shared = (at(packed), at(spread), ctypes.c_int64(stride), ctypes.c_int64(words), at(start))
        tile.dots(small, *shared, at(out))
        assert (out == expected).all()
        scores = squares - 2 * expected
        limit = np.sort(scores, axis=1)[:, panel // 3].astype(np.int32)  # one score is equal to it
        limit[0] = scores[0].min() - 1
        hit = np.empty(rows, np.uint64)
        tile.near(small, *shared, at(squares), at(limit), at(out), at(hit))
        assert (out == scores).all()
        for r in range(rows):
            bits = [int(hit[r]) >> j & 1 for j in range(64)]
            assert bits == [int(s <= limit[r]) for s in scores[r]] + [0] * (64 - panel)


@pytest.mark.parametrize("kind", ["any", "extremes", "highest", "lowest"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_sums_of_rows_are_exact_at_any_size_and_place(tile, dtype, kind):
    rng = np.random.default_rng(1)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for d in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 784, 20011):
        buffers = [np.empty(d + 3, dtype) for _ in range(2)]
        x, y = buffers[0][1 : d + 1], buffers[1][3 : d + 3]
        x[:], y[:] = drawn(kind, rng, low, high, d), drawn("any", rng, low, high, d)
        for other in (x[::-1].copy(), y):
            pairs = list(zip(x.tolist(), other.tolist(), strict=True))
            kinds = (int(dtype == np.int8), at(x), at(other), ctypes.c_int64(d))
            assert tile.sum(1, *kinds) == sum((a - b) ** 2 for a, b in pairs)
            assert tile.sum(0, *kinds) == sum(a * b for a, b in pairs)
    lowest, highest = np.full(20011, low, dtype), np.full(20011, high, dtype)
    kinds = (int(dtype == np.int8), at(lowest), at(highest), ctypes.c_int64(20011))
    assert tile.sum(1, *kinds) == 20011 * 255**2
