"""What a task is: the protocol that every file of this folder keeps.

A *task* knows what its data means: how it is loaded and prepared, its loss, its metrics and its
line in the results file, what is reported of every sample, what a finished run shows, and how one
file is treated. It knows neither how a model learns nor which model it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dataset import Data, limit, split_train
from options import Options
from run_folder import RunFolder

__all__ = ["Evaluate", "Finding", "Needs", "Task"]


class Evaluate(Protocol):
    """How data sets are evaluated in this run (`train_eval.Evaluation`)."""

    device: torch.device

    def __call__(self, dataset: Dataset, observe: Callable | None = None) -> dict[str, float]:
        """Return metrics averaged over samples; see `train_eval.evaluate` for `observe`."""

    def loader(self, dataset: Dataset) -> DataLoader:
        """Return batches of a data set, in its order."""


@dataclass(frozen=True)
class Needs:
    """What a model and its way of training ask of their data.

    Attributes:
        min_side: Smallest side of an image the model accepts.
        normalize: Images are normalised per channel; otherwise pixels lie in [0, 1].
        evaluation_only: Nothing will be trained: training data may be left out.
    """

    min_side: int = 1
    normalize: bool = True
    evaluation_only: bool = False


@dataclass
class Finding:
    """What a finished model showed: numbers for the caller, lines for the results file."""

    results: dict[str, Any]
    lines: list[str]


class Task:
    """What a batch means, from the files on disk to the line in the results file.

    A subclass says `name`, its headline metric and `Options`, and writes `metrics`, `line` and, for
    models that learn by gradient, `loss`. Its constructor takes its options as keywords.

    Args:
        seed: Seed of what it draws at random.

    Attributes:
        name: Its name in `TASKS`.
        headline: The metric whose best value makes a checkpoint the best one.
        headline_name: Its name in the results file, e.g. "Accuracy".
        headline_unit: Its unit there, e.g. "%".
        higher_is_better: Whether the best value is the largest.
        defaults: Defaults of options of others, where they differ for this task.
        features: Whether samples may be replaced by features (`tasks.features`).
        treats_files: Whether `apply` works.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    headline_name: ClassVar[str]
    headline_unit: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {}
    features: ClassVar[bool] = False
    treats_files: ClassVar[bool] = False
    Options: ClassVar[type[Options]] = Options

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    # -- data

    def load(
        self,
        build: Callable[..., Data],
        options: Mapping[str, Any],
        *,
        seed: int,
        needs: Needs,
        limit_train: int | None = None,
        limit_test: int | None = None,
        val_split: float = 0.0,
    ) -> Data:
        """Load a data set with its splits.

        Args:
            build: The data set's builder.
            options: Its options.
            seed: Seed of what is drawn at random.
            needs: What the model asks for.
            limit_train: Use that many training samples.
            limit_test: Use that many test samples.
            val_split: Part of the training set to hold out.

        Raises:
            DataError: If files are missing, damaged or of the wrong form.
        """
        data = build(seed=seed, **options, **self.data_options(needs))
        data.train, data.test = limit(data.train, limit_train), limit(data.test, limit_test)
        splits = val_split > 0 and data.train is not None  # nothing is loaded to train on: no split
        return split_train(data, val_split, seed) if splits else data

    def data_options(self, needs: Needs) -> dict[str, Any]:
        """Return what the builders of this task's data take beside a data set's own options."""
        return {}

    def sizes(self, data: Data) -> dict[str, Any]:
        """Return what a model must know of the data, by the names of constructor keywords."""
        return {}

    def known_sizes(self, shape: tuple[int, ...], num_outputs: int | None) -> dict[str, Any]:
        """Return the same where nothing is loaded yet.

        Args:
            shape: Shape of a sample.
            num_outputs: Classes or output channels; None: not known yet.
        """
        return self.sizes(Data(self.name, self.name, None, None, shape, num_outputs or 1))

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that cannot do what the options ask for; it may be on the meta device.

        Raises:
            ValueError: What is wrong, why, and what to try.
        """

    # -- a batch

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move a loader's batch to the device: (inputs, targets)."""
        inputs, targets = batch
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def loss(self, outputs: Any, targets: Any) -> Tensor | None:
        """Return the scalar that is minimised, the mean over samples; None where there is none."""
        return None

    def objective(self, outputs: Any, targets: Any) -> Tensor | None:
        """Return what training minimises, where it is not the loss that evaluation reports."""
        return self.loss(outputs, targets)

    def blind_loss(self, num_outputs: int) -> float | None:
        """Return the loss of a model that holds all outputs for equally likely, if that is known.

        Args:
            num_outputs: Classes.
        """
        return None

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return one value per sample, (B,), for every metric."""
        raise NotImplementedError

    def line(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the results file."""
        raise NotImplementedError

    def brief(self, metrics: Mapping[str, float]) -> str:
        """Word averaged metrics for the line of an epoch: two of them fit into 120 characters."""
        return self.line(metrics)

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """Make the outputs in evaluation."""
        return model(inputs)

    # -- a run

    def examine(
        self, model: nn.Module, data: Data, run: RunFolder, evaluate: Evaluate
    ) -> tuple[dict[str, float], Finding]:
        """Evaluate on the test set: `--test_only`, and the end of a run with `--val_split`.

        Args:
            model: The model.
            data: The data.
            run: Where tables and pictures go.
            evaluate: Evaluates a data set; takes `observe=`, which is told inputs, outputs, targets
                and per-sample metrics of every batch.

        Returns:
            Metrics, and what else there is to say.
        """
        return evaluate(data.test), self.show(model, data, run)

    def show(self, model: nn.Module, data: Data, run: RunFolder) -> Finding:
        """Draw and say what a model has learnt."""
        return Finding({}, [])

    def finish(
        self,
        model: nn.Module,
        data: Data,
        run: RunFolder,
        evaluate: Evaluate,
        use_best: Callable[[], int],
    ) -> Finding:
        """End a training run that has tested every epoch: `examine` ends one with `--val_split`.

        Args:
            model: The model, with the weights of the last epoch.
            data: The data.
            run: Where files go.
            evaluate: See `examine`.
            use_best: Gives the model the weights of the best epoch, and returns its number.
        """
        return self.show(model, data, run)

    def files(self, inputs: Sequence[str], output: str) -> list[tuple[Path, Path]]:
        """Return the files that `--input` names, each with the one that it is turned into."""
        raise NotImplementedError

    def apply(self, model: nn.Module, source: str, target: str, device: torch.device) -> str:
        """Treat one file; return a line that says what was done.

        Raises:
            ValueError: If the file cannot be read, treated or written.
        """
        raise NotImplementedError
