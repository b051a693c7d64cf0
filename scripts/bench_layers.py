"""Time and peak memory of the neighbor layer beside a plain implementation of the same formulas.

    python scripts/bench_layers.py                 # the cases and the scaling with image size
    python scripts/bench_layers.py --parts cases   # only the cases
    python scripts/bench_layers.py --train         # training steps of VGG11 with every layer
    python scripts/bench_layers.py --device cuda   # the same on a GPU

All implementations of a case take turns within one process, so that they share the machine's
moods; times are medians, with the quartiles beside them. Peak memory is what one forward and
backward pass adds to a process of its own that has already run the layer on a small input.

plain     the whole similarity of all padded positions, top-K, the input expanded K-fold before
          gathering, Conv1d: the formulas one after the other, as the published layer does
cropped   the same, with only the needed rows of the similarity and no expansion
traced    plain after torch.compile (on a GPU, or where it is asked for)
torch     this project's layer in PyTorch alone (NEIGHBORS_NATIVE=0)
floor     the operations of PyTorch that `torch` cannot do without, and nothing between them: scores
          and torch.topk, rows gathered and weighed, both gradients; on tensors that lie ready
compiled  this project's layer with its compiled kernels (the default where there is a compiler; on
          a GPU where there is Triton)
given     compiled, with the neighbors of its first pass kept: a layer whose search is free
conv2d    nn.Conv2d with as many taps
sdpa      scaled_dot_product_attention on the same tokens, one head
"""

import argparse
import csv
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import nn

from layers import LAYERS, Conv2d_NN
from ops.budget import chunk_bytes, pieces
from ops.cpu import build as native
from ops.triton import launch

MIB = 1 << 20
K = 9
CASES = {
    "1": {"shape": (32, 64, 32, 32)},
    "2": {"shape": (8, 64, 64, 64)},
    "3": {"shape": (32, 64, 32, 32), "sampling_type": "spatial", "num_samples": 8},
    "4": {"shape": (32, 256, 8, 8)},
    "224": {"shape": (1, 64, 224, 224)},
}
SCALING_SIDES = (4, 8, 16, 32, 64, 128, 224)
IMPLEMENTATIONS = ("plain", "cropped", "traced", "torch", "floor")
IMPLEMENTATIONS += ("compiled", "given", "conv2d", "sdpa")
# Positions up to which `plain` and `cropped` form the similarity of all pairs.
PLAIN_LIMIT = 6000


class Plain(nn.Module):
    """ConvNN step by step, holding every intermediate result whole."""

    def __init__(self, layer, cropped=False):
        super().__init__()
        self.layer, self.cropped = layer, cropped

    def forward(self, x):
        layer, (b, c, h, w) = self.layer, x.shape
        x = F.pad(x, (1, 1, 1, 1))
        key_shape = tuple(x.shape[2:])
        own = layer.self_index(key_shape, x.device)
        candidates = layer.candidates(key_shape, x.device)
        x = x.flatten(2)  # (B, C, N)
        features = F.normalize(x, dim=1)
        rows = features[:, :, own] if self.cropped else features
        names = own if self.cropped else torch.arange(x.shape[2], device=x.device)
        if candidates is None:
            similarity = rows.mT @ features
            similarity[:, torch.arange(len(names)), names] = 2.0
            indices = similarity.topk(K, dim=-1).indices
        else:
            similarity = rows.mT @ features[:, :, candidates]
            similarity = similarity.masked_fill(names[:, None] == candidates, -2.0)
            others = candidates[similarity.topk(K - 1, dim=-1).indices]
            indices = torch.cat([names[None, :, None].expand(b, -1, 1), others], -1)
        if self.cropped:
            at = indices.view(b, 1, -1).expand(-1, c, -1)
            gathered = x.gather(2, at)
        else:
            at = indices[:, own, None].movedim(2, 1).expand(-1, c, -1, -1)
            gathered = x.unsqueeze(-1).expand(-1, -1, -1, K).gather(2, at).flatten(2)
        conv = layer.conv1d_layer
        return F.conv1d(gathered, conv.weight, conv.bias, stride=K).view(b, -1, h, w)


