"""The loop: epochs, evaluation, keep the best. It knows no task, trainer or model by name.

A *task* says what a batch means (`tasks.task`), a *trainer* how a model learns from it
(`trainers`).
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import faults
import ranks
from checkpoints import CheckpointError, load_checkpoint
from evaluation import Averages, Evaluation, evaluate, watched
from resuming import own_place, own_random_state, restore, settle, state_of
from run_folder import Measured, Pass, Progress, RunFolder, TrainingError
from utils import (
    WriteError,
    count_parameters,
    get_random_state,
    plot_learning_curves,
    seed_everything,
    set_random_state,
    write_text,
)

__all__ = ["Evaluation", "Run", "dry_run", "evaluate", "fit", "restore", "test", "train"]


@dataclass
class Pace:
    """How fast samples are learnt from, as a bar shows it.

    Attributes:
        count: Samples that were done before.
        start: When the first one began.
    """

    count: int = 0
    start: float = field(default_factory=time.perf_counter)

    def rate(self, count: int) -> float:
        """Return samples per second of all processes."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return ranks.world_size() * (count - self.count) / seconds


def seconds_left(done: float, spent: float, former: Sequence[float], epochs: int) -> float:
    """Estimate the time to the end of a run.

    Args:
        done: The part of the epoch that is done, in (0, 1].
        spent: Seconds that it took.
        former: Seconds of the epochs before it, evaluation included; with none, the running one
            tells.
        epochs: Epochs after it.
    """
    length = sum(former) / len(former) if former else spent / done
    return length * (1 - done) + length * epochs


def progress_texts(
    trainer: Any, averages: Averages, pace: Pace, left: float | None
) -> dict[str, str]:
    """Word what stands behind the bar of an epoch.

    Args:
        trainer: How the model learns.
        averages: Metrics so far.
        pace: How fast it goes.
        left: Seconds to the end of the run, if that is known.
    """
    found = averages.result() if averages.count else {}
    shown = {n: v for n, v in found.items() if n in ("loss", trainer.task.headline)}
    texts = {name: f"{value:.4g}" for name, value in (shown | trainer.columns()).items()}
    if averages.count:
        texts["samples/s"] = f"{pace.rate(averages.count):,.0f}"
    if left is not None:
        texts["run ends in"] = tqdm.format_interval(left)
    return texts


CHECK_EVERY = 50  # steps between two looks at the losses: a look waits for the GPU


def train_one_epoch(
    trainer: Any,
    loader: DataLoader,
    *,
    epoch: int,
    max_steps: int | None = None,
    shares: ranks.Shares | None = None,
    place: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    save_every: int = 0,
    outlook: Callable[[float], float] | None = None,
) -> dict[str, float]:
    """Train for one epoch; return metrics averaged over samples, and ``samples``.

    Args:
        trainer: How the model learns (see `trainers.Trainer`).
        loader: Batches.
        epoch: Number of the epoch.
        max_steps: Stop after so many.
        shares: Which part of every batch is this process's, if several share the work.
        place: Where to go on amid the epoch: what `keep` was told.
        keep: Saves the state amid the epoch; told its place there.
        save_every: Steps between two such states; 0: only when the run is asked to stop.
        outlook: Told which part of the epoch is done; returns the seconds to the end of the run.

    Raises:
        faults.Stopped: If the run was asked to stop; the state is saved.
    """
    trainer.model.train()
    averages, step = Averages(), 0
    pace = Pace()

    def show(done: int, total: int) -> dict[str, Any]:
        left = None if outlook is None else outlook(done / total)
        return progress_texts(trainer, averages, pace, left)

    begun = 0 if place is None else place["step"]
    batches = enumerate(watched(loader, f"epoch {epoch}", max_steps, show), start=1)
    if begun:
        averages.load(place, trainer.device)
        if place["done"]:
            batches = iter(())
        for step, _ in batches:  # loading draws random numbers: it is gone through again
            if step == begun:
                break
        step = begun
        set_random_state(own_random_state(place))
        pace = Pace(averages.count)

    def keep_here(done: bool) -> None:
        trainer.finite(epoch, step)
        keep({"epoch": epoch, "step": step, "done": done, **averages.state()})

    for step, batch in batches:
        share = None if shares is None else shares.share(step - 1)
        averages.add(trainer.step(batch, share) if share else trainer.step(batch))
        if step % CHECK_EVERY == 0 or trainer.debug_nan:
            try:
                trainer.finite(epoch, step)
            except TrainingError as error:
                error.batch = batch if trainer.debug_nan else None
                raise
        if keep is not None and (signum := ranks.agree(faults.asked())) is not None:
            keep_here(trainer.sated)
            raise faults.Stopped(signum)
        if trainer.sated:
            break
        if keep is not None and save_every and step % save_every == 0:
            keep_here(False)
    trainer.finite(epoch, step)
    trainer.end_batches()
    trainer.sound(epoch, step)
    place = {"epoch": epoch, "step": step, "done": True, **averages.state()}
    if shares is not None:
        averages = averages.over_ranks()
    return averages.result() | {"samples": averages.count, "place": place}


