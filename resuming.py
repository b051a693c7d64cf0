"""What a run needs to go on: its state, and putting it back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ranks
from checkpoints import (
    CheckpointError,
    check_form,
    checkpoint_digest,
    without_training,
)
from evaluation import Averages
from run_folder import Progress
from utils import get_random_state, set_random_state

__all__ = ["own_place", "restore", "settle", "state_of"]


def own_random_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the generators' state of this process, out of those that a checkpoint holds."""
    several = state.get("random_states", [])
    if len(several) == ranks.world_size() > 1:
        return several[ranks.rank()]
    return state["random_state"]


# What PyTorch and Python raise on entries of a form that they do not expect.
WRONG_FORM = (TypeError, ValueError, AttributeError, RuntimeError, LookupError, ArithmeticError)


def check_random_state(state: Any) -> None:
    """Refuse a state of the generators that they cannot take.

    Raises:
        CheckpointError: If an entry is of another form.
    """
    own = get_random_state()
    for name in ("python", "numpy", "torch"):
        like = own[name]
        if name == "python" and state[name][2] is not None:  # half of a pair of normal numbers
            like = [*like[:2], 0.0]
        check_form(state[name], like, f"random_state['{name}']")
    cards = [torch.empty(len(one), dtype=torch.uint8) for one in state["cuda"]]
    check_form(state["cuda"], cards, "random_state['cuda']")
    if not 0 <= state["numpy"][2] <= len(state["numpy"][1]):  # NumPy itself would read beyond
        raise CheckpointError("its random_state['numpy'] is at a place that is not there.")


def check_place(place: Any, epoch: int) -> None:
    """Refuse a place in an epoch that a run cannot be at.

    Args:
        place: What `train_eval.train_one_epoch` keeps, and the seconds it took.
        epoch: Epochs done.

    Raises:
        CheckpointError: If an entry is of another form.
    """
    like = {"epoch": 0, "step": 0, "done": False, "sums": {}, "count": 0, "seconds": 0.0}
    sums = place["sums"]
    like["sums"] = dict.fromkeys(sums, torch.zeros((), dtype=torch.float64))
    check_form(place, like, "place")
    if place["epoch"] != epoch + 1 or place["step"] < 0 or place["count"] < 0:
        raise CheckpointError(
            f"its place, step {place['step']} of epoch {place['epoch']}, does not follow epoch "
            f"{epoch}."
        )


def restore(trainer: Any, checkpoint: Mapping[str, Any]) -> Progress:
    """Put model, trainer and generators where a checkpoint left them.

    Raises:
        CheckpointError: If entries are missing or of another form.
    """
    try:
        trainer.load_model(checkpoint)
        trainer.load_state_dict(checkpoint["trainer"])
        for state in (checkpoint["random_state"], *checkpoint.get("random_states", [])):
            check_random_state(state)
        set_random_state(own_random_state(checkpoint))
        progress = Progress.from_state(checkpoint["progress"])
        places = [checkpoint["place"]] if "place" in checkpoint else []
        for place in [*places, *checkpoint.get("places", [])]:
            check_place(place, progress.epoch)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint cannot be gone on with: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint cannot be gone on with: it lacks {error}. A file of weights alone "
            "can be begun with by --pretrained."
        ) from error
    except WRONG_FORM as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint cannot be gone on with: an entry has another form than this program "
            f"writes ({reason})."
        ) from error
    if progress.best_epoch == progress.epoch and not places:
        progress.best_digest = checkpoint_digest(without_training(checkpoint))
    return progress


def own_place(checkpoint: Mapping[str, Any], *, splits: bool) -> dict[str, Any]:
    """Return this process's place in the epoch, out of those that a checkpoint holds.

    If it was saved by another number of processes, the first one takes over all their averages.

    Args:
        checkpoint: What was saved amid an epoch.
        splits: Whether every process sees a part of each batch; if not, all are in one place.
    """
    if not splits:
        return dict(checkpoint["place"])
    places = checkpoint.get("places", [checkpoint["place"]])
    if len(places) == ranks.world_size():
        return places[ranks.rank()]
    whole = Averages()
    for place in places if ranks.rank() == 0 else []:
        whole.include(place)
    return {**checkpoint["place"], **whole.state()}


def state_of(trainer: Any, run: Any, progress: Progress, **more: Any) -> dict[str, Any]:
    """Return what a run can be gone on with from."""
    random_state = get_random_state()
    state = {
        "model": trainer.model_state(),
        "trainer": trainer.state_dict(),
        "progress": vars(progress),
        "random_state": random_state,
        "args": dict(run.arguments),
        **more,
    }
    if ranks.initialised():
        state["random_states"] = ranks.gather(random_state)
    return state


def settle(trainer: Any, run: Any, source: Path, checkpoint: Mapping[str, Any], progress: Any):
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
            column = f"{judge}_{task.headline}"
            if not progress.history or column not in progress.history[-1]:
                raise CheckpointError(f"the checkpoint cannot be gone on with: it lacks {column}.")
            progress.best_value = progress.history[-1][column]
            progress.best_digest = checkpoint_digest(without_training(checkpoint))
            if run.folder.writes:
                run.folder.settle(run.folder.path / run.folder.LAST, progress, at_end=True)
        line = (
            f"The weights of the best epoch, {lost}, are lost ({line}): the best one is chosen "
            f"from epoch {progress.epoch + (not at_end)} on."
        )
        progress.lines.append(line)
    if line is not None and run.folder.writes:
        print(line)
