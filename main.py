"""Train, evaluate and compare nearest-neighbor neural networks: ``python main.py --flags``.

Options are declared beside what they configure (`options.py`); here they become flags, are checked,
and are handed back as keyword arguments. ``main(argv) -> dict`` may be imported.
"""

import signal
import sys

import faults

if __name__ == "__main__":  # importing takes a while, in which somebody may think better of it
    for number in faults.SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, faults.quit_quietly)

import os

# OpenMP's threads spin while they wait for each other, and spin away the time of those they wait
# for where the machine is shared (scripts/bench_busy.py). It reads this when torch is loaded.
if __name__ == "__main__" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"

import argparse
import contextlib
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

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
)
from checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_pretrained,
    load_weights,
    read_weights,
    save_checkpoint,
)
from commandline import (
    build_parser,
    check_arguments,
    given_flags,
    parse_arguments,
    resolve_device,
)
from dataset import Data, DataError, build_loader
from environment import describe_environment, fingerprint, record_start
from ops.cpu import build as native
from options import (
    flagged,
)
from ranks import (
    distributed,
    gather,
    in_agreement,
    initialised,
    leave_together,
    left_alone,
    world_size,
)
from run_folder import RunFolder, TrainingError
from tasks import Task
from tasks.inspection import inspect_data
from trackers import WRITERS, TrackerError, tracked
from train_eval import Evaluation, Run, dry_run, test, train
from trainers import Trainer
from utils import WriteError, count_parameters, format_args, seed_everything, write_text

__all__ = ["build_parser", "main"]


# What PyTorch, Python and oneDNN say where memory is full: of a tensor, of the stack of a thread,
# of a convolution's code and buffers.
MEMORY_SIGNS = (
    "can't allocate memory",
    "can't start new thread",
    "could not create a primitive",
    "could not create a memory",
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line.

    Args:
        argv: Flags; None takes those of the process.

    Returns:
        The run's results: ``output_dir``, and the metrics of what was done.

    Raises:
        SystemExit: With code 2 for bad input, 1 for a failed run, and 130, 143 or 129 for one that
            SIGINT, SIGTERM or SIGHUP has stopped.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    with faults.handled(), contextlib.ExitStack() as stack:
        try:
            plain = parser.parse_args(words)
            if plain.seeds is not None:
                return run_seeds(parser, words, plain)
            wants_card = plain.device in ("cuda", "auto") and torch.cuda.is_available()
            try:
                leader = stack.enter_context(distributed("cuda" if wants_card else "cpu"))
            except ValueError as error:
                parser.error(str(error))
            if not leader:
                silent = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silent))
            return run_command(parser, words, leader)
        except KeyboardInterrupt as stop:
            code = stop.code if isinstance(stop, faults.Stopped) else 130
            if getattr(stop, "said", None) is None:
                print("\nInterrupted. Nothing was saved yet.", file=sys.stderr)
            raise SystemExit(code) from stop