@dataclass(frozen=True)
class Run:
    """What one run works with.

    Attributes:
        folder: Where its files go.
        data: The data (`dataset.Data`).
        task: What a batch means.
        evaluation: How data sets are evaluated.
        arguments: The run's arguments in plain types, kept in checkpoints.
        args_text: The arguments, as args.txt holds them; None: the file holds them already.
        model_text: What model.txt holds.
    """

    folder: RunFolder
    data: Any
    task: Any
    evaluation: Evaluation
    arguments: Mapping[str, Any]
    args_text: str | None = ""
    model_text: str = ""

    @property
    def sets(self) -> dict[str, Dataset]:
        """Sets to evaluate after an epoch; the first one decides on the best."""
        return {"test": self.data.test} if self.data.val is None else {"val": self.data.val}


def fit(
    trainer: Any,
    run: Run,
    train_loader: DataLoader,
    progress: Progress,
    *,
    num_epochs: int,
    place: Mapping[str, Any] | None = None,
    save_every: int = 0,
) -> Progress:
    """Train until ``num_epochs`` epochs are done, saving and logging after each.

    Args:
        trainer: How the model learns.
        run: What it works with.
        train_loader: Training batches; its sampler's ``set_epoch`` is called.
        progress: Where to go on from; updated in place.
        num_epochs: Number of the last epoch.
        place: Where to go on from amid an epoch.
        save_every: Steps between two states amid an epoch; 0: none.

    Raises:
        TrainingError: If what was measured is not finite; the last good state is kept.
        faults.Stopped: If the run was asked to stop; the state is saved.
    """
    sets = run.sets
    if trainer.tests_itself:
        sets = {**sets, "test": run.data.test}
    loader, shares = ranks.share_batches(train_loader) if trainer.splits else (train_loader, None)
    sampler, generator = train_loader.sampler, train_loader.generator
    for number in range(progress.epoch + 1, num_epochs + 1):
        if progress.finished:
            break
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
            generator.manual_seed(sampler.seed + number)
        epoch = Epoch(trainer, run, progress, number, num_epochs, place)
        with faults.deferred() if epoch.saves else contextlib.nullcontext():
            epoch.record(epoch.measure(epoch.learn(loader, shares, save_every), sets))
            place = None
            after_epoch(trainer, run, progress, next(iter(sets)))
    folder = run.folder
    if progress.finished:
        folder.write_line(trainer.finished_line(progress.epoch))

    held_out = None if run.data.val is None else len(run.data.val)
    folder.end()
    for line in trainer.conclude(progress, held_out):
        folder.write_line(line)
    return progress


