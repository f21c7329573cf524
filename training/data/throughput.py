"""`paceline data generate --compare-transformers`: tokens per second against transformers' batched generate().

Both decode the same prompts with the same batch, lengths and temperatures, taking turns, so that a machine that slows
down slows both. Tokens after an end of text do not count. Knows nothing of files.
"""

import contextlib
import time

from ...spec.console import table
from ...spec.data.content import Unfit
from ...spec.engines.executors import choose
from ...spec.plan.step_times import wait_for
from ...spec.prompts import check_ids, left_padded, pad_id, templated_ids
from ...spec.serve.texts import Text, decode_texts
from ...spec.target.load import end_ids
from .answers import Sampling
from .prompts import Prompt

ROUNDS = 2  # each way decodes a part of the prompts, in turns


def compare_with_transformers(
    model, tokenizer, prompts: list[Prompt], temperatures, sampling: Sampling, **decoding
) -> float:
    """Print and return the ratio of Paceline's tokens per second to transformers', over all temperatures."""
    ids = []
    for prompt in prompts:
        with contextlib.suppress(Unfit):
            made = templated_ids(tokenizer, [{"role": "user", "content": prompt.turns[0]}])
            check_ids(made, model, sampling.max_new_tokens)
            ids.append(made)
    if not ids:
        raise ValueError("there is no prompt to compare with that the model can continue; give others")
    batch = decoding["batch"]
    each = sampling.max_new_tokens * len(ids) // ROUNDS
    # Settled once, so that a short warm-up runs what the long runs will.
    decoding = {**decoding, "executor": choose(decoding["executor"], model, each, True, False)}
    run = {
        "transformers": lambda part, t: _transformers(model, tokenizer, part, batch, t, sampling),
        "paceline": lambda part, t: _ours(model, part, t, sampling, decoding),
    }
    _transformers(model, tokenizer, ids[:batch], batch, temperatures[0], sampling)  # warm up
    for temperature in temperatures:
        for turn in range(ROUNDS):  # whatever is compiled for the sizes to come
            _ours(model, ids[turn::ROUNDS], temperature, sampling, decoding, new_tokens=2)
    rows, totals = [], {way: [0, 0.0] for way in run}
    for temperature in temperatures:
        spent = {way: [0, 0.0] for way in run}
        for turn in range(ROUNDS):
            part = ids[turn::ROUNDS]
            for way in run if turn % 2 else reversed(run):
                started = time.perf_counter()
                spent[way][0] += run[way](part, temperature) if part else 0
                spent[way][1] += time.perf_counter() - started
        for way, (tokens, seconds) in spent.items():
            totals[way][0] += tokens
            totals[way][1] += seconds
        rows.append(_row(f"{temperature:g}", spent))
    rows.append(_row("together", totals))
    print(table(["temperature", "transformers tok/s", "paceline tok/s", "ratio"], rows))
    print(f"{len(ids)} prompts, batch {batch}, at most {sampling.max_new_tokens} new tokens, {model.dtype}")
    rates = {way: tokens / seconds for way, (tokens, seconds) in totals.items()}
    return rates["paceline"] / rates["transformers"]


def _row(name: str, spent: dict) -> list[str]:
    transformers_rate, paceline_rate = (spent[way][0] / spent[way][1] for way in ("transformers", "paceline"))
    return [name, f"{transformers_rate:.1f}", f"{paceline_rate:.1f}", f"{paceline_rate / transformers_rate:.2f}x"]


def _transformers(model, tokenizer, ids: list[list[int]], batch: int, temperature: float, sampling: Sampling) -> int:
    """Decode in batches of similar length; returns the number of tokens, without those after an end of text."""
    options = {"do_sample": True, "temperature": temperature, "top_p": sampling.top_p, "top_k": 0}
    options = options if temperature > 0 else {"do_sample": False}
    ends, pad, tokens, ordered = end_ids(model), pad_id(tokenizer), 0, sorted(ids, key=len)
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        padded = left_padded(part, pad, model.device)
        out = model.generate(**padded, pad_token_id=pad, max_new_tokens=sampling.max_new_tokens, **options)
        for row in out[:, padded["input_ids"].shape[1] :].tolist():
            tokens += next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
    wait_for(model)
    return tokens


def _ours(model, ids: list[list[int]], temperature: float, sampling: Sampling, decoding: dict, new_tokens=None) -> int:
    """The number of tokens; with `new_tokens`, texts of the same room end after so many."""
    counts: list[int] = []
    new, room = new_tokens or sampling.max_new_tokens, sampling.max_new_tokens
    texts = [Text(prompt, new, number, len(prompt) + room) for number, prompt in enumerate(ids)]

    def finish(text: Text, tokens: list[int], failed: bool) -> None:
        counts.append(len(tokens))

    decode_texts(model, texts, finish, temperature=temperature, top_p=sampling.top_p, **decoding)
    return sum(counts)
