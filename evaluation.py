"""Evaluation: averages over samples, on one process or several."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import faults
import ranks
from utils import autocast

__all__ = ["Averages", "Evaluation", "evaluate", "watched"]


class Averages:
    """Averages of per-sample values; every sample counts the same. Stays on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take the values of a batch."""
        if not metrics:
            return
        for name, values in metrics.items():
            total = self.total(values)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += len(next(iter(metrics.values())))

    @staticmethod
    def total(values: Tensor) -> Tensor:
        """Return their sum in double precision, where the device has it."""
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        return values.detach().to(dtype).sum()

    def result(self) -> dict[str, float]:
        """Return the averages."""
        return {name: (total / self.count).item() for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """Return sums and count in plain types."""
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return {"sums": sums, "count": self.count}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take back what :meth:`state` returned."""
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.count = state["count"]

    def over_ranks(self) -> "Averages":
        """Return the averages of all processes' samples, summed in the order of the processes."""
        whole = Averages()
        for state in ranks.gather(self.state()):
            whole.include(state)
        return whole

    def include(self, state: Mapping[str, Any]) -> None:
        """Add what :meth:`state` of others returned."""
        for name, total in state["sums"].items():
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += state["count"]


SHOWN_EVERY = 0.5  # seconds; a look at the loss waits for the GPU


def watched(
    loader: DataLoader,
    text: str,
    limit: int | None,
    show: Callable[[int, int], Mapping[str, Any]] | None = None,
) -> Iterator[Any]:
    """Iterate with a bar where a person is watching, and with none in a log file.

    Args:
        loader: Batches.
        text: Title of the bar.
        limit: Stop after so many batches.
        show: Told how many batches are done, and of how many; returns what is to stand behind the
            bar.
    """
    total = len(loader) if limit is None else min(limit, len(loader))
    bar = tqdm(loader, desc=text, total=total, leave=False, disable=None, dynamic_ncols=True)
    due = 0.0
    for index, batch in enumerate(bar):
        if index == total:
            break
        yield batch
        if show is not None and not bar.disable and time.monotonic() >= due:
            bar.set_postfix(show(index + 1, total))
            due = time.monotonic() + SHOWN_EVERY
    bar.close()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Any,
    loader: DataLoader,
    *,
    device: torch.device,
    amp: bool = False,
    with_loss: bool = True,
    max_batches: int | None = None,
    text: str = "evaluate",
    observe: Callable[[Any, Any, Any, Mapping[str, Tensor]], None] | None = None,
) -> dict[str, float]:
    """Evaluate a model; return metrics averaged over samples, ``loss`` first where there is one.

    Args:
        model: The network, on its device.
        task: What a batch means (see `tasks.task`).
        loader: Batches.
        device: Where it runs.
        amp: Mixed precision.
        with_loss: Report the task's loss.
        max_batches: Stop after so many.
        text: Title of the progress bar.
        observe: Told inputs, outputs, targets and per-sample metrics of every batch.
    """
    model.eval()
    averages, parts = Averages(), []
    # Several processes share the batches; what observes them has to see all of them, and a model
    # in parts runs in all processes at once.
    shared = ranks.initialised() and observe is None and max_batches is None
    shared = shared and not ranks.in_parts(model)
    for batch in watched(ranks.every_nth_batch(loader) if shared else loader, text, max_batches):
        if not shared:
            faults.check()
        inputs, targets = task.prepare(batch, device)
        with autocast(device, amp):
            outputs = task.predict(model, inputs)
            loss = task.loss(outputs, targets) if with_loss else None
        metrics = task.metrics(outputs, targets)
        if loss is not None:
            metrics = {"loss": loss.expand(len(next(iter(metrics.values())))), **metrics}
        if shared:
            totals = {name: averages.total(values) for name, values in metrics.items()}
            parts.append((totals, len(next(iter(metrics.values())))))
        else:
            averages.add(metrics)
        if observe is not None:
            observe(inputs, outputs, targets, metrics)
    return _in_order(parts) if shared else averages.result()


def _in_order(parts: list[tuple[dict[str, Tensor], int]]) -> dict[str, float]:
    """Average over all processes' batches, summed in the order in which one would see them."""
    mine = [({name: total.item() for name, total in totals.items()}, n) for totals, n in parts]
    everyone = ranks.gather(mine)
    sums: dict[str, float] = {}
    count = 0
    for index in range(sum(len(batches) for batches in everyone)):
        totals, n = everyone[index % len(everyone)][index // len(everyone)]
        for name, total in totals.items():
            sums[name] = sums[name] + total if name in sums else total
        count += n
    return {name: total / count for name, total in sums.items()}


@dataclass(frozen=True)
class Evaluation:
    """How data sets are evaluated in a run; called with one, it returns averaged metrics.

    Attributes:
        model: The model, on its device.
        task: What a batch means.
        device: Where it runs.
        load: Makes a loader: `dataset.build_loader` with what the run's loaders share.
        amp: Mixed precision.
        with_loss: Report the task's loss.
    """

    model: nn.Module
    task: Any
    device: torch.device
    load: Callable[..., DataLoader]
    amp: bool = False
    with_loss: bool = True

    def loader(self, dataset: Dataset) -> DataLoader:
        """Return batches of a data set, in its order."""
        return self.load(dataset)

    def __call__(
        self, dataset: Dataset, observe: Callable | None = None, text: str = "evaluate"
    ) -> dict[str, float]:
        """Return metrics averaged over samples, see :func:`evaluate`."""
        return evaluate(
            self.model,
            self.task,
            self.load(dataset),
            device=self.device,
            amp=self.amp,
            with_loss=self.with_loss,
            text=text,
            observe=observe,
        )