class Epoch:
    """One epoch of a run: learnt, measured, recorded; saved amid it where that is asked for.

    Args:
        trainer: How the model learns.
        run: What it works with.
        progress: What was done before; :meth:`record` adds to it.
        number: Number of the epoch.
        last: Number of the last one.
        place: Where to go on amid it, if it was begun before.
    """

    def __init__(
        self,
        trainer: Any,
        run: Run,
        progress: Progress,
        number: int,
        last: int,
        place: Mapping[str, Any] | None,
    ) -> None:
        self.trainer, self.run, self.progress = trainer, run, progress
        self.number, self.last, self.place = number, last, place
        self.start = time.perf_counter() - (0.0 if place is None else place["seconds"])
        self.saves = trainer.unsaved is None and trainer.resumes and run.folder.keeps_last
        self.reached: Mapping[str, Any] | None = None  # the place at the end of learning

    def keep(self, where: Mapping[str, Any]) -> None:
        """Save the state amid the epoch, at the place that `train_one_epoch` names."""
        trainer, more = self.trainer, {}
        trainer.sound(where["epoch"], where["step"])
        places = ranks.gather({**where, "seconds": time.perf_counter() - self.start})
        if len(places) > 1 and trainer.splits:
            more["places"] = places
        state = state_of(trainer, self.run, self.progress, place=places[0], **more)
        self.run.folder.save(state, best=False)

    def outlook(self, done: float) -> float:
        """Estimate the seconds to the end of the run, from the part of the epoch that is done."""
        former = [row["seconds"] for row in self.progress.times]
        spent = time.perf_counter() - self.start
        return seconds_left(done, spent, former, self.last - self.number)

    def learn(self, loader: DataLoader, shares: ranks.Shares | None, save_every: int) -> Pass:
        """Go through the training batches."""
        options: dict[str, Any] = {"outlook": self.outlook, "shares": shares, "place": self.place}
        if self.saves:
            options |= {"keep": self.keep, "save_every": save_every}
        metrics = train_one_epoch(self.trainer, loader, epoch=self.number, **options)
        seconds = time.perf_counter() - self.start
        samples, self.reached = metrics.pop("samples"), metrics.pop("place", None)
        return Pass(self.number, metrics, samples, self.start, seconds)

    def measure(self, trained: Pass, sets: Mapping[str, Dataset]) -> Measured:
        """Evaluate what was learnt; if the run is asked to stop meanwhile, save what is learnt."""
        trainer, data, evaluation = self.trainer, self.run.data, self.run.evaluation
        random_state = get_random_state()
        try:
            if trainer.evaluates_training and data.train is not data.test:
                trained.metrics = evaluation(data.train, text="train")
            measured = trainer.measure(trained, evaluation, sets)
        except faults.Stopped:
            if self.saves and self.reached is not None:
                set_random_state(random_state)
                self.keep(self.reached)
            raise
        check_measured(trainer, measured, self.number, self.progress)
        return measured

    def record(self, measured: Measured) -> None:
        """Add the epoch to what was done, save it, and log it."""
        trainer, run, progress = self.trainer, self.run, self.progress
        value = measured.metrics[run.task.headline]
        finished = trainer.end_epoch(value)
        better = value > progress.best_value
        if not run.task.higher_is_better:
            better = value < progress.best_value
        best = better or progress.best_epoch == 0
        if best:
            progress.best_epoch, progress.best_value = self.number, value
            progress.best_digest = ""
        progress.epoch, progress.finished = self.number, finished
        progress.history += measured.rows
        progress.times += measured.times
        progress.lines += measured.lines
        if trainer.unsaved is None:
            digest = run.folder.save(state_of(trainer, run, progress), best=best)
            if best:
                progress.best_digest = digest
        run.folder.log(measured.rows, measured.lines, measured.times)
        if trainer.unsaved is not None:
            run.folder.write_line(trainer.unsaved)


def check_measured(trainer: Any, measured: Any, epoch: int, progress: Progress) -> None:
    """Refuse metrics that are not finite, or are others than before, before anything is saved.

    Raises:
        TrainingError: Says which, and the epoch.
    """
    for row in measured.rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} after epoch {epoch}: the evaluation is not finite, and "
                    f"this epoch is not saved. {trainer.advice}"
                )
        if progress.history and row.keys() != progress.history[0].keys():
            raise TrainingError(
                f"epoch {epoch} was measured by {', '.join(row)}, and the epochs before by "
                f"{', '.join(progress.history[0])}: the checkpoint is of another version of this "
                "program. Begin a run of its own."
            )