class Floor(nn.Module):
    """The chunked search and aggregation reduced to their products, top-K, gathers and scatter."""

    def __init__(self, layer, shape):
        super().__init__()
        key_shape = tuple(side + 2 for side in shape[2:])
        candidates = layer.candidates(key_shape, torch.device("cpu"))
        b, c, n, m = shape[0], shape[1], math.prod(key_shape), math.prod(shape[2:])
        count = n if candidates is None else len(candidates)
        self.queries, self.keys = torch.randn(b, m, c), torch.randn(b, c, count)
        self.x, self.gx = torch.randn(b * n, c), torch.zeros(b * n, c)
        self.weight, self.gw = torch.randn(K * c, c), torch.zeros(K * c, c)
        self.y = torch.empty(b * m, c)
        self.neighbors = torch.randint(n, (b, m * K)).add_(torch.arange(0, b * n, n)[:, None])
        cpu, row_bytes = torch.device("cpu"), 4 * count
        rows = chunk_bytes(cpu, row_bytes=row_bytes) // row_bytes  # as the layer's search has it
        self.searched = list(pieces(b, m, rows))
        self.scores = torch.empty_like(self.queries[self.searched[0]] @ self.keys[:1])
        self.step = chunk_bytes(cpu) // 2 // (4 * K * c)
        self.rows = torch.empty(self.step * K, c)

    def forward(self, x):
        return _Floor.apply(x, self)

    def gathered(self):
        for at in self.neighbors.view(-1).split(self.step * K):
            rows = torch.index_select(self.x, 0, at, out=self.rows[: len(at)])
            yield rows.view(len(at) // K, -1), at


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, floor):
        ctx.floor, ctx.zeros = floor, torch.zeros(()).expand_as(x)
        for samples, part in floor.searched:
            q, k = floor.queries[samples, part], floor.keys[samples]
            scores = floor.scores[: len(q), : q.shape[1]]
            if len(q) == 1:
                torch.mm(q[0], k[0], out=scores[0])
            else:
                torch.bmm(q, k, out=scores)
            scores.topk(K - 1)
        for (rows, _), y in zip(floor.gathered(), floor.y.split(floor.step), strict=True):
            torch.mm(rows, floor.weight, out=y)
        return floor.y.clone()

    @staticmethod
    def backward(ctx, gy):
        floor = ctx.floor
        for (rows, at), g in zip(floor.gathered(), gy.split(floor.step), strict=True):
            floor.gw.addmm_(rows.T, g)
            torch.mm(g, floor.weight.T, out=rows)
            floor.gx.index_add_(0, at, rows.view(len(at), -1))
        return ctx.zeros, None


class Attention(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).mT.contiguous()[:, None]  # else the fused kernels are passed over
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


def keep_neighbors(layer):
    """Let a layer search once for every shape, and take the same neighbors ever after."""
    find, found = layer.find_neighbors, {}

    def kept(keys, key_shape):
        if keys.shape not in found:
            found[keys.shape] = find(keys, key_shape)
        return found[keys.shape]

    layer.find_neighbors = kept
    return layer


def build(name, shape, options):
    """Build an implementation; returns it and how to switch the kernels for it."""
    torch.manual_seed(0)
    layer = Conv2d_NN(shape[1], shape[1], K=K, padding=1, **options)
    switch = "0" if name == "torch" else "1"
    module = {
        "plain": lambda: Plain(layer),
        "cropped": lambda: Plain(layer, cropped=True),
        "traced": lambda: torch.compile(Plain(layer)),
        "floor": lambda: Floor(layer, shape),
        "given": lambda: keep_neighbors(layer),
        "conv2d": lambda: nn.Conv2d(shape[1], shape[1], 3, padding=1),
        "sdpa": Attention,
    }.get(name, lambda: layer)()
    return module, switch


def available(name, shape, device):
    n = math.prod(side + 2 for side in shape[2:])
    if name in ("plain", "cropped", "traced"):
        return n <= PLAIN_LIMIT
    if name == "floor":
        return device == "cpu"
    return name not in ("compiled", "given") or has_kernels(device)


def has_kernels(device):
    if device == "cpu":
        return native.library() is not None
    return launch.kernels("search", torch.empty(0, device=device)) is not None


def one_pass(module, x, backward):
    if not backward:
        with torch.no_grad():
            return module(x)
    y = module(x)
    y.backward(torch.ones_like(y))
    x.grad = None
    return y


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def draw_map(shape, background, device):
    """Draw features of a normal distribution; a share of the positions is all the same."""
    x = torch.randn(shape)
    plain = torch.rand(shape[2:]) < background
    x[..., plain] = torch.randn(shape[1], 1)
    return x.to(device).requires_grad_()


def time_case(shape, options, names, args, repeats, backward=True):
    """Milliseconds of each implementation: {name: sorted times}, taking turns."""
    device, seconds = args.device, args.seconds
    x = draw_map(shape, args.background, device)
    built = {name: build(name, shape, options) for name in names}
    times = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, (module, switch) in built.items():
            if turn > 1 and sum(times[name]) > seconds * 1e3:
                continue
            os.environ["NEIGHBORS_NATIVE"] = switch
            module.to(device).zero_grad()
            synchronize(device)
            start = time.perf_counter()
            one_pass(module, x, backward)
            synchronize(device)
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    os.environ["NEIGHBORS_NATIVE"] = "1"
    return {name: sorted(values) for name, values in times.items()}


