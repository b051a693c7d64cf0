"""Compare kernels on one picture: what growing networks keep, and how well that redraws it.

Runs ``--model dynamic --dataset image`` for every kernel and tolerance, each in a folder of its own
below --output_dir, and draws rate (pixels kept) against distortion (PSNR), and the pictures.

    python scripts/plot_image_growth.py --image_path FILE --output_dir Output/ImageGrowth
    python scripts/plot_image_growth.py --crop 120 260 192 256      # a piece of the photograph
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from main import main as run_program
from tasks.approximation import build_image


def main(argv: list[str] | None = None) -> list[dict]:
    """Run all combinations; return one row each."""
    from matplotlib.figure import Figure
    from PIL import Image

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_path", help="picture (default: the embedded photograph)")
    parser.add_argument("--crop", type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"))
    parser.add_argument("--kernels", nargs="+", default=["euclidean", "influence_cone"])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--picture_at", type=float, default=0.2, help="tolerance that is shown")
    parser.add_argument("--output_dir", type=Path, default=Path("Output/ImageGrowth"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.image_path
    if args.crop:
        pixels = build_image(image_path=path).extra["image"]
        top, left, height, width = args.crop
        piece = (pixels[:, top : top + height, left : left + width] * 255).round().byte()
        path = str(args.output_dir / "picture.png")
        Image.fromarray(piece.permute(1, 2, 0).numpy()).save(path)

    rows, shown = [], []
    for kernel in args.kernels:
        for tolerance in sorted({*args.tolerances, args.picture_at}):
            folder = args.output_dir / f"{kernel}_{tolerance:g}"
            flags = ["--model", "dynamic", "--dataset", "image", "--device", args.device]
            flags += ["--kernel_type", kernel, "--tolerance", str(tolerance)]
            flags += ["--output_dir", str(folder), "--overwrite"]
            results = run_program(flags + (["--image_path", path] if path else []))
            rows.append(
                {
                    "kernel": kernel,
                    "tolerance": tolerance,
                    "centers": results["centers"][0],
                    "share": results["share"],
                    "psnr": results["psnr"],
                }
            )
            if tolerance == args.picture_at:
                shown.append((kernel, folder / "image.png"))
    with open(args.output_dir / "rate_distortion.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for kernel in args.kernels:
        mine = [row for row in rows if row["kernel"] == kernel]
        axis.plot([r["share"] for r in mine], [r["psnr"] for r in mine], "o-", label=kernel)
    axis.set(xlabel="pixels kept, %", ylabel="PSNR, dB")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(args.output_dir / "rate_distortion.png", dpi=110)

    pictures = [(kernel, Image.open(file).convert("RGB")) for kernel, file in shown]
    width, height = pictures[0][1].size
    figure = Figure(figsize=(8.6, 8.6 * len(pictures) * height / width), layout="constrained")
    axes = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for axis, (kernel, picture) in zip(axes, pictures, strict=True):
        axis.imshow(picture)
        axis.set_ylabel(kernel)
        axis.set(xticks=[], yticks=[])
    figure.savefig(args.output_dir / "kernels.png", dpi=100)
    return rows


if __name__ == "__main__":
    main()
