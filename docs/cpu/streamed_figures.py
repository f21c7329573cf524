"""The figures of streamed.py: what its output, a list of answers and probes of the disk, comes to. Measures nothing."""

import statistics
from pathlib import Path

import psutil


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
