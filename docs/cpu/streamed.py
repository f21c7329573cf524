"""A target streamed from disk, plain and with a large tree, beside accelerate's disk offload and the target in memory.

    python docs/cpu/streamed.py MODEL DRAFT prompts.jsonl --calibrate other-prompts.jsonl --resident 1GB

MODEL is a folder of safetensors, or whatever else `load_target` reads: of that a folder is made first, in --work, so
that accelerate reads the same weights. Each way is a process that answers the same prompts greedily, one at a time; the
order changes from prompt to prompt. Weights come by direct reads, past the page cache; of what accelerate reads, the
page cache is emptied before every forward. It keeps the same layers in memory, and embeddings and LM head too. The
disk is probed by direct reads of the same files between the turns. What was measured is appended to the output, and
the same command goes on with what is not there. The tree is planned on the prompts to calibrate on, or it is --tree.
"""

import argparse
import json
import mmap
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streamed_figures import report
from streamed_ways import WAYS, work

PIECE = 8 << 20
ASKED = (  # what an output is of, whichever ways are measured at a time
    "model", "draft", "prompts", "count", "calibrate", "resident", "weights", "draft_weights", "dtype", "tree",
    "tokens", "slow_tokens",
)  # fmt: skip


class Worker:
    def __init__(self, args, name, **more):
        arguments = {**vars(args), **more, "worker": name}
        command = [sys.executable, __file__, *(arguments.pop(key) for key in ("model", "draft", "prompts"))]
        for key, value in arguments.items():
            command += [] if value is None else [f"--{key.replace('_', '-')}", str(value)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.known = self._line()

    def answer(self, tokens, limit):
        self.process.stdin.write(json.dumps([tokens, limit]) + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self):
        while not (line := self.process.stdout.readline()).startswith("{"):
            assert line, "a process has ended"
        return json.loads(line)


def probe(folder, size=512 << 20):
    """GB/s of direct reads of the streamed layers' files, four pieces at a time, into memory that is in use already."""
    pieces, buffers = [], queue.SimpleQueue()
    for path in sorted(Path(folder).glob("layer-*")):
        pieces += [(path, start) for start in range(0, path.stat().st_size, PIECE)]
    for _ in range(4):
        buffers.put(memory := mmap.mmap(-1, PIECE))
        memory.write(bytes(PIECE))
    with ThreadPoolExecutor(4) as pool:
        begun = time.perf_counter()
        read = sum(pool.map(lambda piece: read_direct(*piece, buffers), pieces[: size // PIECE]))
        return read / (time.perf_counter() - begun) / 1e9


def read_direct(path, start, buffers):
    memory, descriptor = buffers.get(), os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.preadv(descriptor, [memory], start)
    finally:
        os.close(descriptor)
        buffers.put(memory)


def folder_of(args):
    """The target as a folder of safetensors; what is in blocks stays where it is."""
    import paceline

    if Path(args.model).is_dir() or args.weights != "16":
        return args.model
    folder = Path(args.work) / "target"
    if not (folder / "config.json").is_file():
        model, tokenizer = paceline.load_target(args.model, dtype=args.dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def texts(args):
    """The tokens of the prompts, spread evenly over their file, in the model's chat template."""
    from paceline.spec.data.sources import open_source
    from paceline.spec.prompts import read_bench_prompts, templated_ids
    from paceline.spec.target.sources import resolve
    from paceline.spec.target.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(resolve(args.model, in_blocks=args.weights != "16"))
    for prompt in read_bench_prompts(open_source(args.prompts), args.count):
        yield templated_ids(tokenizer, [{"role": "user", "content": prompt.turns[0]}])


def measure(args):
    """Run what the output does not have yet: one line for each answer and for each probe of the disk."""
    ways = [way for way in args.ways.split(",") if way != "accelerate" or args.weights == "16"]
    args.model = folder_of(args)
    prompts, output = [*texts(args)], Path(args.output)
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    asked = {key: getattr(args, key) for key in ASKED}
    if done and done[0] != {"asked": asked}:
        raise SystemExit(f"{output} is of other arguments ({done[0].get('asked')}); name another output with -o")
    if not done:
        done.append({"asked": asked})
        output.write_text(json.dumps(done[0]) + "\n")
    there = {(entry["prompt"], entry["way"]) for entry in done if "way" in entry}
    left = [(n, way) for n in range(len(prompts)) for way in turn(ways, n) if (n, way) not in there]
    if not left:
        return done
    if args.calibrate and len(done) == 1:
        plan(args)
    workers = {way: Worker(args, way) for way in ("plain", "tree") if way in ways}
    known = {key: value for worker in workers.values() for key, value in worker.known.items()}
    kept = ",".join(map(str, resident_layers(known["about"])))
    workers |= {way: Worker(args, way, kept=kept) for way in {way for _, way in left} - workers.keys()}
    with open(output, "a", encoding="utf-8") as file:
        warmed = set()
        for number, way in left:
            slow = way in ("plain", "accelerate") and args.slow_tokens
            limit = args.slow_tokens if slow else args.tokens
            if way not in warmed:  # the first forward compares checksums, and fills buffers
                warmed.add(way)
                workers[way].answer(prompts[number][:16], 2)
            for entry in (
                {"known": known, "speed": probe(known["folder"])},
                {"prompt": number, "way": way, **workers[way].answer(prompts[number], limit)},
            ):
                file.write(json.dumps(entry) + "\n")
                file.flush()
                done.append(entry)
            print(f"prompt {number}, {way}: {done[-1]['seconds']:.1f} s", file=sys.stderr)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()
    return done


def resident_layers(about):
    """The numbers of the layers that stay in memory."""
    from paceline.spec.stream.budget import spread

    layers, streamed = about["layers"], about["layers"] - about["resident_layers"]
    return sorted({*range(layers)} - {*(spread(streamed, layers) if streamed else ())})


def plan(args):
    command = ["plan", "--model", args.model, "--drafter", args.draft, "--stream", "disk", "--resident", args.resident]
    command += ["--weights", args.weights, "--draft-weights", args.draft_weights, "--dtype", args.dtype]
    command += ["--calibrate", args.calibrate, "--max-new-tokens", str(args.tokens)]
    subprocess.run([sys.executable, "-m", "paceline.spec.cli", *command], check=True)


def turn(ways, number):
    start = number % len(ways)
    return ways[start:] + ways[:start]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "draft", "prompts"):
        parser.add_argument(name)
    parser.add_argument("--resident", default="1GB", help="of the target's weights, in memory")
    parser.add_argument("--weights", default="16")
    parser.add_argument("--draft-weights", default="16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calibrate", help="prompts to plan the tree on, first")
    parser.add_argument("--tree", default="auto", help="auto is the plan that was made before")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--count", type=int, default=12, help="prompts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--slow-tokens", type=int, help="of plain and accelerate: each takes as long (default: all)")
    parser.add_argument("--work", default="streamed-work", help="folder for what is made")
    parser.add_argument("-o", "--output", default="streamed.jsonl")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--kept", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    report(args, measure(args))


if __name__ == "__main__":
    main()
