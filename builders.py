"""From a choice of rows (model, layer, data set, task, trainer) to options and objects.

Only this file and `main.py` know all tables. Plain keywords are handed to constructors.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints import CheckpointError, load_checkpoint, load_pretrained, load_weights
from dataset import Data, DataError, DataOptions, full_dataset, image_side
from layers import LAYER_KINDS
from models import MODELS, PRESETS, model_class
from ops.flops import register_flop_formulas
from ops.shapes import rehearse, without_values
from options import Option, Options, check_stored, merge_options, option
from ranks import world_size
from tasks import DATASETS, TASKS, DatasetEntry, Needs, Task
from tasks.features import last_linear, load_features
from trainers import TRAINERS, Trainer
from utils import describe_model, lonely_norms, memory_size

__all__ = [
    "Choice",
    "OpenRun",
    "all_options",
    "build_model",
    "build_task",
    "build_trainer",
    "chosen",
    "describe",
    "load_data",
    "open_run",
    "rehearse_run",
    "without_rows",
]

# ---------------------------------------------------------------------------------------------
# Options that belong to no model, layer, task, data set or trainer


@dataclass(frozen=True)
class WeightsOptions(Options):
    """Where a network begins."""

    title = "Weights to begin with"
    pretrained: str = option(None, "weights to start from or to evaluate", metavar="FILE")


@dataclass(frozen=True)
class SystemOptions(Options):
    """Where it runs."""

    title = "System"
    device: str = option(
        "cuda",
        "without this flag: cuda where there is one, else the CPU; auto: the best there is",
        choices=("cpu", "cuda", "mps", "auto"),
        resumable=True,
    )
    seed: int = option(0, "seed of everything drawn at random", least=0, most=2**32 - 1)
    seeds: list = option(
        None,
        "do the run once for each of these seeds, in folders below --output_dir, and report mean "
        "and standard deviation",
        kind=int,
        several="list",
        least=0,
        most=2**32 - 1,
        of_run=True,
    )
    deterministic: bool = option(
        False, "use only algorithms that give the same numbers every time, or say which cannot"
    )
    threads: int = option(
        None,
        "threads of the CPU to compute on; not given: as many as PyTorch takes",
        kind=int,
        least=1,
        most=1024,
        resumable=True,
    )
    num_workers: int = option(
        -1,
        "loading processes; -1: none for data in memory, else up to 4",
        least=-1,
        resumable=True,
        most=128,
    )


@dataclass(frozen=True)
class OutputOptions(Options):
    """What is written, and what kind of run it is."""

    title = "Output and kind of run"
    output_dir: str = option(
        "./Output/VGG/ConvNN",
        "run folder; not given: ./Output/<family>/<layer>, numbered where a run is already "
        "there (the default shown is that of vgg11 and ConvNN)",
        resumable=True,
    )
    save: str = option(
        "both",
        "checkpoints that are kept: the weights of the best epoch (best.pt), all that --resume "
        "needs (last.pt, several times as large), both, or none",
        choices=("both", "best", "last", "none"),
    )
    tensorboard: bool = option(
        False,
        "write metrics, pictures and hyperparameters for TensorBoard too, below the run folder",
        resumable=True,
    )
    wandb: str = option(
        None,
        "send metrics, pictures and hyperparameters to this project of Weights & Biases "
        "(WANDB_MODE=offline keeps them here)",
        bare="neighbors",
        metavar="PROJECT",
        resumable=True,
    )
    test_only: bool = option(
        False,
        "evaluate best.pt of --output_dir (or --checkpoint) on the test set",
        of_run=True,
    )
    resume: str = option(
        None,
        "go on from last.pt of --output_dir (or from --checkpoint); auto: from the newest whole "
        "checkpoint there, or begin if there is none",
        choices=("last", "auto"),
        bare="last",
        of_run=True,
    )
    overwrite: bool = option(False, "replace the run in --output_dir", of_run=True)
    checkpoint: str = option(None, "checkpoint file for --test_only and --resume", of_run=True)
    config: str = option(
        None, "args.txt of a former run; flags on the command line win over it", of_run=True
    )
    check_data: bool = option(
        False,
        "read every sample once, count the classes, write nothing; what is broken is named",
        of_run=True,
    )
    dry_run: bool = option(
        False,
        "build everything, take two steps, evaluate two batches, write nothing",
        of_run=True,
    )


# ---------------------------------------------------------------------------------------------
# All options, and those of a choice


def choosing_options() -> list[Option]:
    """Return the flags that choose a row of a table."""
    return [
        Option(
            "model",
            "vgg11",
            "network; besides those listed every torchvision:NAME and timm:NAME",
            choices=MODELS,
            fixed=True,
        ),
        Option(
            "layer",
            "ConvNN",
            "what takes the place of every convolution (VGG, ResNet, ...) or attention (ViT), or "
            "combines a node with its neighbors (ViG, DGCNN)",
            choices=tuple(dict.fromkeys(name for table in LAYER_KINDS.values() for name in table)),
            fixed=True,
        ),
        Option("dataset", "cifar10", "dataset", choices=tuple(DATASETS)),
        Option(
            "task",
            None,
            "what is learnt from it; not given: the first that the dataset serves",
            choices=tuple(TASKS),
        ),
        Option(
            "preset",
            None,
            "a network of the N3Net paper's tables, or one to compare with them: sets --model and "
            "its flags",
            choices=tuple(PRESETS),
            of_run=True,
        ),
    ]


def all_owners() -> Iterable[type[Options]]:
    """Return the options of everything there is, in the order of the help text."""
    yield from (layer.Options for table in LAYER_KINDS.values() for layer in table.values())
    yield DataOptions
    yield from (entry.Options for entry in DATASETS.values())
    yield from (trainer.Options for trainer in TRAINERS.values())
    yield from (model_class(name).Options for name in MODELS)
    yield from (task.Options for task in TASKS.values())
    yield from (WeightsOptions, SystemOptions, OutputOptions)


def all_options() -> dict[str, tuple[str, Option]]:
    """Return every option by name, with the heading it stands under."""
    pairs = [("Model", each) for each in choosing_options()]
    pairs += [(owner.title, each) for owner in all_owners() for each in owner.declared()]
    return merge_options(pairs)


def without_rows(known: Mapping[str, Option]) -> dict[str, Option]:
    """Let the flags that choose rows take any word: rows of a stored run may be gone."""
    free = {each.name for each in choosing_options()}
    return {n: replace(each, choices=None) if n in free else each for n, each in known.items()}


@dataclass(frozen=True)
class Choice:
    """The rows that a run chooses: its model, layer, data set, task and trainer."""

    model: str
    layer: str
    dataset: str
    task: str

    @property
    def model_type(self) -> type[nn.Module]:
        """Class of the model."""
        return model_class(self.model)

    @property
    def layers(self) -> Mapping[str, Callable[..., nn.Module]]:
        """The layers that fit the model."""
        return LAYER_KINDS[getattr(self.model_type, "layer_kind", "maps")]

    @property
    def layer_options(self) -> type[Options]:
        """Options of the layer; none where it does not fit the model, which `main` refuses."""
        return self.layers[self.layer].Options if self.layer in self.layers else Options

    @property
    def entry(self) -> DatasetEntry:
        """Row of the data set."""
        return DATASETS[self.dataset]

    @property
    def task_type(self) -> type[Task]:
        """Class of the task."""
        return TASKS[self.task]

    @property
    def trainer_type(self) -> type[Trainer]:
        """Class of the trainer."""
        return TRAINERS[self.model_type.training]

    @property
    def owners(self) -> list[type[Options]]:
        """Options of the rows."""
        found = [self.entry.Options, self.task_type.Options, self.trainer_type.Options]
        if self.model_type.uses_layer:
            found.append(self.layer_options)
        return [*found, self.model_type.Options]

    def defaults(self) -> dict[str, Any]:
        """Return the defaults of these rows, where they differ from the parser's."""
        found: dict[str, Any] = {}
        for owner in self.owners:
            found |= owner.defaults()
        model = self.model_type
        found |= self.task_type.defaults
        found |= getattr(model, "defaults", {})
        return found | getattr(model, "task_defaults", {}).get(self.task, {})

    def read_options(self) -> set[str]:
        """Return the names of the options that this run reads."""
        everywhere = (DataOptions, WeightsOptions, SystemOptions, OutputOptions)
        names = {each.name for each in choosing_options()}
        names -= set() if self.model_type.uses_layer else {"layer"}
        for owner in (*self.owners, *everywhere):
            names |= {o.name for o in owner.declared() if o.is_read_by(self.trainer_type.name)}
        return names

    def fixed_options(self) -> set[str]:
        """Return the names of the options that decide what the weights mean."""
        names = {"model"}
        if self.model_type.uses_layer:
            names |= {"layer"} | self.layer_options.names()
        names |= {o.name for o in self.model_type.Options.declared() if o.fixed is not False}
        return names | {o.name for o in self.task_type.Options.declared() if o.fixed}

    def __str__(self) -> str:
        layer = f" --layer {self.layer}" if self.model_type.uses_layer else ""
        return f"--model {self.model}{layer}"


