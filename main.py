"""Train, evaluate and compare nearest-neighbor neural networks: ``python main.py --flags``.

Options are declared beside what they configure (`options.py`); here they become flags, are checked,
and are handed back as keyword arguments. ``main(argv) -> dict`` may be imported.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from builders import (
    Choice,
    all_options,
    build_model,
    build_task,
    build_trainer,
    chosen,
    describe,
    load_data,
    rehearse_run,
    without_rows,
)
from dataset import DataError, build_loader, inspect_data
from layers import LAYER_KINDS
from models import MODELS, PRESETS, model_class
from ops.cpu import build as native
from options import HelpFormatter, OptionError, add_flag, check_stored, flagged, read_texts
from tasks import DATASETS, TASKS, Task
from tasks.features import check_features
from train_eval import Evaluation, Run, dry_run, test, train
from trainers import TrainingError
from utils import (
    RunFolder,
    distributed,
    format_args,
    load_checkpoint,
    load_pretrained,
    load_weights,
    parse_args_text,
    read_text_file,
    read_weights,
    seed_everything,
    world_size,
)

__all__ = ["build_parser", "main"]

# ---------------------------------------------------------------------------------------------
# From the command line to arguments


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every flag, in groups."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train, evaluate and compare nearest-neighbor neural networks.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for title, each in all_options().values():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], each)
    return parser


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Return the names of the flags that stand on the command line."""
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {k for k, v in vars(parser.parse_args(argv, blank)).items() if v is not absent}


def default_output_dir(values: Mapping[str, Any]) -> str:
    """Return ./Output/<family>/<layer>, or <dataset> for models that take no layer."""
    model_type = model_class(values["model"])
    last = values["layer"] if model_type.uses_layer else values["dataset"]
    return f"./Output/{model_type.family}/{last}"


def next_free(path: str) -> str:
    """Return ``path``, or the first of ``path_2``, ``path_3``, … that holds no run."""
    candidate, number = path, 2
    while RunFolder(candidate).holds_run():
        candidate, number = f"{path}_{number}", number + 1
    return candidate


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[dict[str, Any], set[str], dict[str, Any] | None]:
    """Parse flags, then fill in what was not given.

    The order is: the command line, then the checkpoint of --resume or --test_only, or the --config
    file, then the defaults of what is chosen, then the parser's.

    Returns:
        The arguments, the names of those the user gave, and the checkpoint, if one is used.
    """
    values = vars(parser.parse_args(argv))
    given = given_flags(parser, argv)
    if values["resume"] and values["test_only"]:
        parser.error("--resume trains on and --test_only does not train: give one of them.")
    if values["checkpoint"] and not (values["resume"] or values["test_only"]):
        parser.error("--checkpoint is read by --test_only and --resume: give one of them too.")
    former = read_former(parser, values["config"])
    preset: dict[str, Any] = {}
    if values["preset"]:
        model, preset = PRESETS[values["preset"]]
        if "model" in given and values["model"] != model:
            parser.error(
                f"--preset {values['preset']} is a {model}, not a {values['model']}: leave one out."
            )
        preset = {**preset, "model": model}
    for name in ("model", "dataset", "task", "layer"):
        for source in (getattr(model_class(values["model"]), "defaults", {}), former, preset):
            if name not in given and name in source:
                values[name] = source[name]
    if "task" not in given and values["task"] not in DATASETS[values["dataset"]].tasks:
        values["task"] = None
    values["task"] = chosen(values).task
    for source in (chosen(values).defaults(), former, preset):
        values |= {n: v for n, v in source.items() if n not in given and n != "task"}
    given |= set(preset)
    if values["pretrained"] and not values["resume"]:
        adopt_pretrained(parser, values, given)

    base = values["output_dir"]
    if "output_dir" not in given | set(former):
        base = default_output_dir(values)
    checkpoint = None
    if values["resume"] or (values["test_only"] and "pretrained" not in given):
        values["output_dir"] = base
        checkpoint = read_checkpoint(parser, values, given)
    elif "output_dir" not in given:
        values["output_dir"] = base if values["overwrite"] else next_free(base)
    else:
        values["output_dir"] = base
        of_run = ("overwrite", "dry_run", "test_only", "check_data")
        writes = not any(values[name] for name in of_run)
        if writes and RunFolder(base).holds_run():
            parser.error(
                f"--output_dir {base} already holds a run. Add --resume to go on with it, "
                "--test_only to evaluate it, --overwrite to replace it, or name another folder."
            )
    return values, given, checkpoint


