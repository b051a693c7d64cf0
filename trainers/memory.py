"""Learning by memory: the training set is stored, and K is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from options import option
from ranks import world_size
from run_folder import Measured, Pass, Progress, RunFolder
from trainers.trainer import Trainer, TrainingOptions
from utils import write_text

__all__ = ["MemoryOptions", "MemoryTrainer"]


@dataclass(frozen=True)
class MemoryOptions(TrainingOptions):
    """What is stored, and how K is chosen."""

    title = "Training by memory (--model knn)"
    knn_features: str = option(
        "raw",
        "what is compared: pixels, their N principal components, or what the last layer of "
        "a network trained here sees (its best.pt)",
        metavar="raw|pca:N|FILE",
    )
    leave_one_out: bool = option(
        False, "choose among several --K by classifying every training sample by the others"
    )


class MemoryTrainer(Trainer):
    """The training set is the model: it is stored in one pass, and K is chosen afterwards.

    The model offers ``store(inputs, targets)`` for a batch, ``seal(num_classes, shard=)`` when all
    are there, ``K``: the numbers of neighbors to choose from, and ``chosen``. The task judges all
    of them from one search (`tasks.classification.NeighborReport`).

    Under torchrun every process stores its part of the training set.

    Args:
        model: The model.
        task: What a batch means; offers ``neighbors``, ``neighbor_lines``, ``show_neighbors``.
        device: Where it runs.
        num_classes: Number of classes.
        leave_one_out: Choose K by classifying every training sample by the others.
    """

    name = "memory"
    Options = MemoryOptions
    resumes = False
    tests_itself = True
    draws_curves = False
    features = "knn_features"

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        device: torch.device,
        num_classes: int,
        leave_one_out: bool = False,
    ) -> None:
        super().__init__(model, task, device=device)
        self.num_classes, self.leave_one_out = num_classes, leave_one_out
        self.reports: dict[str, Any] = {}

    @classmethod
    def check(cls, values: Mapping[str, Any], task_name: str) -> None:
        """Refuse K-nearest-neighbor runs that cannot work."""
        if values["leave_one_out"] and values["val_split"] > 0:
            raise ValueError(
                "--leave_one_out and --val_split are two ways to choose --K: give one of them."
            )
        if values["leave_one_out"] and world_size() > 1:
            raise ValueError(
                "--leave_one_out needs all samples in one process, and torchrun started "
                f"{world_size()}. Try --val_split."
            )

    def check_set(self, num_samples: int, batch_size: int) -> None:
        """Refuse a K beyond the samples there are."""
        others, what = num_samples, "samples"
        if self.leave_one_out:
            others, what = num_samples - 1, "other samples"
        if max(self.model.K) > others:
            raise ValueError(
                f"K must be at most the number of {what}, {others} (got {max(self.model.K)})"
            )

    def last_epoch(self, wanted: int) -> int:
        """One pass stores everything."""
        return 1

    def loader_options(self, batch_size: int) -> dict[str, Any]:
        """Store samples in their order."""
        return {"shuffle": False}

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Store a batch; there is nothing to measure yet."""
        self.model.store(*batch)
        return {}

    def end_batches(self) -> None:
        """Make what was stored searchable."""
        self.model.seal(self.num_classes, shard=world_size() > 1)
        self.model.to(self.device)

    def measure(self, trained: Pass, evaluate: Any, sets: Mapping[str, Any]) -> Measured:
        """Classify by every K, and choose one; a row a K, on all sets."""
        model = self.model
        self.reports = {}
        for name, dataset in sets.items():
            if name == "test" and self.leave_one_out:
                own = [(None, model.labels)]
                self.reports["leave-one-out"] = self.task.neighbors(model, own, self.device)
            batches = evaluate.loader(dataset)
            self.reports[name] = self.task.neighbors(model, batches, self.device)
        judge = next(iter(self.reports))  # the test set only if there is nothing else
        headline = self.task.headline
        values = {K: self.reports[judge].metrics[K][headline] for K in model.K}
        sign = 1 if self.task.higher_is_better else -1
        model.chosen = max(model.K, key=lambda K: (sign * values[K], -K))

        lines = self.task.neighbor_lines(model, self.reports)
        stored = f"Stored {len(model.labels)} training samples in {trained.seconds:.4f}s."
        lines[0] = f"{stored} {lines[0]}"
        lines.append(self.best_line(values[model.chosen], f"K {model.chosen}"))
        if len(model.K) > 1:
            chosen_on = {
                "val": f"on {len(self.reports[judge].labels)} held-out training samples",
                "leave-one-out": "by leaving out one training sample at a time",
                "test": "on the test set, as in published tables; --val_split or --leave_one_out "
                "choose it on training data",
            }
            lines.append(f"K was chosen {chosen_on[judge]}.")
        rows = []
        for K in model.K:
            row: dict[str, float] = {"K": K}
            for name, report in self.reports.items():
                prefix = name.replace("-", "_")
                row |= {f"{prefix}_{metric}": v for metric, v in report.metrics[K].items()}
            rows.append(row)
        times = [
            {
                "set": name,
                "queries": len(report.labels),
                "seconds": report.seconds,
                "queries_per_second": report.queries_per_second,
            }
            for name, report in self.reports.items()
        ]
        return Measured(self.reports[judge].metrics[model.chosen], rows, lines, times)

    def report(self, run: RunFolder) -> None:
        """Describe the model, now that it holds samples."""
        if run.writes:
            write_text(run.file(run.MODEL), f"{self.model}\n")

    def conclude(self, progress: Progress, held_out: int | None) -> list[str]:
        """Return nothing: :meth:`measure` has said it all."""
        return []

    @property
    def unsaved(self) -> str | None:
        """Why there is no checkpoint, if there is none."""
        if self.model.sharded:
            return "No checkpoint: every process holds its own part of the samples."
        return None

    def finish(self, data: Any, run: RunFolder, evaluate: Any) -> tuple[dict[str, Any], list[str]]:
        """Draw what was found on the test set."""
        report = self.reports["test"]
        if run.writes:
            self.task.show_neighbors(self.model, data, report, run)
        return self.results(), []

    def results(self) -> dict[str, Any]:
        """Return the chosen K, and what was measured on the test set."""
        report, K = self.reports["test"], self.model.chosen
        return {
            "K": K,
            "test": report.metrics[K],
            "accuracy": {K: row[self.task.headline] for K, row in report.metrics.items()},
            "queries_per_second": report.queries_per_second,
        }
