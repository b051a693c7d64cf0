"""The loop: epochs, evaluation, keep the best. It knows no task, trainer or model by name.

A *task* says what a batch means (`tasks.task`), a *trainer* how a model learns from it
(`trainers`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from utils import (
    Pass,
    Progress,
    RunFolder,
    autocast,
    count_parameters,
    get_random_state,
    load_checkpoint,
    load_weights,
    plot_learning_curves,
    seed_everything,
    set_random_state,
    write_text,
)

__all__ = ["Evaluation", "Run", "dry_run", "evaluate", "fit", "restore", "test", "train"]


class _Averages:
    """Averages of per-sample values; every sample counts the same. Stays on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        if not metrics:
            return
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
    trainer: Any, loader: DataLoader, *, epoch: int, max_steps: int | None = None
) -> dict[str, float]:
    """Train for one epoch; return metrics averaged over samples, and ``samples``.

    Args:
        trainer: How the model learns (see `trainers.Trainer`).
        loader: Batches.
        epoch: Number of the epoch.
        max_steps: Stop after so many.
    """
    trainer.model.train()
    averages, step = _Averages(), 0
    batches = _progress(loader, f"epoch {epoch}", max_steps, trainer.columns)
    for step, batch in enumerate(batches, start=1):
        averages.add(trainer.step(batch))
        if step % CHECK_EVERY == 0:
            trainer.finite(epoch, step)
        if trainer.sated:
            break
    trainer.finite(epoch, step)
    trainer.end_batches()
    return averages.result() | {"samples": averages.count}


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
    averages = _Averages()
    for batch in _progress(loader, text, max_batches):
        inputs, targets = task.prepare(batch, device)
        with autocast(device, amp):
            outputs = task.predict(model, inputs)
            loss = task.loss(outputs, targets) if with_loss else None
        metrics = task.metrics(outputs, targets)
        if loss is not None:
            metrics = {"loss": loss.expand(len(next(iter(metrics.values())))), **metrics}
        averages.add(metrics)
        if observe is not None:
            observe(inputs, outputs, targets, metrics)
    return averages.result()


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


@dataclass(frozen=True)
class Run:
    """What one run works with.

    Attributes:
        folder: Where its files go.
        data: The data (`dataset.Data`).
        task: What a batch means.
        evaluation: How data sets are evaluated.
        arguments: The run's arguments in plain types, kept in checkpoints.
        args_text: The arguments, as args.txt holds them.
        model_text: What model.txt holds.
    """

    folder: RunFolder
    data: Any
    task: Any
    evaluation: Evaluation
    arguments: Mapping[str, Any]
    args_text: str = ""
    model_text: str = ""

    @property
    def sets(self) -> dict[str, Dataset]:
        """Sets to evaluate after an epoch; the first one decides on the best."""
        return {"test": self.data.test} if self.data.val is None else {"val": self.data.val}


def restore(trainer: Any, checkpoint: Mapping[str, Any]) -> Progress:
    """Put model, trainer and generators where a checkpoint left them."""
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.load_state_dict(checkpoint["trainer"])
    set_random_state(checkpoint["random_state"])
    return Progress(**checkpoint["progress"])


def fit(
    trainer: Any,
    run: Run,
    train_loader: DataLoader,
    progress: Progress,
    *,
    num_epochs: int,
) -> Progress:
    """Train until ``num_epochs`` epochs are done, saving and logging after each.

    Args:
        trainer: How the model learns.
        run: What it works with.
        train_loader: Training batches; its sampler's ``set_epoch`` is called.
        progress: Where to go on from; updated in place.
        num_epochs: Number of the last epoch.
    """
    task, folder = run.task, run.folder
    sets = run.sets
    if trainer.tests_itself:
        sets = {**sets, "test": run.data.test}
    judge = next(iter(sets))
    for epoch in range(progress.epoch + 1, num_epochs + 1):
        if hasattr(train_loader.sampler, "set_epoch"):
            train_loader.sampler.set_epoch(epoch)
            train_loader.generator.manual_seed(train_loader.sampler.seed + epoch)
        start = time.perf_counter()
        train = train_one_epoch(trainer, train_loader, epoch=epoch)
        seconds = time.perf_counter() - start
        samples = train.pop("samples")
        if trainer.evaluates_training and run.data.train is not run.data.test:
            train = run.evaluation(run.data.train, text="train")
        trained = Pass(epoch, train, samples, start, seconds)
        measured = trainer.measure(trained, run.evaluation, sets)
        value = measured.metrics[task.headline]
        finished = trainer.end_epoch(value)

        better = (
            value > progress.best_value if task.higher_is_better else value < progress.best_value
        )
        if better or progress.best_epoch == 0:
            progress.best_epoch, progress.best_value = epoch, value
        progress.epoch = epoch
        progress.history += measured.rows
        progress.times += measured.times
        progress.lines += measured.lines
        if trainer.unsaved is None:
            folder.save(
                {
                    "format": 1,
                    "model": trainer.model.state_dict(),
                    "trainer": trainer.state_dict(),
                    "progress": vars(progress),
                    "random_state": get_random_state(),
                    "args": dict(run.arguments),
                },
                best=progress.best_epoch == epoch,
            )
        folder.log(measured.rows, measured.lines, measured.times)
        if trainer.unsaved is not None:
            folder.write_line(trainer.unsaved)
        if trainer.draws_curves and folder.writes:
            plot_learning_curves(progress.history, folder.file(folder.CURVES), eval_name=judge)
        summarize(trainer, run, progress, judge)
        trainer.report(folder)
        if finished:
            folder.write_line(f"Nothing left to learn after epoch {epoch}.")
            break

    held_out = None if run.data.val is None else len(run.data.val)
    for line in trainer.conclude(progress, held_out):
        folder.write_line(line)
    return progress


