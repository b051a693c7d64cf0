import json
from pathlib import Path

import numpy as np
import pytest
from make_matches import main
from PIL import Image

from tasks.correspondence import read_matches

CAMERAS = {"K1": [[500, 0, 100], [0, 500, 80], [0, 0, 1]], "R": np.eye(3).tolist(), "t": [1, 0, 0]}
CAMERAS["K2"] = CAMERAS["K1"]


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    """A picture of spots, and the same moved to the side."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    spots = np.kron(rng.integers(0, 256, (24, 32)), np.ones((8, 8))).astype(np.uint8)
    Image.fromarray(spots[:, :200]).save("a.png")
    Image.fromarray(spots[:, 16:216]).save("b.png")
    Path("cameras.json").write_text(json.dumps(CAMERAS))


def test_a_picture_moved_to_the_side():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    main(["a.png", "b.png", "cameras.json", "pair.npz"])
    ((_, (matches, (distances, _, _))),) = read_matches("pair.npz")
    assert len(matches) > 50
    assert (distances < 1e-4).float().mean() > 0.8
    moved = (matches[:, 0] - matches[:, 2]).median().item()
    assert moved == pytest.approx(16 / 500, abs=1e-3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.png"], "name two pictures"),
        (["a.png", "none.png", "cameras.json", "x.npz"], "none.png cannot be read"),
        (["a.png", "b.png", "none.json", "x.npz"], "none.json"),
        (["a.png", "b.png", "lacking.json", "x.npz"], "the cameras lack 'K2'"),
        (["a.png", "b.png", "mirror.json", "x.npz"], "R is no rotation: its determinant is -1"),
    ],
)
def test_bad_input(refused, files, message):
    lacking = {name: value for name, value in CAMERAS.items() if name != "K2"}
    Path("lacking.json").write_text(json.dumps(lacking))
    mirror = CAMERAS | {"R": np.diag([1.0, 1, -1]).tolist()}
    Path("mirror.json").write_text(json.dumps(mirror))
    code, said = refused(main, files)
    assert code == 2
    assert message in said, said


def test_without_opencv(refused, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cv2", None)
    code, said = refused(main, ["a.png", "b.png", "cameras.json", "x.npz"])
    assert code == 2
    assert "pip install opencv-python-headless" in said
