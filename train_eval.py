"""The loop: epochs, evaluation, keep the best. It knows no task, trainer or model by name.

A *task* says what a batch means (`tasks.task`), a *trainer* how a model learns from it
(`trainers`).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import faults
import ranks
from utils import (
    CheckpointError,
    Pass,
    Progress,
    RunFolder,
    TrainingError,
    WriteError,
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
            total = self.total(values)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += len(next(iter(metrics.values())))

    @staticmethod
    def total(values: Tensor) -> Tensor:
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        return values.detach().to(dtype).sum()

    def result(self) -> dict[str, float]:
        return {name: (total / self.count).item() for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return {"sums": sums, "count": self.count}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.count = state["count"]

    def over_ranks(self) -> "_Averages":
        """Return the averages of all processes' samples, summed in the order of the processes."""
        whole = _Averages()
        for state in ranks.gather(self.state()):
            whole.include(state)
        return whole

    def include(self, state: Mapping[str, Any]) -> None:
        """Add what :meth:`state` of others returned."""
        for name, total in state["sums"].items():
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += state["count"]


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
    trainer: Any,
    loader: DataLoader,
    *,
    epoch: int,
    max_steps: int | None = None,
    shares: ranks.Shares | None = None,
    place: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    save_every: int = 0,
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

    Raises:
        faults.Stopped: If the run was asked to stop; the state is saved.
    """
    trainer.model.train()
    averages, step = _Averages(), 0
    begun = 0 if place is None else place["step"]
    batches = enumerate(_progress(loader, f"epoch {epoch}", max_steps, trainer.columns), start=1)
    if begun:
        averages.load(place, trainer.device)
        if place["done"]:
            batches = iter(())
        for step, _ in batches:  # loading draws random numbers: it is gone through again
            if step == begun:
                break
        step = begun
        set_random_state(own_random_state(place))

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
    averages, parts = _Averages(), []
    # Several processes share the batches; what observes them has to see all of them.
    shared = ranks.initialised() and observe is None and max_batches is None
    for batch in _progress(ranks.every_nth_batch(loader) if shared else loader, text, max_batches):
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


def own_random_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the generators' state of this process, out of those that a checkpoint holds."""
    several = state.get("random_states", [])
    if len(several) == ranks.world_size() > 1:
        return several[ranks.rank()]
    return state["random_state"]


def restore(trainer: Any, checkpoint: Mapping[str, Any]) -> Progress:
    """Put model, trainer and generators where a checkpoint left them.

    Raises:
        CheckpointError: If entries are missing or of another form.
    """
    try:
        load_weights(trainer.model, checkpoint)
        trainer.load_state_dict(checkpoint["trainer"])
        set_random_state(own_random_state(checkpoint))
        progress = Progress.from_state(checkpoint["progress"])
        if (place := checkpoint.get("place")) is not None:
            _Averages().load(place, trainer.device)
            if not (isinstance(place["step"], int) and place["epoch"] == progress.epoch + 1):
                raise CheckpointError("its 'place' in the epoch is of another form.")
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint cannot be gone on with: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint cannot be gone on with: it lacks {error}. A file of weights alone "
            "can be begun with by --pretrained."
        ) from error
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint cannot be gone on with: an entry has another form than this program "
            f"writes ({reason})."
        ) from error
    if progress.best_epoch == progress.epoch and place is None:
        progress.best_digest = checkpoint.get("digest", "")
    return progress


