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
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import psutil

PIECE = 8 << 20
WAYS = "plain", "tree", "accelerate", "resident"


# The processes.


def streamed(args, draft):
    """The streamed model, the drafter if there is to be one, and what is to be known of the model."""
    import paceline
    from paceline.spec import generate  # noqa: F401  (what is imported anyway is no memory of the model's)
    from paceline.spec.stream.streamer import streamer_of
    from transformers import AutoModelForCausalLM  # noqa: F401

    before = psutil.Process().memory_info().rss
    options = {"dtype": args.dtype, "weights": args.weights}
    model, _ = paceline.load_target(args.model, stream="disk", resident=args.resident, **options)
    drafter = paceline.load_drafter(args.draft, model, weights=args.draft_weights) if draft else None
    streamer = streamer_of(model)
    return model, drafter, {"about": asdict(streamer.about), "folder": str(streamer.folder.path), "before": before}


def plain_worker(args):
    """A function that answers tokens; and what is to be known of the model."""
    model, _, known = streamed(args, draft=False)
    return ours(model, None, None), known


def tree_worker(args):
    from paceline.spec.plan.store import plan_path, read_shape
    from paceline.spec.plan.trees import Plan

    model, drafter, known = streamed(args, draft=True)
    plan = Plan.load(plan_path(model, drafter, "eager", "match", 0.0)) if args.tree == "auto" else None
    shape = plan.shape if plan is not None else read_shape(args.tree, drafter)
    forecast = {} if plan is None else {key: value for key, value in vars(plan).items() if key != "shape"}
    tree = getattr(shape, "text", f"{len(shape)} nodes, fixed")
    speculates = len(shape) > 1
    return ours(model, drafter if speculates else None, shape), {**known, "forecast": forecast, "tree": tree}


def resident_worker(args):
    import paceline

    model, _ = paceline.load_target(args.model, dtype=args.dtype, weights=args.weights)
    for parameter in model.parameters():  # what stays mapped into memory cannot be dropped from the page cache
        parameter.data = parameter.data.clone()
    return ours(model, None, None), {}


def ours(model, drafter, shape):
    import paceline
    import torch

    def answer(tokens, limit):
        ends = []
        begun = time.perf_counter()
        out = paceline.generate(
            model, torch.tensor([tokens]), drafter=drafter, tree=shape, executor="eager", do_sample=False,
            max_new_tokens=limit, return_dict_in_generate=True, on_step=lambda events: ends.append(time.perf_counter()),
        )  # fmt: skip
        text, first = out.sequences[0, len(tokens) :].tolist(), out.trace.events[0].committed
        said = {"seconds": time.perf_counter() - begun, "text": text, "summary": out.trace.summary()}
        return {**said, "after": [len(text) - len(first), ends[-1] - ends[0]]}

    return answer


