"""From the command line to checked arguments: parsing, help texts, former runs, refusals.

What cannot work is refused here, before any work is done.
"""

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from builders import (
    Choice,
    all_options,
    chosen,
    rehearse_run,
    without_rows,
)
from checkpoints import CheckpointError, load_checkpoint, read_weights
from layers import LAYER_KINDS
from models import MODELS, PRESETS, model_class
from options import (
    FlagParser,
    HelpFormatter,
    Option,
    OptionError,
    add_flag,
    check_stored,
    did_you_mean,
    flagged,
    merge_options,
    read_texts,
    whole_numbers,
)
from ranks import world_size
from run_folder import RunFolder
from tasks import DATASETS, TASKS
from tasks.features import check_features
from trackers import check_trackers
from trainers import TRAINERS
from utils import parse_args_text, read_text_file

__all__ = ["build_parser", "check_arguments", "parse_arguments", "resolve_device"]

ABOUT = "Train, evaluate and compare nearest-neighbor neural networks."


# What --help shows by itself.
COMMON = (
    "model",
    "layer",
    "dataset",
    "data_path",
    "K",
    "batch_size",
    "num_epochs",
    "optimizer",
    "lr",
    "scheduler",
    "val_split",
    "device",
    "seed",
    "output_dir",
    "resume",
    "test_only",
    "overwrite",
    "config",
    "dry_run",
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every flag, in groups."""
    parser = FlagParser(prog="main.py", description=ABOUT, explain=explain)
    add_groups(parser, all_options().values())
    return parser


def add_groups(parser: argparse.ArgumentParser, options: Iterable[tuple[str, Option]]) -> None:
    """Add flags under their headings."""
    groups: dict[str, Any] = {}
    for title, each in options:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], each)


def all_layers() -> dict[str, Callable[..., nn.Module]]:
    """Return the layers of every kind of model by name."""
    tables = reversed(LAYER_KINDS.values())  # of one name the first table's row
    return {name: layer for table in tables for name, layer in table.items()}


def explain(topic: str | None) -> str:
    """Write the help text of a topic.

    Args:
        topic: A model, layer, data set, task, way of training or flag; "all"; None: the common
            flags, and which topics there are.

    Raises:
        ValueError: If there is no such topic.
    """
    everything = all_options()
    tables = {"model": MODELS, "layer": all_layers(), "dataset": DATASETS, "task": TASKS}
    if topic is None:
        text = help_page(ABOUT, [("Common flags", everything[n][1]) for n in COMMON], choices=False)
        for kind, table in tables.items():
            text += f"\n--{kind}: {', '.join(table)}\n"
        return (
            f"{text}\nMore: --help NAME for a model, layer, dataset, task or flag named above, "
            "--help all for every flag.\n"
        )
    if topic == "all":
        return help_page(ABOUT, list(everything.values()))
    flag = topic.removeprefix("--")
    for kind, table in {**tables, "way of training": TRAINERS}.items():
        if topic in table:
            return topic_page(kind, topic)
    if flag in everything:
        title, each = everything[flag]
        return help_page(f"--{flag}", [(title, each)])
    names = [name for table in tables.values() for name in table]
    hint = did_you_mean(topic, [*names, *everything, "all"])
    raise ValueError(f"--help {topic}: there is no such topic.{hint} --help lists them.")


def topic_page(kind: str, topic: str) -> str:
    """Write the help text of one row of a table: what it is, and its own options."""
    if kind == "model":
        owner, flag = model_class(topic), "--model"
    else:
        tables = {
            "layer": all_layers(),
            "dataset": DATASETS,
            "task": TASKS,
            "way of training": TRAINERS,
        }
        owner, flag = tables[kind][topic], f"--{kind}"
    changed = dict(getattr(owner, "defaults", {})) if kind in ("model", "task") else {}
    about = (owner.Options if kind == "dataset" else owner).__doc__ or ""
    text = f"{flag} {topic}: " if kind != "way of training" else f"training by {topic}: "
    text += about.strip().partition("\n")[0]
    if changed:
        text += " It sets " + ", ".join(f"--{name} {value}" for name, value in changed.items())
        text += " where you give nothing else."
    pairs = [(owner.Options.title, each) for each in owner.Options.declared()]
    if kind == "model" and owner.uses_layer:
        text += " --layer chooses its layers (--help ConvNN)."
    if kind == "model":
        text += f" It learns by {owner.training} (--help {owner.training})."
    if not pairs:
        text += " It has no options of its own."
    return help_page(text, list(merge_options(pairs).values()))


def help_page(about: str, options: Sequence[tuple[str, Option]], *, choices: bool = True) -> str:
    """Write the help text of some flags.

    Args:
        about: What comes first.
        options: Headings and options.
        choices: List the choices in place of a value.
    """
    page = argparse.ArgumentParser(
        prog="main.py",
        usage="python main.py --flags",
        description=about,
        formatter_class=HelpFormatter,
        add_help=False,
    )
    if not choices:
        options = [
            (title, replace(each, choices=None, metavar=each.metavar or each.name.upper()))
            for title, each in options
        ]
    add_groups(page, options)
    return page.format_help()


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
    fill_in(values, given, former, read_preset(parser, values, given))
    if values["pretrained"] and not values["resume"]:
        adopt_pretrained(parser, values, given)
    if "output_dir" not in given | set(former):
        values["output_dir"] = default_output_dir(values)
    checkpoint = settle_folder(parser, values, given)
    try:
        whole_numbers(chosen(values).owners, values)
    except OptionError as error:
        parser.error(flagged(error, all_options()))
    return values, given, checkpoint


def read_preset(
    parser: argparse.ArgumentParser, values: dict[str, Any], given: set[str]
) -> dict[str, Any]:
    """Return the arguments of ``--preset``, or of the weights that ``--input`` takes by itself."""
    preset: dict[str, Any] = {}
    if values["input"] and not given & NAMES_WEIGHTS:
        values["pretrained"], preset = shipped_weights(parser, values, given)
        values["test_only"] = True
        given |= {"pretrained", "test_only"}
    if values["preset"]:
        model, preset = PRESETS[values["preset"]]
        if "model" in given and values["model"] != model:
            parser.error(
                f"--preset {values['preset']} is a {model}, not a {values['model']}: leave one out."
            )
        preset = {**preset, "model": model}
    return preset


def fill_in(
    values: dict[str, Any], given: set[str], former: Mapping[str, Any], preset: Mapping[str, Any]
) -> None:
    """Give what the user did not give the value of a preset, of a former run, or of what is chosen.

    The names in `preset` count as given from then on.
    """
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


def settle_folder(
    parser: argparse.ArgumentParser, values: dict[str, Any], given: set[str]
) -> dict[str, Any] | None:
    """Settle which folder the run writes to; return the checkpoint it goes on from or tests."""
    if values["resume"] == "auto":
        find_newest(values)
        if values["resume"] == "auto":
            values["overwrite"] = True  # nothing is there to go on from
            return None
    if values["resume"] or (values["test_only"] and "pretrained" not in given):
        return read_checkpoint(parser, values, given)
    base = values["output_dir"]
    if "output_dir" not in given:
        values["output_dir"] = base if values["overwrite"] else next_free(base)
        return None
    of_run = ("overwrite", "dry_run", "test_only", "check_data")
    if not any(values[name] for name in of_run) and RunFolder(base).holds_run():
        parser.error(
            f"--output_dir {base} already holds a run. Add --resume to go on with it, "
            "--test_only to evaluate it, --overwrite to replace it, or name another folder."
        )
    return None


def find_newest(values: dict[str, Any]) -> None:
    """Choose what ``--resume auto`` goes on from: the newest whole checkpoint of the folder.

    Leaves ``resume`` as it is where there is none.
    """
    if not chosen(values).trainer_type.resumes:
        return
    found = newest_whole(Path(values["output_dir"]), print)
    if found is None:
        print(f"--resume auto: no whole checkpoint in {values['output_dir']}: the run begins.")
        return
    values["resume"] = "last"
    if found.name != RunFolder.LAST:
        values["checkpoint"] = str(found)


def newest_whole(
    folder: Path, say: Callable[[str], Any] | None = None, *, resumes: bool = True
) -> Path | None:
    """Return the newest checkpoint of a folder that can be read; None if there is none.

    Args:
        folder: The folder.
        say: Told why a file is passed over.
        resumes: Look for one that a run can be gone on with from.
    """
    for name in (RunFolder.LAST, RunFolder.PREVIOUS, RunFolder.BEST):
        path = folder / name
        if not os.path.exists(path):
            continue
        try:
            if "trainer" in load_checkpoint(path) or not resumes:
                return path
            if say is not None:
                say(f"note: {path} holds weights alone, and nothing to go on with.")
        except CheckpointError as error:
            if say is not None:
                say(f"note: {error}")
    return None


# Flags that say which network a picture is treated by, or how one is made.
NAMES_WEIGHTS = {"model", "preset", "pretrained", "test_only", "checkpoint", "config", "resume"}


WEIGHTS = Path(__file__).parent / "weights"


def shipped_weights(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], given: set[str]
) -> tuple[str, dict[str, Any]]:
    """Choose the weights that come along for --input; return their file and their arguments."""
    if "scale" in given or values["task"] == "super_resolution":
        name, what = f"enlarge_x{'_'.join(map(str, values['scale']))}", "enlarging so many times"
    elif values["color"]:
        name, what = "denoise_color", "pictures in color"
    else:
        name, what = "denoise_gray", "pictures"
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        there = sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))
        parser.error(
            f"--input: no weights for {what} come along ({path.name} is not among "
            f"{', '.join(there) or 'none'} in {WEIGHTS.name}/). Name a network: --test_only with "
            "--pretrained FILE or the --output_dir of a trained run."
        )
    try:
        _, stored = read_weights(path)
    except ValueError as error:
        parser.error(f"--input: {error}")
    return str(path), {n: v for n, v in stored.items() if n not in given}


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


def weights_alone(path: Path) -> str:
    """Say why a run cannot go on from a file, and what can be done with it."""
    return (
        f"--resume goes on from last.pt, and {path} holds weights without the state of the "
        f"optimizer (--save says what is kept). --pretrained {shlex.quote(str(path))} begins a new "
        "run with these weights."
    )


def saved_file(parser: argparse.ArgumentParser, values: Mapping[str, Any], flag: str) -> str:
    """Return the file of a run folder that a flag reads."""
    folder = Path(values["output_dir"])
    last, best = folder / RunFolder.LAST, folder / RunFolder.BEST
    if flag == "--resume":
        if best.exists() and not last.exists():
            parser.error(weights_alone(best))
        return str(last)
    if last.exists() and not best.exists():
        try:
            stored = load_checkpoint(last)["args"]
        except CheckpointError as error:
            parser.error(f"{flag}: {error}")
        if stored.get("save") == "last":
            print(f"{folder} was trained with --save last: the last epoch is tested.")
            return str(last)
    return str(best)


def read_checkpoint(
    parser: argparse.ArgumentParser, values: dict[str, Any], given: set[str]
) -> dict[str, Any]:
    """Load the checkpoint of --resume or --test_only and take its arguments over."""
    flag = "--resume" if values["resume"] else "--test_only"
    path = values["checkpoint"] or saved_file(parser, values, flag)
    known = {name: each for name, (_, each) in all_options().items()}
    try:
        if not Path(path).exists():
            parser.error(
                f"{flag} needs a checkpoint, and there is none at {path}. Train first, or name the "
                "run folder by --output_dir, or the file by --checkpoint."
            )
        checkpoint = load_checkpoint(path)
        kept = {name: each for name, each in known.items() if not each.of_run}
        check_stored(without_rows(kept), checkpoint["args"], path)
        if values["resume"] and "trainer" not in checkpoint:
            parser.error(weights_alone(Path(path)))
    except OSError as error:
        parser.error(f"{flag}: {path} cannot be read: {error.strerror}.")
    except ValueError as error:
        folder = Path(path).absolute().parent
        whole = newest_whole(folder, resumes=bool(values["resume"]))
        hint = ""
        if values["resume"] and whole is None and newest_whole(folder, resumes=False) is not None:
            parser.error(f"{flag}: {error} {weights_alone(folder / RunFolder.BEST)}")
        if whole is not None and whole.absolute() != Path(path).absolute():
            folder = shlex.quote(str(values["output_dir"]))
            hint = (
                f" {whole} is whole: python main.py {flag} --checkpoint {shlex.quote(str(whole))} "
                f"--output_dir {folder}"
            )
        parser.error(f"{flag}: {error}{hint}")
    stored = checkpoint["args"]
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
        kept = {name: each for name, each in known.items() if not each.of_run}
        check_stored(without_rows(kept), stored, path)
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


def check_arguments(values: Mapping[str, Any], given: set[str], choice: Choice) -> None:
    """Refuse combinations that cannot work; note flags that have no effect.

    Raises:
        ValueError: What is wrong, why, and what to try.
    """
    check_rows(choice)
    check_values(values, choice)
    check_trackers(values)
    for owner in choice.owners:
        owner.check(values)
    trainer = choice.trainer_type
    trainer.check(values, choice.task)
    if values["save_every"] and values["save"] in ("best", "none"):
        raise ValueError(
            f"--save_every {values['save_every']} saves last.pt, and --save {values['save']} keeps "
            "none. Leave one of them out."
        )
    if values["resume"] == "last" and not trainer.resumes:
        raise ValueError(
            f"--resume: --model {choice.model} stores the training set in one go, there is nothing "
            "to go on with. --test_only evaluates the run; --overwrite does it anew."
        )
    check_fsdp(given, choice)
    if trainer.features is not None:
        spec = values[trainer.features]
        if spec != "raw" and not choice.task_type.features:
            raise ValueError(
                f"--{trainer.features} {spec} is for classification: --dataset {choice.dataset} "
                "is learnt as it is."
            )
        check_features(f"--{trainer.features}", spec, learns=trainer.learns_features)
    rehearse_run(values, choice)
    if idle := sorted(given - choice.read_options()):
        print(f"note: no effect with {choice}: {', '.join(f'--{name}' for name in idle)}.")
    check_folder(Path(values["output_dir"]), reads=values["test_only"])


def check_fsdp(given: set[str], choice: Choice) -> None:
    """Refuse parameters in parts where there is nothing to share out."""
    if "fsdp" not in given:
        return
    if choice.trainer_type.name != "gradient":
        raise ValueError(
            f"--fsdp shares out the parameters of a network that learns by gradient, and --model "
            f"{choice.model} has none. Leave it out."
        )
    if world_size() == 1:
        raise ValueError(
            "--fsdp shares out the parameters over several processes, and there is one. Start "
            "them by torchrun --nproc_per_node N main.py, or leave it out."
        )


def check_folder(folder: Path, *, reads: bool) -> None:
    """Refuse a run folder that cannot be made or written.

    Args:
        folder: The folder.
        reads: Whether the run can do without writing.

    Raises:
        ValueError: What is in the way.
    """
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        dangling = folder.is_symlink() and not folder.exists()
    except OSError as error:
        raise ValueError(f"--output_dir cannot be used: {error.strerror} ({folder}).") from error
    if dangling:
        raise ValueError(
            f"--output_dir {folder} is a link to {os.readlink(folder)}, which is not there. Make "
            "that folder, or remove the link."
        )
    if not existing.is_dir() or not (reads or os.access(existing, os.W_OK)):
        raise ValueError(f"--output_dir {folder} cannot be written: {existing} is in the way.")


def check_rows(choice: Choice) -> None:
    """Refuse a model for another task or kind of samples, or a task that the data do not serve."""
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
    kind = choice.entry.inputs
    if kind not in inputs_of(choice.model):
        fits = [
            name
            for name, row in DATASETS.items()
            if row.inputs in inputs_of(choice.model) and set(row.tasks) & set(tasks)
        ]
        able = [
            name
            for name in MODELS
            if kind in inputs_of(name) and choice.task in model_class(name).tasks
        ]
        raise ValueError(
            f"--model {choice.model} takes {' and '.join(inputs_of(choice.model))}, and --dataset "
            f"{choice.dataset} has {kind}. Datasets for {choice.model}: {', '.join(fits)}. "
            f"Models for {choice.dataset}: {', '.join(able) or 'none'}."
        )


def inputs_of(model: str) -> tuple[str, ...]:
    """Return the kinds of samples that a model classifies."""
    return getattr(model_class(model), "inputs", ("images",))


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
