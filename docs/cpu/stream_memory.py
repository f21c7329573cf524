"""A random model that is larger than the memory it decodes in: made layer by layer, repacked, and decoded, each by a
process of its own whose peak of resident memory is printed.

    python docs/cpu/stream_memory.py FOLDER --resident 450MB --limit 1GB

The model has 1.5 billion parameters, in layers of Qwen2.5-1.5B's sizes, 3 GB in bfloat16. Fails where decoding takes
more than the limit, or a tenth more than what was announced when the model was loaded: the process as it was then, the
weights in memory, and what a prompt takes while it is read.
"""

import argparse
import contextlib
import io
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = dict(
    hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, num_hidden_layers=30,
    vocab_size=65536, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


def make(folder, **sizes):
    """Write a random model of Qwen2's kind, one layer in memory at a time."""
    from paceline.spec.stream.source import skeleton
    from transformers import Qwen2Config

    config = Qwen2Config(**{**SIZES, **sizes}, dtype="bfloat16", eos_token_id=None, pad_token_id=0)
    config.architectures = ["Qwen2ForCausalLM"]
    folder.mkdir(parents=True)
    groups = {}
    for name, parameter in skeleton(config, torch.bfloat16).named_parameters():
        groups.setdefault(name.split(".layers.")[-1].split(".")[0] if ".layers." in name else name, {})[name] = (
            parameter
        )
    index = {}
    torch.manual_seed(0)
    for number, tensors in enumerate(groups.values()):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        save_file({name: random(each) for name, each in tensors.items()}, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)


def random(like):
    if like.ndim < 2:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    made = torch.empty(like.shape, dtype=torch.bfloat16)
    for rows in made.split(4096):
        rows.copy_(torch.randn(rows.shape) * 0.02)
    return made


def repack(folder, resident):
    import paceline

    paceline.load_target(folder, "bfloat16", "cpu", with_tokenizer=False, stream="disk", resident=resident)


def decode(folder, resident, tokens, prompt):
    import paceline
    from paceline.spec.stream.streamer import streamer_of

    with contextlib.redirect_stderr(io.StringIO()) as heard:
        model, _ = paceline.load_target(
            folder, "bfloat16", "cpu", with_tokenizer=False, stream="disk", resident=resident
        )
    sys.stderr.write(heard.getvalue())
    reading, more = re.search(r"(\d+\.\d+) GB while a long prompt.* (\d+) MB more", heard.getvalue()).groups()
    announced = 1e9 * float(reading) + 1e3 * float(more) * (prompt + tokens)
    streamer, begun = streamer_of(model), time.perf_counter()
    ids = 3 + torch.arange(prompt)[None] % 60000
    paceline.generate(model, ids, drafter="ngram", max_new_tokens=tokens, do_sample=False)
    record, seconds = streamer.record, time.perf_counter() - begun
    return {
        "resident_bytes": streamer.about.resident_bytes, "announced": announced, "seconds": seconds,
        "forwards": record.forwards, "waited_seconds": record.waited_seconds, "bytes_read": record.bytes_read,
        "bandwidth": record.bandwidth,
    }  # fmt: skip


def apart(*arguments):
    """Run a part in a process of its own; what it says of itself."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resident", default="450MB")
    parser.add_argument("--limit", default="1GB")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1200, help="its tokens")
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--part", choices=["make", "repack", "decode"])
    args = parser.parse_args()
    if args.part is not None:
        steps = {
            "make": lambda: make(args.folder, num_hidden_layers=args.layers),
            "repack": lambda: repack(args.folder, args.resident),
            "decode": lambda: decode(args.folder, args.resident, args.tokens, args.prompt),
        }
        said = steps[args.part]() or {}
        print(json.dumps({**said, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    from paceline.spec.stream.budget import bytes_of

    options = ["--resident", args.resident, "--tokens", args.tokens, "--prompt", args.prompt]
    options += ["--layers", args.layers]
    for part in ("make", "repack", "decode"):
        if part != "make" or not args.folder.exists():
            said = apart(args.folder, "--part", part, *options)
            print(f"{part}: peak of resident memory {said['peak'] / 1e9:.3f} GB", flush=True)
    weights, waited = f"{said['resident_bytes'] / 1e9:.3f}", f"{said['waited_seconds']:.1f} s waiting"
    print(
        f"announced {said['announced'] / 1e9:.2f} GB, of it weights {weights}; {said['forwards']} forwards in ", end=""
    )
    print(f"{said['seconds']:.1f} s, of them {waited}; {said['bandwidth'] / 1e9:.2f} GB/s while reading")
    if said["peak"] > min(1.1 * said["announced"], bytes_of(args.limit)):
        sys.exit("decoding took more than that, or than the limit")


if __name__ == "__main__":
    main()
