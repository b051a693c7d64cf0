"""Write the weights of a trained denoiser or enlarger as a small file without code in it.

python scripts/export_weights.py Output/DnCNN/Conv2d weights/denoise_gray.safetensors
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from builders import chosen
from checkpoints import load_checkpoint, save_safetensors
from run_folder import RunFolder

KEPT = {"dataset", "task", "sigma", "noise_type", "scale"}  # beside what decides on the weights


def export(run: str, target: str) -> None:
    checkpoint = load_checkpoint(Path(run) / RunFolder.BEST)
    args = checkpoint["args"]
    choice = chosen(args)
    own = {"dataset", "task"} | choice.task_type.Options.names()
    kept = (choice.fixed_options() | (KEPT & own)) & set(args)
    save_safetensors(target, checkpoint["model"], {name: args[name] for name in sorted(kept)})
    size = Path(target).stat().st_size
    print(f"{target}: epoch {checkpoint['progress']['epoch']} of {run}, {size / 2**20:.2f} MiB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("target", help="file to write, *.safetensors")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.target)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
