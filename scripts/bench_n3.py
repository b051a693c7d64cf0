"""Speed and memory of the N3 block and of N3Net beside a plain implementation of the same formulas.

The plain one unfolds patches, forms the M × N distances, gathers the candidates, runs the rounds
through autograd and scatters the weights back into M × N matrices. Every measurement runs in a
process of its own; times are the fastest of several runs, memory is the peak of the resident set
above what the process held before.

    python scripts/bench_n3.py            # all cases
    python scripts/bench_n3.py --network  # the whole network as well
    python scripts/bench_n3.py --device cuda --traced  # on a GPU, plain after torch.compile

`NEIGHBORS_NATIVE=0` before it measures this project's tiles in PyTorch instead of its kernels.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layers.n3 import N3Aggregation2d, N3Block
from models.n3net import N3Net


class PlainAggregation2d(N3Aggregation2d):
    """The formulas as they stand, for the default patch-average temperature."""

    def forward(self, values, features, log_temp=None, pad_start=None):
        b, c, height, width = values.shape
        p, s, nnn = self.patch_size, self.stride, self.aggregation.nnn
        grid = self.grid(height, width, pad_start)
        x = F.unfold(grid.pad(values), p, stride=s).transpose(1, 2)  # (B, M, 800)
        e = F.unfold(grid.pad(features), p, stride=s).transpose(1, 2)
        log_temp = F.avg_pool2d(grid.pad(log_temp), p, s).flatten(1) + nnn.log_bias

        index = self.candidates(grid.rows, grid.cols, values.device)  # (M, O)
        norms = e.square().sum(-1)
        full = 2 * e @ e.transpose(1, 2) - norms[:, :, None] - norms[:, None]  # (B, M, N)
        d = full.gather(2, index.expand(b, -1, -1))
        del full
        d = nnn.bn(d.reshape(b, 1, -1)).view_as(d)
        alpha = d / log_temp.exp()[..., None]

        volumes = []
        for j in range(nnn.K):
            lw = torch.log_softmax(alpha, -1)
            w = lw.exp()
            dense = torch.zeros(b, *[grid.rows * grid.cols] * 2, device=w.device)
            dense = dense.scatter(2, index.expand(b, -1, -1), w)
            volumes.append(dense @ x)
            if j < nnn.K - 1:
                small = lw < -math.log(2)
                a = torch.log1p(-torch.where(small, lw, -1.0).exp())
                alpha = alpha + torch.where(
                    small, a, torch.log(-torch.expm1(torch.where(small, -1.0, lw)) + 1e-12)
                )
        z = torch.cat(volumes, 2).transpose(1, 2)  # (B, K·800, M)
        ones = F.fold(torch.ones_like(z[:1, : p * p]), grid.padded, p, stride=s)
        out = F.fold(z, grid.padded, p, stride=s) / ones
        top, _, left, _ = grid.pads
        return out[:, :, top : top + height, left : left + width]

    def candidates(self, rows, cols, device):
        """Positions (M, O) of the candidates of every patch, itself left out."""
        r, c = min(self.window, rows), min(self.window, cols)
        i, j = torch.arange(rows, device=device), torch.arange(cols, device=device)
        top, left = (i - r // 2).clamp(0, rows - r), (j - c // 2).clamp(0, cols - c)
        at_r = top[:, None] + torch.arange(r, device=device)
        at_c = left[:, None] + torch.arange(c, device=device)
        index = at_r[:, None, :, None] * cols + at_c[None, :, None, :]
        index = index.reshape(rows * cols, r * c)
        own = index == torch.arange(rows * cols, device=device)[:, None]
        return index[~own].view(rows * cols, r * c - 1)


def make_plain(module):
    """Let every aggregation of a network be the plain one."""
    for part in module.modules():
        if isinstance(part, N3Aggregation2d):
            part.__class__ = PlainAggregation2d
    return module


def build(case, plain):
    """Return a function to be timed, and what it returns for comparison."""
    torch.manual_seed(0)
    kind, shape, train = case["kind"], case["shape"], case["train"]
    b, c, h, w = shape
    device = torch.device(case["device"])
    if kind == "network":
        net = N3Net().to(device).train(train)
        for m in net.modules():  # running statistics like those of a trained network
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_var.fill_(0.05)
        net = make_plain(net) if plain else net
        inputs = [torch.rand(b, 1, h, w, device=device)]
    else:
        block = N3Block(c).to(device).train(train)
        net = block if kind == "block" else block.n3aggregation
        net = make_plain(net) if plain else net
        inputs = [torch.randn(b, c, h, w, device=device)]
        if kind == "aggregation":
            inputs += [torch.randn(b, c, h, w, device=device) * 0.05]
            inputs += [torch.randn(b, 1, h, w, device=device) * 0.3 + 1]
    bn = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    for m in bn:
        m.running_var.fill_(0.05)
    if plain and case["traced"]:
        net = torch.compile(net)

    seeds = []

    def infer():
        with torch.no_grad():
            return net(*inputs)

    def step():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = net(*leaves)
        if not seeds:
            seeds.append(torch.randn_like(out))
        out.backward(seeds[0])
        return leaves[0].grad

    return step if train else infer


def resident(device, peak):
    """Bytes in use now, or their peak since the last reset."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    key = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def measure(case, plain, repeats):
    """Time and memory of one implementation, in this process."""
    small = {**case, "shape": [1, case["shape"][1], 40, 40]}
    build(small, plain)()  # libraries load, threads start
    run = build(case, plain)
    reset_peak(case["device"])
    before = resident(case["device"], False)
    result = run()
    memory = resident(case["device"], True) - before
    clock = time.process_time if case["cpu_time"] else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        if case["device"] == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    times.sort()
    flat = result.double().flatten()
    sample = flat[:: max(1, len(flat) // 20000)]
    return {
        "ms": times[0] * 1e3,
        "mib": memory / 2**20,
        "norm": flat.norm().item(),
        "sample": sample.tolist(),
    }


CASES = [
    ("aggregation, inference 1x8x256x256", "aggregation", [1, 8, 256, 256], False),
    ("aggregation, training 4x8x80x80", "aggregation", [4, 8, 80, 80], True),
    ("block with its CNNs, inference 1x8x256x256", "block", [1, 8, 256, 256], False),
    ("block with its CNNs, training 4x8x80x80", "block", [4, 8, 80, 80], True),
]
NETWORK = [
    ("N3Net, inference 256x256", "network", [1, 1, 256, 256], False),
    ("N3Net, inference 512x512", "network", [1, 1, 512, 512], False),
    ("N3Net, training 4x1x80x80", "network", [4, 1, 80, 80], True),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="store_true", help="the whole network as well")
    parser.add_argument("--cases", type=int, nargs="+", default=None, help="only these, from 0")
    parser.add_argument(
        "--cpu_time", action="store_true", help="processor time: for a busy machine, one thread"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--traced", action="store_true", help="plain goes through torch.compile")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        print(json.dumps(measure(job["case"], job["plain"], job["repeats"])))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch sees none: leave it out, or use cpu.")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{'case':<46}{'plain':>16}{'ours':>16}{'faster':>9}{'memory':>9}{'differ':>10}")
    cases = CASES + (NETWORK if args.network or args.cases else [])
    for title, kind, shape, train in [cases[i] for i in args.cases] if args.cases else cases:
        case = {"kind": kind, "shape": shape, "train": train, "device": args.device}
        case |= {"cpu_time": args.cpu_time, "traced": args.traced}
        found = []
        for plain in (True, False):
            repeats = args.repeats if kind != "network" else 1
            job = json.dumps({"case": case, "plain": plain, "repeats": repeats})
            output = subprocess.run(
                [sys.executable, __file__, "--worker", job],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            found.append(json.loads(output.splitlines()[-1]))
        plain, ours = found
        a, b = (torch.tensor(f["sample"], dtype=torch.float64) for f in found)
        differ = ((a - b).norm() / a.norm()).item()
        print(
            f"{title:<46}{plain['ms']:>7.0f} ms{plain['mib']:>5.0f}M"
            f"{ours['ms']:>7.0f} ms{ours['mib']:>5.0f}M"
            f"{plain['ms'] / ours['ms']:>8.1f}x{ours['mib'] / plain['mib']:>9.2f}{differ:>10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
