"""Correspondence: which of the putative matches between two pictures are right.

K. M. Yi et al., "Learning to Find Good Correspondences", CVPR 2018,
https://arxiv.org/abs/1711.05971, and T. Plötz, S. Roth, "Neural Nearest Neighbors Networks",
NeurIPS 2018, https://arxiv.org/abs/1810.12575, section 5.4. A match is right where its symmetric
epipolar distance is below 1e-4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset import Data, DataError
from options import Options, option
from run_folder import RunFolder
from tasks.eight_point import weighted_eight_point
from tasks.geometry import (
    INLIER,
    check_rotation,
    draw_scene,
    epipolar_distances,
    essential_matrix,
    pose_errors,
    recover_pose,
)
from tasks.task import Evaluate, Finding, Needs, Task
from utils import atomic_path, csv_text

__all__ = [
    "CorrespondenceOptions",
    "CorrespondenceTask",
    "MatchOptions",
    "SceneOptions",
    "build_matches",
    "build_scenes",
    "read_matches",
]

DEGREES = (5, 10, 20)
LEAST = 8  # matches that an essential matrix takes

# Matches, distances, rotation, translation of a batch
Pairs = tuple[Tensor, tuple[Tensor, Tensor, Tensor]]

# ---------------------------------------------------------------------------------------------
# Data


class Scenes(Dataset):
    """Scenes made up as they are asked for: each time new, or the same by number.

    Args:
        count: Scenes of an epoch.
        num_matches: Matches of a scene.
        outliers: Share of wrong ones, or a range that each scene draws from.
        pixel_noise: Noise of positions, see `draw_scene`.
        seed: Seed of the scenes; None: drawn from the global generator, new in every epoch.
    """

    def __init__(
        self,
        count: int,
        num_matches: int,
        outliers: float | Sequence[float],
        pixel_noise: float,
        seed: int | None,
    ) -> None:
        self.count, self.num_matches, self.outliers = count, num_matches, outliers
        self.pixel_noise, self.seed = pixel_noise, seed
        self.names = [f"scenes/{i}" for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        share = self.outliers
        if isinstance(share, list | tuple):
            share = share[0] + (share[1] - share[0]) * torch.rand((), generator=generator).item()
        scene = draw_scene(self.num_matches, share, self.pixel_noise, generator)
        return scene["xs"], (scene["ys"], scene["R"], scene["t"])

    def __getitems__(self, indices: Sequence[int]) -> Pairs:
        """Return a batch."""
        return _stack([self[i] for i in indices])


class StoredPairs(Dataset):
    """Pairs of pictures read from files; whole ones, one at a time, or parts of equal size.

    Args:
        pairs: Matches, distances, rotation and translation of each pair.
        names: Their names.
        part: Matches drawn at random of each pair, some twice where there are fewer; None: all.
    """

    def __init__(self, pairs: Sequence[Any], names: Sequence[str], part: int | None) -> None:
        self.pairs, self.names, self.part = list(pairs), list(names), part
        if part is None:
            self.max_batch_size = 1

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        matches, (distances, rotation, translation) = self.pairs[index]
        if self.part is not None:
            n = len(matches)
            order = torch.randperm(n)
            more = torch.randint(n, (max(0, self.part - n),))
            order = torch.cat((order, more))[: self.part]
            matches, distances = matches[order], distances[order]
        return matches, (distances, rotation, translation)

    def __getitems__(self, indices: Sequence[int]) -> Pairs:
        """Return a batch."""
        return _stack([self[i] for i in indices])


def _stack(samples: Sequence[Any]) -> Pairs:
    matches = torch.stack([matches for matches, _ in samples])
    truth = zip(*(truth for _, truth in samples), strict=True)
    return matches, tuple(torch.stack(parts) for parts in truth)


@dataclass(frozen=True)
class SceneOptions(Options):
    """Scenes made up at random."""

    title = "Made-up scenes (--dataset scenes)"
    num_scenes: int = option(4000, "scenes of an epoch, never the same", least=1, most=10**9)
    test_scenes: int = option(
        200, "scenes to test on, always the same for a seed", least=1, most=10**9
    )
    outliers: float = option(
        [0.5, 0.9],
        "share of wrong matches; two values: drawn between them for every scene",
        kind=float,
        several="range",
        least=0,
        below=1,
    )
    test_outliers: float = option(0.7, "the same for the scenes to test on", least=0, below=1)
    pixel_noise: float = option(
        1.0, "standard deviation of positions, in pixels of a picture 1000 wide", least=0, most=1000
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse scenes with fewer right matches than an essential matrix takes."""
        shares = values["outliers"]
        most = max([*(shares if isinstance(shares, list) else [shares]), values["test_outliers"]])
        right = values["num_matches"] - round(most * values["num_matches"])
        if right < LEAST:
            raise ValueError(
                f"--num_matches {values['num_matches']} with {most:g} outliers leaves {right} "
                f"right matches, and an essential matrix takes {LEAST}. Raise --num_matches to "
                f"{int(LEAST / (1 - most)) + 1}, or lower --outliers and --test_outliers."
            )