def memory_of(name, shape, options, device):
    """Peak memory of a forward and backward pass in MiB, in a process of its own."""
    if device == "cuda":
        module, switch = build(name, shape, options)
        os.environ["NEIGHBORS_NATIVE"] = switch
        x = torch.randn(shape, device=device, requires_grad=True)
        module.to(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(module, x, True)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    job = json.dumps({"name": name, "shape": shape, "options": options})
    command = [sys.executable, __file__, "--worker", job, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return float(done.stdout) if done.returncode == 0 else math.nan


def status_mib(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(field)


def worker(job):
    """Print what a pass adds to the resident memory of this process, at its peak."""
    shape, options = job["shape"], job["options"]
    module, switch = build(job["name"], shape, options)
    os.environ["NEIGHBORS_NATIVE"] = switch
    small = torch.randn(1, shape[1], 10, 10, requires_grad=True)
    one_pass(module, small, True)
    x = torch.randn(shape, requires_grad=True)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_mib("VmRSS")
        one_pass(module, x, True)
        print(status_mib("VmHWM") - before)
    except OSError:  # not Linux: the high-water mark cannot be set back, only compared
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        one_pass(module, x, True)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / MIB)


def summary(times):
    quarter = len(times) // 4
    return statistics.median(times), times[quarter], times[-1 - quarter]


def measure(label, shape, options, args, repeats):
    names = [n for n in args.implementations if available(n, shape, args.device)]
    forward = time_case(shape, options, names, args, repeats, backward=False)
    both = time_case(shape, options, names, args, repeats)
    rows = []
    for name in names:
        median, low, high = summary(both[name])
        rows.append(
            {
                "case": label,
                "shape": "x".join(map(str, shape)),
                "positions": math.prod(shape[2:]),
                "sampling": options.get("sampling_type", "all"),
                "implementation": name,
                "forward_ms": summary(forward[name])[0],
                "forward_backward_ms": median,
                "quartile1_ms": low,
                "quartile3_ms": high,
                "peak_mib": math.nan
                if args.no_memory
                else memory_of(name, shape, options, args.device),
                "repeats": len(both[name]),
            }
        )
    base = {row["implementation"]: row for row in rows}
    for row in rows:
        for key, column in (("speedup", "forward_backward_ms"), ("memory_ratio", "peak_mib")):
            plain = base.get("plain")
            row[key] = plain[column] / row[column] if plain and row[column] > 0 else math.nan
        conv, column = base.get("conv2d"), "forward_backward_ms"
        row["over_conv2d"] = row[column] / conv[column] if conv else math.nan
    return rows


def number(value, digits=1):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def print_rows(rows):
    print(
        "| case | input | implementation | fwd ms | fwd+bwd ms (quartiles) | ÷ Conv2d | x plain "
        "| MiB | 1/x |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        spread = f"({number(r['quartile1_ms'])}-{number(r['quartile3_ms'])})"
        print(
            f"| {r['case']} | {r['shape']} {r['sampling']} | {r['implementation']} "
            f"| {number(r['forward_ms'])} | {number(r['forward_backward_ms'])} {spread} "
            f"| {number(r['over_conv2d'], 2)} | {number(r['speedup'])} "
            f"| {number(r['peak_mib'], 0)} "
            f"| {number(r['memory_ratio'])} |",
            flush=True,
        )


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    columns = (("forward_backward_ms", "forward + backward, ms"), ("peak_mib", "peak memory, MiB"))
    for axis, (column, title) in zip(axes, columns, strict=True):
        for name in IMPLEMENTATIONS:
            mine = [r for r in rows if r["implementation"] == name and r[column] > 0]
            if not mine:
                continue
            axis.loglog([r["positions"] for r in mine], [r[column] for r in mine], "o-", label=name)
        axis.set(xlabel="positions", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].set_ylim(bottom=1)  # less is a page here and there
    figure.suptitle("One image of 64 channels, K = 9, all positions")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_csv(rows, path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


TRAINED = {
    "Conv2d": ("Conv2d", {}),
    "ConvNN all": ("ConvNN", {}),
    "ConvNN random 64": ("ConvNN", {"sampling_type": "random", "num_samples": 64}),
    "ConvNN spatial 8": ("ConvNN", {"sampling_type": "spatial", "num_samples": 8}),
    "ConvNN Loc": ("ConvNN", {"similarity_type": "Loc", "magnitude_type": "euclidean"}),
    "ConvNN Loc_Col": ("ConvNN", {"similarity_type": "Loc_Col"}),
    "ConvNN euclidean": ("ConvNN", {"magnitude_type": "euclidean"}),
    "ConvNN_Attn all": ("ConvNN_Attn", {}),
    "ConvNN_Attn random 64": ("ConvNN_Attn", {"sampling_type": "random", "num_samples": 64}),
    "ConvNN_Attn spatial 8": ("ConvNN_Attn", {"sampling_type": "spatial", "num_samples": 8}),
    "Branching all": ("Branching", {}),
    "Branching_Attn all": ("Branching_Attn", {}),
}


def train_step(model, optimizer, x, target, device):
    synchronize(device)
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def train(args):
    """Training steps of VGG11 on random images of CIFAR-10's size.

    Each layer takes turns with Conv2d, and is divided by the Conv2d steps around its own.
    """
    from models.vgg import VGG

    x = torch.randn(args.batch_size, 3, 32, 32, device=args.device)
    target = torch.randint(10, (args.batch_size,), device=args.device)

    def build_vgg(layer, options):
        torch.manual_seed(0)
        fixed = {"kernel_size": 3} if layer == "Conv2d" else {"K": K}
        model = VGG(layer=partial(LAYERS[layer], **fixed, **options)).to(args.device)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    base = build_vgg(*TRAINED["Conv2d"])
    rows = []
    print(f"VGG11, batch {args.batch_size}, one training step (forward, backward, SGD)")
    print("| layer | ms (quartiles) | Conv2d beside it, ms | ratio |")
    print("|---|---|---|---|")
    for name, (layer, options) in TRAINED.items():
        if layer == "Conv2d" or (args.only and not any(word in name for word in args.only)):
            continue
        mine = build_vgg(layer, options)
        times, beside = [], []
        for turn in range(args.repeats + 1):
            pair = [train_step(*run, x, target, args.device) for run in (base, mine)]
            if turn:
                beside.append(pair[0])
                times.append(pair[1])
        median, low, high = summary(sorted(times))
        conv = statistics.median(beside)
        print(
            f"| {name} | {median:.0f} ({low:.0f}-{high:.0f}) | {conv:.0f} | {median / conv:.2f} |",
            flush=True,
        )
        rows.append(
            {"layer": name, "ms": median, "quartile1_ms": low, "quartile3_ms": high}
            | {"conv2d_ms": conv, "ratio": median / conv}
            | {"repeats": len(times), "batch_size": args.batch_size}
        )
    return rows


def describe(args):
    on_gpu = args.device == "cuda"
    status = launch.status(torch.device("cuda")) if on_gpu else native.status()
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    if Path("/proc/cpuinfo").exists() and args.device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    print(
        f"{args.device}: {name}; {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"Python {platform.python_version()}; kernels {status}; K = {K}, cosine, "
        f"padding 1, float32; medians of up to {args.repeats} repeats"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["cases", "scaling"], help="cases scaling")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--sides", nargs="+", type=int, default=SCALING_SIDES, help="of the images of scaling"
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, help="all (traced: on a GPU)"
    )
    parser.add_argument("--train", action="store_true", help="time training steps of VGG11")
    parser.add_argument("--only", nargs="*", help="with --train: layers whose name has this word")
    parser.add_argument("--batch_size", type=int, default=64, help="of --train")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="most for one line")
    parser.add_argument(
        "--background", type=float, default=0.0, help="share of positions with the same features"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--output_dir", default=str(ROOT / "Output" / "bench_layers"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch sees none: leave it out, or use cpu.")
    if not args.implementations:
        args.implementations = [n for n in IMPLEMENTATIONS if (n, args.device) != ("traced", "cpu")]
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        return worker(json.loads(args.worker))
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    describe(args)
    if args.train:
        return write_csv(train(args), out / "train.csv")
    if "cases" in args.parts:
        rows = []
        for label in args.cases:
            options = dict(CASES[label])
            rows += measure(label, options.pop("shape"), options, args, args.repeats)
        print_rows(rows)
        write_csv(rows, out / "cases.csv")
    if "scaling" in args.parts:
        rows = []
        for side in args.sides:
            rows += measure("scaling", (1, 64, side, side), {}, args, min(5, args.repeats))
        print_rows(rows)
        write_csv(rows, out / "scaling.csv")
        draw(rows, out / "scaling.png")
    return None


if __name__ == "__main__":
    main()
