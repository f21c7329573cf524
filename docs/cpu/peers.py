"""The same GGUF file decoded by OpenVINO GenAI and by Paceline, prompt by prompt in turns: new tokens a second.

    python -m venv peer && peer/bin/pip install openvino-genai
    python docs/cpu/peers.py MODEL.gguf PROMPTS.jsonl --python peer/bin/python

Each way is a process that answers the same texts (the model's chat template around each prompt's first turn) greedily,
one process at a time; the order of ways changes from prompt to prompt. The probed memory bandwidth of each turn is
printed beside the medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

WAYS = {
    "openvino": ("openvino", "plain"),
    "openvino-lookup": ("openvino", "lookup"),
    "plain": ("paceline", "none"),
    "auto": ("paceline", "auto"),
    "ngram": ("paceline", "ngram"),
}


def openvino_worker(path, kind, tokens):
    """A function that answers a text: (new tokens, seconds in all, seconds until the first token)."""
    import openvino_genai

    options = {"prompt_lookup": True} if kind == "lookup" else {}
    pipeline = openvino_genai.LLMPipeline(path, "CPU", **options)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.apply_chat_template = tokens, False, False
    if kind == "lookup":
        config.num_assistant_tokens, config.max_ngram_size = 5, 3

    def answer(text):
        begun = time.perf_counter()
        result = pipeline.generate([text], config)
        seconds = time.perf_counter() - begun
        metrics = result.perf_metrics
        return metrics.get_num_generated_tokens(), seconds, metrics.get_ttft().mean / 1000

    return answer


def paceline_worker(path, kind, tokens, weights, tree):
    import paceline
    import torch

    model, tokenizer = paceline.load_target(path, weights=weights)

    def answer(text):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        drafter = None if kind == "none" else kind
        first: list[float] = []
        begun = time.perf_counter()
        out = paceline.generate(
            model, ids, drafter=drafter, tree=tree if drafter == "auto" else None, executor="compiled",
            do_sample=False, max_new_tokens=tokens, on_step=lambda events: first.append(time.perf_counter()),
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out.shape[1] - ids.shape[1], time.perf_counter() - begun, first[0] - begun

    return answer


def work(args):
    which, kind = WAYS[args.worker]
    if which == "openvino":
        answer = openvino_worker(args.model, kind, args.tokens)
    else:
        answer = paceline_worker(args.model, kind, args.tokens, args.weights, args.tree)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def texts(path, count, tokenizer):
    """The prompts of a file, spread evenly over it, in the model's chat template."""
    from paceline.spec.data.sources import open_source
    from paceline.spec.prompts import read_bench_prompts

    for prompt in read_bench_prompts(open_source(path), count):
        messages = [{"role": "user", "content": prompt.turns[0]}]
        yield tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--python", help="the interpreter that has openvino_genai")
    parser.add_argument("--count", type=int, default=18, help="prompts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--weights", default="q4-int8")
    parser.add_argument("--tree", help="of --drafter auto")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    import paceline
    from steps import bandwidth

    tokenizer = paceline.load_target(args.model)[1]
    ways = args.ways.split(",")
    common = [args.model, args.prompts, "--tokens", str(args.tokens), "--weights", args.weights]
    common += ["--tree", args.tree] if args.tree else []
    workers = {}
    for way in ways:
        python = args.python if WAYS[way][0] == "openvino" else sys.executable
        command = [python, __file__, *common, "--worker", way]
        workers[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    results = {way: [] for way in ways}
    probes = []
    for number, text in enumerate(["Hello, who are you?", *texts(args.prompts, args.count, tokenizer)]):
        turn = ways[number % len(ways) :] + ways[: number % len(ways)]
        for way in turn:
            workers[way].stdin.write(json.dumps(text) + "\n")
            workers[way].stdin.flush()
            while not (line := workers[way].stdout.readline()).startswith("["):
                assert line, f"{way} has ended"
            if number:  # the first warms up
                results[way].append(json.loads(line))
        probes.append(bandwidth())
    print(
        f"{len(results[ways[0]])} prompts, {args.tokens} tokens; bandwidth {min(probes):.0f} to {max(probes):.0f} GB/s"
    )
    for way, answers in results.items():
        whole = statistics.median(tokens / seconds for tokens, seconds, _ in answers)
        after = statistics.median((tokens - 1) / (seconds - first) for tokens, seconds, first in answers if tokens > 1)
        reading = statistics.median(first for _, _, first in answers) * 1000
        print(f"{way:16} {whole:6.1f} tokens/s, {after:6.1f} after the first, which takes {reading:.0f} ms")
    for worker in workers.values():
        worker.stdin.close()


if __name__ == "__main__":
    main()
