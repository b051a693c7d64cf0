"""Classification: one class a sample; also what nearest-neighbor classifiers found."""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import Data
from options import OptionError, Options, option
from run_folder import RunFolder
from tasks.task import Evaluate, Finding, Needs, Task
from utils import atomic_path

__all__ = [
    "ClassificationTask",
    "NeighborReport",
    "evaluate_neighbors",
    "plot_confusion",
    "plot_neighbors",
]

MOST_DRAWN = 2000  # classes in a confusion matrix; it is held and drawn as a square


@dataclass
class NeighborReport:
    """What K-nearest-neighbor classification found, for several K from one search.

    Attributes:
        metrics: For every K: ``top1`` in % and, of more than five classes, ``top5``; a class
            without a vote is in no top five.
        predictions: For every K the classes (M,).
        labels: (M,) true classes.
        indices: (M, largest K) neighbors.
        seconds: Time of search and votes.
    """

    metrics: dict[int, dict[str, float]]
    predictions: dict[int, Tensor]
    labels: Tensor
    indices: Tensor
    seconds: float

    @property
    def queries_per_second(self) -> float:
        """Throughput of search and votes."""
        return len(self.labels) / max(self.seconds, 1e-9)

    def confusion(self, K: int, num_classes: int) -> Tensor:
        """Return how many samples of a class (row) were taken for each class (column)."""
        pairs = self.labels * num_classes + self.predictions[K]
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@torch.no_grad()
def evaluate_neighbors(
    model: nn.Module, batches: Iterable[tuple[Tensor | None, Tensor]], *, device: torch.device
) -> NeighborReport:
    """Classify by K nearest neighbors, for all of the model's K at once.

    Args:
        model: Offers ``K``, ``kneighbors(x)`` and ``votes(values, indices, K)``.
        batches: Samples and labels; samples None stands for the stored ones, each without itself.
        device: Where the search runs.
    """
    hits: dict[int, list[Tensor]] = {K: [] for K in model.K}
    classes: dict[int, list[Tensor]] = {K: [] for K in model.K}
    labels, indices, seconds = [], [], 0.0
    for samples, targets in batches:
        targets = targets.to(device)
        start = time.perf_counter()
        found = model.kneighbors(None if samples is None else samples.to(device))
        for K in model.K:
            _, scores = model.votes(*found, K)
            best = scores.topk(min(5, scores.shape[1]), dim=1)
            right = (best.indices == targets[:, None]) & best.values.isfinite()
            counted = 1 if scores.shape[1] <= 5 else 2
            hits[K].append(torch.stack([right[:, 0], right.any(1)], 1)[:, :counted].cpu())
            classes[K].append(best.indices[:, 0].cpu())
        seconds += time.perf_counter() - start
        labels.append(targets.cpu())
        indices.append(found[1].cpu())
    shares = {K: (100 * torch.cat(parts).double().mean(0)).tolist() for K, parts in hits.items()}
    return NeighborReport(
        {K: dict(zip(("top1", "top5"), share, strict=False)) for K, share in shares.items()},
        {K: torch.cat(parts) for K, parts in classes.items()},
        torch.cat(labels),
        torch.cat(indices),
        seconds,
    )


@dataclass(frozen=True)
class ClassificationOptions(Options):
    """What is minimised."""

    title = "Classification"
    criterion: str = option(
        "CrossEntropy",
        "classification loss; MSE is taken against the one-hot class",
        choices=("CrossEntropy", "MSE"),
        trainers=("gradient",),
    )
    label_smoothing: float = option(
        0.0,
        "share of each target that is spread over all classes, in training by cross-entropy",
        least=0,
        below=1,
        trainers=("gradient",),
    )

    def __post_init__(self) -> None:
        """Refuse to smooth what is no cross-entropy."""
        super().__post_init__()
        if self.label_smoothing > 0 and self.criterion != "CrossEntropy":
            raise OptionError(
                f"label_smoothing {self.label_smoothing:g} is for criterion CrossEntropy (got "
                f"{self.criterion}). Leave one of them out."
            )


