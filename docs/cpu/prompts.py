"""How long prompts are read, beside transformers' own forward over the same tokens with a DynamicCache.

python docs/cpu/prompts.py [--model smollm2-135m] [--dtype bfloat16] [--weights 16] [--turns 5] [--profile]

Both read in turns, each time into a new cache and without logits but for the last token; medians. The batch of four
holds texts of a quarter, a half, three quarters and all of the length, which transformers pads. Tokens are random.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from paceline import load_target
from paceline.spec.engines.executors import Eager
from paceline.spec.engines.runs import RunSpec, make_engine
from paceline.spec.proposal import NoDrafter
from paceline.spec.request import Request
from paceline.spec.rows import Rows
from paceline.spec.sampling import Sampler, warpers
from paceline.spec.target.cache import SlotCache
from paceline.spec.target.slots import cache_argument
from paceline.spec.tree import TreeShape
from transformers import DynamicCache, PreTrainedModel

PLAIN = TreeShape.chain(0)


def ours(model: PreTrainedModel, texts: list[list[int]]) -> Callable[[], None]:
    """Reads all tokens of `texts` into new slots of an engine."""
    blank = torch.zeros(len(texts), 0, dtype=torch.long)
    sampler = Sampler(warpers(0.0, 1.0), False, blank, blank.sum(1))
    longest = max(map(len, texts))
    spec = RunSpec(PLAIN, "match", "eager", len(texts), longest + 64, 1, False, sampler.signature).settled("eager")
    requests = {row: Request([*text, 0], 8, (0, row)) for row, text in enumerate(texts)}  # the last one is not read
    executor = Eager(make_engine(model, NoDrafter(), spec, sampler))

    def read() -> None:
        executor.engine.target.cache = SlotCache(len(texts), spec.capacity, model.config.num_hidden_layers)
        Rows(executor, 512).admit(requests)

    return read


def theirs(model: PreTrainedModel, texts: list[list[int]]) -> Callable[[], None]:
    """Reads all tokens of `texts` into a DynamicCache."""
    longest, name = max(map(len, texts)), cache_argument(model)
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    given = {} if mask.all() else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def read() -> None:
        model(input_ids=ids, logits_to_keep=1, **{name: DynamicCache(config=model.config)}, **given)

    return read


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def profiled(work: Callable[[], None]) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=50)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", default="16")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[30, 120, 500, 2000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--profile", action="store_true", help="the costliest operators of both")
    args = parser.parse_args()
    model, _ = load_target(args.model, dtype=args.dtype, weights=args.weights, with_tokenizer=False)
    draw = torch.Generator().manual_seed(0)
    print(f"{args.model}, {model.dtype}, weights {args.weights}, {torch.get_num_threads()} threads, ms")
    print("tokens  batch    ours  theirs  theirs/ours (least, most)")
    for tokens in args.tokens:
        for batch in args.batches:
            lengths = [max(1, tokens * (row + 1) // batch) for row in range(batch)]
            texts = [torch.randint(1000, (length,), generator=draw).tolist() for length in lengths]
            ways = ours(model, texts), theirs(model, texts)
            for way in ways:
                way()
            times = [[seconds(way) for way in ways] for _ in range(args.turns)]
            mine, other = (1000 * statistics.median(column) for column in zip(*times))
            ratios = sorted(b / a for a, b in times)
            middle = statistics.median(ratios)
            print(
                f"{tokens:6} {batch:6} {mine:7.1f} {other:7.1f}  {middle:.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})",
                flush=True,
            )
            if args.profile:
                print(*map(profiled, ways), sep="\n")


if __name__ == "__main__":
    main()
