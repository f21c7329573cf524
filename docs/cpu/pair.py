"""A target with a draft model of its family, plain and with chains, prompt by prompt in turns: tokens/s, ms a step.

    python docs/cpu/pair.py target.gguf draft.gguf prompts.jsonl --draft-weights q4-int8
    python docs/cpu/pair.py ... --weights q4-int8 --trees chain:4

Weights are as for `load_target` and `load_drafter`. Each way is compiled before the first prompt.
"""

import argparse
import time

import paceline
import torch
from paceline.spec.data.sources import open_source
from paceline.spec.prompts import read_bench_prompts


def decode(model, ids, drafter, tree, new_tokens):
    """Seconds of the call and of its steps after the first, tokens, steps, and the text."""
    ends, begun = [], time.perf_counter()
    options = {"drafter": drafter if tree else None, "tree": tree, "executor": "compiled", "do_sample": False}
    out = paceline.generate(
        model, ids, max_new_tokens=new_tokens, on_step=lambda events: ends.append(time.perf_counter()), **options
    )
    return time.perf_counter() - begun, ends[-1] - ends[0], out.shape[1] - ids.shape[1], len(ends) - 1, out


def main():
    parser = argparse.ArgumentParser()
    for name in ("target", "draft", "prompts"):
        parser.add_argument(name)
    parser.add_argument("--weights", default="16")
    parser.add_argument("--draft-weights", default="16")
    parser.add_argument("--trees", nargs="+", default=["chain:4"])
    parser.add_argument("--count", type=int, default=18)
    args = parser.parse_args()
    model, tokenizer = paceline.load_target(args.target, weights=args.weights)
    drafter = paceline.load_drafter(args.draft, model, weights=args.draft_weights)
    prompts, sums = read_bench_prompts(open_source(args.prompts))[: args.count], {}
    for number, prompt in enumerate([prompts[0], *prompts]):
        chat = [{"role": "user", "content": prompt.turns[0]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        texts = []
        for tree in (None, *args.trees):
            *numbers, text = decode(model, ids["input_ids"], drafter, tree, 64 if number else 4)
            texts.append(text)
            if number:  # the first time compiles
                sums[tree] = [a + b for a, b in zip(sums.get(tree, [0] * 4), numbers)]
        assert all(torch.equal(text, texts[0]) for text in texts), "near-ties of 16 bits apart, texts are identical"
    for tree, (seconds, stepping, tokens, steps) in sums.items():
        after = tokens - len(prompts)
        rates = f"{tokens / seconds:.1f} tokens/s, {after / stepping:.1f} after the first token"
        print(f"{tree or 'plain'}: {rates}, {1e3 * stepping / steps:.0f} ms a step, {after / steps:.2f} tokens/step")


if __name__ == "__main__":
    main()
