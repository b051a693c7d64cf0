"""Learning by growth: a network adds the samples that it still gets wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ranks
from checkpoints import check_form, check_rows, load_checkpoint, save_checkpoint
from options import option
from run_folder import RunFolder, TrainingError
from trainers.trainer import Trainer, TrainingOptions
from trainers.votes import VoteLearner
from utils import CsvLog, plot_growth

__all__ = ["GrowthOptions", "GrowthTrainer"]


@dataclass(frozen=True)
class GrowthOptions(TrainingOptions):
    """How a network grows."""

    title = "Training by growth (--model dynamic)"
    dynamic_features: str = option(
        "raw",
        "what is compared (classification): pixels, their N principal components, what a small "
        "network sees that learns before growth begins, or what the last layer of a network "
        "trained here sees (its best.pt)",
        metavar="raw|pca:N|learned|FILE",
    )
    learned_epochs: int = option(
        5, "learned features: passes before growth begins", least=1, most=10**6
    )
    learned_batch: int = option(
        256, "learned features: samples that vote on each other", least=2, most=65536
    )
    learned_lr: float = option(
        3e-3,
        "learned features: learning rate of AdamW, falling to 0 by a cosine",
        above=0,
        most=1e6,
    )
    learned_temperature: float = option(
        0.1,
        "learned features: half the squared distance at which a vote weighs 1/e",
        above=0,
        most=1e6,
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
    a batch grown, ``num_centers``, ``prune(inputs, targets)``, and a ``transform`` that learns
    features before anything grows. When memory is full, the model raises MemoryError: what was
    learnt is then kept, evaluated and saved, and the run ends.

    Under torchrun every process holds all centers and is given all samples; they share the
    comparison of samples with the centers there are, row by row (`ranks.Crew`), and evaluation.

    Args:
        model: The growing model.
        task: What a batch means.
        device: Where it runs.
        balanced_first_batch: The first batch holds all classes equally often.
        prune: Drop centers that no training prediction needs when the run ends.
        eval_train: Measure training metrics after each pass, not while growing.
        learned_epochs: Passes in which a `transform` of the model learns, see `VoteLearner`.
        learned_batch: Samples that vote on each other.
        learned_lr: Learning rate.
        learned_temperature: Temperature of the votes.
    """

    name = "growth"
    Options = GrowthOptions
    features = "dynamic_features"
    learns_features = True

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        device: torch.device,
        balanced_first_batch: bool = False,
        prune: bool = False,
        eval_train: bool = True,
        learned_epochs: int = 5,
        learned_batch: int = 256,
        learned_lr: float = 3e-3,
        learned_temperature: float = 0.1,
    ) -> None:
        super().__init__(model, task, device=device)
        self.balanced_first_batch, self.prune = balanced_first_batch, prune
        self.eval_train = eval_train
        self.learned_batch = learned_batch
        self.learner: VoteLearner | None = None
        if getattr(model, "transform", None) is not None:
            self.learner = VoteLearner(
                model.transform,
                task,
                device=device,
                epochs=learned_epochs,
                lr=learned_lr,
                temperature=learned_temperature,
            )
        self.full: str | None = None  # why nothing can be added any more
        if ranks.initialised():
            for module in model.modules():
                if hasattr(module, "crew"):
                    module.crew = ranks.Crew()

    @classmethod
    def check(cls, values: Mapping[str, Any], task_name: str) -> None:
        """Refuse growing networks that cannot work."""
        if values["max_neighbors"] < values["batch_size"]:
            raise ValueError(
                f"--max_neighbors {values['max_neighbors']} is less than the first batch, all of "
                f"which becomes centers (--batch_size {values['batch_size']}). Raise the one or "
                "lower the other."
            )
        if values["prune"] and values["save"] not in ("last", "both"):
            raise ValueError(
                f"--prune writes pruned.pt beside last.pt, and --save {values['save']} keeps no "
                "last.pt. Use --save last."
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

    def begin(self, load: Callable[..., Any], keep: Callable[[str], None]) -> None:
        """Learn the features that the network then grows on, as far as that is not done."""
        if self.learner is not None and not self.learner.finished:
            self.learner.learn(load(batch_size=self.learned_batch, shuffle=True), keep)

    @property
    def evaluates_training(self) -> bool:
        """Whether training metrics are measured after a pass."""
        return self.eval_train

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Grow by a batch; return per-sample metrics (B,) afterwards."""
        inputs, targets = self.task.prepare(batch, self.device)
        with torch.no_grad():
            outputs = None
            if self.full is None:
                try:
                    outputs = self.model.grow(inputs, targets)
                except MemoryError as error:
                    self.full = str(error)
                self._agree()
            return self.task.metrics(self.model(inputs) if outputs is None else outputs, targets)

    def _agree(self) -> None:
        """Raise TrainingError if memory is full in some processes only: their centers differ."""
        reasons = ranks.gather(self.full)
        if None in reasons and any(reasons):
            full = ", ".join(str(number) for number, why in enumerate(reasons) if why)
            raise TrainingError(
                f"memory for centers is full in process {full} of {len(reasons)} and not in the "
                "others. Start fewer processes, or lower --max_neighbors."
            )

    def end_batches(self) -> None:
        """Raise TrainingError if processes have grown differently: their arithmetic differs."""
        layers = getattr(self.model, "layers", [])
        found = ranks.gather(
            [(each.num_centers, each.centers.double().sum().item()) for each in layers]
        )
        if any(other != found[0] for other in found):
            counts = ", ".join(str(sum(count for count, _ in each)) for each in found)
            raise TrainingError(
                f"the processes have grown different centers (in all {counts}): their machines do "
                "not compute alike. Start processes on machines of one kind only."
            )

    @property
    def sated(self) -> bool:
        """Whether the rest of a pass could add nothing, and need not be gone through."""
        return self.full is not None or bool(getattr(self.model, "full", False))

    def end_epoch(self, headline: float) -> bool:
        """Return True when the model says that there is no more to learn."""
        finished = self.model.end_pass() if hasattr(self.model, "end_pass") else False
        return finished or self.full is not None

    def finished_line(self, epoch: int) -> str:
        """Say why growing ends: nothing is wrong any more, or there is no room."""
        if not self.sated:
            return super().finished_line(epoch)
        room = ": there is no room for further centers (--max_neighbors allows more)"
        # What else has stopped it, report() has said.
        return f"Growing stopped after epoch {epoch}{room if self.full is None else ''}."

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
        state = {"growth": list(getattr(self.model, "growth", [])), "full": self.full}
        if self.learner is not None and not self.learner.finished:
            state["learner"] = self.learner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.full = state.get("full")
        if self.learner is not None and not self.learner.finished:
            self.learner.load_state_dict(state["learner"])
        if self.full is not None:
            check_form(self.full, "", "trainer['full']")
        if hasattr(self.model, "growth"):
            columns = ("layer", "samples", "centers", "seen", "learnt")
            check_rows(state["growth"], "trainer['growth']", columns)
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
