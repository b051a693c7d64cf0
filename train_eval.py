"""The shared training and evaluation loop, its tasks, checkpoints and run logs.

A *task* knows what a batch means: how it is prepared, its loss, its metrics and its line in the
results file. A *trainer* knows how a model learns from a batch: by gradient or by growth. The loop
in :func:`fit` knows neither.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import (
    CsvLog,
    atomic_path,
    get_random_state,
    plot_growth,
    plot_learning_curves,
    psnr,
    read_tensor_file,
    save_checkpoint,
    save_panels,
    set_random_state,
    ssim,
    write_text,
)

__all__ = [
    "ApproximationTask",
    "ClassificationTask",
    "DenoisingTask",
    "GradientTrainer",
    "GrowthTrainer",
    "ImageReport",
    "LanguageTask",
    "NeighborReport",
    "Progress",
    "RunFolder",
    "Task",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "build_scheduler",
    "evaluate",
    "evaluate_neighbors",
    "fit",
    "generate_text",
    "load_checkpoint",
    "mse_to_psnr",
    "read_weights",
]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is saved."""


# ---------------------------------------------------------------------------------------------
# Tasks


class Task(Protocol):
    """What a batch means.

    Attributes:
        name: "classification", "denoising", …
        headline: The metric whose maximum makes a checkpoint the best one.
        headline_name: Its name in the results file, e.g. "Accuracy".
        headline_unit: Its unit there, e.g. "%".

    A task may also have ``predict(model, inputs)``, which then makes the outputs in evaluation.
    """

    name: str
    headline: str
    headline_name: str
    headline_unit: str

    def prepare(self, batch: Any, device: torch.device) -> tuple[Any, Any]:
        """Move a loader's batch to the device: (inputs, targets)."""

    def loss(self, outputs: Any, targets: Any) -> Tensor | None:
        """Return the scalar that is minimised, the mean over samples; None where there is none."""

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return one value per sample, (B,), for every metric."""

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""


class ClassificationTask:
    """One class per sample; cross-entropy, or squared error against the one-hot class.

    Args:
        num_classes: Number of classes.
        criterion: "CrossEntropy", "MSE", or None for models that grow: no loss is reported.
    """

    name = "classification"
    headline, headline_name, headline_unit = "top1", "Accuracy", "%"

    def __init__(self, num_classes: int, criterion: str | None = "CrossEntropy") -> None:
        self.num_classes, self.criterion = num_classes, criterion

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move images and labels to the device."""
        images, labels = batch
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return the mean loss of scores (B, classes) for labels (B,), in float32."""
        if self.criterion is None:
            return None
        if self.criterion == "MSE":
            one_hot = F.one_hot(targets, self.num_classes).to(torch.float32)
            return F.mse_loss(outputs.float(), one_hot)
        return F.cross_entropy(outputs.float(), targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 where the class is the best, or among the best five, and 0 elsewhere."""
        best = outputs.topk(min(5, self.num_classes), dim=1).indices
        hits = (best == targets[:, None]).float() * 100
        return {"top1": hits[:, 0], "top5": hits.sum(1)}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        loss = f"Loss: {metrics['loss']:.8f} " if "loss" in metrics else ""
        return f"{loss}Accuracy: Top1: {metrics['top1']:.4f}%, Top5: {metrics['top5']:.4f}%"


