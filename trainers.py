"""Three ways to learn behind one protocol: by gradient, by growth, by memory.

A *trainer* knows how a model learns from batches, how many epochs that takes, and what an epoch
yields. It knows no model by name; a model names its trainer (`training`).
"""

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ranks
from options import Options, option
from ranks import world_size
from utils import (
    CsvLog,
    Measured,
    Pass,
    Progress,
    RunFolder,
    TrainingError,
    autocast,
    load_checkpoint,
    plot_growth,
    save_checkpoint,
    write_text,
)

__all__ = [
    "TRAINERS",
    "GradientTrainer",
    "GrowthTrainer",
    "MemoryTrainer",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "build_scheduler",
    "compile_model",
]


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
        shares: Whether several processes can share the work.
        splits: Whether they do so by parts of every training batch (`ranks.Shares`).
        advice: What to try when numbers are not finite.
        debug_nan: Whether :meth:`finite` is asked after every step.
        rehearses: Whether the model maps a batch to outputs before it has learnt anything.
        features: Name of the option that says what samples are replaced by, if there is one.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    has_loss: ClassVar[bool] = False
    normalize: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    tests_itself: ClassVar[bool] = False
    draws_curves: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    advice: ClassVar[str] = "Look for numbers in the data that are not finite."
    rehearses: ClassVar[bool] = False
    debug_nan = False
    features: ClassVar[str | None] = None

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
            f"Average Epoch Time: {average:.4f}s",
            self.best_line(progress.best_value, f"Epoch {progress.best_epoch}"),
        ]
        if held_out is None:
            lines.append(
                "The best epoch was chosen on the test set, as in the published runs; "
                "--val_split chooses it on held-out training data."
            )
        return lines

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

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


# ---------------------------------------------------------------------------------------------
# Gradient


@dataclass(frozen=True)
class GradientOptions(TrainingOptions):
    """Optimizer, schedule and precision of gradient descent."""

    title = "Training by gradient"
    use_amp: bool = option(
        False, "mixed precision: float16 with loss scaling on CUDA, bfloat16 on the CPU"
    )
    use_compiled: bool = option(False, "torch.compile (needs a C++ compiler)")
    compile_mode: str = option(
        "default",
        "mode of torch.compile; it knows no reduce-memory: the default mode with memory "
        "planning and reordering for a low peak stands for it",
        choices=("default", "reduce-overhead", "reduce-memory", "max-autotune"),
    )
    accum_steps: int = option(
        1,
        "parts that a step's batch is gone through in, whose gradients add up: less memory; "
        "batch norm sees the parts",
        least=1,
        most=10**6,
    )
    sync_bn: bool = option(
        False, "under torchrun: batch norm by the statistics of all processes' samples"
    )
    debug_nan: bool = option(
        False,
        "look at the loss after every step, and keep the batch of one that is not finite, in "
        "nan_batch.pt",
        resumable=True,
    )
    clip_grad_norm: float = option(1.0, "largest norm of the gradients; 0 does not clip", least=0)
    optimizer: str = option("adamw", "optimizer", choices=("adam", "sgd", "adamw"))
    lr: float = option(1e-3, "learning rate", least=0)
    weight_decay: float = option(1e-6, "weight decay", least=0, most=1e12)
    momentum: float = option(0.9, "momentum of sgd", least=0, most=10)
    scheduler: str = option(
        "none",
        "learning rate over epochs: times --lr_gamma every --lr_step epochs, cosine to 0, "
        "times --lr_gamma when --lr_step epochs brought no better result, exponentially down to "
        "times --lr_final, or constant",
        choices=("step", "cosine", "plateau", "exponential", "none"),
    )
    lr_final: float = option(1e-3, "see --scheduler exponential", least=0, most=1e12)
    decay_bias: bool = option(True, "weight decay on biases too (not in denoisers, as published)")
    lr_step: int = option(20, "see --scheduler, in epochs", least=1, most=10**6)
    lr_gamma: float = option(0.1, "see --scheduler", least=0, most=1e12)


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


