"""Networks written for use elsewhere give the same outputs."""

import importlib.util

import export
import pytest
import torch

from main import main


@pytest.fixture
def denoiser(tmp_path, monkeypatch):
    """A denoiser trained for a step on photographs that ship with scikit-learn."""
    monkeypatch.chdir(tmp_path)
    start = ["--model", "dncnn", "--depth", "3", "--features", "4", "--crops_per_image", "2"]
    start += ["--crop_size", "20", "--num_epochs", "1", "--device", "cpu", "--limit_test", "1"]
    main([*start, "--tile", "120", "--output_dir", "a"])
    return "a"


@pytest.mark.parametrize(
    ("layer", "static"), [("Conv2d", False), ("ConvNN", True), ("Branching_Attn", False)]
)
def test_programs(run, capsys, layer, static):
    run("--layer", layer, "--K", "4", "--output_dir", "a")
    assert export.export("a", "net.pt2", static=static) <= 1e-5
    said = capsys.readouterr().out
    assert f"net.pt2: epoch {export.open_run('a').epoch} of a" in said
    assert "Largest difference of outputs up to" in said
    program = torch.export.load("net.pt2").module()
    x = torch.randn(1 if static else 5, 1, 8, 8)
    torch.testing.assert_close(program(x), export.open_run("a").model(x), rtol=1e-4, atol=1e-5)


def test_weights_are_those_of_the_run(denoiser):
    assert export.export(denoiser, "x.safetensors") == 0
    assert export.export("x.safetensors", "again.pt2") <= 1e-5  # they hold their arguments


def test_onnx(denoiser, run, refused, monkeypatch):
    for name in export.ONNX_PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed")
    assert export.export(denoiser, "x.onnx") <= 1e-4
    run("--layer", "ConvNN", "--K", "4", "--output_dir", "b")
    code, said = refused(export.main, ["b", "b.onnx"])
    assert code == 2
    assert "computes by neighbors.aggregate, neighbors.search, which ONNX does not have" in said


def test_refusals(denoiser, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "onnx" in name else find(name, *a)
    )
    for words, message in [
        (["nowhere", "x.pt2"], "there is no checkpoint nowhere/best.pt"),
        ([denoiser, "x.pth"], "the ending says what is written: .safetensors, .pt2, .onnx"),
        ([denoiser, "x"], "(got none)"),
        ([denoiser, "x.onnx"], ".onnx needs onnx, onnxscript, onnxruntime: pip install onnx"),
    ]:
        code, said = refused(export.main, words)
        assert code == 2
        assert message in said, said
