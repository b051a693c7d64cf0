"""Time exact K-nearest-neighbor search beside faiss, scikit-learn, oneDAL, USearch and PyTorch.

Every method runs in a process of its own, on the same files, with the same number of threads; its
time is that of handing over the keys and searching once, after a small search to warm up. "Built"
leaves out handing over: the keys have been searched before. Ratios are those to "ours". Extra
memory is the peak of the process above what it held with keys and queries loaded. Neighbors are
compared by their float64 distances, so that exact ties may differ. Examples:

    python scripts/bench_knn.py --suite must --data_path ./Data
    python scripts/bench_knn.py --suite grid --max_gflop 400
    python scripts/bench_knn.py --suite mapped
    python scripts/bench_knn.py --plot bench.csv --output bench.png
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

METHODS = ("ours", "ours float32", "ours built", "faiss", "faiss built")
METHODS += ("scikit-learn", "scikit-learn-intelex", "USearch", "torch cdist")
PIXELS = {"pixels": "FashionMNIST"}  # kinds of data, and the data set whose images they are
PIXELS |= dict.fromkeys(("mnist", "mnist float32", "mnist sorted"), "MNIST")
PIXELS |= {"cifar gray": "CIFAR10"}
FIELDS = ("data", "keys", "queries", "dim", "k", "threads", "method", "seconds", "extra_mib")
FIELDS += ("cpu_seconds", "agreement", "worst_excess", "ratio", "note")


# ---------------------------------------------------------------------------------------------
# One method in its own process


def resident_mib(key):
    """Read VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def run_method(method, keys, queries, k):
    """Hand over the keys and search: (indices, note)."""
    find, note = make_method(method, keys, k)
    return find(queries), note()


def make_method(method, keys, k):
    """Hand over the keys; return (function of queries that gives indices, function of the note)."""
    if method.startswith("ours"):
        import torch

        from ops.sets.index import ExactIndex

        index = ExactIndex(keys, precision="float32" if "float32" in method else "auto")
        return lambda rows: index.search(torch.from_numpy(rows), k)[1].numpy(), lambda: index.path
    if method.startswith("faiss"):
        import faiss

        index = faiss.IndexFlatL2(keys.shape[1])
        index.add(keys.astype(np.float32, copy=False))
        core = os.environ.get("OPENBLAS_CORETYPE", "as detected")
        note = f"faiss {faiss.__version__}, OpenBLAS core {core}"
        return lambda rows: index.search(rows.astype(np.float32, copy=False), k)[1], lambda: note
    if method == "scikit-learn":
        import sklearn
        from sklearn.neighbors import KNeighborsClassifier

        model = KNeighborsClassifier(k, algorithm="brute", n_jobs=int(os.environ["THREADS"]))
        return _sklearn_search(model, keys), lambda: f"scikit-learn {sklearn.__version__}"
    if method == "scikit-learn-intelex":
        from importlib.metadata import version

        from sklearnex.neighbors import KNeighborsClassifier

        model = KNeighborsClassifier(k, algorithm="brute", n_jobs=int(os.environ["THREADS"]))
        note = f"scikit-learn-intelex {version('scikit-learn-intelex')}"
        return _sklearn_search(model, keys), lambda: note
    if method == "USearch":
        import usearch
        from usearch.index import MetricKind, search

        keys = keys.astype(np.float32, copy=False)
        options = {"exact": True, "threads": int(os.environ["THREADS"])}

        def find(rows):
            rows = rows.astype(np.float32, copy=False)
            found = search(keys, rows, k, MetricKind.L2sq, **options).keys
            return found.reshape(len(rows), k).astype(np.int64)

        return find, lambda: f"USearch {usearch.__version__}, float32"
    if method == "torch cdist":
        import torch

        b = torch.from_numpy(keys.astype(np.float32, copy=False))

        def find(rows):
            a = torch.from_numpy(rows.astype(np.float32, copy=False))
            return torch.cdist(a, b).topk(k, largest=False).indices.numpy()

        return find, lambda: torch.__version__
    raise ValueError(method)


def _sklearn_search(model, keys):
    """Fit a model of scikit-learn's kind and return its search."""
    model.fit(keys.astype(np.float32, copy=False), np.zeros(len(keys)))
    return lambda rows: model.kneighbors(rows.astype(np.float32, copy=False), return_distance=False)