def accelerate_worker(args):
    """transformers' generate() on accelerate's disk offload. `args.kept` are the layers that stay in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    layers = range(AutoConfig.from_pretrained(args.model).num_hidden_layers)
    kept = {int(number) for number in args.kept.split(",") if number}
    places = {f"model.layers.{number}": "cpu" if number in kept else "disk" for number in layers}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = Path(args.work) / "offloaded"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, device_map=places, offload_folder=offloaded, use_safetensors=True
    ).eval()
    files = [path for folder in (Path(args.model), offloaded) for path in folder.rglob("*") if path.is_file()]
    model.register_forward_pre_hook(lambda *ignored: empty_cache_of(files))

    class Times(BaseStreamer):
        def __init__(self):
            self.ends = []

        def put(self, value):
            self.ends.append(time.perf_counter())  # first when the prompt is handed over

        def end(self):
            pass

    def answer(tokens, limit):
        times, ids, before = Times(), torch.tensor([tokens]), psutil.Process().io_counters().read_bytes
        begun = time.perf_counter()
        options = {"do_sample": False, "max_new_tokens": limit, "streamer": times}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        text = out[0, len(tokens) :].tolist()
        after = [len(text) - 1, times.ends[-1] - times.ends[1]]
        said = {"seconds": time.perf_counter() - begun, "text": text, "after": after}
        return {**said, "read": (psutil.Process().io_counters().read_bytes - before) / len(text)}

    return answer, {}


def empty_cache_of(files):
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def work(args):
    workers = dict(zip(WAYS, (plain_worker, tree_worker, accelerate_worker, resident_worker)))
    answer, known = workers[args.worker](args)
    print(json.dumps(known), flush=True)
    for line in sys.stdin:
        print(json.dumps({**answer(*json.loads(line)), "peak": peak_bytes()}), flush=True)


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


# The measurement.


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
    asked = {key: getattr(args, key) for key in ("model", "draft", "prompts", "resident", "weights", "tree", "tokens")}
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


# The figures.


def report(args, entries):
    import torch
    from paceline.spec.provenance import machine, versions

    known = next(entry["known"] for entry in entries if "known" in entry)
    about, speeds = known["about"], [entry["speed"] for entry in entries if "speed" in entry]
    answers = {way: {e["prompt"]: e for e in entries if e.get("way") == way} for way in args.ways.split(",")}
    answers = {way: found for way, found in answers.items() if found}
    size = (
        sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors")) if Path(args.model).is_dir() else 0
    )
    cpu = machine()
    print(f"{cpu['cpu']}, {torch.get_num_threads()} threads, {psutil.virtual_memory().total / 1e9:.0f} GB of memory")
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    print(
        f"{args.model}: {size / 1e9:.2f} GB of safetensors, weights {args.weights}, {args.dtype}; tree "
        f"{known.get('tree', 'none')}"
    )
    policy = "read past the page cache (O_DIRECT)" if about["direct"] else "read through the page cache"
    print(
        f"{about['bytes_per_forward'] / 1e9:.2f} GB a forward, {policy}; {about['resident_layers']} of "
        f"{about['layers']} layers resident; accelerate's files dropped from the page cache before each forward"
    )
    print(f"disk {spread_of(speeds)} GB/s in {len(speeds)} probes")
    if reads := [entry["read"] for entry in answers.get("accelerate", {}).values()]:
        print(f"accelerate read {spread_of([each / 1e9 for each in reads])} GB a forward from the disk")
    peaks = {way: max(entry["peak"] for entry in found.values()) for way, found in answers.items()}
    announced = about["resident_bytes"]
    print(
        f"announced {announced / 1e9:.2f} GB of weights beside the {known['before'] / 1e9:.2f} GB of the process; its "
        "most was " + ", ".join(f"{way} {peak / 1e9:.2f} GB" for way, peak in peaks.items())
    )
    print("\nway         tokens/s           after the first       tokens/step  s a step  waited  hidden")
    for way, found in answers.items():
        whole = [rate(entry) for entry in found.values()]
        after = [rate_after(entry) for entry in found.values() if entry["after"][0]]
        print(f"{way:11} {spread_of(whole):18} {spread_of(after):18}", end="")
        summaries = [e["summary"] for e in found.values() if "summary" in e]
        if summaries:
            steps, tokens, seconds, wait, hidden = sums(summaries)
            shown = "" if hidden is None else f"{wait / seconds:6.0%} {hidden:7.0%}"
            print(f" {tokens / steps:11.2f} {seconds / steps:9.2f} {shown}", end="")
        print()
    compare(answers)
    foretold(known.get("forecast"), answers)


def rate(entry):
    """Tokens per second of a whole call."""
    return len(entry["text"]) / entry["seconds"]


def rate_after(entry):
    """Tokens per second after the first step, which begins with reading the prompt."""
    return entry["after"][0] / entry["after"][1]


def spread_of(values):
    """The median, the least and the most."""
    if not values:
        return "-"
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def sums(summaries):
    """Steps, tokens, seconds of steps, of which waited, and the share of the shorter of fetching and working that ran
    beside the other (metrics.streaming)."""
    steps, tokens = (sum(each[name] for each in summaries) for name in ("num_spec_steps", "num_tokens"))
    seconds = sum(sum(each["seconds"].values()) for each in summaries)
    wait = sum(each["seconds"].get("wait", 0.0) for each in summaries)
    fetching = sum(each["weights_seconds"] or 0.0 for each in summaries)
    hidden = (fetching - wait) / min(fetching, seconds - wait) if fetching else None
    return steps, tokens, seconds, wait, hidden


def compare(answers):
    """Speed-ups over the same prompts, and whether the texts are the same."""
    for way, other in (("tree", "plain"), ("plain", "accelerate"), ("tree", "accelerate"), ("tree", "resident")):
        both = answers.get(way, {}).keys() & answers.get(other, {}).keys()
        if not both:
            continue
        pairs = [(answers[way][n], answers[other][n]) for n in sorted(both)]
        whole = [rate(a) / rate(b) for a, b in pairs if len(a["text"]) == len(b["text"])]
        after = [rate_after(a) / rate_after(b) for a, b in pairs if a["after"][0] and b["after"][0]]
        same = sum(a["text"][: len(b["text"])] == b["text"][: len(a["text"])] for a, b in pairs)
        print(
            f"{way} over {other}: {spread_of(whole)} in whole calls, {spread_of(after)} after the first tokens; {same} "
            f"of {len(pairs)} texts identical"
        )


def foretold(forecast, answers):
    """The planner's forecast beside what was measured, both of steps alone."""
    if not forecast or not answers.get("tree") or not answers.get("plain"):
        return
    both = answers["tree"].keys() & answers["plain"].keys()
    tree, plain = (sums([answers[way][n]["summary"] for n in both]) for way in ("tree", "plain"))
    measured = (plain[2] / plain[1]) / (tree[2] / tree[1])
    print(
        f"foretold {forecast['speedup']:.2f} times plain decoding, measured {measured:.2f}; tokens per step "
        f"{forecast['tokens_per_step']:.2f} and {tree[1] / tree[0]:.2f}; a step {forecast['seconds_per_step']:.2f} s "
        f"and {tree[2] / tree[0]:.2f} s, a plain one {forecast['plain_seconds']:.2f} s and {plain[2] / plain[0]:.2f} s"
    )


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
