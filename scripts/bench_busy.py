"""Time training on an idle and on a busy machine, by how long OpenMP's threads spin.

    python scripts/bench_busy.py --threads 2

Threads that wait for each other spin before they sleep. On a busy machine they spin away the time
of those they wait for. Every value of GOMP_SPINCOUNT is timed in turn, several rounds, with and
without processes that compute beside it; ratios are to the value that OpenMP takes by itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from layers import LAYERS
from models import ConvNet
torch.manual_seed(0)
model = ConvNet(layer=LAYERS["Conv2d"], depth=4, width=24)
optimizer = torch.optim.Adam(model.parameters(), fused=True)
x, y = torch.randn(64, 3, 20, 20), torch.randint(10, (64,))
for step in range(int(sys.argv[3]) + 3):
    if step == 3:
        start = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
print(time.perf_counter() - start)
"""


def seconds(spin: str | None, threads: int, steps: int) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT",)}
    environment.pop("OMP_NUM_THREADS", None)
    if spin is not None:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-c", WORK, str(threads), str(ROOT), str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the training")
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="processes beside it")
    parser.add_argument("--steps", type=int, default=60, help="training steps a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each value")
    parser.add_argument("--spins", nargs="+", default=["1000", "10000", "20000"])
    args = parser.parse_args(argv)
    spins = [None, *args.spins]
    print("| other processes | GOMP_SPINCOUNT | seconds | times faster |")
    print("|--:|--:|--:|--:|")
    for beside in (0, args.busy):
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)
        ]
        try:
            found = {spin: [] for spin in spins}
            for _ in range(args.rounds):
                for spin in spins:
                    found[spin].append(seconds(spin, args.threads, args.steps))
        finally:
            for other in others:
                other.kill()
                other.wait()
        base = statistics.median(found[None])
        for spin, times in found.items():
            middle = statistics.median(times)
            print(f"| {beside} | {spin or 'not set'} | {middle:.2f} | {base / middle:.2f} |")


if __name__ == "__main__":
    main()
