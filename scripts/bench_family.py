"""Time and memory of layers that look at K neighbors, beside plain implementations of the same.

A step is forward and backward of one layer, for one sample of N tokens, nodes or points:

- kvt: attention to the K best tokens (width 192, 3 heads, K 32). Plain: N × N scores, a mask.
- vig: neighbors and what is largest of them relative to the node (192 channels, K 9, every second
  of the 18 nearest, position bias); the weights that follow are alike on both sides, and left out.
  Plain: N × N distances and bias, `topk`, expanded gathers.
- dgcnn: an edge convolution (64 to 64 channels, K 20, batch norm over edges). Plain: N × N
  distances, `topk`, the (N, K, 2C) tensor of all edges.

Every measurement runs in a process of its own. Time is that of the processor, the fastest of
several steps, on one thread; memory is the peak of the resident set above what the process held
before. The outputs and gradients of both sides are compared.

    python scripts/bench_family.py                       # the table
    python scripts/bench_family.py --layers vig --sizes 4096
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_n3 import reset_peak, resident

from layers import EdgeConv, KvtAttention
from models.vig import position_features
from ops.maps.pairs import nearest_rows
from ops.maps.reduce import max_neighbors

# ---------------------------------------------------------------------------------------------
# Our layers: a module and what maps it and its input to the output


class Relative(nn.Module):
    """max_j (x_j - x_i), what max-relative convolution maps."""

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return max_neighbors(x, indices) - x


class Graph(nn.Module):
    """The neighbors of every node, and a graph layer over them."""

    def __init__(self, layer: nn.Module, K: int, dilation: int, metric: str, position=None):
        super().__init__()
        self.layer, self.K, self.dilation, self.metric = layer, K, dilation, metric
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        options = {"position": self.position, "dilation": self.dilation}
        indices = nearest_rows(x, x, self.K, self.metric, **options)[1]
        return self.layer(x, indices)


def build(name: str, n: int) -> nn.Module:
    """Build our layer for n nodes."""
    torch.manual_seed(0)
    if name == "kvt":
        return KvtAttention(192, 3, K=32, attention_dropout=0.0)
    if name == "vig":
        side = math.isqrt(n)
        return Graph(Relative(), 9, 2, "cosine", position_features((side, side), 192, 1))
    return Graph(EdgeConv(64, 64, groups=1), 20, 1, "euclidean")


WIDTHS = {"kvt": 192, "vig": 192, "dgcnn": 64}


# ---------------------------------------------------------------------------------------------
# The same, plainly


def plain_kvt(layer: KvtAttention, x: Tensor) -> Tensor:
    """N × N scores of every head; all but the K best masked out."""
    q, k, v = layer.heads(layer.qkv(x), 3)  # (B, h, N, D)
    scores = (q @ k.mT) * q.shape[3] ** -0.5
    best = scores.topk(layer.K, dim=3).indices
    mask = torch.zeros_like(scores).scatter_(3, best, 1.0)
    attention = scores.masked_fill(mask == 0, -math.inf).softmax(3)
    return layer.proj((attention @ v).transpose(1, 2).flatten(2))


def plain_search(x: Tensor, K: int, dilation: int, metric: str, bias: Tensor | None) -> Tensor:
    """N × N distances, then the K nearest: (B, N, C) -> (B, N, K)."""
    with torch.no_grad():
        x = F.normalize(x, dim=2) if metric == "cosine" else x
        squares = x.square().sum(2, keepdim=True)
        distances = squares - 2 * (x @ x.mT) + squares.mT
        if bias is not None:
            distances = distances - 2 * bias
        return distances.topk(K * dilation, dim=2, largest=False).indices[..., ::dilation]


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """All neighbors: (B, N, C) -> (B, N, K, C)."""
    return torch.stack([rows[i] for rows, i in zip(x, indices, strict=True)])


def plain_vig(graph: Graph, x: Tensor) -> Tensor:
    """Gather all neighbors, subtract the node from each, take the largest."""
    bias = graph.position[0] @ graph.position[1].T
    indices = plain_search(x, graph.K, graph.dilation, graph.metric, bias)
    return (gather(x, indices) - x[:, :, None]).amax(2)


def plain_dgcnn(graph: Graph, x: Tensor) -> Tensor:
    """Lay all edges out, map each of them, take the largest."""
    indices = plain_search(x, graph.K, graph.dilation, graph.metric, None)
    own = x[:, :, None].expand(-1, -1, graph.K, -1)
    edges = torch.cat([own, gather(x, indices) - own], 3)  # (B, N, K, 2C)
    y = edges @ graph.layer.linear.weight.T
    return graph.layer.norm(y.flatten(0, 2)).view_as(y).amax(2)


PLAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "kvt": plain_kvt,
    "vig": plain_vig,
    "dgcnn": plain_dgcnn,
}


# ---------------------------------------------------------------------------------------------
# Measuring


def make_step(name: str, plain: bool, n: int) -> Callable[[], Tensor]:
    """Return a function that takes a step and returns the gradient of the input."""
    module = build(name, n)
    run = (lambda x: PLAIN[name](module, x)) if plain else module
    x = torch.randn(1, n, WIDTHS[name])
    upstream: list[Tensor] = []

    def step() -> Tensor:
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        if not upstream:
            upstream.append(torch.randn(y.shape))
        y.backward(upstream[0])
        return torch.cat([y.detach().flatten(), leaf.grad.flatten()])

    return step


def measure(name: str, plain: bool, n: int, seconds: float) -> dict:
    """Measure one side in this process."""
    torch.set_num_threads(1)
    make_step(name, plain, 256)()  # libraries load, threads start
    step = make_step(name, plain, n)
    reset_peak("cpu")
    before = resident("cpu", False)
    result = step()
    memory = resident("cpu", True) - before
    times, end = [], time.process_time() + seconds
    while not times or (time.process_time() < end and len(times) < 50):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    sample = result[:: max(1, len(result) // 20000)]
    return {"ms": 1e3 * min(times), "mib": memory / 2**20, "sample": sample.tolist()}


def in_a_process(name: str, plain: bool, n: int, seconds: float) -> dict:
    """Measure one side in a process of its own."""
    job = json.dumps([name, plain, n, seconds])
    done = subprocess.run(
        [sys.executable, __file__, "--worker", job], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def plain_bytes(name: str, n: int) -> float:
    """Say about how much memory the plain side needs: its N × N tables."""
    return n * n * 4 * {"kvt": 3 * 5, "vig": 5, "dgcnn": 4}[name]


def row(name: str, n: int, seconds: float, plain_gb: float) -> str:
    """Measure both sides; return a line of the table."""
    ours = in_a_process(name, False, n, seconds)
    mine = f"{ours['ms']:,.1f} | {ours['mib']:,.0f}"
    need = plain_bytes(name, n)
    if need > plain_gb * 1e9:
        return f"| {name} | {n:,} | not run: {need / 1e9:.0f} GB | | {mine} | | | |"
    plain = in_a_process(name, True, n, seconds)
    a, b = (torch.tensor(side["sample"], dtype=torch.float64) for side in (plain, ours))
    return (
        f"| {name} | {n:,} | {plain['ms']:,.1f} | {plain['mib']:,.0f} | {mine} "
        f"| {plain['ms'] / ours['ms']:.1f} | 1/{plain['mib'] / max(ours['mib'], 0.1):.0f} "
        f"| {((a - b).norm() / a.norm()).item():.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", default=list(PLAIN), choices=list(PLAIN))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--seconds", type=float, default=3.0, help="of repeating each step")
    parser.add_argument("--plain_gb", type=float, default=4.0, help="most that plain may need")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*json.loads(args.worker))))
        return
    print(f"torch {torch.__version__}, one thread\n")
    print("| layer | N | plain, ms | MiB | ours, ms | MiB | faster | memory | differ |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in args.layers:
        for n in args.sizes:
            print(row(name, n, args.seconds, args.plain_gb), flush=True)


if __name__ == "__main__":
    main()
