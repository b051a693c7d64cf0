"""The protocol of a trainer: what the loop asks of every way to learn."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ranks
from checkpoints import load_weights
from options import Options, option
from run_folder import Measured, Pass, Progress, RunFolder

__all__ = ["Trainer", "TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions(Options):
    """What every way of training takes."""

    title = "Training"
    batch_size: int = option(
        256,
        "samples per step, over all processes together where torchrun starts several",
        least=1,
        most=10**6,
    )
    num_epochs: int = option(
        150,
        "passes over the training set",
        least=1,
        resumable=True,
        trainers=("gradient", "growth"),
        most=10**6,
    )
    save_every: int = option(
        0,
        "save last.pt every N steps too, to go on amid an epoch; 0: after epochs, and when the run "
        "is asked to stop",
        least=0,
        most=10**9,
        resumable=True,
        trainers=("gradient", "growth"),
    )


class Trainer:
    """How a model learns; what a way of training does not need stays as it is here.

    Args:
        model: The network, on its device.
        task: What a batch means (see `tasks.task`).
        device: Where it runs.

    Attributes:
        name: Its name in `TRAINERS`.
        has_loss: Whether evaluation reports the task's loss.
        normalize: Whether it wants images normalised; otherwise pixels lie in [0, 1].
        resumes: Whether an interrupted run can be gone on with.
        tests_itself: Whether :meth:`measure` measures on the test set, whatever else there is.
        draws_curves: Whether learning curves are drawn.
        splits: Whether several processes share the work by parts of every training batch
            (`ranks.Shares`).
        advice: What to try when numbers are not finite.
        debug_nan: Whether :meth:`finite` is asked after every step.
        rehearses: Whether the model maps a batch to outputs before it has learnt anything.
        features: Name of the option that says what samples are replaced by, if there is one.
        learns_features: Whether that may be "learned": the model has a network for it.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    has_loss: ClassVar[bool] = False
    normalize: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    tests_itself: ClassVar[bool] = False
    draws_curves: ClassVar[bool] = True
    splits: ClassVar[bool] = False
    advice: ClassVar[str] = "Look for numbers in the data that are not finite."
    rehearses: ClassVar[bool] = False
    debug_nan = False
    features: ClassVar[str | None] = None
    learns_features: ClassVar[bool] = False

    def __init__(self, model: nn.Module, task: Any, *, device: torch.device) -> None:
        self.model, self.task, self.device = model, task, device

    # -- what the loop asks before it begins

    @classmethod
    def check(cls, values: Mapping[str, Any], task_name: str) -> None:
        """Refuse what cannot work, before any work is done.

        Args:
            values: The values of all options of the run.
            task_name: Name of the task.

        Raises:
            ValueError: What is wrong, why, and what to try.
        """

    @classmethod
    def copies(cls, values: Mapping[str, Any]) -> int:
        """Return how often training holds the parameters: themselves, gradients, states."""
        return 1

    @classmethod
    def prepare(cls, model: nn.Module, values: Mapping[str, Any]) -> None:
        """Make a model ready to run, for training and for evaluation alone."""

    @classmethod
    def batch(cls, batch_size: int) -> int:
        """Return how many samples a loader hands over at a time, given ``--batch_size``."""
        return batch_size

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved."""
        return self.model

    def check_set(self, num_samples: int, batch_size: int) -> None:
        """Refuse a training set that this way of training cannot learn from.

        Raises:
            ValueError: What is wrong, why, and what to try.
        """

    def last_epoch(self, wanted: int) -> int:
        """Return the number of the last epoch, given ``--num_epochs``."""
        return wanted

    def loader_options(self, batch_size: int) -> dict[str, Any]:
        """Return how training data is loaded: keywords of `dataset.build_loader`."""
        return {"shuffle": True}

    @property
    def evaluates_training(self) -> bool:
        """Whether training metrics are measured after an epoch, not while the model learns."""
        return False

    def begin(self, load: Callable[..., Any], keep: Callable[[str], None]) -> None:
        """Do what comes before the first epoch; a resumed run goes on with it.

        Args:
            load: Loads the training set by further keywords of `dataset.build_loader`.
            keep: Writes a line to the results, and saves the state.
        """

    # -- an epoch

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Learn from a batch; return per-sample metrics (B,)."""
        raise NotImplementedError

    @property
    def sated(self) -> bool:
        """Whether the rest of an epoch could add nothing, and need not be gone through."""
        return False

    def finite(self, epoch: int, step: int) -> None:
        """Raise TrainingError if what was learnt since the last look is not finite."""

    def end_batches(self) -> None:
        """Finish the training part of an epoch: evaluation follows."""

    def sound(self, epoch: int, step: int) -> None:
        """Raise TrainingError if the model holds numbers that are not finite.

        Args:
            epoch: The running epoch.
            step: Steps taken in it.
        """

    def measure(self, trained: Pass, evaluate: Any, sets: Mapping[str, Any]) -> Measured:
        """Evaluate and word an epoch.

        Args:
            trained: Its training part.
            evaluate: Evaluates a data set (`train_eval.Evaluation`).
            sets: Data sets by name; the first one decides on the best epoch.
        """
        name, dataset = next(iter(sets.items()))
        columns = self.columns()
        measured = evaluate(dataset, text=name)
        seconds = time.perf_counter() - trained.start
        throughput = trained.samples / trained.seconds
        shown = {column: value for column, value in columns.items() if column != "lr"}
        extra = "".join(f" | {column}: {value:.6g}" for column, value in shown.items())
        row = {"epoch": trained.epoch, **columns}
        row |= {f"train_{metric}": value for metric, value in trained.metrics.items()}
        row |= {f"{name}_{metric}": value for metric, value in measured.items()}
        line = (
            f"[Epoch {trained.epoch:03d}] {seconds:.2f}s | "
            f"[Train] {self.task.brief(trained.metrics)} | "
            f"[{name.capitalize()}] {self.task.brief(measured)}{extra}"
        )
        times = {
            "epoch": trained.epoch,
            "seconds": seconds,
            "train_seconds": trained.seconds,
            "train_samples_per_second": throughput,
        }
        return Measured(measured, [row], [line], [times])

    def end_epoch(self, headline: float) -> bool:
        """Finish an epoch, told the headline metric; return True when there is no more to learn."""
        return False

    def columns(self) -> dict[str, float]:
        """Return what else an epoch's row should hold, e.g. the learning rate."""
        return {}

    def report(self, run: RunFolder) -> None:
        """Write files of its own after an epoch."""

    # -- the end of a run

    def finished_line(self, epoch: int) -> str:
        """Say why a run ends before its last epoch."""
        return f"Nothing left to learn after epoch {epoch}."

    def conclude(self, progress: Progress, held_out: int | None) -> list[str]:
        """Return the lines that close the results of the epochs.

        Args:
            progress: What was done.
            held_out: Samples that the best epoch was chosen on, or None: on the test set.
        """
        if not progress.times:
            return []
        average = sum(row["seconds"] for row in progress.times) / len(progress.times)
        lines = [
            f"Average Epoch Time: {average:.4f}s{self.pace(progress)}",
            self.best_line(progress.best_value, f"Epoch {progress.best_epoch}"),
        ]
        if held_out is None:
            lines.append(
                "The best epoch was chosen on the test set, as in the published runs; "
                "--val_split chooses it on held-out training data."
            )
        return lines

    @staticmethod
    def pace(progress: Progress) -> str:
        """Word the part of the epochs' time that went into training, and samples per second."""
        known = (row for row in progress.times if "train_seconds" in row)
        rows = [row for row in known if math.isfinite(row["train_seconds"])]
        seconds = sum(row["train_seconds"] for row in rows)
        if not seconds:  # the run began before this was measured
            return ""
        samples = sum(row["train_seconds"] * row["train_samples_per_second"] for row in rows)
        return f" (training {seconds / len(rows):.4f}s, {samples / seconds:.0f} samples/s)"

    def finish(self, data: Any, run: RunFolder, evaluate: Any) -> tuple[dict[str, Any], list[str]]:
        """End a run: return results for the caller, and lines."""
        return {}, []

    def best_line(self, value: float, where: str) -> str:
        """Word the best value of the headline metric."""
        task = self.task
        best = "Max" if task.higher_is_better else "Min"
        return f"{best} {task.headline_name}: {value:.4f}{task.headline_unit} at {where}"

    @property
    def unsaved(self) -> str | None:
        """Why there can be no checkpoint, if there can be none."""
        return None

    def model_state(self) -> dict[str, Tensor]:
        """Return the state of the model that is evaluated."""
        return self.evaluated.state_dict()

    def load_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Take back the model's state; a mismatch is a ValueError."""
        load_weights(self.evaluated, checkpoint)

    def load_best(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Take, in all processes, the weights that the first one has read."""
        if checkpoint is not None:
            self.load_model(checkpoint)
        ranks.broadcast_module(self.evaluated)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