def read_former(parser: argparse.ArgumentParser, path: str | None) -> dict[str, Any]:
    """Read the arguments of a former run from --config."""
    if path is None:
        return {}
    try:
        text = read_text_file(path)
    except ValueError as error:
        parser.error(f"--config {error}")
    known = {name: each for name, (_, each) in all_options().items()}
    try:
        return read_texts(known, parse_args_text(text), path)
    except ValueError as error:
        parser.error(str(error))


def differing_flags(
    names: Iterable[str], stored: Mapping[str, Any], values: Mapping[str, Any]
) -> str:
    """Say which of these flags a stored run has otherwise; empty if none."""
    return "; ".join(
        f"--{name} is {stored[name]} there and {values[name]} here"
        for name in sorted(names)
        if name in stored and stored[name] != values[name]
    )


def stored_choice(stored: Mapping[str, Any], values: Mapping[str, Any]) -> Choice | None:
    """Return the rows that a stored run chose; None if one is not there any more."""
    tables = {"model": MODELS, "dataset": DATASETS}
    merged = {name: stored.get(name, values[name]) for name in ("layer", *tables)}
    if any(merged[name] not in table for name, table in tables.items()):
        return None
    choice = chosen({**merged, "task": stored.get("task")})
    fits = not choice.model_type.uses_layer or choice.layer in choice.layers
    return choice if fits and choice.task in TASKS else None


def read_checkpoint(
    parser: argparse.ArgumentParser, values: dict[str, Any], given: set[str]
) -> dict[str, Any]:
    """Load the checkpoint of --resume or --test_only and take its arguments over."""
    name = RunFolder.LAST if values["resume"] else RunFolder.BEST
    path = values["checkpoint"] or str(Path(values["output_dir"], name))
    flag = "--resume" if values["resume"] else "--test_only"
    if not Path(path).is_file():
        parser.error(
            f"{flag} needs a checkpoint, and there is none at {path}. Train first, or name the "
            "run folder by --output_dir, or the file by --checkpoint."
        )
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as error:
        parser.error(f"{flag}: {error}")
    stored = checkpoint["args"]
    known = {name: each for name, (_, each) in all_options().items()}
    try:
        check_stored(without_rows(known), stored, path)
    except ValueError as error:
        parser.error(f"{flag}: {error}")
    of_run = {name for name, each in known.items() if each.of_run}
    choice = stored_choice(stored, values)
    if choice is None:
        rows = (stored.get(name) for name in ("model", "layer", "dataset", "task"))
        parser.error(
            f"{flag}: {path} was made with {', '.join(str(row) for row in rows if row)}, one of "
            "which this version does not have. Choose another checkpoint."
        )
    if values["resume"]:
        resumable = {name for name, each in known.items() if each.resumable}
        fixed = set(stored) - resumable - of_run
    else:
        fixed = choice.fixed_options()
    if differing := differing_flags(fixed & given, stored, values):
        parser.error(
            f"{flag}: {path} was made by another "
            f"{'run' if values['resume'] else 'architecture'}: {differing}. Leave these "
            "flags out (they are taken from the checkpoint), or choose another checkpoint."
        )
    for name, value in stored.items():
        if name in known and name not in given | of_run | {"output_dir", "device"}:
            values[name] = value
    if "task" not in given and "task" not in stored:
        values["task"] = None
    values["task"] = chosen(values).task
    return checkpoint


def adopt_pretrained(
    parser: argparse.ArgumentParser, values: dict[str, Any], given: set[str]
) -> None:
    """Take the architecture from --pretrained, where that file holds the arguments of a run."""
    path = values["pretrained"]
    try:
        _, stored = read_weights(path)
        known = {name: each for name, (_, each) in all_options().items()}
        check_stored(without_rows(known), stored, path)
    except ValueError as error:
        parser.error(f"--pretrained: {error}")
    choice = stored_choice(stored, values)
    if not stored or choice is None:
        return
    fixed = choice.fixed_options() & set(stored)
    if differing := differing_flags(fixed & given, stored, values):
        parser.error(f"--pretrained {path} was made with other options: {differing}.")
    values |= {name: stored[name] for name in fixed}


