"""Run many hostile inputs: ``python -m tests.fuzz --count 10000``."""

import argparse
import faulthandler
import resource
import sys
import time
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.harness import SECONDS, Case, attempt
from tests.fuzz.inputs import KINDS


def fuzz(kind: str, count: int, number: int) -> list[tuple[Case, str]]:
    """Run `count` inputs of a kind; print what happened, return what was wrong."""
    wrong: list[tuple[Case, str]] = []
    codes: Counter = Counter()
    slowest, start = 0.0, time.perf_counter()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind])
    def run(case: Case) -> None:
        nonlocal slowest
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # where no signal is heard
        outcome = attempt(case)
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, outcome.seconds)
        codes["returned" if outcome.code is None else f"exit {outcome.code}"] += 1
        if outcome.problem:
            wrong.append((case, outcome.problem))
            last = outcome.problem.strip().splitlines()[-1]
            print(f"{kind}: {case.argv}: {last}", file=sys.stderr, flush=True)

    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hangs = sum(problem.startswith("hangs") for _, problem in wrong)
    print(
        f"{kind}: {sum(codes.values())} inputs ({dict(sorted(codes.items()))}), "
        f"{len(wrong) - hangs} tracebacks or other faults, {hangs} hangs, slowest {slowest:.1f} s, "
        f"{time.perf_counter() - start:.0f} s; peak memory of the process so far {peak:.2f} GiB",
        flush=True,
    )
    return wrong


def run_all(argv: list[str] | None = None) -> int:
    """Run the kinds that are asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=600, help="inputs, shared by the kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of inputs")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    given_ = parser.parse_args(argv)
    wrong = []
    for kind in given_.kinds:
        wrong += fuzz(kind, -(-given_.count // len(given_.kinds)), given_.seed)
    shown: Counter = Counter()
    for case, problem in wrong:
        last = problem.strip().splitlines()[-1]
        shown[last] += 1
        if shown[last] == 1:
            print(f"\n{case}\n{problem}")
    for last, times in shown.most_common():
        print(f"{times} x {last}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_all())