class ClassificationTask(Task):
    """One class per sample; cross-entropy, or squared error against the one-hot class.

    Args:
        criterion: "CrossEntropy" or "MSE".
        label_smoothing: Share of the targets spread over all classes in training (C. Szegedy et
            al., https://arxiv.org/abs/1512.00567).
        seed: Nothing is drawn at random.
    """

    name = "classification"
    headline, headline_name, headline_unit = "top1", "Accuracy", "%"
    features = True
    Options = ClassificationOptions

    def __init__(
        self, *, criterion: str = "CrossEntropy", label_smoothing: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        self.criterion, self.label_smoothing = criterion, label_smoothing

    def data_options(self, needs: Needs) -> dict[str, Any]:
        """Return what builders of labelled images take beside their own options."""
        return {"min_side": needs.min_side, "normalize": needs.normalize}

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return channels, height and width, features of a flattened sample, and classes."""
        return {
            "in_channels": data.sample_shape[0],
            "image_size": tuple(data.sample_shape[1:]),
            "num_inputs": math.prod(data.sample_shape),
            "num_classes": data.num_outputs,
        }

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of scores (B, classes) for labels, in float32.

        Args:
            outputs: Scores.
            targets: Classes (B,), or shares of the classes (B, classes) where samples are mixed.
        """
        if self.criterion == "MSE":
            mixed = targets.ndim == 2
            shares = targets if mixed else F.one_hot(targets, outputs.shape[1])
            return F.mse_loss(outputs.float(), shares.to(torch.float32))
        return F.cross_entropy(outputs.float(), targets)

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, of smoothed targets if that is asked for."""
        if self.label_smoothing == 0:
            return self.loss(outputs, targets)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.label_smoothing)

    def blind_loss(self, num_outputs: int) -> float | None:
        """Return the cross-entropy of equal scores."""
        return math.log(num_outputs) if self.criterion == "CrossEntropy" else None

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 where the class is the best, or among the best five, and 0 elsewhere.

        The best five are left out where there are no more classes. The class of a mixed sample is
        the one with the largest share.
        """
        targets = targets.argmax(1) if targets.ndim == 2 else targets
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
        hits = (best == targets[:, None]).float() * 100
        top1 = {"top1": hits[:, 0]}
        return top1 if outputs.shape[1] <= 5 else {**top1, "top5": hits.sum(1)}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        loss = f"Loss: {metrics['loss']:.8f} " if "loss" in metrics else ""
        top5 = f", Top5: {metrics['top5']:.4f}%" if "top5" in metrics else ""
        return f"{loss}Accuracy: Top1: {metrics['top1']:.4f}%{top5}"

    def brief(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the line of an epoch; all digits are in metrics.csv."""
        loss = f"Loss: {metrics['loss']:.4f} " if "loss" in metrics else ""
        top5 = f" Top5: {metrics['top5']:.2f}%" if "top5" in metrics else ""
        return f"{loss}Top1: {metrics['top1']:.2f}%{top5}"

    def examine(
        self, model: nn.Module, data: Data, run: RunFolder, evaluate: Evaluate
    ) -> tuple[dict[str, float], Finding]:
        """Evaluate on the test set; a model that has neighbors shows them too."""
        if not hasattr(model, "kneighbors"):
            return super().examine(model, data, run, evaluate)
        report = self.neighbors(model, evaluate.loader(data.test), evaluate.device)
        self.show_neighbors(model, data, report, run)
        lines = self.neighbor_lines(model, {"test": report})
        return report.metrics[model.chosen], Finding({}, lines)

    # -- models that classify by the nearest of stored samples

    def neighbors(
        self, model: nn.Module, batches: Iterable[tuple[Tensor | None, Tensor]], device: Any
    ) -> NeighborReport:
        """Find and judge the neighbors of samples; see :func:`evaluate_neighbors`."""
        return evaluate_neighbors(model, batches, device=device)

    def neighbor_lines(self, model: nn.Module, reports: Mapping[str, NeighborReport]) -> list[str]:
        """Word what K-nearest-neighbor classification measured: speed, then a line for every K."""
        test = reports["test"]
        lines = [
            f"Classified {len(test.labels)} test samples in {test.seconds:.4f}s "
            f"({test.queries_per_second:.0f} queries/s; {model.metric}, {model.vote} vote; "
            f"{model.search_path}; K up to {max(model.K)} from one search)."
        ]
        for K in model.K:
            parts = [
                f"[{name.capitalize()}] {self.line(report.metrics[K])}"
                for name, report in reports.items()
            ]
            lines.append(f"[K {K:03d}] " + " | ".join(parts))
        return lines

    def show_neighbors(
        self, model: nn.Module, data: Data, report: NeighborReport, run: RunFolder
    ) -> None:
        """Draw the confusion matrix, and some queries with their neighbors, right and wrong."""
        K, names = model.chosen, data.class_names or tuple(map(str, range(data.num_outputs)))
        if data.num_outputs <= MOST_DRAWN:
            confusion = report.confusion(K, data.num_outputs)
            plot_confusion(confusion, names, run.file("confusion.png"))
        else:
            print(f"note: {data.num_outputs:,} classes are too many to draw a confusion.png of.")
        if "pictures" in data.extra:  # samples are features: load the same ones as pictures
            data = data.extra["pictures"]()
        if len(data.sample_shape) != 3:
            return
        predictions = report.predictions[K]
        right = predictions == report.labels
        chosen = [part.nonzero().flatten()[:5].tolist() for part in (right, ~right)]
        rows = []
        for query in chosen[0] + chosen[1]:
            image, label = data.test[query]
            row = [(image, f"{names[int(label)]}", None)]
            for neighbor in report.indices[query, :8].tolist():
                image, other = data.train[neighbor]
                row.append((image, names[int(other)], int(other) == int(label)))
            rows.append(row)
        plot_neighbors(rows, run.file("neighbors.png"))


def plot_confusion(counts: Tensor, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Draw how often samples of a class (row) are taken for each class (column).

    Args:
        counts: (C, C) numbers of samples.
        class_names: Their names.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure

    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    classes = len(counts)
    side = min(9.0, 2.5 + 0.42 * classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    # The square root makes rare confusions visible beside the diagonal.
    image = axis.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="predicted", ylabel="true")
    if classes <= 25:
        axis.set_xticks(range(classes), class_names, rotation=90)
        axis.set_yticks(range(classes), class_names)
        for row in range(classes):
            for column in range(classes):
                if counts[row, column]:
                    dark = shares[row, column] > 0.4
                    axis.text(
                        *(column, row, str(int(counts[row, column]))),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
    bar = figure.colorbar(image, ax=axis, shrink=0.7)
    ticks = (0, 0.01, 0.1, 0.5, 1)
    bar.set_ticks([t**0.5 for t in ticks], labels=[f"{100 * t:g}%" for t in ticks])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_neighbors(
    rows: Sequence[Sequence[tuple[Tensor, str, bool | None]]], path: str | os.PathLike
) -> None:
    """Draw queries, each with its neighbors in a row.

    Args:
        rows: For every query the query itself and its neighbors: image (C, H, W) in [0, 1],
            caption, and whether its class is right (None for the query).
        path: Where the PNG goes.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    height, width = rows[0][0][0].shape[-2:]
    zoom = max(1, -(-56 // max(height, width)))
    cell, line = (width * zoom + 10, height * zoom + 24), 16
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    colors = {None: "black", True: "green", False: "red"}
    for y, row in enumerate(rows):
        for x, (image, caption, right) in enumerate(row):
            picture = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            picture = picture.expand(3, -1, -1) if len(picture) == 1 else picture[:3]
            tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            left, top = x * cell[0] + 5, y * cell[1] + line
            box = (left - 2, top - 2, left + tile.width + 1, top + tile.height + 1)
            draw.rectangle(box, outline=colors[right], width=2)
            sheet.paste(tile, (left, top))
            while caption and draw.textlength(caption, font) > cell[0] - 4:
                caption = caption[:-1]
            draw.text((left, top - line), caption, fill=colors[right], font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