def build_scenes(
    *,
    seed: int,
    num_scenes: int,
    test_scenes: int,
    outliers: float | Sequence[float],
    test_outliers: float,
    pixel_noise: float,
    num_matches: int,
    evaluation_only: bool,
) -> Data:
    """Make up scenes: see `SceneOptions` and `Scenes`."""
    test = Scenes(test_scenes, num_matches, test_outliers, pixel_noise, seed)
    train = (
        None if evaluation_only else Scenes(num_scenes, num_matches, outliers, pixel_noise, None)
    )
    return Data("scenes", "correspondence", train, test, (num_matches, 4), 1)


@dataclass(frozen=True)
class MatchOptions(Options):
    """Matches of real pictures, with the cameras' poses."""

    title = "Matches of real pictures (--dataset matches)"
    train_matches: list[str] = option(
        None,
        ".npz or .h5 files, or folders of them",
        several="list",
        metavar="FILE",
        resumable=True,
    )
    test_matches: list[str] = option(
        None,
        ".npz or .h5 files, or folders of them",
        several="list",
        metavar="FILE",
        resumable=True,
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse a run that lacks its files."""
        if not values["test_matches"]:
            raise ValueError(
                "--dataset matches needs --test_matches: .npz or .h5 files with xs, R and t "
                "(scripts/make_matches.py makes them of two pictures)."
            )
        if not values["train_matches"] and not values["test_only"]:
            raise ValueError("--dataset matches needs --train_matches: .npz or .h5 files.")


def build_matches(
    *,
    seed: int,
    train_matches: Sequence[str] | None,
    test_matches: Sequence[str],
    num_matches: int,
    evaluation_only: bool,
) -> Data:
    """Read matches from files: see `read_matches`."""
    train = None
    if train_matches and not evaluation_only:
        train = StoredPairs(*_read_all(train_matches, "--train_matches"), num_matches)
    test = StoredPairs(*_read_all(test_matches, "--test_matches"), None)
    return Data("matches", "correspondence", train, test, (num_matches, 4), 1)


def _read_all(words: Sequence[str], flag: str) -> tuple[list[Any], list[str]]:
    pairs: list[Any] = []
    names: list[str] = []
    for path in map(Path, words):
        if not path.exists():
            raise DataError(f"{flag} {path}: there is no such file.")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix.lower() in (".npz", ".h5", ".hdf5")]
        if not files:
            raise DataError(f"{flag} {path}: no matches in it (looked for .npz, .h5, .hdf5).")
        for file in files:
            found = read_matches(file)
            pairs += [pair for _, pair in found]
            names += [f"{file.parent.name}/{file.name}{key}" for key, _ in found]
    return pairs, names


def read_matches(path: str | Path) -> list[tuple[str, Any]]:
    """Read the pairs of a file: one in an .npz, one or more in an .h5.

    Arrays are ``xs`` (N, 4), ``R`` (3, 3), ``t`` (3,), and ``ys``, the symmetric epipolar distances
    (N,) or (N, 2), whose first column counts; without ``ys`` they are computed. An .h5 may hold
    groups ``xs``, ``ys``, ``Rs``, ``ts`` of arrays by number, as the published sets do.

    Returns:
        For every pair its name within the file, and (matches, (distances, rotation, translation)).

    Raises:
        DataError: If the file is damaged, lacks an array or holds one of the wrong form.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return [("", _check_pair(dict(file), str(path)))]
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read as matches: {error}") from error
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{path}: reading .h5 files needs h5py, which is not installed (pip install h5py)."
        ) from error
    try:
        with h5py.File(path, "r") as file:
            if "xs" in file and isinstance(file["xs"], h5py.Group):
                groups = {"xs": "xs", "ys": "ys", "R": "Rs", "t": "ts"}
                known = {key: file[name] for key, name in groups.items() if name in file}
                found = []
                for number in sorted(known["xs"], key=lambda name: (len(name), name)):
                    each = {k: np.asarray(g[number]) for k, g in known.items() if number in g}
                    found.append((f"/{number}", _check_pair(each, f"{path}, pair {number}")))
                return found
            whole = {key: np.asarray(value) for key, value in file.items()}
            return [("", _check_pair(whole, str(path)))]
    except OSError as error:
        raise DataError(f"{path} cannot be read as matches: {error}") from error