def own_place(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return this process's place in the epoch, out of those that a checkpoint holds.

    If it was saved by another number of processes, the first one takes over all their averages.
    """
    places = checkpoint.get("places", [checkpoint["place"]])
    if len(places) == ranks.world_size():
        return places[ranks.rank()]
    whole = _Averages()
    for place in places if ranks.rank() == 0 else []:
        whole.include(place)
    return {**checkpoint["place"], **whole.state()}


def state_of(trainer: Any, run: Run, progress: Progress, **more: Any) -> dict[str, Any]:
    """Return what a run can be gone on with from."""
    random_state = get_random_state()
    state = {
        "model": trainer.model.state_dict(),
        "trainer": trainer.state_dict(),
        "progress": vars(progress),
        "random_state": random_state,
        "args": dict(run.arguments),
        **more,
    }
    if ranks.initialised():
        state["random_states"] = ranks.gather(random_state)
    return state


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
    task, folder = run.task, run.folder
    sets = run.sets
    if trainer.tests_itself:
        sets = {**sets, "test": run.data.test}
    judge = next(iter(sets))
    loader, shares = ranks.share_batches(train_loader) if trainer.splits else (train_loader, None)
    sampler, generator = train_loader.sampler, train_loader.generator
    for epoch in range(progress.epoch + 1, num_epochs + 1):
        if progress.finished:
            break
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
            generator.manual_seed(sampler.seed + epoch)
        spent = 0.0 if place is None else place["seconds"]
        start = time.perf_counter() - spent

        def keep(where: Mapping[str, Any], start: float = start, **more: Any) -> None:
            trainer.sound(where["epoch"], where["step"])
            where = {**where, "seconds": time.perf_counter() - start}
            where = ranks.gather(where)
            if len(where) > 1:
                more["places"] = where
            state = state_of(trainer, run, progress, place=where[0], **more)
            folder.save(state, best=False)

        options: dict[str, Any] = {}
        if trainer.unsaved is None and trainer.resumes:
            options = {"keep": keep, "save_every": save_every}
        if shares is not None:
            options["shares"] = shares
        if place is not None:
            options["place"] = place
        with faults.deferred() if options else contextlib.nullcontext():
            train = train_one_epoch(trainer, loader, epoch=epoch, **options)
            place, seconds = None, time.perf_counter() - start
            samples, reached = train.pop("samples"), train.pop("place", None)
            random_state = get_random_state()
            try:
                if trainer.evaluates_training and run.data.train is not run.data.test:
                    train = run.evaluation(run.data.train, text="train")
                trained = Pass(epoch, train, samples, start, seconds)
                measured = trainer.measure(trained, run.evaluation, sets)
            except faults.Stopped:
                if options and reached is not None:
                    set_random_state(random_state)
                    keep(reached)
                raise
            check_measured(trainer, measured, epoch)
            value = measured.metrics[task.headline]
            finished = trainer.end_epoch(value)

            better = (
                value > progress.best_value
                if task.higher_is_better
                else value < progress.best_value
            )
            best = better or progress.best_epoch == 0
            if best:
                progress.best_epoch, progress.best_value = epoch, value
                progress.best_digest = ""
            progress.epoch, progress.finished = epoch, finished
            progress.history += measured.rows
            progress.times += measured.times
            progress.lines += measured.lines
            if trainer.unsaved is None:
                digest = folder.save(state_of(trainer, run, progress), best=best)
                if best:
                    progress.best_digest = digest
            folder.log(measured.rows, measured.lines, measured.times)
            if trainer.unsaved is not None:
                folder.write_line(trainer.unsaved)
            after_epoch(trainer, run, progress, judge)
    if progress.finished:
        folder.write_line(f"Nothing left to learn after epoch {progress.epoch}.")

    held_out = None if run.data.val is None else len(run.data.val)
    for line in trainer.conclude(progress, held_out):
        folder.write_line(line)
    return progress


def check_measured(trainer: Any, measured: Any, epoch: int) -> None:
    """Refuse metrics that are not finite, before anything is saved.

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


def after_epoch(trainer: Any, run: Run, progress: Progress, judge: str) -> None:
    """Write what follows from the state at the end of an epoch; a resumed run does it anew."""
    if trainer.draws_curves and run.folder.writes:
        path = run.folder.file(run.folder.CURVES)
        plot_learning_curves(progress.history, path, eval_name=judge)
    summarize(trainer, run, progress, judge)
    trainer.report(run.folder)


def settle(trainer: Any, run: Run, source: Path, checkpoint: Mapping[str, Any], progress: Any):
    """Let ``best.pt`` be what the state says; say so in the results where it was not.

    Where the best state is lost, the state that the run goes on from is the best one there is.
    """
    at_end = "place" not in checkpoint
    there, line = True, None
    if run.folder.writes:
        there, line = run.folder.settle(source, progress, at_end=at_end)
    there, line = ranks.broadcast_object((there, line))
    if not there:
        lost, task = progress.best_epoch, run.task
        judge = next(iter(run.sets))
        progress.best_epoch, progress.best_digest = 0, ""
        progress.best_value = -math.inf if task.higher_is_better else math.inf
        if at_end:
            progress.best_epoch = progress.epoch
            progress.best_value = progress.history[-1][f"{judge}_{task.headline}"]
            progress.best_digest = checkpoint.get("digest", "")
            if run.folder.writes:
                run.folder.settle(run.folder.path / run.folder.LAST, progress, at_end=True)
        line = (
            f"The weights of the best epoch, {lost}, are lost ({line}): the best one is chosen "
            f"from epoch {progress.epoch + (not at_end)} on."
        )
        progress.lines.append(line)
    if line is not None and run.folder.writes:
        print(line)


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
    data, task, folder, evaluation = run.data, run.task, run.folder, run.evaluation
    train_loader = build_loader(data.train, **trainer.loader_options(batch_size))
    num_epochs = trainer.last_epoch(num_epochs)
    seed_everything(seed)
    progress = Progress() if checkpoint is None else restore(trainer, checkpoint)
    place = None
    if checkpoint is None:
        if not task.higher_is_better:
            progress.best_value = float("inf")
    else:
        settle(trainer, run, Path(source), checkpoint, progress)
        if "place" in checkpoint:
            place = own_place(checkpoint)
            states = {k: v for k, v in checkpoint.items() if k.startswith("random_state")}
            place = {**place, **states}
    if progress.epoch >= num_epochs:
        print(f"Epoch {progress.epoch} of {num_epochs} is done: nothing to resume.")
    folder.start(run.args_text, run.model_text, progress, fresh=checkpoint is None)
    if folder.writes:
        print(f"Run folder: {folder.path}")
    if progress.history:
        after_epoch(trainer, run, progress, next(iter(run.sets)))
    fit(
        trainer,
        run,
        train_loader,
        progress,
        num_epochs=num_epochs,
        place=place,
        save_every=save_every,
    )
    results: dict[str, Any] = {
        "output_dir": str(folder.path),
        "history": progress.history,
        "best_epoch": progress.best_epoch,
        "best": progress.best_value,
    }

    def use_best() -> int:
        if folder.writes:
            best = load_checkpoint(folder.path / folder.BEST)
            if progress.best_digest not in ("", best.get("digest")):
                raise CheckpointError(
                    f"{folder.path / folder.BEST} is not the state of epoch {progress.best_epoch} "
                    "any more: something else has replaced it. --resume mends what it can."
                )
            load_weights(trainer.model, best)
        ranks.broadcast_module(trainer.model)
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