def after_epoch(trainer: Any, run: Run, progress: Progress, judge: str) -> None:
    """Write what follows from the state at the end of an epoch; a resumed run does it anew."""
    if trainer.draws_curves and run.folder.writes:
        path = run.folder.file(run.folder.CURVES)
        plot_learning_curves(progress.history, path, eval_name=judge)
    summarize(trainer, run, progress, judge)
    trainer.report(run.folder)


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
    source: str | None = None,
    save_every: int = 0,
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
        source: The file that the checkpoint was read from.
        save_every: Steps between two states amid an epoch; 0: none.

    Returns:
        The run's results: output_dir, history, best, best_epoch, and what trainer and task add.

    Raises:
        CheckpointError: If the checkpoint cannot be gone on with.
    """
    train_loader = build_loader(run.data.train, **trainer.loader_options(batch_size))
    num_epochs = trainer.last_epoch(num_epochs)
    seed_everything(seed)
    progress, place = begin(trainer, run, checkpoint, source)
    if progress.epoch >= num_epochs:
        print(f"Epoch {progress.epoch} of {num_epochs} is done: nothing to resume.")
    run.folder.start(run.args_text, run.model_text, progress, fresh=checkpoint is None)
    if run.folder.writes:
        print(f"Run folder: {run.folder.path}")
    if progress.history:
        after_epoch(trainer, run, progress, next(iter(run.sets)))

    def keep(line: str) -> None:
        progress.lines.append(line)
        run.folder.write_line(line)
        first = {"epoch": 1, "step": 0, "done": False, "seconds": 0.0, **Averages().state()}
        if trainer.unsaved is None:
            run.folder.save(state_of(trainer, run, progress, place=first), best=False)

    trainer.begin(partial(build_loader, run.data.train), keep)
    fit(
        trainer,
        run,
        train_loader,
        progress,
        num_epochs=num_epochs,
        place=place,
        save_every=save_every,
    )
    return {
        "output_dir": str(run.folder.path),
        "history": progress.history,
        "best_epoch": progress.best_epoch,
        "best": progress.best_value,
        **finish(trainer, run, progress),
    }


def begin(
    trainer: Any, run: Run, checkpoint: Mapping[str, Any] | None, source: str | None
) -> tuple[Progress, dict[str, Any] | None]:
    """Return what was done, and the place amid an epoch, of the run that is gone on with, if any.

    Raises:
        CheckpointError: If the checkpoint cannot be gone on with.
    """
    if checkpoint is None:
        worst = float("-inf") if run.task.higher_is_better else float("inf")
        return Progress(best_value=worst), None
    progress = restore(trainer, checkpoint)
    settle(trainer, run, Path(source), checkpoint, progress)
    if "place" not in checkpoint:
        return progress, None
    states = {k: v for k, v in checkpoint.items() if k.startswith("random_state")}
    return progress, {**own_place(checkpoint, splits=trainer.splits), **states}


def finish(trainer: Any, run: Run, progress: Progress) -> dict[str, Any]:
    """Test the best epoch where it was chosen on held-out samples; let trainer and task finish."""
    data, task, folder, evaluation = run.data, run.task, run.folder, run.evaluation

    def use_best() -> int:
        return load_best(trainer, folder, progress)

    results: dict[str, Any] = {}
    found = None
    if data.val is not None and not trainer.tests_itself:
        epoch = use_best()
        results["test"], found = task.examine(trainer.evaluated, data, folder, evaluation)
        summarize(trainer, run, progress, next(iter(run.sets)), test=results["test"])
        which = f"The best epoch was chosen on {len(data.val)} held-out training samples."
        if not folder.keeps_best:
            which = (
                f"--save {folder.saves} keeps no weights of the best epoch: the last ones count."
            )
        folder.write_line(f"{which} [Test at Epoch {epoch}] {task.line(results['test'])}")
    more, lines = trainer.finish(data, folder, evaluation)
    if found is None:
        found = task.finish(trainer.evaluated, data, folder, evaluation, use_best)
    for line in [*lines, *found.lines]:
        folder.write_line(line)
    return results | more | found.results


def load_best(trainer: Any, folder: RunFolder, progress: Progress) -> int:
    """Take the weights of the best epoch, if they were kept; return the epoch of the weights.

    Raises:
        CheckpointError: If the file that held them was replaced.
    """
    if not folder.keeps_best:
        return progress.epoch
    best = None
    if folder.writes:
        best = load_checkpoint(folder.path / folder.BEST)
        if progress.best_digest not in ("", best.get("digest")):
            raise CheckpointError(
                f"{folder.path / folder.BEST} is not the state of epoch {progress.best_epoch} "
                "any more: something else has replaced it. --resume mends what it can."
            )
    trainer.load_best(best)
    return progress.best_epoch


def test(run: Run, source: str) -> dict[str, Any]:
    """Evaluate on the test set.

    Args:
        run: What it works with.
        source: Where the weights come from, for the results file.
    """
    folder, data, task = run.folder, run.data, run.task
    metrics, found = task.examine(run.evaluation.model, data, folder, run.evaluation)
    text = (
        f"Checkpoint: {source}\n"
        f"Data: {data.name}, {len(data.test)} test samples\n"
        + "".join(f"{line}\n" for line in found.lines)
        + f"[Test] {task.line(metrics)}\n"
    )
    print(text, end="")
    if not folder.writes:
        if ranks.rank() == 0:
            print(f"note: {folder.path} cannot be written: nothing of this was kept.")
    else:
        try:
            path = folder.file(folder.TEST)
            before = path.read_text(encoding="utf-8") + "\n" if path.exists() else ""
            write_text(path, before + text)
        except WriteError as error:
            print(f"note: nothing of this was kept: {error}")
    return {"output_dir": str(folder.path), "test": metrics}


def dry_run(
    trainer: Any, run: Run, build_loader: Callable[..., DataLoader], *, batch_size: int
) -> dict[str, Any]:
    """Take two steps and evaluate two batches; write nothing."""
    start = time.perf_counter()
    loader = build_loader(run.data.train, **trainer.loader_options(batch_size))
    trained = train_one_epoch(trainer, loader, epoch=1, max_steps=2)
    seconds = time.perf_counter() - start
    samples, _ = trained.pop("samples"), trained.pop("place")
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