def _check_pair(arrays: Mapping[str, np.ndarray], where: str) -> Any:
    if missing := [name for name in ("xs", "R", "t") if name not in arrays]:
        raise DataError(f"{where} lacks the arrays {', '.join(missing)} (xs, R and t are needed).")
    matches = torch.from_numpy(np.asarray(arrays["xs"], dtype=np.float64))
    matches = matches.reshape(matches.shape[-2:]) if matches.ndim == 3 else matches
    if matches.ndim != 2 or matches.shape[1] != 4 or not matches.isfinite().all():
        raise DataError(
            f"{where}: xs has the shape {tuple(arrays['xs'].shape)} or numbers that are none; "
            "expected (N, 4): x, y, x', y' in normalised camera coordinates."
        )
    if len(matches) < LEAST:
        raise DataError(f"{where} holds {len(matches)} matches; at least {LEAST} are needed.")
    rotation = torch.from_numpy(np.asarray(arrays["R"], dtype=np.float64)).squeeze()
    if (problem := check_rotation(rotation)) is not None:
        raise DataError(f"{where}: R is no rotation: {problem}.")
    translation = torch.from_numpy(np.asarray(arrays["t"], dtype=np.float64)).flatten()
    if translation.shape != (3,) or not 0 < translation.norm() < float("inf"):
        raise DataError(
            f"{where}: t must be three numbers, not all 0 (got {translation.tolist()}): without a "
            "way between the cameras there is no essential matrix."
        )
    if "ys" in arrays:
        distances = torch.from_numpy(np.asarray(arrays["ys"], dtype=np.float64))
        distances = distances.reshape(len(distances), -1)[:, 0]
        if len(distances) != len(matches):
            raise DataError(f"{where}: {len(matches)} matches in xs and {len(distances)} in ys.")
    else:
        distances = epipolar_distances(matches, essential_matrix(rotation, translation))
    return matches.float(), (distances, rotation, translation)


# ---------------------------------------------------------------------------------------------
# The task


