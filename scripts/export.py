"""Write the network of a run for use elsewhere; the ending of the file says how.

    python scripts/export.py Output/DnCNN/Conv2d weights/denoise_gray.safetensors
    python scripts/export.py Output/ResNet/ConvNN resnet18.pt2
    python scripts/export.py Output/ResNet/Conv2d resnet18.onnx

- .safetensors: the weights, and the arguments that `main.py` and `torch.hub` build their network
  from; a small file without code in it.
- .pt2: the whole network by `torch.export`, for any size of batch; --static: for one sample,
  which networks need that go through a batch by pieces (n3net).
  `torch.export.load(FILE).module()` runs it; networks with neighbor layers need `import layers`
  of this repository first, which brings their operators.
- .onnx: the whole network, where it holds no operators of ours (pip install onnx onnxscript
  onnxruntime).

What was written is read again, run on random inputs, and compared with the network it came from.
"""

import argparse
import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from builders import OpenRun, open_run
from checkpoints import load_pretrained, read_weights, save_safetensors
from utils import atomic_path

KEPT = {"dataset", "task", "sigma", "noise_type", "scale"}  # beside what decides on the weights
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Forward = Callable[[Tensor], Tensor]


def write_weights(run: OpenRun, target: Path, inputs: Tensor, static: bool) -> Forward:
    """Write the weights and the arguments they belong to."""
    own = {"dataset", "task"} | run.choice.task_type.Options.names()
    kept = (run.choice.fixed_options() | (KEPT & own)) & set(run.values)
    args = {name: run.values[name] for name in sorted(kept)}
    save_safetensors(target, run.weights, args)
    again = copy.deepcopy(run.model)
    load_pretrained(again, read_weights(target)[0])
    return again


def write_program(run: OpenRun, target: Path, inputs: Tensor, static: bool) -> Forward:
    """Write the network by `torch.export`."""
    with atomic_path(target) as temporary:
        program = traced(run, inputs, static)
        with open(temporary, "wb") as file:
            torch.export.save(program, file)
    return torch.export.load(str(target)).module()


def traced(run: OpenRun, inputs: Tensor, static: bool) -> torch.export.ExportedProgram:
    """Trace the network."""
    shapes = None if static else ({0: torch.export.Dim("batch", min=1)},)
    try:
        return torch.export.export(run.model, (inputs,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export documents no error types
        hint = "" if static else " Try --static, for one sample at a time."
        reason = str(error).split("!")[0].splitlines()[0]
        raise ValueError(f"torch.export cannot trace {run.choice}: {reason}.{hint}") from error


def write_onnx(run: OpenRun, target: Path, inputs: Tensor, static: bool) -> Forward:
    """Write the network as ONNX."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f".onnx needs {', '.join(missing)}: pip install {' '.join(missing)}. Or write a .pt2."
        )
    import onnxruntime

    program = traced(run, inputs, static)
    ours = {
        str(node.target).removesuffix(".default")
        for node in program.graph.nodes
        if str(node.target).startswith("neighbors.")
    }
    if ours:
        raise ValueError(
            f"{run.choice} computes by {', '.join(sorted(ours))}, which ONNX does not have. "
            "Write a .pt2, which keeps them."
        )
    with atomic_path(target) as temporary:
        torch.onnx.export(program, dynamo=True, verbose=False).save(temporary)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


WRITERS: dict[str, Callable[[OpenRun, Path, Tensor, bool], Forward]] = {
    ".safetensors": write_weights,
    ".pt2": write_program,
    ".onnx": write_onnx,
}


@torch.no_grad()
def export(source: str, target: str, *, static: bool = False) -> float:
    """Write a network and compare; return the largest difference of the outputs.

    Raises:
        ValueError: For another ending, a run that cannot be opened or traced, or outputs that
            differ by more than float32 explains.
    """
    path = Path(target)
    if path.suffix not in WRITERS:
        raise ValueError(
            f"{target}: the ending says what is written: {', '.join(WRITERS)} "
            f"(got {path.suffix or 'none'})."
        )
    run = open_run(source)
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(1 if static else 3, *run.shape, generator=generator)
    forward = WRITERS[path.suffix](run, path, samples[:2], static)
    expected = run.model(samples)
    difference = (forward(samples) - expected).abs().max().item()
    epoch = "" if run.epoch is None else f"epoch {run.epoch} of "
    size = path.stat().st_size / 2**20
    print(f"{target}: {epoch}{source}, {size:.2f} MiB; inputs ({samples_text(run, static)})")
    print(f"Largest difference of outputs up to {expected.abs().max():.3g}: {difference:.3g}.")
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise ValueError(f"{target} gives other outputs than {source}: do not use it.")
    return difference


def samples_text(run: OpenRun, static: bool) -> str:
    return ", ".join(["1" if static else "B", *map(str, run.shape)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the run, or a file of weights/")
    parser.add_argument("target", help=f"file to write: *{', *'.join(WRITERS)}")
    parser.add_argument("--static", action="store_true", help="for one sample at a time")
    args = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")
            export(args.run, args.target, static=args.static)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
