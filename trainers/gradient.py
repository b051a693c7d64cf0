"""Learning by gradient: optimizers, schedules, mixed precision, compiled networks."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ranks
from checkpoints import CheckpointError, check_form
from options import option
from ranks import world_size
from run_folder import TrainingError
from trainers.trainer import Trainer, TrainingOptions
from utils import autocast

__all__ = [
    "GradientOptions",
    "GradientTrainer",
    "build_optimizer",
    "build_scheduler",
    "compile_model",
]


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
        """Take back what :meth:`state_dict` returned.

        Raises:
            CheckpointError: If an entry is of another form.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        check_form(
            [group["params"] for group in state["optimizer"]["param_groups"]],
            [group["params"] for group in groups],
            "optimizer['param_groups']",
        )
        self.optimizer.load_state_dict(state["optimizer"])
        for number, group in enumerate(groups):
            found = self.optimizer.state_dict()["param_groups"][number]
            known = {name: found.get(name) for name in group}  # PyTorch's versions add some
            check_form(known, group, f"optimizer['param_groups'][{number}]")
        check_optimizer_state(self.optimizer, self._build_optimizer)
        if self.scheduler is not None:
            own = self.scheduler.state_dict()
            stored = {**_plain(own), **state["scheduler"]}
            stored = {name: stored[name] for name in _plain(own)}
            check_form(stored, _plain(own), "scheduler")
            self.scheduler.load_state_dict({**own, **stored})
        if self.scaler.is_enabled() and state["scaler"]:
            check_form(state["scaler"], self.scaler.state_dict(), "scaler")
            self.scaler.load_state_dict(state["scaler"])


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
