"""Time training by several processes of one thread against one process of as many threads.

    python scripts/bench_ranks.py --processes 2
    python scripts/bench_ranks.py --flags "--model convnet --dataset digits"

Both train the same network on the same batches, in turn, several rounds; a run's first epoch is
left out. Times are those of training alone, without evaluation and start; the ratio says how many
times faster the processes are.
"""

import argparse
import csv
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--model vgg11 --layer Branching --width 0.25 --classifier gap --dropout 0 --dataset digits "
    "--resize 32 --limit_train 512 --limit_test 64 --batch_size 64 --num_epochs 3 --sync_bn"
)


def seconds(flags: str, processes: int, threads: int, folder: Path) -> float:
    """Return the median time that training takes for 1000 samples."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(processes)]
    command += [str(ROOT / "main.py"), *shlex.split(flags)]
    command += ["--device", "cpu", "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    with open(folder / "timing.csv", newline="") as file:
        rates = [float(row["train_samples_per_second"]) for row in csv.DictReader(file)]
    return 1000 / statistics.median(rates[1:] or rates)


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--flags", default=FLAGS, help="what is trained (default: %(default)s)")
    args = parser.parse_args(argv)
    found: dict[tuple[int, int], list[float]] = {(1, args.processes): [], (args.processes, 1): []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for (processes, threads), times in found.items():
                place = Path(folder, f"{processes}_{number}")
                times.append(seconds(args.flags, processes, threads, place))
    alone = statistics.median(found[1, args.processes])
    print("| processes x threads | seconds for 1000 samples | times faster |\n|--:|--:|--:|")
    for (processes, threads), times in found.items():
        median = statistics.median(times)
        print(f"| {processes} x {threads} | {median:.2f} | {alone / median:.2f} |")


if __name__ == "__main__":
    main()