@dataclass(frozen=True)
class CorrespondenceOptions(Options):
    """Matches, loss and evaluation of networks that judge matches."""

    title = "Correspondences"
    num_matches: int = option(512, "matches of a pair in training", least=LEAST, most=10**6)
    essential_weight: float = option(
        0.1,
        "weight of the error of the essential matrix beside the cross-entropy",
        least=0,
        most=1e12,
    )
    ransac: bool = option(
        False, "in evaluation: RANSAC on all matches and on those kept (needs OpenCV)"
    )
    ransac_threshold: float = option(
        1e-3,
        "distance from the epipolar line that RANSAC allows, in camera coordinates",
        above=0,
        most=100,
    )
    ransac_iterations: int = option(
        1000, "its trials at most (1000: OpenCV's default)", least=1, most=10**9
    )
    save_images: bool = option(False, "draw the matches kept and dropped of test pairs")

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Refuse RANSAC without OpenCV."""
        if values["ransac"]:
            opencv()


def opencv() -> Any:
    """Import OpenCV.

    Raises:
        ValueError: If it is not installed; names the line that installs it.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "--ransac needs OpenCV, which is not installed: pip install opencv-python-headless."
        ) from error
    return cv2


class CorrespondenceTask(Task):
    """Right and wrong matches: cross-entropy, and the essential matrix that the weights give.

    Half of the cross-entropy is the right matches', half the wrong ones'. The weight of a match is
    relu(tanh(logit)), its essential matrix that of the weighted eight-point algorithm. The
    published training adds the latter from step 20,000 on; here its gradients are bounded, and it
    counts from the first step.

    Args:
        num_matches: Matches of a pair in training.
        essential_weight: Weight of the squared error of the essential matrix, up to its sign.
        ransac: Compare with RANSAC in evaluation.
        ransac_threshold: What it takes for right.
        ransac_iterations: Its trials, at most.
        save_images: Draw test pairs.
        seed: Seed of made-up scenes.
    """

    name = "correspondence"
    headline, headline_name, headline_unit = "f1", "F1", "%"
    defaults: ClassVar[dict[str, Any]] = {
        "batch_size": 32,
        "num_epochs": 20,
        "optimizer": "adam",
        "weight_decay": 0.0,
    }
    Options = CorrespondenceOptions

    def __init__(
        self,
        *,
        num_matches: int = 512,
        essential_weight: float = 0.1,
        ransac: bool = False,
        ransac_threshold: float = 1e-3,
        ransac_iterations: int = 1000,
        save_images: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        self.num_matches, self.essential_weight = num_matches, essential_weight
        self.ransac, self.ransac_threshold = ransac, ransac_threshold
        self.ransac_iterations, self.save_images = ransac_iterations, save_images

    def data_options(self, needs: Needs) -> dict[str, Any]:
        """Return what builders take beside their own options."""
        return {"num_matches": self.num_matches, "evaluation_only": needs.evaluation_only}

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return the samples of an epoch."""
        return {"num_samples": 0 if data.train is None else len(data.train)}

    def prepare(self, batch: Pairs, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Move a batch to the device; the targets are matches, distances, rotations, ways."""
        matches, truth = batch
        matches = matches.to(device)
        return matches, (matches, *(each.to(device) for each in truth))

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the mean over pairs of cross-entropy and error of the essential matrix."""
        logits = outputs.float()
        matches, distances, rotation, translation = targets
        right = (distances < INLIER).to(logits.dtype)
        entropy = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
        counts = right.sum(1), (1 - right).sum(1)
        classes = [
            (entropy * mask).sum(1) / count.clamp(min=1)
            for mask, count in zip((right, 1 - right), counts, strict=True)
        ]
        loss = 0.5 * sum(classes).mean()
        if self.essential_weight > 0:
            found = weighted_eight_point(matches, self.weights(logits))
            true = essential_matrix(rotation, translation)
            errors = [(found + sign * true).square().sum((-1, -2)) for sign in (1, -1)]
            loss = loss + self.essential_weight * torch.minimum(*errors).mean().to(loss.dtype)
        return loss

    @staticmethod
    def weights(logits: Tensor) -> Tensor:
        """Return the weights of matches in the eight-point algorithm."""
        return torch.relu(torch.tanh(logits))

    def metrics(self, outputs: Tensor, targets: Any) -> dict[str, Tensor]:
        """Return precision, recall and F1 in %, and 100 where the pose is right, else 0, (B,)."""
        logits = outputs.float()
        matches, distances, rotation, translation = targets
        right, kept = distances < INLIER, logits > 0
        both = (right & kept).sum(1).double()
        precision, recall = both / kept.sum(1).clamp(min=1), both / right.sum(1).clamp(min=1)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        weights = self.weights(logits)
        found = weighted_eight_point(matches, weights)
        pose = recover_pose(found, matches, weights)
        errors = pose_errors(*pose, rotation, translation)
        scores = {"precision": precision, "recall": recall, "f1": f1}
        scores = {name: 100 * value for name, value in scores.items()}
        return scores | pose_scores(errors)

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        loss = f"Loss: {metrics['loss']:.6f} " if "loss" in metrics else ""
        return (
            f"{loss}Precision: {metrics['precision']:.2f}%, Recall: {metrics['recall']:.2f}%, "
            f"F1: {metrics['f1']:.2f}% | {pose_line(metrics)}"
        )

    def examine(
        self, model: nn.Module, data: Data, run: RunFolder, evaluate: Evaluate
    ) -> tuple[dict[str, float], Finding]:
        """Evaluate on the test set, with a table of pairs, RANSAC and pictures if asked for."""
        base = getattr(data.test, "dataset", data.test)
        rows: list[dict[str, Any]] = []

        def observe(inputs: Tensor, outputs: Tensor, targets: Any, metrics: Mapping) -> None:
            matches, distances, rotation, translation = (each.cpu() for each in targets)
            kept = outputs.cpu() > 0
            for i in range(len(matches)):
                name = base.names[len(rows)]
                scores = {key: v[i].item() for key, v in metrics.items() if key != "loss"}
                row = {"pair": name, "matches": len(matches[i]), **scores}
                if self.ransac:
                    truth = rotation[i : i + 1], translation[i : i + 1]
                    everything = torch.ones_like(kept[i])
                    for key, chosen in (("ransac", everything), ("kept_ransac", kept[i])):
                        row |= self._by_ransac(key, matches[i], chosen, distances[i], truth)
                rows.append(row)
                if self.save_images:
                    path = run.file(f"images/{len(rows):03d}_{Path(name).stem}.png")
                    draw_matches(path, matches[i], kept[i], distances[i] < INLIER)

        metrics = evaluate(data.test, observe=observe)
        run.write_result("per_pair.csv", csv_text(rows))
        lines = [
            "Protocol: a match is right where its symmetric epipolar distance is below "
            f"{INLIER:g}; kept where its logit is positive; the pose is that of the weighted "
            "eight-point algorithm, right where rotation and direction are both off by less than "
            "so many degrees; scores per pair, then averaged."
        ]
        for key, title in (
            ("ransac", "RANSAC on all matches"),
            ("kept_ransac", "RANSAC on those kept"),
        ):
            if self.ransac:
                own = {
                    name.removeprefix(f"{key}_"): sum(row[name] for row in rows) / len(rows)
                    for name in rows[0]
                    if name.startswith(f"{key}_")
                }
                lines.append(f"{title}: {self.line(own)}")
        return metrics, Finding({}, lines)

    def _by_ransac(
        self, key: str, matches: Tensor, chosen: Tensor, distances: Tensor, truth: tuple
    ) -> dict[str, float]:
        """Score OpenCV's RANSAC on the chosen matches of a pair; 180 degrees where it fails."""
        cv2 = opencv()
        right, kept = distances < INLIER, torch.zeros_like(chosen)
        error = torch.tensor([180.0])
        positions = chosen.nonzero()[:, 0]
        if len(positions) >= LEAST:
            first, second = matches[positions].double().numpy().reshape(-1, 2, 2).transpose(1, 0, 2)
            first, second = np.ascontiguousarray(first), np.ascontiguousarray(second)
            cv2.setRNGSeed(self.seed)
            found, mask = cv2.findEssentialMat(
                *(first, second, np.eye(3), cv2.RANSAC, 0.999),
                *(self.ransac_threshold, self.ransac_iterations),
            )
            if found is not None and found.shape == (3, 3):
                kept[positions] = torch.from_numpy(mask.ravel() > 0)
                pose = recover_pose(
                    torch.from_numpy(found)[None], matches[None], kept[None].double()
                )
                error = pose_errors(*pose, *truth)
        both = (kept & right).sum().item()
        precision, recall = both / max(1, kept.sum().item()), both / max(1, right.sum().item())
        f1 = 2 * precision * recall / max(1e-12, precision + recall)
        scores = {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}
        scores |= {name: value.item() for name, value in pose_scores(error).items()}
        return {f"{key}_{name}": value for name, value in scores.items()}

    def finish(
        self,
        model: nn.Module,
        data: Data,
        run: RunFolder,
        evaluate: Evaluate,
        use_best: Callable[[], int],
    ) -> Finding:
        """Compare with RANSAC and draw pairs with the best weights, if that is asked for."""
        if not (self.ransac or self.save_images):
            return Finding({}, [])
        epoch = use_best()
        metrics, found = self.examine(model, data, run, evaluate)
        first = f"Test pairs with the weights of epoch {epoch}:"
        return Finding({"test": metrics}, [first, *found.lines])


def pose_scores(errors: Tensor) -> dict[str, Tensor]:
    """Return 100 where an error in degrees is below 5, 10, 20, else 0; and the published mean.

    The mean up to 20 degrees is that of the shares below 5, 10, 15 and 20.
    """
    shares = {f"below{limit}": 100.0 * (errors < limit) for limit in DEGREES}
    steps = [100.0 * (errors < limit) for limit in (5, 10, 15, 20)]
    return {**shares, "map20": torch.stack(steps).mean(0)}


def pose_line(metrics: Mapping[str, float]) -> str:
    """Word averaged pose scores."""
    shares = ", ".join(f"{limit}°: {metrics[f'below{limit}']:.1f}%" for limit in DEGREES)
    return f"Pose within {shares}, mAP20: {metrics['map20']:.1f}%"


def draw_matches(path: str | Path, matches: Tensor, kept: Tensor, right: Tensor) -> None:
    """Draw both pictures' points side by side, all matches left and those kept right.

    Right matches are green, wrong ones red. Of many, every so-manieth is drawn, 200 in all.

    Args:
        path: Where the PNG goes.
        matches: (N, 4).
        kept: (N,) bool.
        right: (N,) bool.
    """
    from PIL import Image, ImageDraw

    side, gap, margin = 320, 12, 16
    low = min(matches.min().item(), -0.5)
    span = max(matches.max().item(), 0.5) - low
    sheet = Image.new("RGB", (4 * side + 3 * gap, side + margin), "white")
    draw = ImageDraw.Draw(sheet)
    places = (matches - low) / span * (side - 1)
    drawn = torch.arange(len(matches)) % -(-len(matches) // 200) == 0
    for panel, (title, shown) in enumerate((("all", torch.ones_like(kept)), ("kept", kept))):
        left = panel * 2 * (side + gap)
        good, total = int((shown & right).sum()), int(shown.sum())
        draw.text((left + 2, 1), f"{title}: {good} of {total} right", fill="black")
        for i in (0, 1):
            start = left + i * (side + gap)
            draw.rectangle((start, margin, start + side - 1, margin + side - 1), outline="gray")
        # Right ones last: they are fewer, and lie on top.
        for color, group in (
            ("#e0a0a0", drawn & shown & ~right),
            ("#108010", drawn & shown & right),
        ):
            for x, y, u, v in places[group].tolist():
                ends = (left + x, margin + y, left + side + gap + u, margin + v)
                draw.line(ends, fill=color)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