def resolve_device(parser: argparse.ArgumentParser, wanted: str, asked: bool) -> str:
    """Choose the device, or refuse one that was asked for and is not there."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if wanted == "auto":
        return there[0]
    if wanted in there:
        return wanted
    if asked:
        parser.error(f"--device {wanted}: there is none here. There is: {', '.join(there)}.")
    print(f"No {wanted} device here: using the {there[0]}.")
    return there[0]


# ---------------------------------------------------------------------------------------------
# Checks: what cannot work is refused before any work is done


def check_arguments(values: Mapping[str, Any], given: set[str], choice: Choice) -> None:
    """Refuse combinations that cannot work; note flags that have no effect.

    Raises:
        ValueError: What is wrong, why, and what to try.
    """
    check_rows(choice)
    check_values(values, choice)
    for owner in choice.owners:
        owner.check(values)
    trainer = choice.trainer_type
    trainer.check(values, choice.task)
    if values["resume"] and not trainer.resumes:
        raise ValueError(
            f"--resume: --model {choice.model} stores the training set in one go, there is nothing "
            "to go on with. --test_only evaluates the run; --overwrite does it anew."
        )
    if world_size() > 1 and not trainer.shares:
        raise ValueError(
            f"torchrun started {world_size()} processes, and --model {choice.model} learns in one: "
            "each of them would do the whole run. Start it by python main.py."
        )
    if trainer.features is not None:
        spec = values[trainer.features]
        if spec != "raw" and not choice.task_type.features:
            raise ValueError(
                f"--{trainer.features} {spec} is for classification: --dataset {choice.dataset} "
                "is learnt as it is."
            )
        check_features(f"--{trainer.features}", spec)
    rehearse_run(values, choice)
    if idle := sorted(given - choice.read_options()):
        print(f"note: no effect with {choice}: {', '.join(f'--{name}' for name in idle)}.")
    folder = Path(values["output_dir"])
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written: {existing} is in the way.")


def check_rows(choice: Choice) -> None:
    """Refuse a model that cannot do the task, or a task that the data set does not serve."""
    tasks, served = choice.model_type.tasks, choice.entry.tasks
    if choice.task not in served:
        raise ValueError(
            f"--task {choice.task} cannot be learnt from --dataset {choice.dataset}, which serves "
            f"{', '.join(served)}."
        )
    if choice.model_type.uses_layer and choice.layer not in choice.layers:
        able = [name for name in MODELS if takes_layer(model_class(name), choice.layer)]
        raise ValueError(
            f"--layer {choice.layer} does not fit --model {choice.model}, which takes "
            f"{', '.join(choice.layers)}. Models for {choice.layer}: {', '.join(able)}."
        )
    if choice.task not in tasks:
        fits = [name for name, row in DATASETS.items() if set(row.tasks) & set(tasks)]
        able = [name for name in MODELS if choice.task in model_class(name).tasks]
        raise ValueError(
            f"--model {choice.model} cannot do {choice.task}, the task of --dataset "
            f"{choice.dataset}. Datasets for {choice.model}: {', '.join(fits)}. "
            f"Models for {choice.dataset}: {', '.join(able) or 'none'}."
        )


def takes_layer(model_type: type[torch.nn.Module], layer: str) -> bool:
    """Say whether a layer fits a model."""
    return model_type.uses_layer and layer in LAYER_KINDS[getattr(model_type, "layer_kind", "maps")]


def check_values(values: Mapping[str, Any], choice: Choice) -> None:
    """Refuse values that their owners do not take."""
    layer = choice.layer_options
    for owner in choice.owners:
        for each in owner.declared():
            if isinstance(values[each.name], list) and each.several is None:
                raise ValueError(
                    f"--{each.name} takes one number for --model {choice.model} "
                    f"(got {values[each.name]})."
                )
        try:
            owner(**{name: values[name] for name in owner.names()})
        except OptionError:
            raise
        except ValueError as error:
            where = f"--layer {choice.layer}" if owner is layer else f"--model {choice.model}"
            raise ValueError(f"{where}: {error}") from error
    smallest, resize = choice.model_type.min_input_size, values["resize"]
    if resize is not None and resize < smallest:
        raise ValueError(
            f"--resize {resize} is too small for {choice.model}, which would shrink it to "
            f"nothing: it needs at least {smallest}."
        )


# ---------------------------------------------------------------------------------------------
# The run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line.

    Args:
        argv: Flags; None takes those of the process.

    Returns:
        The run's results: ``output_dir``, and the metrics of what was done.

    Raises:
        SystemExit: With code 2 for bad input, 1 for a failed and 130 for an interrupted run.
    """
    parser = build_parser()
    values, given, checkpoint = parse_arguments(parser, argv)
    values["device"] = resolve_device(parser, values["device"], "device" in given)
    choice = chosen(values)
    try:
        check_arguments(values, given, choice)
    except ValueError as error:
        parser.error(flagged(error, all_options()))
    seed_everything(values["seed"])
    with distributed(wanted=choice.trainer_type.shares) as leader:
        folder = RunFolder(values["output_dir"], writes=leader)
        command = shlex.join(["python", "main.py", *(sys.argv[1:] if argv is None else argv)])
        try:
            return run_choice(parser, values, choice, checkpoint, folder, command)
        except (TrainingError, DataError) as error:
            print(f"error: {error}{resume_hint(folder)}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            print(f"\nInterrupted.{resume_hint(folder)}", file=sys.stderr)
            raise SystemExit(130) from error


def run_choice(
    parser: argparse.ArgumentParser,
    values: dict[str, Any],
    choice: Choice,
    checkpoint: dict[str, Any] | None,
    folder: RunFolder,
    command: str,
) -> dict[str, Any]:
    """Load, build, and train, test, try or treat a file."""
    device, task = torch.device(values["device"]), build_task(values, choice)
    trainer_type = choice.trainer_type
    try:
        weights = None
        if values["pretrained"] and checkpoint is None:
            weights, _ = read_weights(values["pretrained"])
        if values.get("input") and choice.task_type.treats_files:
            return treat_file(values, choice, task, device, checkpoint, weights)
        data = load_data(values, choice, task, device)
        if values["check_data"]:
            counts, lines = inspect_data(data, values["num_workers"])
            print(*data.notes, *lines, sep="\n")
            return {"output_dir": None, "counts": counts}
        if choice.entry.shape is None:
            rehearse_run(values, choice, data)
        model = build_model(values, choice, task.sizes(data)).to(device)
        model_text = describe(model, trainer_type, data, device)
        if checkpoint is not None:
            load_weights(model, checkpoint)
        if weights is not None:
            load_pretrained(model, weights)
        trainer = None
        if not values["test_only"]:
            trainer = build_trainer(values, choice, model, task, data, device)
    except ValueError as error:  # DataError, and what layers and models refuse
        parser.error(flagged(error, all_options()))
    for note in data.notes:
        print(note)
    trainer_type.prepare(model, values)

    loader = partial(
        build_loader,
        batch_size=trainer_type.batch(values["batch_size"]),
        seed=values["seed"],
        num_workers=values["num_workers"],
        pin_memory=device.type == "cuda",
    )
    amp = trainer_type.Options.keywords(values).get("use_amp", False)
    evaluation = Evaluation(model, task, device, loader, amp=amp, with_loss=trainer_type.has_loss)
    run = Run(
        folder,
        data,
        task,
        evaluation,
        values,
        args_text=describe_run(command) + format_args(values),
        model_text=model_text,
    )
    if trainer is None:
        try:
            return test(run, source_of(values, checkpoint, folder))
        except ValueError as error:  # samples of another size, or none to compare with
            parser.error(flagged(f"--model {choice.model}: {error}", all_options()))
    if values["dry_run"]:
        return dry_run(trainer, run, loader, batch_size=values["batch_size"])
    return train(
        trainer,
        run,
        loader,
        checkpoint,
        batch_size=values["batch_size"],
        num_epochs=values["num_epochs"],
        seed=values["seed"],
    )


def treat_file(
    values: Mapping[str, Any],
    choice: Choice,
    task: Task,
    device: torch.device,
    checkpoint: Mapping[str, Any] | None,
    weights: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """Treat --input into --output."""
    sizes = task.known_sizes(task.known_shape, None)
    model = build_model(values, choice, sizes).to(device).eval()
    load_pretrained(model, checkpoint["model"] if weights is None else weights)
    print(task.apply(model, values["input"], values["output"], device))
    return {"output_dir": None, "output": values["output"]}


def describe_run(command: str) -> str:
    """Return the comment lines above the arguments in args.txt."""
    lines = command.encode("utf-8", "backslashreplace").decode().splitlines()
    return (
        "".join(f"# {line}\n" for line in lines)  # a text on it may hold line breaks
        + f"# torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"neighbor kernels {native.status().splitlines()[0]}\n"
    )


def source_of(
    values: Mapping[str, Any], checkpoint: Mapping[str, Any] | None, folder: RunFolder
) -> str:
    """Say where the weights of a test come from."""
    if checkpoint is None:
        return str(values["pretrained"])
    epoch = checkpoint.get("progress", {}).get("epoch", "?")
    return f"{values['checkpoint'] or folder.path / folder.BEST} (epoch {epoch})"


def resume_hint(folder: RunFolder) -> str:
    """Say what is saved and how to go on."""
    if not (folder.path / folder.LAST).exists():
        return " Nothing was saved yet."
    return (
        f" The last finished epoch is in {folder.path / folder.LAST}; go on with: "
        f"python main.py --resume --output_dir {shlex.quote(str(folder.path))}"
    )


if __name__ == "__main__":
    main()