def work(folder, method, k, repeat, mapped):
    """Measure one method; print one line of JSON."""
    threads = int(os.environ["THREADS"])
    if method.startswith(("ours", "torch")):
        import torch

        torch.set_num_threads(threads)
    elif method.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
    keys = np.load(folder / "keys.npy", mmap_mode="r" if mapped else None)
    queries = np.load(folder / "queries.npy")
    run_method(method, np.array(keys[: max(256, k)]), queries[:64], min(k, 100))
    before = resident_mib("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    seconds, busy = [], []
    if method.endswith("built"):
        find, words = make_method(method, keys, k)
        find(queries)
    for _ in range(repeat):
        start, used = time.perf_counter(), time.process_time()
        if method.endswith("built"):
            indices, note = find(queries), words()
        else:
            indices, note = run_method(method, keys, queries, k)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    extra = resident_mib("VmHWM") - before
    np.save(folder / f"{method.replace(' ', '_')}.npy", indices)
    total = resident_mib("VmHWM")
    result = {"seconds": min(seconds), "cpu": min(busy), "extra": extra, "note": note}
    print(json.dumps(result | {"total": total}))


def faiss_environment():
    """Tell OpenBLAS its processor: old builds take new ones, or virtual ones, for a Pentium."""
    if "OPENBLAS_CORETYPE" in os.environ:
        return {}
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    core = "SkylakeX" if "avx512f" in flags else "Haswell" if "avx2" in flags else None
    return {} if core is None else {"OPENBLAS_CORETYPE": core}


def measure(folder, method, k, threads, repeat, mapped=False):
    """Run one method in a process of its own."""
    environment = {**os.environ, "THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    environment["MKL_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = str(threads)
    if method.startswith("faiss"):
        environment |= faiss_environment()
    command = [sys.executable, __file__, "--worker", str(folder), "--method", method]
    command += ["--k", str(k), "--repeat", str(repeat)] + ["--mapped"] * mapped
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# Cases


def make_case(folder, kind, n, m, d, seed, data_path):
    """Write keys.npy and queries.npy."""
    rng = np.random.default_rng(seed)
    if kind in PIXELS:
        from torchvision import datasets

        dataset = getattr(datasets, PIXELS[kind])
        train, test = (dataset(data_path, train=part, download=True) for part in (True, False))
        keys, queries = np.asarray(train.data[:n]), np.asarray(test.data[:m])
        if keys.ndim == 4:  # colors: luma, as PIL converts to gray
            keys, queries = (
                (rows @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)
                for rows in (keys, queries)
            )
        keys, queries = keys.reshape(len(keys), -1), queries.reshape(len(queries), -1)
        if "sorted" in kind:
            keys = keys[np.argsort(np.asarray(train.targets[:n]), kind="stable")]
        if "float32" in kind:
            keys, queries = (rows.astype(np.float32) for rows in (keys, queries))
        np.save(folder / "keys.npy", keys)
        np.save(folder / "queries.npy", queries)
        return
    for name, rows in (("keys", n), ("queries", m)):
        array = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", np.uint8 if kind == "bytes" else np.float32, (rows, d)
        )
        for start in range(0, rows, 65536):
            shape = array[start : start + 65536].shape
            if kind == "bytes":
                block = rng.integers(0, 256, shape, dtype=np.uint8)
            elif kind == "uniform":
                block = rng.random(shape, dtype=np.float32)
            else:
                block = rng.standard_normal(shape, dtype=np.float32)
            array[start : start + 65536] = block
        array.flush()


def distances_of(keys, queries, indices):
    """Return the float64 squared distances of chosen neighbors, (M, k)."""
    out = np.empty(indices.shape)
    step = max(1, (1 << 24) // (indices.shape[1] * keys.shape[1]))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        difference = keys[indices[part]].astype(np.float64)
        difference -= queries[part, None].astype(np.float64)
        out[part] = np.einsum("mkd,mkd->mk", difference, difference)
    return out


def true_distances(keys, queries, k, sample):
    """Return the k smallest float64 squared distances of some queries, from differences."""
    best = np.full((len(sample), k), np.inf)
    step = max(1, (1 << 23) // keys.shape[1])
    for start in range(0, len(keys), step):
        block = keys[start : start + step].astype(np.float64)
        for row, query in enumerate(sample):
            difference = block - queries[query].astype(np.float64)
            new = np.einsum("nd,nd->n", difference, difference)
            best[row] = np.sort(np.partition(np.append(best[row], new), k - 1)[:k])
    return best


def agreement(keys, queries, indices, k, sample, truth):
    """Return the share of neighbors as near as the true ones, and the worst relative excess.

    ``truth`` is that of the sampled queries.
    """
    mine = np.sort(distances_of(keys, queries[sample], indices[sample]), axis=1)
    excess = (mine - truth) / np.maximum(truth, 1e-30)
    unique = all(len(set(row)) == k for row in indices[sample])
    return float((excess <= 1e-6).mean()) if unique else 0.0, float(excess.max())


def run_case(case, args, writer):
    """Measure all methods on one case; the ratio of a method is its time over ours."""
    kind, n, m, d, k = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_case(folder, kind, n, m, d, 0, args.data_path)
        keys = np.load(folder / "keys.npy", mmap_mode="r")
        queries = np.load(folder / "queries.npy")
        n, d = keys.shape
        m = len(queries)
        sample = np.linspace(0, m - 1, min(m, args.sample)).astype(int)
        truth = true_distances(keys, queries, k, sample)
        ours, first = None, None
        for method in args.methods:
            if method == "torch cdist" and n * m * 4 > 6 << 30:
                continue
            if method == "ours float32" and kind in (*PIXELS, "bytes"):
                continue
            slow = method in ("scikit-learn", "USearch") and 2e-9 * n * m * d > args.max_gflop
            if slow:
                continue
            result = measure(folder, method, k, args.threads, args.repeat)
            row = dict.fromkeys(FIELDS, "")
            row |= {"data": kind, "keys": n, "queries": m, "dim": d, "k": k}
            row |= {"threads": args.threads, "method": method}
            if "error" in result:
                row["note"] = result["error"]
            else:
                if method == "ours":
                    ours = result["seconds"]
                indices = np.load(folder / f"{method.replace(' ', '_')}.npy")
                share, worst = agreement(keys, queries, indices, k, sample, truth)
                row |= {
                    "seconds": f"{result['seconds']:.4f}",
                    "extra_mib": f"{result['extra']:.0f}",
                }
                row |= {"cpu_seconds": f"{result['cpu']:.4f}", "agreement": f"{share:.6f}"}
                row["worst_excess"] = f"{worst:.2e}"
                row |= {"note": result["note"]}
                row["ratio"] = f"{result['seconds'] / ours:.2f}" if ours else ""
                everything = distances_of(keys, queries, indices)
                if first is None:
                    first = everything
                else:
                    same = np.isclose(np.sort(everything), np.sort(first), rtol=1e-6, atol=0)
                    row["note"] += f"; {100 * same.mean():.4f}% as near as ours, all queries"
            writer(row)


def run_mapped(args, writer):
    """Search ten million 32-dimensional keys in a memory-mapped file."""
    n, m, d, k = args.mapped_keys, 1000, 32, 10
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        make_case(folder, "normal", n, m, d, 0, None)
        result = measure(folder, "ours", k, args.threads, 1, mapped=True)
        row = dict.fromkeys(FIELDS, "")
        row |= {"data": "normal, mapped", "keys": n, "queries": m, "dim": d, "k": k}
        row |= {"threads": args.threads, "method": "ours"}
        if "error" in result:
            row["note"] = result["error"]
        else:
            keys = np.load(folder / "keys.npy", mmap_mode="r")
            queries = np.load(folder / "queries.npy")
            sample = np.linspace(0, m - 1, 20).astype(int)
            truth = true_distances(keys, queries, k, sample)
            share, worst = agreement(keys, queries, np.load(folder / "ours.npy"), k, sample, truth)
            row |= {"seconds": f"{result['seconds']:.4f}", "extra_mib": f"{result['extra']:.0f}"}
            row |= {"cpu_seconds": f"{result['cpu']:.4f}", "agreement": f"{share:.6f}"}
            row["worst_excess"] = f"{worst:.2e}"
            row["note"] = f"whole process at most {result['total']:.0f} MiB; {result['note']}"
        writer(row)


def suite(name):
    """Return cases (kind, keys, queries, dimensions, k)."""
    if name == "must":
        return [(kind, 55000, 10000, 784, 10) for kind in ("pixels", "uniform", "normal")]
    return [
        (kind, n, m, d, k)
        for kind in ("uniform", "normal")
        for d in (32, 128, 784)
        for n in (10_000, 60_000, 1_000_000)
        for m in (1_000, 10_000)
        for k in (1, 10, 100)
    ]


def plot(path, output):
    """Draw the time of every method over ours, a panel for each kind of data and dimension."""
    from matplotlib.figure import Figure

    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ratio"] and row["method"] != "ours"]
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    dims = sorted({int(row["dim"]) for row in rows})
    cases = sorted({tuple(int(row[name]) for name in ("keys", "queries", "k")) for row in rows})
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    size = (1.5 + 3.2 * len(dims), 1.0 + 0.17 * len(cases) * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(kinds), len(dims), sharex=True, sharey=True, squeeze=False)
    for kind, line in zip(kinds, panels, strict=True):
        for dim, axis in zip(dims, line, strict=True):
            for number, method in enumerate(methods):
                mine = [
                    (
                        float(r["ratio"]),
                        cases.index((int(r["keys"]), int(r["queries"]), int(r["k"]))),
                    )
                    for r in rows
                    if (r["data"], int(r["dim"]), r["method"]) == (kind, dim, method)
                ]
                if mine:
                    style = {"markersize": 4, "color": f"C{number}", "label": method}
                    axis.plot(*zip(*mine, strict=True), "osD^vPX*d"[number], **style)
            axis.axvline(1, color="black", linewidth=1)
            axis.set_title(f"{kind}, {dim} dimensions", fontsize=9)
            axis.grid(alpha=0.3, which="both")
    names = [f"{n:,} x {m:,}, k = {k}" for n, m, k in cases]
    panels[0][0].set_yticks(range(len(cases)), names)
    for axis in figure.axes:
        axis.tick_params(labelsize=7)
    panels[0][0].set(xscale="log")
    panels[0][0].xaxis.set_major_formatter("{x:g}")
    panels[0][0].invert_yaxis()
    found = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=8)
    for axis in panels[-1]:
        axis.set_xlabel("time / time of this search (right of 1: slower)", fontsize=8)
    figure.savefig(output, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=["must", "grid", "mapped"], default="must", help="what is measured")
    add("--only", default="", help="of the suite, cases whose name holds this, e.g. 'uniform'")
    add("--dims", type=int, nargs="*", help="of the suite, these dimensions only")
    add("--case", help="one case instead of a suite: kind,keys,queries,dimensions,k")
    add("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="what is compared")
    add("--threads", type=int, default=2, help="threads of every method")
    add("--repeat", type=int, default=1, help="searches timed; the best counts")
    add("--sample", type=int, default=100, help="queries checked against a float64 search")
    add("--max_gflop", type=float, default=2000, help="leave scikit-learn out beyond this")
    add("--data_path", default=str(ROOT / "Data"), help="folder of the image data sets")
    add("--scratch", default=None, help="folder for the file of the mapped suite")
    add("--mapped_keys", type=int, default=10_000_000, help="keys of the mapped suite")
    add("--output", default=None, help="CSV to append to, or the picture of --plot")
    add("--plot", default=None, metavar="CSV", help="draw a picture of measured rows")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    add("--method", help=argparse.SUPPRESS)
    add("--k", type=int, help=argparse.SUPPRESS)
    add("--mapped", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.method, args.k, args.repeat, args.mapped)
        return
    if args.plot:
        plot(args.plot, args.output or "bench_knn.png")
        return

    def writer(row):
        shown = [f"{row[name]!s}" for name in FIELDS]
        print(" | ".join(shown), flush=True)
        if args.output:
            new = not Path(args.output).exists()
            with open(args.output, "a", newline="") as file:
                out = csv.DictWriter(file, FIELDS, lineterminator="\n")
                if new:
                    out.writeheader()
                out.writerow(row)

    print(" | ".join(FIELDS))
    if args.suite == "mapped" and not args.case:
        run_mapped(args, writer)
        return
    cases = suite(args.suite)
    if args.case:
        kind, *numbers = args.case.split(",")
        cases = [(kind, *map(int, numbers))]
    for case in cases:
        if args.only in case[0] and (not args.dims or case[3] in args.dims):
            run_case(case, args, writer)


if __name__ == "__main__":
    main()