class DenoisingTask:
    """Noisy and clean images in [0, 1]; squared error, PSNR and SSIM.

    Args:
        reduction: "sum": half the sum of squares of each image times `scale`, averaged over images
            (published); "mean": the mean square.
        scale: See reduction; published is 0.25 for crops of 80×80.
        predict: How to run the model in evaluation (model, noisy images) -> images, e.g. by tiles;
            None calls it.
    """

    name = "denoising"
    headline, headline_name, headline_unit = "psnr", "PSNR", " dB"

    def __init__(
        self,
        reduction: str = "sum",
        scale: float = 0.25,
        predict: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        self.reduction, self.scale = reduction, scale
        self.run = predict

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move noisy and clean images to the device."""
        noisy, clean = batch
        return noisy.to(device, non_blocking=True), clean.to(device, non_blocking=True)

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Denoise whole images."""
        return model(inputs) if self.run is None else self.run(model, inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over images of their squared error."""
        squares = (outputs.float() - targets).square()
        if self.reduction == "mean":
            return squares.mean()
        return squares.sum() * (0.5 * self.scale / len(squares))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return PSNR in dB and SSIM of every image."""
        return {"psnr": psnr(outputs, targets), "ssim": ssim(outputs, targets)}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        loss = f"Loss: {metrics['loss']:.8f} " if "loss" in metrics else ""
        return f"{loss}PSNR: {metrics['psnr']:.4f} dB, SSIM: {metrics['ssim']:.4f}"


class ImageReport:
    """Quality of every image of a denoising test set, as a table, lines and pictures.

    Give :meth:`add` to :func:`evaluate` as its observer.

    Args:
        names: Names of the images (``folder/file``), in the order of the loader.
        path: Folder for ``per_image.csv`` and pictures.
        pictures: Draw noisy, denoised and clean side by side, below ``images/``.
    """

    TABLE, PICTURES = "per_image.csv", "images"

    def __init__(self, names: Sequence[str], path: Path, *, pictures: bool = False) -> None:
        self.names, self.path, self.pictures = names, path, pictures
        self.rows: list[dict[str, Any]] = []

    def add(self, noisy: Tensor, outputs: Tensor, clean: Tensor, metrics: Mapping) -> None:
        """Take note of a batch."""
        for i, before in enumerate(psnr(noisy, clean).tolist()):
            name = self.names[len(self.rows)]
            after = {key: values[i].item() for key, values in metrics.items() if key != "loss"}
            self.rows.append({"image": name, "noisy_psnr": before, **after})
            if self.pictures:
                folder = self.path / self.PICTURES
                folder.mkdir(parents=True, exist_ok=True)
                save_panels(
                    folder / f"{len(self.rows):03d}_{Path(name).stem}.png",
                    {
                        f"noisy {before:.2f} dB": noisy[i],
                        f"denoised {after['psnr']:.2f} dB": outputs[i],
                        "clean": clean[i],
                    },
                )

    def lines(self) -> list[str]:
        """Write the table; return a line an image and a line a folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / self.TABLE).unlink(missing_ok=True)
        table = CsvLog(self.path / self.TABLE)
        lines = []
        folders: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            table.append(row)
            folders.setdefault(row["image"].rpartition("/")[0], []).append(row)
            lines.append(self._line(row["image"], [row]))
        for folder, rows in folders.items():
            lines.append(self._line(f"Average of {folder} ({len(rows)} images)", rows))
        return lines

    @staticmethod
    def _line(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
        before, after, similar = (
            sum(row[key] for row in rows) / len(rows) for key in ("noisy_psnr", "psnr", "ssim")
        )
        return f"{title}: PSNR: {after:.4f} dB, SSIM: {similar:.4f} (noisy: {before:.4f} dB)"


class ApproximationTask:
    """A function known at points, e.g. a picture: position -> values in [0, 1].

    Args:
        tolerance: A prediction is right where its distance to the value is below this.
    """

    name = "approximation"
    headline, headline_name, headline_unit = "within", "Within tolerance", "%"

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move positions and values to the device."""
        positions, values = batch
        return positions.to(device, non_blocking=True), values.to(device, non_blocking=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> None:
        """Return nothing: the model grows."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 where within tolerance and 0 elsewhere, and the mean square error."""
        errors = outputs.float() - targets
        right = (errors.norm(dim=1) < self.tolerance).float() * 100
        return {"within": right, "mse": errors.square().mean(dim=1)}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file; PSNR is that of all points together."""
        return (
            f"Within tolerance: {metrics['within']:.4f}%, "
            f"PSNR: {mse_to_psnr(metrics['mse']):.4f} dB"
        )


def mse_to_psnr(mse: float) -> float:
    """Return the PSNR in dB of a mean square error of values in [0, 1]."""
    return float("inf") if mse == 0 else -10 * math.log10(mse)


class LanguageTask:
    """Scores of the next character; accuracy and bits per character.

    A score of 0 would cost infinitely many bits, so scores are mixed with `uniform` parts of an
    even distribution over all classes for that count.

    Args:
        num_classes: Number of characters.
        uniform: See above.
    """

    name = "language"
    headline, headline_name, headline_unit = "top1", "Accuracy", "%"

    def __init__(self, num_classes: int, uniform: float = 0.01) -> None:
        self.num_classes, self.uniform = num_classes, uniform

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move features and codes to the device."""
        features, codes = batch
        return features.to(device, non_blocking=True), codes.to(device, non_blocking=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> None:
        """Return nothing: the model grows."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return 100 where the character is right and 0 elsewhere, and the bits it costs."""
        right = (outputs.argmax(dim=1) == targets).float() * 100
        scores = outputs.gather(1, targets[:, None])[:, 0].float()
        mixed = scores * (1 - self.uniform) + self.uniform / self.num_classes
        return {"top1": right, "bits": -mixed.log2()}

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        return f"Accuracy: {metrics['top1']:.4f}%, Bits per character: {metrics['bits']:.4f}"


# ---------------------------------------------------------------------------------------------
# Optimizers and schedules


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    decay_bias: bool = True,
) -> torch.optim.Optimizer:
    """Build an optimizer over all trainable parameters.

    Args:
        model: The network.
        name: "adam", "adamw" (decoupled weight decay) or "sgd".
        lr: Learning rate.
        weight_decay: Weight decay.
        momentum: Momentum of sgd.
        decay_bias: Apply weight decay to parameters named bias as well.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters: list[Any] = [p for _, p in named]
    # One pass over each parameter instead of a dozen: an AdamW step of VGG costs a third.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    if not decay_bias:
        biases = [p for key, p in named if key.rpartition(".")[2] == "bias"]
        parameters = [p for key, p in named if key.rpartition(".")[2] != "bias"]
        parameters = [{"params": parameters}, {"params": biases, "weight_decay": 0.0}]
    options = {"lr": lr, "weight_decay": weight_decay, "fused": fused}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=momentum, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **options)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    num_epochs: int,
    lr_step: int,
    lr_gamma: float,
    lr_final: float = 1e-3,
) -> torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau | None:
    """Build a schedule that is stepped once an epoch.

    All but plateau are functions of the epoch alone, so that a resumed run may have another
    number of epochs.

    Args:
        optimizer: What it steers.
        name: "step" (× lr_gamma every lr_step epochs), "cosine" (to 0 over num_epochs), "plateau"
            (× lr_gamma when the headline metric has not risen for lr_step epochs), "exponential"
            (down to × lr_final in the last epoch) or "none".
        num_epochs: Length of the run.
        lr_step: See name.
        lr_gamma: See name.
        lr_final: See name.
    """
    if name == "none":
        return None
    if name == "plateau":
        # The published runs watched accuracy with mode "min", which lowers the rate as it rises.
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=lr_gamma, patience=lr_step
        )
    factors: dict[str, Callable[[int], float]] = {
        "step": lambda epoch: lr_gamma ** (epoch // lr_step),
        "exponential": lambda epoch: lr_final ** (epoch / max(1, num_epochs - 1)),
        "cosine": lambda epoch: (
            0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / num_epochs)).item())
        ),
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[name])


# ---------------------------------------------------------------------------------------------
# Two ways to learn from a batch


class Trainer(Protocol):
    """How a model learns from a batch."""

    model: nn.Module

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Learn from a batch; return per-sample metrics (B,)."""

    def check(self, epoch: int, step: int) -> None:
        """Raise TrainingError if what was learnt since the last check is not finite."""

    def end_epoch(self, headline: float) -> bool:
        """Finish an epoch, told the headline metric; return True when there is no more to learn."""

    def columns(self) -> dict[str, float]:
        """Return what else an epoch's row should hold, e.g. the learning rate."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Mixed precision: float16 on GPUs, bfloat16 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


class GradientTrainer:
    """Gradient descent with mixed precision and gradient clipping.

    Args:
        model: The network, on its device.
        task: What a batch means.
        optimizer: Its optimizer.
        scheduler: Its schedule, stepped once an epoch, or None.
        device: Where it runs.
        amp: Mixed precision (see :func:`autocast`), with loss scaling on CUDA.
        clip_grad_norm: Largest norm of all gradients together; 0 does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        *,
        device: torch.device,
        amp: bool = False,
        clip_grad_norm: float = 1.0,
    ) -> None:
        self.model, self.task, self.device, self.amp = model, task, device, amp
        self.optimizer, self.scheduler = optimizer, scheduler
        self.clip_grad_norm = clip_grad_norm
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp and device.type == "cuda")
        self._losses: list[Tensor] = []

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Take one gradient step; return per-sample metrics (B,)."""
        inputs, targets = self.task.prepare(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.amp):
            outputs = self.model(inputs)
            loss = self.task.loss(outputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._losses.append(loss.detach())
        with torch.no_grad():
            metrics = self.task.metrics(outputs.detach(), targets)
        count = len(next(iter(metrics.values())))
        return {"loss": loss.detach().expand(count), **metrics}

    def check(self, epoch: int, step: int) -> None:
        """Raise TrainingError if a loss since the last check is not finite."""
        if not self._losses:
            return
        finite = torch.stack(self._losses).isfinite().tolist()
        first = step - len(finite) + 1
        self._losses.clear()
        if not all(finite):
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {first + finite.index(False)}. "
                "Try a smaller --lr, or --clip_grad_norm 1.0; without --use_amp numbers have "
                "more range."
            )

    def end_epoch(self, headline: float) -> bool:
        """Step the schedule."""
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(headline)
        elif self.scheduler is not None:
            self.scheduler.step()
        return False

    def columns(self) -> dict[str, float]:
        """Return the learning rate."""
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule and loss scaling."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else _plain(self.scheduler.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a scheduler's state what loads with ``weights_only=True``."""
    kinds = (bool, int, float, str, list, type(None))
    return {k: v for k, v in state.items() if isinstance(v, kinds) and k != "lr_lambdas"}


class GrowthTrainer:
    """Learning without gradients: the model adds what it still gets wrong.

    The model offers ``grow(inputs, targets) -> outputs``: its outputs for the batch once it has
    learnt it. It may offer ``end_pass() -> bool``: whether there is no more to learn, ``growth``:
    a list of rows, one a batch grown, and ``num_centers``. When memory is full, the model raises
    MemoryError: what was learnt is then kept, evaluated and saved, and the run ends.

    Args:
        model: The growing model.
        task: What a batch means.
        device: Where it runs.
    """

    def __init__(self, model: nn.Module, task: Task, *, device: torch.device) -> None:
        self.model, self.task, self.device = model, task, device
        self.full: str | None = None  # why nothing can be added any more

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Grow by a batch; return per-sample metrics (B,) afterwards."""
        inputs, targets = self.task.prepare(batch, self.device)
        with torch.no_grad():
            if self.full is None:
                try:
                    return self.task.metrics(self.model.grow(inputs, targets), targets)
                except MemoryError as error:
                    self.full = str(error)
            return self.task.metrics(self.model(inputs), targets)

    @property
    def sated(self) -> bool:
        """Whether the rest of a pass could add nothing, and need not be gone through."""
        return self.full is not None or bool(getattr(self.model, "full", False))

    def check(self, epoch: int, step: int) -> None:
        """Do nothing: growth has no loss that could diverge."""

    def end_epoch(self, headline: float) -> bool:
        """Return True when the model says that there is no more to learn."""
        finished = self.model.end_pass() if hasattr(self.model, "end_pass") else False
        return finished or self.full is not None

    def columns(self) -> dict[str, float]:
        """Return the number of centers, if the model counts them."""
        count = getattr(self.model, "num_centers", None)
        return {} if count is None else {"centers": int(count)}

    def report(self, run: "RunFolder") -> None:
        """Write ``growth.csv`` and ``growth.png``, one entry a batch; say if memory is full."""
        rows = getattr(self.model, "growth", [])
        if rows:
            CsvLog(run.path / "growth.csv", rows)
            plot_growth(rows, run.path / "growth.png")
        if self.full is not None:
            run.write_line(f"Growing stopped: {self.full}.")

    def state_dict(self) -> dict[str, Any]:
        """Return what is not part of the model's own state: the record of its growth."""
        return {"growth": list(getattr(self.model, "growth", []))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        if hasattr(self.model, "growth"):
            self.model.growth[:] = state["growth"]


# ---------------------------------------------------------------------------------------------
# Loops


class _Averages:
    """Averages of per-sample values; every sample counts the same. Stays on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, values in metrics.items():
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            total = values.detach().to(dtype).sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += len(next(iter(metrics.values())))

    def result(self) -> dict[str, float]:
        return {name: (total / self.count).item() for name, total in self.sums.items()}


def _progress(
    loader: DataLoader,
    text: str,
    limit: int | None,
    show: Callable[[], dict[str, float]] | None = None,
) -> Iterator[Any]:
    """Iterate with a bar where a person is watching, and with none in a log file."""
    total = len(loader) if limit is None else min(limit, len(loader))
    bar = tqdm(loader, desc=text, total=total, leave=False, disable=None, dynamic_ncols=True)
    for index, batch in enumerate(bar):
        if index == total:
            break
        yield batch
        if show is not None and not bar.disable:
            bar.set_postfix(show())
    bar.close()


CHECK_EVERY = 50  # steps between two looks at the losses: a look waits for the GPU


def train_one_epoch(
    trainer: Trainer, loader: DataLoader, *, epoch: int, max_steps: int | None = None
) -> dict[str, float]:
    """Train for one epoch; return metrics averaged over samples, and ``samples``."""
    trainer.model.train()
    averages, step = _Averages(), 0
    batches = _progress(loader, f"epoch {epoch}", max_steps, trainer.columns)
    for step, batch in enumerate(batches, start=1):
        averages.add(trainer.step(batch))
        if step % CHECK_EVERY == 0:
            trainer.check(epoch, step)
        if getattr(trainer, "sated", False):
            break
    trainer.check(epoch, step)
    return averages.result() | {"samples": averages.count}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    loader: DataLoader,
    *,
    device: torch.device,
    amp: bool = False,
    max_batches: int | None = None,
    text: str = "evaluate",
    observe: Callable[[Any, Any, Any, Mapping[str, Tensor]], None] | None = None,
) -> dict[str, float]:
    """Evaluate a model; return metrics averaged over samples, ``loss`` first where there is one.

    Args:
        model: The network, on its device.
        task: What a batch means; where it has ``predict(model, inputs)``, that makes the outputs.
        loader: Batches.
        device: Where it runs.
        amp: Mixed precision.
        max_batches: Stop after so many.
        text: Title of the progress bar.
        observe: Told inputs, outputs, targets and per-sample metrics of every batch.
    """
    model.eval()
    predict = getattr(task, "predict", None)
    averages = _Averages()
    for batch in _progress(loader, text, max_batches):
        inputs, targets = task.prepare(batch, device)
        with autocast(device, amp):
            outputs = model(inputs) if predict is None else predict(model, inputs)
            loss = task.loss(outputs, targets)
        metrics = task.metrics(outputs, targets)
        if loss is not None:
            metrics = {"loss": loss.expand(len(next(iter(metrics.values())))), **metrics}
        averages.add(metrics)
        if observe is not None:
            observe(inputs, outputs, targets, metrics)
    return averages.result()


@dataclass
class NeighborReport:
    """What K-nearest-neighbor classification found, for several K from one search.

    Attributes:
        metrics: For every K: ``top1`` and ``top5`` in %; a class without a vote is in no top five.
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
            hits[K].append(torch.stack([right[:, 0], right.any(1)], 1).cpu())
            classes[K].append(best.indices[:, 0].cpu())
        seconds += time.perf_counter() - start
        labels.append(targets.cpu())
        indices.append(found[1].cpu())
    metrics = {}
    for K, parts in hits.items():
        top1, top5 = (100 * torch.cat(parts).double().mean(0)).tolist()
        metrics[K] = {"top1": top1, "top5": top5}
    return NeighborReport(
        metrics,
        {K: torch.cat(parts) for K, parts in classes.items()},
        torch.cat(labels),
        torch.cat(indices),
        seconds,
    )


@dataclass
class Progress:
    """What a run has done so far; part of every checkpoint."""

    epoch: int = 0
    best_epoch: int = 0
    best_value: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)


class RunFolder:
    """The files of one run (DESIGN: args.txt, model.txt, results, CSV, checkpoints, curves).

    Args:
        path: The folder; created by :meth:`start`.
    """

    RESULTS, METRICS, TIMING = "train_eval_results.txt", "metrics.csv", "timing.csv"
    LAST, BEST, TEST, CURVES = "last.pt", "best.pt", "test_results.txt", "curves.png"

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def holds_run(self) -> bool:
        """Say whether an earlier run left results here."""
        names = (self.LAST, self.BEST, self.METRICS, self.TEST)
        return any((self.path / name).exists() for name in names)

    def start(self, args_text: str, model_text: str, progress: Progress) -> None:
        """Write args.txt and model.txt, and the logs as far as they are known."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "args.txt", args_text)
        write_text(self.path / "model.txt", model_text)
        if not progress.history:
            for name in (self.LAST, self.BEST, self.TEST, self.CURVES):
                (self.path / name).unlink(missing_ok=True)
        write_text(self.path / self.RESULTS, "".join(f"{line}\n" for line in progress.lines))
        self.metrics = CsvLog(self.path / self.METRICS, progress.history)
        self.timing = CsvLog(self.path / self.TIMING, progress.times)

    def write_line(self, line: str) -> None:
        """Append a line to the results file and show it."""
        tqdm.write(line)
        with open(self.path / self.RESULTS, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def save(self, checkpoint: Mapping[str, Any], *, best: bool) -> None:
        """Save ``last.pt``, and let ``best.pt`` be the same file if it is the best so far."""
        save_checkpoint(self.path / self.LAST, checkpoint)
        if best:
            with atomic_path(self.path / self.BEST) as temporary:
                temporary.unlink()
                try:
                    os.link(self.path / self.LAST, temporary)
                except OSError:  # a file system without hard links
                    shutil.copyfile(self.path / self.LAST, temporary)

    def log_epoch(self, progress: Progress) -> None:
        """Write what the last epoch measured."""
        self.write_line(progress.lines[-1])
        self.metrics.append(progress.history[-1])
        self.timing.append(progress.times[-1])
        plot_learning_curves(
            progress.history,
            self.path / self.CURVES,
            eval_name="val" if any(k.startswith("val_") for k in progress.history[-1]) else "test",
        )


@torch.no_grad()
def generate_text(
    model: nn.Module,
    encoder: Any,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> str:
    """Continue a text character by character.

    Args:
        model: Maps encoded characters to scores of the next one.
        encoder: The text encoder the model was trained with.
        prompt: What to continue; if it is shorter than the encoder looks back, blanks are put
            before it.
        length: Characters to add.
        temperature: Scores are raised to 1 / temperature; 0 always takes the best character.
        seed: Seed of the choice.
        device: Where the model is.

    Returns:
        The prompt and what was added.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    codes = encoder.codes(prompt.rjust(encoder.num_features)).tolist()
    for _ in range(length):
        window = torch.tensor([codes[-encoder.num_features :]])
        scores = model(encoder.encode(window).to(device))[0].double().cpu()
        if temperature == 0:
            codes.append(int(scores.argmax()))
            continue
        logits = scores.clamp(min=1e-300).log() / temperature
        codes.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return prompt + "".join(map(chr, codes[len(codes) - length :])) if length else prompt


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load a checkpoint to the CPU, tensors and plain types only.

    Raises:
        ValueError: If the file is missing, damaged or no checkpoint.
    """
    checkpoint = read_tensor_file(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint or "args" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this program (it lacks 'model' and 'args').")
    return checkpoint


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a published checkpoint, of one of this program, or a plain state dict.

    Nothing but tensors and plain types is unpickled.

    Args:
        path: The file (`051_ckpt.t7`, `best.pt`, …).

    Returns:
        The weights by name, and the arguments of the run where the file holds them.

    Raises:
        ValueError: If the file is missing, damaged, or holds no weights.
    """
    content = read_tensor_file(path)
    weights: Any = content
    arguments: dict[str, Any] = {}
    if isinstance(content, Mapping):
        arguments = dict(content.get("args") or {}) if "model" in content else {}
        for name in ("net", "model", "state_dict"):
            if isinstance(content.get(name), Mapping):
                weights = content[name]
                break
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, or such a table under "
            "'net' (published files) or 'model' (this program)."
        )
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, arguments


