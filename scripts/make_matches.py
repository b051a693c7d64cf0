"""Match two pictures of a scene by SIFT and keep the matches for --dataset matches.

python scripts/make_matches.py left.png right.png cameras.json pair.npz
python scripts/make_matches.py --motorcycle pair.npz     # the stereo pair that scikit-image ships

cameras.json holds K1 and K2 (3x3, in pixels), R (3x3) and t (3): X in the second camera is R X + t.
Needs OpenCV (pip install opencv-python-headless).
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from dataset import read_image
from tasks.geometry import check_rotation, epipolar_distances, essential_matrix
from utils import atomic_path


def sift_matches(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Find keypoints of a gray picture and their nearest of another: (N, 4) positions in pixels."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "SIFT needs OpenCV, which is not installed: pip install opencv-python-headless."
        ) from error
    sift = cv2.SIFT_create(nfeatures=count, contrastThreshold=1e-5)
    (points1, described1), (points2, described2) = (
        sift.detectAndCompute(image, None) for image in (first, second)
    )
    if described1 is None or described2 is None:
        raise ValueError("a picture has no keypoints: it is blank.")
    pairs = cv2.BFMatcher(cv2.NORM_L2).match(described1, described2)
    return np.array([[*points1[p.queryIdx].pt, *points2[p.trainIdx].pt] for p in pairs])


def normalised(pixels: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Turn positions (N, 2) in pixels into camera coordinates."""
    ones = np.ones((len(pixels), 1))
    return (np.concatenate((pixels, ones), 1) @ np.linalg.inv(camera).T)[:, :2]


def make_pair(first, second, cameras: dict, count: int) -> dict[str, np.ndarray]:
    """Match two gray pictures; return the arrays that `tasks.correspondence` reads."""
    try:
        K1, K2, R, t = (
            np.array(cameras[name], dtype=np.float64) for name in ("K1", "K2", "R", "t")
        )
    except KeyError as error:
        raise ValueError(f"the cameras lack {error}: K1, K2, R and t are needed.") from error
    if (problem := check_rotation(torch.from_numpy(R))) is not None:
        raise ValueError(f"R is no rotation: {problem}.")
    pixels = sift_matches(first, second, count)
    if len(pixels) < 8:
        raise ValueError(f"{len(pixels)} matches were found; at least 8 are needed.")
    xs = np.concatenate((normalised(pixels[:, :2], K1), normalised(pixels[:, 2:], K2)), 1)
    essential = essential_matrix(torch.from_numpy(R), torch.from_numpy(t))
    ys = epipolar_distances(torch.from_numpy(xs), essential).numpy()
    return {"xs": xs, "ys": ys, "R": R, "t": t}


def motorcycle() -> tuple[np.ndarray, np.ndarray, dict]:
    """The Middlebury motorcycle, a quarter of its size: rectified, cameras side by side."""
    from skimage.data import stereo_motorcycle

    pictures = [
        np.round(p @ [0.299, 0.587, 0.114]).astype(np.uint8) for p in stereo_motorcycle()[:2]
    ]
    focal, x, y, shift = 994.978, 311.193, 254.877, 31.086
    K1 = [[focal, 0, x], [0, focal, y], [0, 0, 1]]
    K2 = [[focal, 0, x + shift], [0, focal, y], [0, 0, 1]]
    return *pictures, {"K1": K1, "K2": K2, "R": np.eye(3), "t": [-1, 0, 0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="two pictures, the cameras' .json; the .npz")
    parser.add_argument("--motorcycle", action="store_true", help="the pair of scikit-image")
    parser.add_argument("--count", type=int, default=2000, help="keypoints of a picture, at most")
    args = parser.parse_args(argv)
    if len(args.files) != (1 if args.motorcycle else 4):
        parser.error(
            "name two pictures, cameras.json and the .npz to write (--motorcycle: only that)"
        )
    try:
        if args.motorcycle:
            first, second, cameras = motorcycle()
        else:
            first, second = (read_image(file, color=False)[0][0].numpy() for file in args.files[:2])
            cameras = json.loads(Path(args.files[2]).read_text(encoding="utf-8"))
        pair = make_pair(first, second, cameras, args.count)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with atomic_path(args.files[-1]) as temporary:
        np.savez(temporary, **pair)
    right = (pair["ys"] < 1e-4).mean()
    print(
        f"{args.files[-1]}: {len(pair['xs'])} matches, {100 * right:.1f}% on their epipolar lines."
    )


if __name__ == "__main__":
    main()
