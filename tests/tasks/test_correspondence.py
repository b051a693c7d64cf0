import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from main import main
from tasks.correspondence import CorrespondenceTask, Scenes, read_matches
from tasks.geometry import (
    check_rotation,
    draw_scene,
    epipolar_distances,
    essential_matrix,
    pose_errors,
    recover_pose,
)

close = torch.testing.assert_close


def scene(seed=0, count=100, outliers=0.0, noise=0.0):
    return draw_scene(count, outliers, noise, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_right_matches_lie_on_their_lines(seed):
    made = scene(seed, 200, 0.4)
    assert ((made["ys"] < 1e-4).sum() >= 120) & ((made["ys"] < 1e-4).sum() < 150)
    assert made["xs"].abs().max() <= 0.5
    assert check_rotation(made["R"]) is None


def test_distances_are_those_of_the_lines():
    made = scene(1, 20, 0.5)
    e, slow = made["E"], []
    for x, y, u, v in made["xs"].double().tolist():
        a, b = torch.tensor([x, y, 1.0]).double(), torch.tensor([u, v, 1.0]).double()
        line, back = e @ a, e.T @ b
        to_line = (b @ line).abs() / line[:2].norm()
        to_back = (a @ back).abs() / back[:2].norm()
        slow.append(to_line**2 + to_back**2)
    close(epipolar_distances(made["xs"], e), torch.stack(slow))


@pytest.mark.parametrize("seed", range(8))
def test_the_pose_comes_back(seed):
    made = scene(seed)
    pose = recover_pose(-made["E"][None], made["xs"][None], torch.ones(1, 100))
    assert pose_errors(*pose, made["R"][None], made["t"][None]).item() < 1e-3
    direction = torch.nn.functional.normalize(made["t"], dim=0)
    close(pose[1][0], direction, atol=1e-5, rtol=0)  # points lie before both cameras


def test_errors_in_degrees():
    angle = torch.tensor(0.2).double()
    zero = torch.zeros(()).double()
    turn = torch.stack(
        [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, zero + 1]
    ).view(1, 3, 3)
    eye, way = torch.eye(3).double()[None], torch.tensor([[1.0, 0, 0]])
    close(pose_errors(turn, way, eye, -way), torch.rad2deg(angle)[None])
    other = torch.tensor([[1.0, 1.0, 0]])
    close(pose_errors(eye, other, eye, way), torch.tensor([45.0]).double(), atol=1e-4, rtol=0)


def test_scenes_are_seeded():
    a, b, c = Scenes(3, 50, 0.5, 1.0, 0), Scenes(3, 50, 0.5, 1.0, 0), Scenes(3, 50, 0.5, 1.0, 1)
    close(a[2][0], b[2][0], rtol=0, atol=0)
    assert not a[2][0].equal(c[2][0])
    fresh = Scenes(3, 50, [0.2, 0.8], 1.0, None)
    assert not fresh[0][0].equal(fresh[0][0])
    matches, truth = fresh.__getitems__([0, 1])
    assert matches.shape == (2, 50, 4)
    assert [tuple(t.shape) for t in truth] == [(2, 50), (2, 3, 3), (2, 3)]


def batch(task, count=2):
    samples = Scenes(count, 60, 0.5, 0.0, 0).__getitems__(range(count))
    return task.prepare(samples, torch.device("cpu"))


def test_perfect_logits_score_perfectly():
    task = CorrespondenceTask()
    matches, truth = batch(task)
    logits = torch.where(truth[1] < 1e-8, 9.0, -9.0)  # those that are right by chance stay out
    scores = task.metrics(logits, truth)
    close(scores["precision"], torch.full((2,), 100.0).double())
    assert scores["recall"].min() > 90
    assert scores["below5"].tolist() == [100, 100]
    assert scores["map20"].tolist() == [100, 100]
    assert task.loss(logits, truth) < task.loss(-logits, truth)
    none = task.metrics(torch.full_like(logits, -1.0), truth)
    assert none["f1"].tolist() == [0, 0]


def test_the_loss_is_balanced():
    task = CorrespondenceTask(essential_weight=0.0)
    _, truth = batch(task)
    logits = torch.randn(2, 60)
    right = truth[1] < 1e-4
    p = torch.sigmoid(logits)
    want = sum(
        0.5 * (-p[i][right[i]].log().mean() - (1 - p[i][~right[i]]).log().mean()) for i in (0, 1)
    )
    close(task.loss(logits, truth), want / 2)
    with_essential = CorrespondenceTask(essential_weight=1.0).loss(logits, truth)
    assert 0 < with_essential - want / 2 <= 2


@pytest.mark.parametrize("value", [-3.0, 0.0, 100.0])
def test_gradients_are_finite(value):
    task = CorrespondenceTask()
    _, truth = batch(task)
    logits = torch.full((2, 60), value, requires_grad=True)
    task.loss(logits, truth).backward()
    assert logits.grad.isfinite().all()


SMALL = ["--model", "cnnet", "--depth", "2", "--features", "8", "--num_matches", "64"]
SMALL += ["--device", "cpu", "--num_epochs", "1", "--batch_size", "4", "--num_workers", "0"]
FEW = ["--num_scenes", "8", "--test_scenes", "5", "--outliers", "0.5", "0.8"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["n3", "knn", "none"])
def test_run_resume_and_test(kind):
    start = [*SMALL, *FEW, "--nonlocal_block", kind]
    main([*start, "--output_dir", "a", "--save_images"])
    assert Image.open("a/images/001_0.png").size == (4 * 320 + 36, 336)
    rows = list(csv.DictReader(Path("a/per_pair.csv").read_text().splitlines()))
    assert len(rows) == 5
    again = main(["--test_only", "--output_dir", "a", "--device", "cpu"])["test"]
    mean = sum(float(row["f1"]) for row in rows) / 5
    assert again["f1"] == pytest.approx(mean)
    whole = main([*start, "--output_dir", "b", "--num_epochs", "2"])
    part = main(["--resume", "--output_dir", "a", "--num_epochs", "2", "--device", "cpu"])
    assert part["history"] == whole["history"]


def test_ransac_beside_the_network():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    main([*SMALL, *FEW, "--ransac", "--output_dir", "a", "--test_outliers", "0.3"])
    rows = list(csv.DictReader(Path("a/per_pair.csv").read_text().splitlines()))
    assert sum(float(row["ransac_below10"]) for row in rows) / 5 > 50
    assert "RANSAC on those kept: Precision" in Path("a/train_eval_results.txt").read_text()


def arrays(count=40):
    made = scene(0, count, 0.3, 1.0)
    return {name: made[name].numpy() for name in ("xs", "ys", "R", "t")}


def test_files_of_matches():
    for i in range(3):
        np.savez(f"{i}.npz", **arrays(40 + i))
    one = read_matches("0.npz")
    assert one[0][1][0].shape == (40, 4)
    without = {name: value for name, value in arrays().items() if name != "ys"}
    np.savez("x.npz", **without)
    close(read_matches("x.npz")[0][1][1][0], one[0][1][1][0])
    files = ["--dataset", "matches", "--train_matches", "0.npz", "1.npz", "--test_matches", "."]
    assert main([*SMALL, *files, "--output_dir", "a"])["history"][0]["test_f1"] >= 0


def test_published_form():
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File("x.h5", "w") as file:
        for name, key in (("xs", "xs"), ("ys", "ys"), ("Rs", "R"), ("ts", "t")):
            for number in range(12):
                value = arrays(30 + number)[key]
                file[f"{name}/{number}"] = value[None] if key == "xs" else value
    found = read_matches("x.h5")
    assert [name for name, _ in found][-1] == "/11"
    assert found[11][1][0].shape == (41, 4)


def test_h5_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        read_matches("x.h5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": np.zeros((7, 4)), "ys": np.zeros(7)}, "holds 7 matches; at least 8 are needed"),
        ({"xs": np.zeros((40, 3))}, "expected (N, 4)"),
        ({"xs": np.full((40, 4), np.nan)}, "numbers that are none"),
        ({"ys": np.zeros(39)}, "40 matches in xs and 39 in ys"),
        ({"R": np.ones((3, 3))}, "R is no rotation: R Rᵀ differs"),
        ({"R": np.diag([1.0, 1, -1])}, "R is no rotation: its determinant is -1"),
        ({"R": np.eye(4)}, "R is no rotation: its shape is (4, 4)"),
        ({"t": np.zeros(3)}, "t must be three numbers, not all 0"),
        ({"t": None}, "lacks the arrays t"),
    ],
)
def test_bad_files(refused, change, message):
    content = {k: v for k, v in (arrays() | change).items() if v is not None}
    np.savez("x.npz", **content)
    code, said = refused(
        main,
        [*SMALL, "--dataset", "matches", "--test_matches", "x.npz", "--train_matches", "x.npz"],
    )
    assert code == 2
    assert message in said, said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_matches", "7"], "must be at least 8 (got 7)"),
        (["--num_matches", "32"], "leaves 6 right matches"),
        (["--outliers", "0.9", "0.5"], "--outliers 0.9 0.5 is the wrong way round"),
        (["--outliers", "1"], "--outliers: must lie in [0, 1)"),
        (["--dataset", "matches"], "--dataset matches needs --test_matches"),
        (["--dataset", "matches", "--test_matches", "a"], "needs --train_matches"),
        (
            ["--dataset", "matches", "--test_matches", "a", "--train_matches", "a"],
            "--train_matches a: there is no such file",
        ),
        (["--features", "9"], "--features 9 is not divided by --num_volumes + 1"),
        (["--nonlocal_block", "concrete"], "nonlocal_block must be one of n3, knn, none"),
    ],
)
def test_bad_input(refused, flags, message):
    code, said = refused(main, [*SMALL, *FEW, *flags])
    assert code == 2
    assert message in said, said
    assert not Path("Output").exists()


def test_ransac_without_opencv(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, said = refused(main, [*SMALL, *FEW, "--ransac"])
    assert code == 2
    assert "pip install opencv-python-headless" in said


def test_the_essential_matrix_has_norm_one():
    made = scene()
    e = essential_matrix(made["R"], made["t"] * 7)
    close(e.norm(), torch.ones(()).double())
    close(torch.linalg.svdvals(e), torch.tensor([0.5, 0.5, 0.0]).double().sqrt())