def chosen(values: Mapping[str, Any]) -> Choice:
    """Return the rows that arguments choose."""
    entry = DATASETS[values["dataset"]]
    task = values.get("task") or entry.tasks[0]
    return Choice(values["model"], values["layer"], values["dataset"], task)


# ---------------------------------------------------------------------------------------------
# From arguments to objects


def build_task(values: Mapping[str, Any], choice: Choice) -> Task:
    """Build the task."""
    options = choice.task_type.Options.keywords(values, choice.trainer_type.name)
    return choice.task_type(seed=values["seed"], **options)


def build_layer(values: Mapping[str, Any], choice: Choice) -> Callable[..., nn.Module] | None:
    """Return the configured layer, still to be told its channels; None: the model's own."""
    options = choice.layer_options.keywords(values)
    own_name, own_options = getattr(choice.model_type, "own_layer", (None, {}))
    plain = choice.layer_options.keywords(choice.layer_options.defaults())
    if choice.layer == own_name and options == {**plain, **own_options}:
        return None
    return partial(choice.layers[choice.layer], **options)


def build_model(values: Mapping[str, Any], choice: Choice, sizes: Mapping[str, Any]) -> nn.Module:
    """Build the model.

    Args:
        values: The arguments.
        choice: The chosen rows.
        sizes: What the task says of the data.
    """
    builder = MODELS[choice.model]
    known = {
        "batch_size": values["batch_size"],
        "num_passes": values["num_epochs"],
        "num_steps": values["num_epochs"] * -(-sizes.get("num_samples", 0) // values["batch_size"]),
        **sizes,
    }
    if choice.trainer_type.features is not None:
        known["features"] = values[choice.trainer_type.features]
    if choice.model_type.uses_layer:
        known["layer"] = build_layer(values, choice)
    wanted = set(inspect.signature(builder).parameters)
    return builder(
        **{name: value for name, value in known.items() if name in wanted},
        **choice.model_type.Options.keywords(values),
    )


def load_run_data(values: Mapping[str, Any], choice: Choice, task: Task, **changes: Any) -> Data:
    """Load the data set as a model wants it; see `Task.load`."""
    model_type, trainer = choice.model_type, choice.trainer_type
    needs = Needs(
        min_side=model_type.min_input_size,
        normalize=trainer.normalize,
        evaluation_only=values["test_only"],
    )
    return task.load(
        choice.entry.build,
        choice.entry.Options.keywords({**values, **changes}, trainer.name),
        seed=values["seed"],
        needs=needs,
        **DataOptions.keywords(values),
    )


def load_data(values: Mapping[str, Any], choice: Choice, task: Task, device: torch.device) -> Data:
    """Load the data, with samples replaced by features where that is asked for."""
    trainer = choice.trainer_type
    load = partial(load_run_data, values, choice, task)
    if trainer.features is None:
        return load()
    open_network = partial(open_feature_network, values, choice, task)
    return load_features(values[trainer.features], load, open_network, device)


def open_feature_network(
    values: Mapping[str, Any], choice: Choice, task: Task, path: str
) -> tuple[Data, nn.Module, str]:
    """Load a network trained here, and the data normalised and sized as it wants them."""
    checkpoint = load_checkpoint(path)
    known = {name: each for name, (_, each) in all_options().items()}
    check_stored(known, checkpoint["args"], path)
    stored = {**values, **checkpoint["args"]}
    source = replace(choice, model=stored["model"], layer=stored["layer"])
    model_type = source.model_type
    if model_type.training != "gradient" or choice.task not in model_type.tasks:
        raise DataError(
            f"{path} holds a {stored['model']}, which is no network that classifies by gradients."
        )
    resize = values["resize"] or stored["resize"]
    data = load_run_data(values, source, task, resize=resize)
    network = build_model(stored, source, task.sizes(data))
    weight = checkpoint["model"].get(f"{last_linear(network)}.weight")
    if weight is not None and len(weight) != data.num_outputs:  # it learnt other classes
        sizes = task.sizes(replace(data, num_outputs=len(weight)))
        network = build_model(stored, source, sizes)
    try:
        load_weights(network, checkpoint)
    except ValueError as error:
        raise DataError(f"{path} does not fit --dataset {choice.dataset}: {error}") from error
    return data, network, stored["model"]


@dataclass(frozen=True)
class OpenRun:
    """A network trained here, opened again.

    Attributes:
        model: The network with the weights of its best epoch, in evaluation, on the CPU.
        values: The arguments of its run.
        choice: The rows that they choose.
        task: What it learnt.
        shape: Shape of one sample.
        weights: The weights by name, as the file holds them.
        epoch: The epoch they are of; None if the file does not say.
    """

    model: nn.Module
    values: dict[str, Any]
    choice: Choice
    task: Task
    shape: tuple[int, ...]
    weights: dict[str, torch.Tensor]
    epoch: int | None

    def load_data(self) -> Data:
        """Load the data of the run, as the network wants them."""
        return load_run_data({**self.values, "test_only": True}, self.choice, self.task)


def open_run(path: str | Path) -> OpenRun:
    """Open the network of a run again.

    Args:
        path: The run's folder, or a file of weights that holds the arguments of its run.

    Raises:
        ValueError: If there is none, it is of no row of this version, or it is not trained by
            gradients; or if its data, which say the sizes of its samples, are not there.
    """
    path = Path(path) / "best.pt" if Path(path).is_dir() or not Path(path).suffix else Path(path)
    checkpoint = load_checkpoint(path)
    stored = checkpoint["args"]
    known = {name: each for name, (_, each) in all_options().items()}
    check_stored(without_rows(known), stored, str(path))
    values = {name: each.default for name, each in known.items()} | stored
    tables = {"model": MODELS, "dataset": DATASETS, "task": {**TASKS, None: None}}
    for name, table in tables.items():
        if values[name] not in table:
            raise CheckpointError(
                f"{path} was made with {name} {values[name]}, which this version does not have."
            )
    choice = chosen(values)
    values = values | choice.defaults() | stored
    if choice.model_type.training != "gradient":
        raise CheckpointError(
            f"{path} holds a {values['model']}, which learns by {choice.model_type.training}: "
            "a network trained by gradients is needed."
        )
    task, entry = build_task(values, choice), choice.entry
    if (shape := getattr(task, "known_shape", None)) is not None:
        sizes = task.known_sizes(shape, None)
    elif entry.shape is not None:
        side = image_side(entry.shape[1:], values["resize"], choice.model_type.min_input_size)
        shape = entry.shape if side is None else (entry.shape[0], side, side)
        sizes = task.known_sizes(shape, entry.num_classes)
    else:
        data = load_run_data({**values, "test_only": True}, choice, task)
        shape, sizes = data.sample_shape, task.sizes(data)
    model = build_model(values, choice, sizes).eval()
    load_pretrained(model, checkpoint["model"])
    epoch = checkpoint.get("progress", {}).get("epoch")
    return OpenRun(model, values, choice, task, tuple(shape), checkpoint["model"], epoch)


def build_trainer(
    values: Mapping[str, Any],
    choice: Choice,
    model: nn.Module,
    task: Task,
    data: Data,
    device: torch.device,
) -> Trainer:
    """Build how the model learns."""
    trainer = choice.trainer_type
    known = {
        **trainer.Options.keywords(values),
        "num_classes": data.num_outputs,
        "sample_shape": data.sample_shape,
        "steps_per_epoch": -(-len(data.train) // values["batch_size"]),
    }
    wanted = set(inspect.signature(trainer).parameters)
    options = {name: value for name, value in known.items() if name in wanted}
    built = trainer(model, task, device=device, **options)
    built.check_set(len(data.train), values["batch_size"])
    if trainer.rehearses and task.name == "classification":
        check_last_batch(values, model, data, device)
    return built


def check_last_batch(
    values: Mapping[str, Any], model: nn.Module, data: Data, device: torch.device
) -> None:
    """Refuse batches of one sample where batch norm would see one value per channel in them.

    Raises:
        ValueError: Names the layer, and the nearest batch size that works.
    """
    count = len(data.train)
    largest = getattr(full_dataset(data.train), "max_batch_size", count)
    size = min(values["batch_size"], largest)
    processes = 1 if values["sync_bn"] else world_size()

    def smallest(size: int) -> int:  # the smallest part of a batch that a process gets
        last = count % size or min(size, count)
        parts = [-(-last // processes) if last < processes else last // processes]
        parts += [size // processes] if count >= size else []
        return min(parts) // values["accum_steps"]

    if smallest(size) > 1:
        return
    names = lonely_norms(model, torch.zeros(1, *data.sample_shape, device=device))
    if not names:
        return
    sizes = sorted(range(2, 2 * size + 2), key=lambda other: (abs(other - size), other))
    fits = next((other for other in sizes if smallest(other) > 1 and other <= largest), None)
    fix = "More training samples are needed." if fits is None else f"Use --batch_size {fits}."
    raise ValueError(
        f"--batch_size {values['batch_size']} leaves a training batch of one sample ({count} "
        f"training samples), and batch norm ({names[0]}) would see one value per channel in it, "
        f"which has no variance. {fix}"
    )


def rehearse_run(values: Mapping[str, Any], choice: Choice, data: Data | None = None) -> None:
    """Build the model on the meta device and run it by shapes alone, as far as they are known.

    Args:
        values: The arguments.
        choice: The chosen rows.
        data: The data, once it is loaded.
    """
    task = build_task(values, choice)
    entry, model_type = choice.entry, choice.model_type
    num_outputs = entry.num_classes
    if data is not None:
        shape, num_outputs = data.sample_shape, data.num_outputs
    elif entry.shape is not None:
        side = image_side(entry.shape[1:], values["resize"], model_type.min_input_size)
        shape = entry.shape if side is None else (entry.shape[0], side, side)
    else:
        shape = getattr(task, "known_shape", None)
    sizes = task.known_sizes(shape or (1, 1, 1), num_outputs)
    if shape is None:
        sizes.pop("image_size", None)
    try:
        # Models that learn otherwise begin empty: there is nothing to save by the meta device.
        with without_values() if choice.trainer_type.rehearses else nullcontext():
            model = build_model(values, choice, sizes)
    except ValueError as error:
        raise ValueError(f"--model {choice.model}: {error}") from error
    except RuntimeError as error:  # a parameter of more bytes than a number can say
        raise ValueError(f"{choice} cannot be built on any machine: {error}") from error
    task.check_model(model)
    if shape is not None and choice.trainer_type.rehearses and task.name == "classification":
        rehearse(model, shape)
    check_memory(values, choice, model)


def check_memory(values: Mapping[str, Any], choice: Choice, model: nn.Module) -> None:
    """Refuse a model whose parameters do not fit into the machine."""
    count = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = 1 if values["test_only"] else choice.trainer_type.copies(values)
    there = memory_size(torch.device(values["device"]))
    if there is not None and size * copies > there:
        what = "" if copies == 1 else " with their gradients and the state of the optimizer"
        raise ValueError(
            f"{choice} has {count:,} parameters, which take {size * copies / 1e9:,.1f} GB{what}; "
            f"the device has {there / 1e9:,.1f} GB. Try fewer channels or blocks, a smaller K or "
            "shuffle_scale."
        )


def describe(
    model: nn.Module, trainer_type: type[Trainer], data: Data, device: torch.device
) -> str:
    """Describe the model, by a forward pass of a blank sample where it learns by gradient."""
    if not trainer_type.rehearses:
        return f"{model}\n"
    register_flop_formulas()
    return describe_model(model, torch.zeros(1, *data.sample_shape, device=device))