def run_command(
    parser: argparse.ArgumentParser, words: Sequence[str], leader: bool
) -> dict[str, Any]:
    """Check the flags, hold the run folder and do what they ask for."""
    with in_agreement():
        values, given, checkpoint = parse_arguments(parser, words)
        values["device"] = resolve_device(parser, values["device"], "device" in given)
        choice = chosen(values)
        try:
            check_arguments(values, given, choice)
        except ValueError as error:
            parser.error(flagged(error, all_options()))
    seed_everything(values["seed"])
    keeps = not (values["dry_run"] or values["test_only"] or values["check_data"])
    folder = RunFolder(values["output_dir"], writes=leader, saves=values["save"])
    if values["test_only"] and not values.get("input") and leader:
        with contextlib.suppress(WriteError):
            folder.file(folder.TEST)
        folder.writes = folder.writable()
    command = shlex.join(["python", "main.py", *words])
    with contextlib.ExitStack() as stack:
        if values["threads"] is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(values["threads"])
        if keeps:
            with in_agreement():
                hold(parser, values, checkpoint, folder, stack)
        try:
            results = run_choice(parser, values, choice, checkpoint, folder, command)
            gather(None)  # every process returns when the first one has written everything
            return results
        except (TrainingError, DataError, TrackerError, WriteError) as error:
            batch = getattr(error, "batch", None)
            if batch is not None and leader:
                path = folder.file("nan_batch.pt")
                save_checkpoint(path, {"batch": list(batch)})
                print(f"The batch is in {path}.", file=sys.stderr)
            if leader or not isinstance(error, TrainingError):
                print(f"error: {error}{resume_hint(folder, keeps)}", file=sys.stderr)
            raise SystemExit(1) from error
        except CheckpointError as error:
            parser.error(str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            print(f"error: {out_of_memory(values)}{resume_hint(folder, keeps)}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt as stop:
            name = f" ({stop})" if isinstance(stop, faults.Stopped) else ""
            if leader:
                print(f"\nInterrupted{name}.{resume_hint(folder, keeps)}", file=sys.stderr)
            stop.said = True
            raise
        except RuntimeError as error:
            if any(sign in str(error) for sign in MEMORY_SIGNS):
                text = out_of_memory(values)
            elif initialised() and left_alone(error):
                reason = str(error).splitlines()[0]
                text = (
                    f"process {os.environ.get('RANK')} of {world_size()} cannot go on without the "
                    f"others: {reason}."
                )
            else:
                raise
            print(f"error: {text}{resume_hint(folder, keeps)}", file=sys.stderr)
            raise SystemExit(1) from error


def hold(
    parser: argparse.ArgumentParser,
    values: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None,
    folder: RunFolder,
    stack: contextlib.ExitStack,
) -> None:
    """Hold the run folder, and see that it is still as it was when the flags were read."""
    last = folder.path / folder.LAST
    try:
        stack.enter_context(folder.held())
        if checkpoint is None and not values["overwrite"] and folder.holds_run():
            raise WriteError(
                f"--output_dir {folder.path}: another run has been written there just now. Name "
                "another folder."
            )
        if checkpoint is not None and not values["checkpoint"] and folder.writes:
            found = load_checkpoint(last)
            if found.get("digest") != checkpoint.get("digest"):
                raise WriteError(
                    f"{last} was written anew by another run just now: start --resume again."
                )
    except (WriteError, CheckpointError) as error:
        parser.error(str(error))


def out_of_memory(values: Mapping[str, Any]) -> str:
    """Say that memory is full, how much was used, and what to lower."""
    if values["device"] == "cuda":
        peak, where = torch.cuda.max_memory_allocated(), "of the CUDA device"
    else:
        peak, where = peak_memory(), "of this machine"
    used = "" if peak is None else f" (at most {peak / 1e9:.1f} GB were in use)"
    return (
        f"the memory {where} is full with --batch_size {values['batch_size']}{used}. Lower "
        "--batch_size, or go through each batch in parts by --accum_steps; --use_amp, smaller "
        "images (--resize, --crop_size) and fewer channels take less too."
    )


def peak_memory() -> int | None:
    """Return the largest memory of this process so far in bytes; None where nobody can tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_seeds(
    parser: argparse.ArgumentParser, words: Sequence[str], plain: argparse.Namespace
) -> dict[str, Any]:
    """Do a run for every seed of --seeds, and report mean and standard deviation."""
    if len(set(plain.seeds)) < len(plain.seeds):
        parser.error(f"--seeds {' '.join(map(str, plain.seeds))}: every seed once.")
    if plain.test_only or plain.dry_run or plain.checkpoint:
        parser.error("--seeds trains: leave --test_only, --dry_run and --checkpoint out.")
    given = given_flags(parser, words)
    if "seed" in given:
        parser.error("--seed and --seeds: give one of them.")
    at = words.index("--seeds") if "--seeds" in words else None
    if at is None:
        parser.error("--seeds takes its numbers as separate words: --seeds 0 1 2.")
    rest = [*words[:at], *words[at + 1 + len(plain.seeds) :]]
    base = plain.output_dir
    if "output_dir" not in given:
        values, _, _ = parse_arguments(parser, [*rest, "--overwrite"])
        base = values["output_dir"]
    results = {}
    for seed in plain.seeds:
        target = str(Path(base, f"seed_{seed}"))
        results[seed] = main([*rest, "--seed", str(seed), "--output_dir", target])
    measured = seed_table(results)
    lines = [
        f"{name}: {mean:.6g} ± {deviation:.3g}" for name, (mean, deviation) in measured.items()
    ]
    head = f"Seeds {', '.join(map(str, plain.seeds))}: mean ± standard deviation (of a sample)"
    text = "".join(f"{line}\n" for line in [head, *lines])
    print(text, end="")
    try:
        write_text(RunFolder(base).file("seeds.txt"), text)
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    return {"output_dir": base, "seeds": results, "mean": measured}


def seed_table(results: Mapping[int, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of the numbers that the runs of all seeds have."""
    rows = []
    for result in results.values():
        row = {"best": result.get("best")}
        last = (result.get("history") or [{}])[-1]
        row |= {f"last_{name}": value for name, value in last.items() if name not in ("epoch", "K")}
        row |= {f"test_{name}": value for name, value in (result.get("test") or {}).items()}
        rows.append({name: value for name, value in row.items() if isinstance(value, float)})
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if len(values) == len(rows):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            table[name] = (statistics.mean(values), deviation)
    return table


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
    if values["deterministic"]:
        be_deterministic()
    with in_agreement():
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
            model, trainer, model_text = build_learner(
                values, choice, task, data, device, checkpoint, weights
            )
        except ValueError as error:  # DataError, and what layers and models refuse
            parser.error(flagged(error, all_options()))
    for note in (*data.notes, *getattr(model, "notes", ())):
        print(note)
    evaluation, loader = build_evaluation(values, choice, task, model, trainer, device)
    arguments, same = settled_arguments(values, checkpoint, folder)
    run = Run(
        folder,
        data,
        task,
        evaluation,
        arguments,
        args_text=None if same else describe_run(command) + describe_arguments(values, choice),
        model_text=model_text,
    )
    if trainer is None:
        try:
            return test(run, source_of(values, checkpoint, folder))
        except ValueError as error:  # samples of another size, or none to compare with
            parser.error(flagged(f"--model {choice.model}: {error}", all_options()))
    print_opening(run, choice, values, device)
    if values["dry_run"]:
        return dry_run(trainer, run, loader, batch_size=values["batch_size"])
    facts = describe_environment(command, device, world_size())
    facts |= {"neighbor_kernels": native.status().splitlines()[0], "data": fingerprint(data)}
    if folder.writes and (note := record_start(folder, facts, goes_on=checkpoint is not None)):
        print(note)
    settings = {name: value for name, value in values.items() if name in choice.read_options()}
    results = learn(trainer, run, loader, checkpoint, values, settings)
    print_closing(folder)
    return results


def build_learner(
    values: Mapping[str, Any],
    choice: Choice,
    task: Task,
    data: Data,
    device: torch.device,
    checkpoint: Mapping[str, Any] | None,
    weights: Mapping[str, torch.Tensor] | None,
) -> tuple[torch.nn.Module, Trainer | None, str]:
    """Build the model with its weights, its trainer where it is to learn, and its description."""
    if choice.entry.shape is None:
        rehearse_run(values, choice, data)
    model = build_model(values, choice, task.sizes(data)).to(device)
    model_text = describe(model, choice.trainer_type, data, device)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if weights is not None:
        load_pretrained(model, weights)
    if values["test_only"]:
        return model, None, model_text
    return model, build_trainer(values, choice, model, task, data, device), model_text


def build_evaluation(
    values: Mapping[str, Any],
    choice: Choice,
    task: Task,
    model: torch.nn.Module,
    trainer: Trainer | None,
    device: torch.device,
) -> tuple[Evaluation, Callable[..., DataLoader]]:
    """Return how data sets are evaluated, and what makes the run's loaders."""
    trainer_type = choice.trainer_type
    judged = model if trainer is None else trainer.evaluated
    for network in dict.fromkeys((model, judged)):
        trainer_type.prepare(network, values)
    loader = partial(
        build_loader,
        batch_size=trainer_type.batch(values["batch_size"]),
        seed=values["seed"],
        num_workers=values["num_workers"],
        pin_memory=device.type == "cuda",
    )
    amp = trainer_type.Options.keywords(values).get("use_amp", False)
    with_loss = trainer_type.has_loss
    return Evaluation(judged, task, device, loader, amp=amp, with_loss=with_loss), loader


def learn(
    trainer: Trainer,
    run: Run,
    loader: Callable[..., DataLoader],
    checkpoint: Mapping[str, Any] | None,
    values: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, and tell the trackers that are asked for; see `train_eval.train`.

    Args:
        trainer: How the model learns.
        run: What it works with.
        loader: Makes a loader.
        checkpoint: Where to go on from, if anywhere.
        values: The arguments.
        settings: Those that this run reads.
    """
    folder = run.folder
    wanted = {flag: values[flag] if folder.writes else None for flag in WRITERS}
    with tracked(folder.path, wanted, settings, goes_on=checkpoint is not None) as trackers:
        folder.trackers = trackers
        results = train(
            trainer,
            run,
            loader,
            checkpoint,
            batch_size=values["batch_size"],
            num_epochs=values["num_epochs"],
            seed=values["seed"],
            source=values["checkpoint"] or str(folder.path / folder.LAST),
            save_every=values["save_every"],
        )
        trackers.conclude(results)
    return results


def size_text(count: int) -> str:
    """Word a number of bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def print_closing(folder: RunFolder) -> None:
    """Say where everything is, and what can be done with it."""
    if not folder.writes:
        return
    where = shlex.quote(str(folder.path))
    sizes = folder.sizes()
    size = size_text(sizes.pop(""))
    if len(sizes) > 1:
        parts = [f"{name} {size_text(count)}" for name, count in sizes.items()]
        size += f"; {', '.join(parts)}, --save keeps fewer"
    print(f"All of it is in {folder.path} ({size}).")
    if folder.saves != "none":
        print(f"Test it:    python main.py --test_only --output_dir {where}")
    print(f"Compare it: python scripts/compare_runs.py {where}  # and other folders")


def print_opening(
    run: Run, choice: Choice, values: Mapping[str, Any], device: torch.device
) -> None:
    """Say what is about to learn what, where, and how long."""
    if not run.folder.writes:
        return
    total, _ = count_parameters(run.evaluation.model)
    data = run.data
    held_out = "" if data.val is None else f"{len(data.val):,} validation, "
    shape = "x".join(str(side) for side in data.sample_shape)
    print(f"Model: {choice}, {total:,} parameters")
    print(
        f"Data: {data.name}, {len(data.train):,} training, {held_out}{len(data.test):,} test "
        f"samples of {shape}"
    )
    number = values["num_epochs"]
    epochs = f"{number} epoch{'s' * (number != 1)} of " if choice.trainer_type.has_loss else ""
    threads = torch.get_num_threads()
    print(
        f"Device: {device}, {threads} thread{'s' * (threads != 1)}; "
        f"{epochs}batches of {values['batch_size']}"
    )


def be_deterministic() -> None:
    """Let PyTorch use only algorithms that repeat, and fail where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def settled_arguments(
    values: Mapping[str, Any], checkpoint: Mapping[str, Any] | None, folder: RunFolder
) -> tuple[dict[str, Any], bool]:
    """Return the arguments that checkpoints keep, and whether args.txt holds them already.

    What says how a run was started stays as it was when it began, so that a run that was
    interrupted leaves the files of an unbroken one.
    """
    if checkpoint is None or not values["resume"]:
        return dict(values), False
    stored = checkpoint["args"]
    of_run = {name for name, (_, each) in all_options().items() if each.of_run}
    kept = {name: stored[name] for name in of_run & set(stored)}
    if Path(stored.get("output_dir") or "").absolute() == folder.path.absolute():
        kept["output_dir"] = stored["output_dir"]
    arguments = {**values, **kept}
    there = (folder.path / folder.ARGS).is_file()
    return arguments, there and arguments == dict(stored)


def treat_file(
    values: Mapping[str, Any],
    choice: Choice,
    task: Task,
    device: torch.device,
    checkpoint: Mapping[str, Any] | None,
    weights: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """Treat every file of --input into --output."""
    sizes = task.known_sizes(task.known_shape, None)
    model = build_model(values, choice, sizes).to(device).eval()
    load_pretrained(model, checkpoint["model"] if weights is None else weights)
    pairs = task.files(values["input"], values["output"])
    for source, target in tqdm(pairs, desc="pictures", disable=None if len(pairs) > 1 else True):
        tqdm.write(task.apply(model, str(source), str(target), device))
    return {"output_dir": None, "output": values["output"]}


def describe_arguments(values: Mapping[str, Any], choice: Choice) -> str:
    """Return the lines of args.txt: the arguments that this run reads, then the others."""
    read = choice.read_options()
    first = {name: value for name, value in values.items() if name in read}
    rest = {name: value for name, value in values.items() if name not in read}
    return f"{format_args(first)}# no effect in this run:\n{format_args(rest)}"


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
    progress = checkpoint.get("progress")
    epoch = progress.get("epoch", "?") if isinstance(progress, Mapping) else "?"
    return f"{values['checkpoint'] or folder.path / folder.BEST} (epoch {epoch})"


def resume_hint(folder: RunFolder, keeps: bool) -> str:
    """Say what is saved and how to go on."""
    if not keeps:
        return ""
    if not folder.keeps_last:
        return f" There is nothing to go on with from: --save {folder.saves} keeps no last.pt."
    if not (folder.path / folder.LAST).exists():
        return " Nothing was saved yet."
    return (
        f" The last good state is in {folder.path / folder.LAST}; go on with: "
        f"python main.py --resume --output_dir {shlex.quote(str(folder.path))}"
    )


if __name__ == "__main__":
    main()
    if world_size() > 1:
        leave_together()
