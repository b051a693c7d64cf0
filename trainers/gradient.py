"""Learning by gradient: optimizers, schedules, mixed precision, compiled networks."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ranks
from checkpoints import CheckpointError, check_form
from options import option
from ranks import world_size
from run_folder import Measured, Pass, TrainingError
from trainers.recipe import (
    RecipeOptions,
    Warmup,
    build_average,
    build_mix,
    check_recipe,
    set_channels_last,
)
from trainers.trainer import Trainer
from utils import autocast

__all__ = [
    "GradientOptions",
    "GradientTrainer",
    "build_optimizer",
    "build_scheduler",
    "compile_model",
    "load_optimizer",
]


@dataclass(frozen=True)
class GradientOptions(RecipeOptions):
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
    fsdp: bool = option(
        False,
        "under torchrun: every process holds a part of the parameters and optimizer states, for "
        "models that one card does not hold (PyTorch's fully_shard)",
        resumable=True,
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
    fused = all(p.device.type in ("cpu", "cuda") and not ranks.is_part(p) for p in parameters)
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
        fsdp: Every process holds a part of the parameters; see `ranks.shard_parameters`.
        debug_nan: Look at the loss after every step.
        warmup_epochs: Epochs in which the learning rate rises; see `trainers.recipe.Warmup`.
        mixup: See `trainers.recipe.build_mix`, as is cutmix.
        cutmix: See there.
        ema: Decay of the average that is evaluated and saved; 0: the weights are.
        num_classes: Number of classes.
        sample_shape: Shape of a sample.
        steps_per_epoch: Steps of an epoch.

    Under torchrun every process takes its part of each batch (DistributedDataParallel); gradients
    are those of the mean over the whole batch, whether or not it divides.
    """

    name = "gradient"
    Options = GradientOptions
    has_loss = True
    normalize = True
    rehearses = True
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
        fsdp: bool = False,
        debug_nan: bool = False,
        warmup_epochs: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        ema: float = 0.0,
        num_classes: int = 1,
        sample_shape: Sequence[int] = (),
        steps_per_epoch: int = 1,
    ) -> None:
        super().__init__(model, task, device=device)
        self.debug_nan, self.num_classes = debug_nan, num_classes
        self.mix = build_mix(mixup, cutmix, num_classes, sample_shape)
        self.network: nn.Module = model  # what a batch goes through
        self.totals = ranks.Totals()
        if ranks.initialised():
            self._join(sync_bn, fsdp)
        self.amp, self.clip_grad_norm = use_amp, clip_grad_norm
        self.accum_steps = accum_steps
        self._build_optimizer = partial(
            build_optimizer,
            name=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            decay_bias=decay_bias,
        )
        self.optimizer = self._build_optimizer(model)
        self.scheduler = build_scheduler(
            self.optimizer,
            scheduler,
            num_epochs=num_epochs,
            lr_step=lr_step,
            lr_gamma=lr_gamma,
            lr_final=lr_final,
        )
        self.warmup = Warmup(self.optimizer, round(warmup_epochs * steps_per_epoch))
        self.average = build_average(model, ema)
        self.scaler = torch.amp.GradScaler("cuda", enabled=use_amp and device.type == "cuda")
        self._losses: list[Tensor] = []

    def _join(self, sync_bn: bool, fsdp: bool) -> None:
        """Share the work with the other processes."""
        if sync_bn:
            self.totals = ranks.synchronise_norms(self.model)
        if fsdp:
            ranks.shard_parameters(self.model)
            return
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        self.network = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)

    @classmethod
    def check(cls, values: Mapping[str, Any], task_name: str) -> None:
        """Refuse what cannot work: a recipe, several processes, compiling without a compiler."""
        check_recipe(values, task_name)
        processes = world_size()
        if processes > 1 and values["sync_bn"] and values["accum_steps"] > 1:
            raise ValueError(
                f"--sync_bn and --accum_steps {values['accum_steps']} with {processes} processes: "
                "batch norm would see parts of the batch that change with the number of "
                "processes. Start more processes instead of --accum_steps, or leave --sync_bn out."
            )
        if processes > 1 and values["fsdp"]:
            for other, why in (
                ("use_compiled", "a compiled network would hold on to gathered parameters"),
                ("ema", "the average would be of one process's part of the weights"),
                ("channels_last", "parts of parameters lie in memory as plain rows"),
                ("use_amp", "loss scaling would see one process's part of the gradients"),
            ):
                if values[other]:
                    raise ValueError(f"--fsdp with --{other}: {why}. Leave one of them out.")
        if values["use_compiled"] and not has_cpp_compiler():
            raise ValueError(
                "--use_compiled needs a C++ compiler and found none (g++, clang++, or $CXX). "
                "Install one (Debian: apt-get install g++), or leave the flag out."
            )

    @classmethod
    def copies(cls, values: Mapping[str, Any]) -> int:
        """Return how often training holds the parameters: themselves, gradients, states."""
        return (3 if values["optimizer"] == "sgd" else 4) + (values["ema"] > 0)

    @classmethod
    def prepare(cls, model: nn.Module, values: Mapping[str, Any]) -> None:
        """Order the model's memory and compile it, if that is asked for."""
        if values["channels_last"]:
            set_channels_last(model)
        if values["use_compiled"]:
            compile_model(model, values["compile_mode"])

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved: the average, if there is one."""
        return self.model if self.average is None else self.average.module

    def loader_options(self, batch_size: int) -> dict[str, Any]:
        """Shuffle, and mix the samples of a batch, if that is asked for."""
        return {"shuffle": True} | ({} if self.mix is None else {"mix": self.mix})

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
            self.totals.weighs = counts
        self.optimizer.zero_grad(set_to_none=True)
        parts = [(inputs, targets)]
        if self.accum_steps > 1:
            chunks = inputs.chunk(self.accum_steps), targets.chunk(self.accum_steps)
            parts = list(zip(*chunks, strict=True))
        losses, metrics = [], []
        for number, (x, y) in enumerate(parts, start=1):
            with self._apart(number < len(parts)):
                with autocast(self.device, self.amp):
                    outputs = self.network(x)
                    loss = self.task.objective(outputs, y)
                factor = weight * len(x) / len(inputs)
                self.scaler.scale(loss if factor == 1 else loss * factor).backward()
            losses.append(loss.detach() * (len(x) / len(inputs)))
            with torch.no_grad():
                metrics.append(self.task.metrics(outputs.detach(), y))
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        with self.warmup.step():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._losses.append(loss)
        if not counts:
            return {}
        if len(metrics) > 1:
            metrics = [{name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}]
        count = len(next(iter(metrics[0].values())))
        return {"loss": loss.expand(count), **metrics[0]}

    def _apart(self, apart: bool) -> contextlib.AbstractContextManager:
        """Whether gradients stay in the processes, as a later part of the batch adds to them."""
        if self.network is not self.model:
            return self.network.no_sync() if apart else contextlib.nullcontext()
        if ranks.in_parts(self.model):
            self.model.set_requires_gradient_sync(not apart)
        return contextlib.nullcontext()

    def model_state(self) -> dict[str, Tensor]:
        """Return the model's state, whole."""
        if not ranks.in_parts(self.model):
            return super().model_state()
        return ranks.whole(self.model.state_dict())

    def load_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Take back a model's state."""
        if not ranks.in_parts(self.model):
            super().load_model(checkpoint)
            return
        own = self.model.state_dict()
        state = {
            name: ranks.part_like(value, own.get(name, value))
            for name, value in checkpoint["model"].items()
        }
        super().load_model({**checkpoint, "model": state})

    def load_best(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Take the weights that the first process has read."""
        if not ranks.in_parts(self.model):
            super().load_best(checkpoint)
            return
        weights = None if checkpoint is None else {"model": checkpoint["model"]}
        self.load_model(ranks.broadcast_object(weights))

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
        if self.average is not None:
            ranks.broadcast_module(self.average.module, buffers_only=True)

    def sound(self, epoch: int, step: int) -> None:
        """Raise TrainingError if a parameter or buffer is not finite, in any process."""
        named = [
            (name, ranks.own_part(value))
            for name, value in self.model.state_dict().items()
            if value.is_floating_point()
        ]
        if not named:
            return
        finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
        wrong = None if all(finite) else named[finite.index(False)][0]
        found = [name for name in ranks.gather(wrong) if name is not None]
        if found:
            raise TrainingError(
                f"{found[0]} is not finite after step {step} of epoch "
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
        return {"lr": self.warmup.rate}

    def measure(self, trained: Pass, evaluate: Any, sets: Mapping[str, Any]) -> Measured:
        """Evaluate and word an epoch; say what helps if the first one's loss was very large."""
        measured = super().measure(trained, evaluate, sets)
        blind, loss = self.task.blind_loss(self.num_classes), trained.metrics.get("loss")
        if trained.epoch == 1 and blind is not None and loss is not None and loss > 2 * blind:
            rate = self.optimizer.param_groups[0]["lr"]
            warmer = "" if self.warmup.steps else "--warmup_epochs 1, or "
            measured.lines.append(
                f"note: guessing among {self.num_classes} classes has a loss of {blind:.2f}, and "
                f"the first epoch had {loss:.2f}: its steps were too large. What helps: {warmer}a "
                f"smaller --lr, say {rate / 10:g}."
            )
        return measured

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule, loss scaling and warm-up.

        Where an average is evaluated and saved, the weights that are trained stand here too.
        """
        state: dict[str, Any] = {"steps": self.warmup.done}
        if self.average is not None:
            state["averaged"] = int(self.average.n_averaged)
            state["weights"] = self.model.state_dict()
        return state | {
            "optimizer": ranks.whole(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else _plain(self.scheduler.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            CheckpointError: If an entry is of another form.
        """
        stored = self._own_parts(state["optimizer"])
        load_optimizer(self.optimizer, stored, self._build_optimizer)
        if self.scheduler is not None:
            own = self.scheduler.state_dict()
            stored = {**_plain(own), **state["scheduler"]}
            stored = {name: stored[name] for name in _plain(own)}
            check_form(stored, _plain(own), "scheduler")
            self.scheduler.load_state_dict({**own, **stored})
        if self.scaler.is_enabled() and state["scaler"]:
            check_form(state["scaler"], self.scaler.state_dict(), "scaler")
            self.scaler.load_state_dict(state["scaler"])
        steps = state.get("steps", 0)
        check_form(steps, 0, "trainer['steps']")
        self.warmup.done = steps
        if self.average is not None:
            check_form(state["averaged"], 0, "trainer['averaged']")
            check_form(state["weights"], dict(self.model.state_dict()), "trainer['weights']")
            self.average.n_averaged.fill_(state["averaged"])
            self.model.load_state_dict(state["weights"])

    def _own_parts(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an optimizer's state with this process's parts of what is in parts."""
        if not ranks.in_parts(self.model):
            return state
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = {
            number: {
                name: ranks.part_like(v, parameters[number]) if isinstance(v, Tensor) else v
                for name, v in values.items()
            }
            for number, values in state["state"].items()
        }
        return {**state, "state": own}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    build: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    """Load the state of an optimizer, and refuse one that it could not go on with.

    Args:
        optimizer: The optimizer, as it was built.
        state: What its ``state_dict`` returned.
        build: Builds one like it, see :func:`check_optimizer_state`.

    Raises:
        CheckpointError: If an entry is of another form.
    """
    groups = optimizer.state_dict()["param_groups"]
    check_form(
        [group["params"] for group in state["param_groups"]],
        [group["params"] for group in groups],
        "optimizer['param_groups']",
    )
    optimizer.load_state_dict(state)
    for number, group in enumerate(groups):
        optimizer.param_groups[number]["fused"] = group["fused"]  # as it suits this run
        found = optimizer.state_dict()["param_groups"][number]
        known = {name: found.get(name) for name in group}  # PyTorch's versions add some
        check_form(known, group, f"optimizer['param_groups'][{number}]")
    check_optimizer_state(optimizer, build)


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, build: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """Refuse what an optimizer was given to remember if it could not go on with it.

    Args:
        optimizer: The optimizer, its state loaded.
        build: Builds one like it: what that remembers after a step is what is expected.

    Raises:
        CheckpointError: If an entry is missing, unknown or of another form.
    """
    sample = nn.Linear(3, 1, bias=False)
    sample.weight.grad = torch.zeros_like(sample.weight)
    probe = build(sample)
    probe.step()
    expected = probe.state[sample.weight]
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            raise CheckpointError("its optimizer remembers a parameter that is not there.")
        like = {
            name: torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            if isinstance(value, Tensor) and value.shape == sample.weight.shape
            else value
            for name, value in expected.items()
        }
        check_form(state, like, "state of the optimizer")


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a scheduler's state what loads with ``weights_only=True``."""
    kinds = (bool, int, float, str, list, type(None))
    return {k: v for k, v in state.items() if isinstance(v, kinds) and k != "lr_lambdas"}
