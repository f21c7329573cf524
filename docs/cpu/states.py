"""What a chain of four guesses costs a target whose layers keep states, beside one of attention of the same size.

    python docs/cpu/states.py

For random models of 8 layers it prints the milliseconds of a forward and commit of one token and of a chain of four
behind its root, eagerly, the smallest of several in turn; and what states, and the inputs of nodes, take of memory.
"""

import argparse
import time

import torch
from paceline.spec.target.protocol import spans
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from transformers import AutoConfig, AutoModelForCausalLM, logging

SIZES = dict(
    vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
    num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {
    "attention": dict(model_type="qwen3"),
    "short convolution": dict(model_type="lfm2", layer_types=["conv", "conv", "conv", "full_attention"] * 2),
    "gated delta": dict(
        model_type="qwen3_5_text", layer_types=["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 3
        + ["full_attention"], linear_num_key_heads=6, linear_num_value_heads=12, linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "mamba-2": dict(
        model_type="bamba", attn_layer_indices=[3, 7], mamba_n_heads=24, mamba_d_head=64, mamba_d_state=64,
        mamba_n_groups=1, mamba_expand=2,
    ),
    "mamba-1": dict(
        model_type="jamba", attn_layer_offset=3, attn_layer_period=4, num_experts=1, num_experts_per_tok=1,
        mamba_d_state=16, mamba_expand=2,
    ),
}  # fmt: skip
PROMPT, CAPACITY = 256, 512


class Measured:
    """A model with a text, and its least seconds by the guesses of a step."""

    def __init__(self, options: dict):
        torch.manual_seed(0)
        options = SIZES | options
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.slots = SlotModel(self.model, 1, CAPACITY)
        text = torch.randint(3, 8000, (1, PROMPT + 1))
        for span in spans(text, torch.tensor([PROMPT + 1]), 128):
            self.slots.read(span)
        self.seconds = {0: [], 4: []}

    def step(self, guesses: int) -> None:
        tree = TokenTree.of(TreeShape.chain(guesses), "cpu")
        tokens, base = torch.randint(3, 8000, (1, guesses + 1)), torch.tensor([PROMPT])
        began = time.perf_counter()
        self.slots.forward_nodes(tokens, base, tree)
        self.slots.commit(base, tree.paths[:, -1], torch.zeros(1, dtype=torch.int64))  # none, so that steps are alike
        self.seconds[guesses].append(time.perf_counter() - began)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    measured = {name: Measured(options) for name, options in MODELS.items()}
    for _ in range(arguments.repeats + 2):
        for one in measured.values():
            for guesses in one.seconds:
                one.step(guesses)
    columns = (
        "layers",
        "parameters",
        "one token, ms",
        "chain of four, ms",
        "ratio",
        "beside attention",
        "states",
        "inputs",
    )
    print("|", " | ".join(columns), "|")
    print("|---|---|---|---|---|---|---|---|")
    shares = {name: min(one.seconds[4]) / min(one.seconds[0]) for name, one in measured.items()}
    for name, one in measured.items():
        states = one.slots.cache.states
        parts = [] if states is None else states.parts
        held, kept = sum(part.state.nbytes for part in parts), sum(t.nbytes for part in parts for t in part.kept)
        times = " | ".join(f"{min(one.seconds[guesses]) * 1e3:.1f}" for guesses in (0, 4))
        print(
            f"| {name} | {one.model.num_parameters() / 1e6:.0f} M | {times} | {shares[name]:.2f} | "
            f"{shares[name] / shares['attention']:.2f} | {held / 1e6:.2f} MB | {kept / 1e6:.2f} MB |"
        )


if __name__ == "__main__":
    main()
