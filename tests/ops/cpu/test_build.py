"""Building the kernels, and the table of what they take."""

import re

import pytest
import torch
import torch._inductor.config  # takes CXX as it is when first imported: not that of a test

from ops import METRICS
from ops.cpu import build
from ops.maps.search import nearest_neighbors

LETTERS = {"int64_t": "i", "int": "d", "float": "f"}


def letter(argument):
    """The letter of an argument's C type; `threads` is one of its own."""
    *kind, name = argument.replace("const ", "").split()
    if "*" in argument:
        return "p"
    return "t" if name == "threads" else LETTERS[kind[0]]


@pytest.mark.parametrize("source", build.SIGNATURES)
def test_the_table_of_signatures_is_that_of_the_sources(source):
    text = (build.SOURCES / f"{source}.cpp").read_text()
    exported = text[text.rindex('extern "C" {') :]
    found = {}
    for result, name, arguments in re.findall(r"^(\w+\*?) (\w+)\(([^)]*)\) \{", exported, re.M):
        letters = "".join(letter(a.strip()) for a in arguments.split(",") if a.strip())
        returns = {"void": "", "void*": "p", "int": "d", "int64_t": "i"}[result]
        found[name] = (letters, returns)
    table = {}
    for name, signature in build.SIGNATURES[source].items():
        arguments, returns, result = signature.partition(">")
        table[name] = (arguments, result if returns else "d")
    assert found == table


def test_one_version_number():
    assert f"kernels_abi() {{ return {build.ABI}; }}" in (build.SOURCES / "threads.h").read_text()


def test_metrics_have_one_order():
    words = re.search(r"enum Metric \{(.*?)\}", (build.SOURCES / "vectors.h").read_text())[1]
    assert words.strip() == ", ".join(f"{m.upper()} = {i}" for i, m in enumerate(METRICS))


def test_every_source_is_built_somewhere():
    assert sorted(sum(build._TOGETHER, ())) == sorted(build.SIGNATURES)
    assert sorted(build.SIGNATURES) == sorted(p.stem for p in build.SOURCES.glob("*.cpp"))


def test_without_a_compiler_all_still_works(monkeypatch, tmp_path):
    monkeypatch.setenv("NEIGHBORS_NATIVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "_found", {})
    monkeypatch.setenv("NEIGHBORS_NATIVE", "1")
    assert build.library() is None
    assert build.status().startswith("absent: no C++ compiler")
    assert build.kernel("nn_search") is None
    keys = torch.tensor([[[0.0], [1.0], [3.0]]])
    assert nearest_neighbors(keys, keys, 1, "euclidean")[1].flatten().tolist() == [0, 1, 2]
    monkeypatch.setenv("NEIGHBORS_NATIVE", "require")
    with pytest.raises(build.NativeError, match="no C\\+\\+ compiler"):
        build.library()


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("NEIGHBORS_NATIVE_CACHE", str(cache))
    monkeypatch.setenv("NEIGHBORS_NATIVE", "1")
    monkeypatch.setattr(build, "_found", {})
    assert build.library() is None
    assert "out of order" in build.status()
    assert list(cache.iterdir()) == []
