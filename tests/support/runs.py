"""Run files made by hand, for tests of what is computed from them."""

import random

from paceline.spec.bench.runfile import Record
from paceline.spec.trace import Event

PARENTS = [-1, 0, 0, 1, 3]


def header(**changes):
    setup = {
        "model": "tiny", "fingerprint": "f", "prompts": "p.jsonl", "prompts_sha256": "0", "dtype": "float32",
        "device": "cpu", "threads": 1, "batch": 1, "max_new_tokens": 64, "temperature": 0.0, "seed": 0, "repeats": 1,
    }  # fmt: skip
    method = {"drafter": None, "tree": None, "rule": "match", "executor": "eager", "temperature": 0.0}
    methods = [
        {"name": "ar", "kind": "ar", **method, "baseline": None},
        {"name": "ngram", "kind": "drafted", **method, "drafter": "ngram", "baseline": "ar"},
    ]
    whole = {
        "kind": "paceline-bench", "version": 1, "setup": {**setup, **changes}, "methods": methods,
        "machine": {"cpu": "a CPU", "cores": 2}, "versions": {"torch": "2"}, "command": "paceline bench p.jsonl",
        "commit": "abc", "created": "2026-01-01T00:00:00Z",
        "memory": {"target": 1000, "slot": 10, "drafters": {"ngram": {"weights": 0, "slot": 0}}},
    }  # fmt: skip
    return whole


def events(tokens, rng, drafted=True, step_seconds=0.02):
    """Steps that commit `tokens`, each accepting up to three drafts."""
    made, left = [], list(tokens)
    while left:
        path = rng.choice([[], [1], [2], [1, 3], [1, 3, 4]]) if drafted else []
        path = path[: len(left)]
        tree = [tokens[0], *(rng.randrange(60) for _ in PARENTS[1:])] if drafted else [tokens[0]]
        for node, token in zip(path, left):
            tree[node] = token
        bonus = left[len(path)] if len(path) < len(left) else None
        left = left[len(path) + 1 :]
        seconds = {"draft": step_seconds / 10, "verify": step_seconds, "commit": step_seconds / 20}
        made.append(Event(0, len(made), tree, PARENTS if drafted else [-1], path, bonus, seconds))
    return made


def records(prompts=6, seed=0, repeats=1, slower=1.0, pieces=None):
    """Both methods on `prompts` prompts of two categories; the drafter is about twice as fast."""
    rng, made = random.Random(seed), []
    for number in range(prompts):
        tokens = [rng.randrange(60) for _ in range(rng.randint(20, 40))]
        words = {str(token): f" w{token}" for token in range(60)} if number < 3 else {}
        for repeat in range(repeats):
            for method in ("ar", "ngram"):
                steps = events(tokens, rng, method == "ngram")
                seconds = 0.005 + sum(sum(event.seconds.values()) for event in steps)
                made.append(
                    Record(
                        f"p{number}", "ab"[number % 2], 0, method, repeat, number, 1,
                        seconds * (slower if method == "ngram" else 1.0) * rng.uniform(0.98, 1.02), 8, tokens,
                        None if method == "ar" else True, None, steps, {**words, **(pieces or {})} if words else {},
                    )
                )  # fmt: skip
    return made


def write(path, head=None, lines=None):
    import json

    text = json.dumps(head or header()) + "\n" + "".join(record.line() for record in lines or records())
    path.write_text(text, encoding="utf-8")
    return path
