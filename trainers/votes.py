"""Learning a transform by gradient, before a network grows on its features."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoints import CheckpointError, check_form
from run_folder import TrainingError
from trainers.gradient import build_optimizer, load_optimizer

__all__ = ["VoteLearner"]


class VoteLearner:
    """Train a transform so that the samples of a batch vote right on each other.

    AdamW; its rate falls to 0 by a cosine. What is left of an epoch's last batch is left out, as
    fewer samples make another vote.

    Args:
        transform: Offers ``vote_loss(inputs, labels, temperature) -> scalar`` and a buffer
            ``finished``, which is set at the end.
        task: Its ``prepare`` moves a batch to the device.
        device: Where it runs.
        epochs: Passes over the training set.
        lr: Learning rate.
        temperature: See `vote_loss`.
    """

    def __init__(
        self,
        transform: nn.Module,
        task: Any,
        *,
        device: torch.device,
        epochs: int,
        lr: float,
        temperature: float,
    ) -> None:
        self.transform, self.task, self.device = transform, task, device
        self.epochs, self.lr, self.temperature = epochs, lr, temperature
        self.epoch = 0
        self.optimizer = self._build_optimizer(transform)

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(module, "adamw", lr=self.lr, weight_decay=1e-4, momentum=0)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to learn."""
        return bool(self.transform.finished)

    def learn(self, loader: DataLoader, keep: Callable[[str], None]) -> None:
        """Learn until all epochs are done.

        Args:
            loader: Shuffled batches.
            keep: Told a line after each epoch, whose state it may save.

        Raises:
            TrainingError: If the loss is not finite.
        """
        while not self.finished:
            start = time.perf_counter()
            loss = self._epoch(loader)
            self.epoch += 1
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of the learned features is {loss} in pass {self.epoch}. Lower "
                    "--learned_lr, or raise --learned_temperature."
                )
            self.transform.finished.fill_(self.epoch >= self.epochs)
            keep(
                f"[Features {self.epoch:03d}] {time.perf_counter() - start:.2f}s | "
                f"right votes: {100 * math.exp(-loss):.2f}% (geometric mean)"
            )

    def _epoch(self, loader: DataLoader) -> float:
        loader.sampler.set_epoch(self.epoch + 1)
        loader.generator.manual_seed(loader.sampler.seed + self.epoch + 1)
        self.transform.train()
        losses = []
        steps, whole = len(loader), loader.batch_size
        for step, batch in enumerate(loader):
            if step and len(batch[1]) < whole:
                break
            part = (self.epoch + step / steps) / self.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * part))
            inputs, labels = self.task.prepare(batch, self.device)
            self.optimizer.zero_grad()
            loss = self.transform.vote_loss(inputs, labels, self.temperature)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        self.transform.eval()
        return torch.stack(losses).mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Return where learning stands; the weights are the model's."""
        return {"epoch": self.epoch, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            CheckpointError: If an entry is of another form.
        """
        check_form(state["epoch"], 0, "trainer['learner']['epoch']")
        if not 0 <= state["epoch"] < self.epochs:
            raise CheckpointError(
                f"its features are not learnt and it has gone through {state['epoch']} of "
                f"{self.epochs} passes."
            )
        load_optimizer(self.optimizer, state["optimizer"], self._build_optimizer)
        self.epoch = state["epoch"]
