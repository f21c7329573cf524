"""The ways of decoding that streamed.py compares, each in a process of its own: it loads the model, says in a line what
is to be known of it, and answers prompts, which come as lines of [tokens, how many new ones]. Knows no figures.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil

WAYS = "plain", "tree", "accelerate", "resident"


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
