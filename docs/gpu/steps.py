"""Milliseconds of whole steps by executor, rows and nodes, timed in turns; everything is compiled and captured before.

python docs/gpu/steps.py SHAPE OUT.json EXECUTOR:ROWSxNODES... [--device cpu] [--within SECONDS]

`paceline check` does this too, within a budget; here any sizes can be asked for, and several processes can compile
beside one another, as they take turns to time. A size that fails is reported and left out.
"""

import argparse
import fcntl
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from paceline.spec import provenance
from paceline.spec.check import shapes
from paceline.spec.check.steps import weights_read
from paceline.spec.plan.step_times import Blank, in_turns, open_idle
from paceline.spec.proposal import NoDrafter
from paceline.spec.tree import TreeShape

REPEATS = 30


def opened(model, size: str):
    """The runner of a size such as "cuda_graph_eager:8x16"."""
    executor, numbers = size.split(":")
    rows, nodes = map(int, numbers.split("x"))
    drafter = Blank() if nodes > 1 else NoDrafter()
    return open_idle(model, executor, drafter, TreeShape.chain(nodes - 1), batch=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("output", type=Path)
    parser.add_argument("sizes", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--within", type=float, default=float("inf"), help="after these seconds no size is compiled")
    args, begun = parser.parse_args(), time.perf_counter()
    device = torch.device(args.device)
    model = shapes.random_model(shapes.shape_config(args.shape), shapes.settled_dtype("auto", device), device)
    runners, making = {}, {}
    for size in args.sizes:
        if time.perf_counter() - begun > args.within:
            print(f"{size}: no time is left", flush=True)
            continue
        try:
            runners[size] = opened(model, size)
        except Exception as error:  # whatever fails, the other sizes are still of use
            print(f"{size}: {type(error).__name__}: {error}", flush=True)
            continue
        making[size] = runners[size].making_seconds
        print(f"{size}: made in {making[size]:.1f} s", flush=True)
    with open(Path(tempfile.gettempdir()) / "paceline-steps.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seconds = in_turns(model, runners, REPEATS)
    result = {
        "shape": args.shape, "command": provenance.command(), "commit": provenance.git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": provenance.machine(),
        "versions": provenance.versions(), "weight_bytes": weights_read(model),
        "step_seconds": seconds, "making_seconds": making,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for size, value in seconds.items():
        print(f"{args.shape} {size}: {value * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