def restore(trainer: Trainer, checkpoint: Mapping[str, Any]) -> Progress:
    """Put model, trainer and generators where a checkpoint left them."""
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.load_state_dict(checkpoint["trainer"])
    set_random_state(checkpoint["random_state"])
    return Progress(**checkpoint["progress"])


def fit(
    trainer: Trainer,
    task: Task,
    train_loader: DataLoader,
    eval_loader: DataLoader,
    run: RunFolder,
    progress: Progress,
    *,
    num_epochs: int,
    args: Mapping[str, Any],
    device: torch.device,
    amp: bool = False,
    eval_name: str = "test",
    train_eval_loader: DataLoader | None = None,
) -> Progress:
    """Train until ``num_epochs`` epochs are done, saving and logging after each.

    Args:
        trainer: How the model learns.
        task: What a batch means.
        train_loader: Training batches; its sampler's ``set_epoch`` is called.
        eval_loader: Batches the best checkpoint is chosen on.
        run: Where results go.
        progress: Where to go on from; updated in place.
        num_epochs: Number of the last epoch.
        args: The run's arguments, in plain types, to be kept in checkpoints.
        device: Where evaluation runs.
        amp: Mixed precision in evaluation.
        eval_name: "test" or "val".
        train_eval_loader: If given, training metrics are measured on it after each epoch, instead
            of batch by batch while the model learns.

    A trainer may have ``report(run)``, called after each epoch for files of its own.
    """
    for epoch in range(progress.epoch + 1, num_epochs + 1):
        if hasattr(train_loader.sampler, "set_epoch"):
            train_loader.sampler.set_epoch(epoch)
            train_loader.generator.manual_seed(train_loader.sampler.seed + epoch)
        start = time.perf_counter()
        train = train_one_epoch(trainer, train_loader, epoch=epoch)
        train_seconds = time.perf_counter() - start
        columns = trainer.columns()
        samples = train.pop("samples")
        if train_eval_loader is not None:
            train = evaluate(
                trainer.model, task, train_eval_loader, device=device, amp=amp, text="train"
            )
        measured = evaluate(
            trainer.model, task, eval_loader, device=device, amp=amp, text=eval_name
        )
        seconds = time.perf_counter() - start
        finished = trainer.end_epoch(measured[task.headline])

        best = measured[task.headline] > progress.best_value
        if best or progress.best_epoch == 0:
            progress.best_epoch, progress.best_value = epoch, measured[task.headline]
        progress.epoch = epoch
        progress.history.append(
            {"epoch": epoch, **columns}
            | {f"train_{name}": value for name, value in train.items()}
            | {f"{eval_name}_{name}": value for name, value in measured.items()}
        )
        throughput = samples / train_seconds
        progress.times.append(
            {"epoch": epoch, "seconds": seconds, "train_samples_per_second": throughput}
        )
        extra = "".join(f" | {name}: {value:.6g}" for name, value in columns.items())
        progress.lines.append(
            f"[Epoch {epoch:03d}] Time: {seconds:.4f}s | [Train] {task.line(train)} | "
            f"[{eval_name.capitalize()}] {task.line(measured)}{extra} | "
            f"{throughput:.0f} samples/s"
        )
        run.save(
            {
                "format": 1,
                "model": trainer.model.state_dict(),
                "trainer": trainer.state_dict(),
                "progress": vars(progress),
                "random_state": get_random_state(),
                "args": dict(args),
            },
            best=progress.best_epoch == epoch,
        )
        run.log_epoch(progress)
        if hasattr(trainer, "report"):
            trainer.report(run)
        if finished:
            run.write_line(f"Nothing left to learn after epoch {epoch}.")
            break

    if progress.times:
        average = sum(row["seconds"] for row in progress.times) / len(progress.times)
        run.write_line(f"Average Epoch Time: {average:.4f}s")
        run.write_line(
            f"Max {task.headline_name}: {progress.best_value:.4f}{task.headline_unit} "
            f"at Epoch {progress.best_epoch}"
        )
    return progress