def has_cpp_compiler() -> bool:
    """Say whether torch.compile will find a C++ compiler."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    return any(name and shutil.which(name.split()[0]) for name in names)


def compile_model(model: nn.Module, mode: str) -> None:
    """Compile in place, so that parameter names stay as they are."""
    if mode != "reduce-memory":
        model.compile(mode=mode)
        return
    known = torch._inductor.list_options()
    wanted = {"memory_planning": True, "reorder_for_peak_memory": True}
    model.compile(options={k: v for k, v in wanted.items() if k in known})


class GradientTrainer(Trainer):
    """Gradient descent with mixed precision and gradient clipping.

    Args:
        model: The network, on its device.
        task: What a batch means.
        device: Where it runs.
        num_epochs: Length of the run, for the schedule.
        optimizer: See :func:`build_optimizer`, as are lr, weight_decay, momentum and decay_bias.
        lr: Learning rate.
        weight_decay: Weight decay.
        momentum: Momentum of sgd.
        decay_bias: Weight decay on biases too.
        scheduler: See :func:`build_scheduler`, as are the next three.
        lr_step: Epochs.
        lr_gamma: Factor.
        lr_final: Factor.
        use_amp: Mixed precision (see `utils.autocast`), with loss scaling on CUDA.
        clip_grad_norm: Largest norm of all gradients together; 0 does not clip.
        accum_steps: Parts that a batch is gone through in.
        sync_bn: Batch norm over all processes; see `ranks.SyncedBatchNorm`.
        debug_nan: Look at the loss after every step.

    Under torchrun every process takes its part of each batch (DistributedDataParallel); gradients
    are those of the mean over the whole batch, whether or not it divides.
    """

    name = "gradient"
    Options = GradientOptions
    has_loss = True
    normalize = True
    rehearses = True
    shares = True
    splits = True
    advice = (
        "Try a smaller --lr, or --clip_grad_norm 1.0; without --use_amp numbers have more range."
    )

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        device: torch.device,
        num_epochs: int,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-6,
        momentum: float = 0.9,
        decay_bias: bool = True,
        scheduler: str = "none",
        lr_step: int = 20,
        lr_gamma: float = 0.1,
        lr_final: float = 1e-3,
        use_amp: bool = False,
        clip_grad_norm: float = 1.0,
        accum_steps: int = 1,
        sync_bn: bool = False,
        debug_nan: bool = False,
    ) -> None:
        super().__init__(model, task, device=device)
        self.debug_nan = debug_nan
        self.amp, self.clip_grad_norm = use_amp, clip_grad_norm
        self.accum_steps = accum_steps
        self.optimizer = build_optimizer(
            model,
            optimizer,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            decay_bias=decay_bias,
        )
        self.scheduler = build_scheduler(
            self.optimizer,
            scheduler,
            num_epochs=num_epochs,
            lr_step=lr_step,
            lr_gamma=lr_gamma,
            lr_final=lr_final,
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=use_amp and device.type == "cuda")
        self._losses: list[Tensor] = []
        self.network: nn.Module = model  # what a batch goes through
        if ranks.initialised():
            if sync_bn:
                ranks.synchronise_norms(model)
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            self.network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    @classmethod
    def check(cls, values: Mapping[str, Any], task_name: str) -> None:
        """Refuse to compile without a compiler."""
        if values["use_compiled"] and not has_cpp_compiler():
            raise ValueError(
                "--use_compiled needs a C++ compiler and found none (g++, clang++, or $CXX). "
                "Install one (Debian: apt-get install g++), or leave the flag out."
            )

    @classmethod
    def copies(cls, values: Mapping[str, Any]) -> int:
        """Return how often training holds the parameters: themselves, gradients, states."""
        return 3 if values["optimizer"] == "sgd" else 4

    @classmethod
    def prepare(cls, model: nn.Module, values: Mapping[str, Any]) -> None:
        """Compile the model, if that is asked for."""
        if values["use_compiled"]:
            compile_model(model, values["compile_mode"])

    def step(self, batch: Any, share: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
        """Take one gradient step; return per-sample metrics (B,).

        Args:
            batch: What the loader handed over.
            share: Begin and end of this process's part of the batch, and the size of the batch.
        """
        inputs, targets = self.task.prepare(batch, self.device)
        weight, counts = 1.0, True
        if share is not None:
            begin, end, size = share
            if len(inputs) == size > 1:  # a whole batch, still to be cut
                counts = end > begin
                part = slice(begin, end) if counts else slice(0, 1)
                inputs, targets = inputs[part], targets[part]
            counts = end > begin
            weight = world_size() * (end - begin) / size
            for module in self.model.modules():
                if isinstance(module, ranks.SyncedBatchNorm):
                    module.weighs = counts
        self.optimizer.zero_grad(set_to_none=True)
        parts = [(inputs, targets)]
        if self.accum_steps > 1:
            chunks = inputs.chunk(self.accum_steps), targets.chunk(self.accum_steps)
            parts = list(zip(*chunks, strict=True))
        losses, metrics = [], []
        for number, (x, y) in enumerate(parts, start=1):
            last = number == len(parts) or self.network is self.model
            with contextlib.nullcontext() if last else self.network.no_sync():
                with autocast(self.device, self.amp):
                    outputs = self.network(x)
                    loss = self.task.loss(outputs, y)
                factor = weight * len(x) / len(inputs)
                self.scaler.scale(loss if factor == 1 else loss * factor).backward()
            losses.append(loss.detach() * (len(x) / len(inputs)))
            with torch.no_grad():
                metrics.append(self.task.metrics(outputs.detach(), y))
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._losses.append(loss)
        if not counts:
            return {}
        if len(metrics) > 1:
            metrics = [{name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}]
        count = len(next(iter(metrics[0].values())))
        return {"loss": loss.expand(count), **metrics[0]}

    def finite(self, epoch: int, step: int) -> None:
        """Raise TrainingError if a loss since the last check is not finite, in any process."""
        finite = torch.stack(self._losses).isfinite().tolist() if self._losses else []
        first = step - len(finite) + 1
        self._losses.clear()
        wrong = first + finite.index(False) if False in finite else None
        found = [number for number in ranks.gather(wrong) if number is not None]
        if found:
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {min(found)}. {self.advice}"
            )

    def end_batches(self) -> None:
        """Let all processes evaluate with the same statistics of batch norm: the first one's."""
        ranks.broadcast_module(self.model, buffers_only=True)

    def sound(self, epoch: int, step: int) -> None:
        """Raise TrainingError if a parameter or buffer is not finite."""
        named = [
            (name, value)
            for name, value in self.model.state_dict().items()
            if value.is_floating_point()
        ]
        if not named:
            return
        finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
        if not all(finite):
            raise TrainingError(
                f"{named[finite.index(False)][0]} is not finite after step {step} of epoch "
                f"{epoch}: the weights are ruined, and not saved. {self.advice}"
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


# ---------------------------------------------------------------------------------------------
# Growth


@dataclass(frozen=True)
class GrowthOptions(TrainingOptions):
    """How a network grows."""

    title = "Training by growth (--model dynamic)"
    dynamic_features: str = option(
        "raw",
        "what is compared (classification): pixels, their N principal components, or what "
        "the last layer of a network trained here sees (its best.pt)",
        metavar="raw|pca:N|FILE",
    )
    balanced_first_batch: bool = option(False, "the first batch holds all classes equally often")
    prune: bool = option(
        False,
        "afterwards drop centers without which every training sample is predicted the same, "
        "into pruned.pt",
    )
    eval_train: bool = option(
        True, "measure training accuracy after each pass, not while growing (default: yes)"
    )


class GrowthTrainer(Trainer):
    """Learning without gradients: the model adds what it still gets wrong.

    The model offers ``grow(inputs, targets) -> outputs``: its outputs for the batch once it has
    learnt it, going over it by its own `batch_size`. It may offer ``end_pass() -> bool``: whether
    there is no more to learn, ``num_stages``: the passes it takes, ``growth``: a list of rows, one
    a batch grown, ``num_centers``, and ``prune(inputs, targets)``. When memory is full, the model
    raises MemoryError: what was learnt is then kept, evaluated and saved, and the run ends.

    Args:
        model: The growing model.
        task: What a batch means.
        device: Where it runs.
        balanced_first_batch: The first batch holds all classes equally often.
        prune: Drop centers that no training prediction needs when the run ends.
        eval_train: Measure training metrics after each pass, not while growing.
    """

    name = "growth"
    Options = GrowthOptions
    features = "dynamic_features"

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        device: torch.device,
        balanced_first_batch: bool = False,
        prune: bool = False,
        eval_train: bool = True,
    ) -> None:
        super().__init__(model, task, device=device)
        self.balanced_first_batch, self.prune = balanced_first_batch, prune
        self.eval_train = eval_train
        self.full: str | None = None  # why nothing can be added any more

    @classmethod
    def check(cls, values: Mapping[str, Any], task_name: str) -> None:
        """Refuse growing networks that cannot work."""
        if values["max_neighbors"] < values["batch_size"]:
            raise ValueError(
                f"--max_neighbors {values['max_neighbors']} is less than the first batch, all of "
                f"which becomes centers (--batch_size {values['batch_size']}). Raise the one or "
                "lower the other."
            )
        predictor, kernel = values["predictor"], values["kernel_type"]
        if values["prune"] and (predictor != "interp" or kernel == "influence_cone"):
            raise ValueError(
                "--prune works with --predictor interp and an inverse kernel: other votes do not "
                f"add up (got --predictor {predictor} --kernel_type {kernel})."
            )
        if values["balanced_first_batch"] and task_name == "approximation":
            raise ValueError(
                f"--balanced_first_batch needs classes, and --dataset {values['dataset']} has none."
            )

    @classmethod
    def batch(cls, batch_size: int) -> int:
        """Return many batches at once: the network goes over them one by one."""
        return batch_size * max(1, 1024 // batch_size)

    def last_epoch(self, wanted: int) -> int:
        """Return the passes that all layers take, if the model has layers."""
        return getattr(self.model, "num_stages", wanted)

    def loader_options(self, batch_size: int) -> dict[str, Any]:
        """Shuffle; balance the first batch, if that is asked for."""
        return {"shuffle": True, "balanced": batch_size if self.balanced_first_batch else 0}

    @property
    def evaluates_training(self) -> bool:
        """Whether training metrics are measured after a pass."""
        return self.eval_train

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

    def end_epoch(self, headline: float) -> bool:
        """Return True when the model says that there is no more to learn."""
        finished = self.model.end_pass() if hasattr(self.model, "end_pass") else False
        return finished or self.full is not None

    def columns(self) -> dict[str, float]:
        """Return the number of centers, if the model counts them."""
        count = getattr(self.model, "num_centers", None)
        return {} if count is None else {"centers": int(count)}

    def report(self, run: RunFolder) -> None:
        """Write ``growth.csv`` and ``growth.png``, one entry a batch; say if memory is full."""
        rows = getattr(self.model, "growth", [])
        if rows:
            CsvLog(run.file("growth.csv"), rows)
            plot_growth(rows, run.file("growth.png"))
        if self.full is not None:
            run.write_line(f"Growing stopped: {self.full}.")

    def state_dict(self) -> dict[str, Any]:
        """Return what is not part of the model's own state: the record of its growth."""
        return {"growth": list(getattr(self.model, "growth", [])), "full": self.full}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.full = state.get("full")
        if hasattr(self.model, "growth"):
            self.model.growth[:] = state["growth"]

    def finish(self, data: Any, run: RunFolder, evaluate: Any) -> tuple[dict[str, Any], list[str]]:
        """Count the centers, and drop those that nothing needs, if that is asked for."""
        results: dict[str, Any] = {"centers": [layer.num_centers for layer in self.model.layers]}
        if not self.prune:
            return results, []
        batches = [self.task.prepare(b, self.device) for b in evaluate.loader(data.train)]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        before, after = self.model.prune(x.flatten(1), y)
        measured = evaluate(data.test)
        if run.writes:
            pruned = dict(load_checkpoint(run.path / run.LAST), model=self.model.state_dict())
            save_checkpoint(run.path / "pruned.pt", pruned)
        line = (
            f"Pruned: {before} -> {after} centers ({100 * after / before:.1f}%) that predict every "
            f"training sample the same. [Test] {self.task.line(measured)}"
        )
        return results | {"pruned": after, "pruned_test": measured}, [line]


# ---------------------------------------------------------------------------------------------
# Memory


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
    shares = True

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


TRAINERS: dict[str, type[Trainer]] = {
    "gradient": GradientTrainer,
    "growth": GrowthTrainer,
    "memory": MemoryTrainer,
}
