"""Compiled steps of SmolLM2-135M on this CPU, beside those of an earlier commit: milliseconds, in turns.

    python docs/cpu/steps.py --old c1c14b6
    python docs/cpu/steps.py --ways 16:1,16:8,q4:1,q4:8,q4-int8:1,q4-int8:8

A way is the kind of weights and the number of nodes of a step. Each is a process with one engine, because engines in
one process share caches; they take turns of 20 steps, and medians of turns are compared. The commit is checked out in a
temporary folder. The bandwidth is that of reading 256 MB, probed between turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def work(way):
    """Steps of one engine, as many at a time as each line of stdin says; prints their median."""
    weights, nodes = way.split(":")
    try:
        from paceline.spec.plan.step_times import Blank, open_idle
        from paceline.spec.target.load import load_target
    except ImportError:  # the commit of the first stage
        from paceline.spec.curves import Blank, open_idle
        from paceline.spec.models import load_target
    from paceline.spec.proposal import NoDrafter
    from paceline.spec.tree import TreeShape

    model, _ = load_target("smollm2-135m", **({} if weights == "16" else {"weights": weights}))
    drafter = NoDrafter() if nodes == "1" else Blank()
    run = open_idle(model, "compiled", drafter, TreeShape.chain(int(nodes) - 1))
    print("ready", model.dtype, flush=True)
    for line in sys.stdin:
        seconds = []
        with torch.no_grad():
            for _ in range(int(line)):
                begun = time.perf_counter()
                run.run(lambda phase: None)
                seconds.append(time.perf_counter() - begun)
        print(statistics.median(seconds), flush=True)


def bandwidth():
    """GB/s of reading 256 MB."""
    numbers, seconds = torch.ones(64 << 20), []
    for _ in range(3):
        begun = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begun)
    return numbers.nbytes / min(seconds) / 1e9


def start(package, way):
    """A worker for `way` of the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, __file__, "--worker", way]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while not (line := worker.stdout.readline()).startswith("ready"):
        assert line, f"{way} has ended"
    print(way, line.split()[1], file=sys.stderr)
    return worker


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", metavar="COMMIT")
    parser.add_argument("--ways", default="16:1,16:8,q4:1,q4-int8:1,q4-int8:8")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    with tempfile.TemporaryDirectory() as folder:
        packages = {"new": Path(folder) / "new"}
        packages["new"].mkdir()
        (packages["new"] / "paceline").symlink_to(ROOT)
        ways = [("new", way) for way in args.ways.split(",")]
        if args.old:
            packages["old"] = Path(folder) / "old"
            tree = str(packages["old"] / "paceline")
            subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", tree, args.old], check=True)
            ways = [("old", "16:1"), ("old", "16:8"), *ways]
        try:
            measure({way: start(packages[way[0]], way[1]) for way in ways}, args.turns)
        finally:
            if args.old:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", tree], check=True)


def measure(workers, turns):
    seconds, probes = {way: [] for way in workers}, []
    for turn in range(turns + 1):
        ways = list(workers)
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            workers[way].stdin.write("20\n")
            workers[way].stdin.flush()
            took = float(workers[way].stdout.readline())
            if turn:  # the first warms up
                seconds[way].append(took)
        probes.append(bandwidth())
    print(f"bandwidth {min(probes):.0f} to {max(probes):.0f} GB/s, median {statistics.median(probes):.0f}")
    base = seconds.get(("old", "16:1")) or next(iter(seconds.values()))
    for way, took in seconds.items():
        ratio = statistics.median(mine / its for mine, its in zip(took, base))
        print(f"{' '.join(way):16} {statistics.median(took) * 1000:6.2f} ms, {ratio:.2f} of the first")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