def summarize(trainer: Any, run: Run, progress: Progress, judge: str, **more: Any) -> None:
    """Write ``summary.json``."""
    task, arguments = run.task, run.arguments
    total, trainable = count_parameters(trainer.model)
    run.folder.summarize(
        task=task.name,
        model=arguments.get("model"),
        layer=arguments.get("layer"),
        dataset=arguments.get("dataset"),
        trainer=trainer.name,
        headline=f"{judge}_{task.headline}",
        headline_name=task.headline_name,
        headline_unit=task.headline_unit,
        higher_is_better=task.higher_is_better,
        best=progress.best_value,
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        parameters=total,
        trainable_parameters=trainable,
        seconds=sum(row["seconds"] for row in progress.times),
        **more,
    )


def train(
    trainer: Any,
    run: Run,
    build_loader: Callable[..., DataLoader],
    checkpoint: Mapping[str, Any] | None,
    *,
    batch_size: int,
    num_epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Train, evaluate every epoch, and end the run as trainer and task want it.

    Args:
        trainer: How the model learns.
        run: What it works with.
        build_loader: Makes a loader with what the run's loaders share.
        checkpoint: Where to go on from, if anywhere.
        batch_size: Samples a step.
        num_epochs: The number of epochs asked for.
        seed: Seed of the run.

    Returns:
        The run's results: output_dir, history, best, best_epoch, and what trainer and task add.
    """
    data, task, folder, evaluation = run.data, run.task, run.folder, run.evaluation
    train_loader = build_loader(data.train, **trainer.loader_options(batch_size))
    num_epochs = trainer.last_epoch(num_epochs)
    seed_everything(seed)
    progress = Progress() if checkpoint is None else restore(trainer, checkpoint)
    if checkpoint is None and not task.higher_is_better:
        progress.best_value = float("inf")
    if progress.epoch >= num_epochs:
        print(f"Epoch {progress.epoch} of {num_epochs} is done: nothing to resume.")
    folder.start(run.args_text, run.model_text, progress)
    if folder.writes:
        print(f"Run folder: {folder.path}")
    fit(trainer, run, train_loader, progress, num_epochs=num_epochs)
    results: dict[str, Any] = {
        "output_dir": str(folder.path),
        "history": progress.history,
        "best_epoch": progress.best_epoch,
        "best": progress.best_value,
    }

    def use_best() -> int:
        load_weights(trainer.model, load_checkpoint(folder.path / folder.BEST))
        return progress.best_epoch

    if data.val is not None and not trainer.tests_itself:
        use_best()
        results["test"] = evaluation(data.test)
        summarize(trainer, run, progress, next(iter(run.sets)), test=results["test"])
        folder.write_line(
            f"The best epoch was chosen on {len(data.val)} held-out training samples. "
            f"[Test at Epoch {progress.best_epoch}] {task.line(results['test'])}"
        )
    more, lines = trainer.finish(data, folder, evaluation)
    found = task.finish(trainer.model, data, folder, evaluation, use_best)
    for line in [*lines, *found.lines]:
        folder.write_line(line)
    return results | more | found.results


def test(run: Run, source: str) -> dict[str, Any]:
    """Evaluate on the test set.

    Args:
        run: What it works with.
        source: Where the weights come from, for the results file.
    """
    folder, data, task = run.folder, run.data, run.task
    metrics, lines = task.examine(run.evaluation.model, data, folder, run.evaluation)
    text = (
        f"Checkpoint: {source}\n"
        f"Data: {data.name}, {len(data.test)} test samples\n"
        + "".join(f"{line}\n" for line in lines)
        + f"[Test] {task.line(metrics)}\n"
    )
    print(text, end="")
    path = folder.file(folder.TEST)
    before = path.read_text(encoding="utf-8") + "\n" if path.exists() else ""
    write_text(path, before + text)
    return {"output_dir": str(folder.path), "test": metrics}


def dry_run(
    trainer: Any, run: Run, build_loader: Callable[..., DataLoader], *, batch_size: int
) -> dict[str, Any]:
    """Take two steps and evaluate two batches; write nothing."""
    start = time.perf_counter()
    loader = build_loader(run.data.train, **trainer.loader_options(batch_size))
    trained = train_one_epoch(trainer, loader, epoch=1, max_steps=2)
    seconds = time.perf_counter() - start
    samples = trained.pop("samples")
    sets = {}
    for name, dataset in (run.sets | {"test": run.data.test}).items():
        size = 2 * build_loader(dataset).batch_size
        sets[name] = Subset(dataset, range(min(size, len(dataset))))
    if not trainer.tests_itself:
        sets = {name: sets[name] for name in list(sets)[:1]}
    passed = Pass(1, trained, samples, start, seconds)
    measured = trainer.measure(passed, run.evaluation, sets)
    if trained:
        print(f"[Dry run, two steps] {run.task.line(trained)}")
        print(f"[Dry run, two batches] {run.task.line(measured.metrics)}")
    else:
        print(*measured.lines, sep="\n")
    return {"output_dir": None, "train": trained, "test": measured.metrics}
