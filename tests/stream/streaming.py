"""Tiny models streamed from the disk, with as many layers fetched as a test wants."""

import copy
import functools

import paceline
import torch
from paceline.spec.files import cache_folder
from paceline.spec.stream.budget import BUFFERS, spread
from paceline.spec.stream.forms import Device
from paceline.spec.stream.load import load_streamed
from paceline.spec.stream.origin import Asked, origin_of
from paceline.spec.stream.repack import RESIDENT, folder_of, repacked
from paceline.spec.stream.streamer import streamer_of
from paceline.spec.target.weights import Weights
from transformers import AutoConfig, AutoModelForCausalLM

USUAL = str(cache_folder())  # where our kernels are kept, once they are compiled: tests have other folders
LAYERS = 6
FAMILIES = {
    "llama": {},
    "qwen2": dict(attention_bias=True, tie_word_embeddings=True),
    "gemma3_text": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 3),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
}
SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    max_position_embeddings=256,
)  # fmt: skip


def saved(family, path, dtype="float32", **sizes):
    """The folder of a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms too, and biases
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


@functools.cache
def resident(path, dtype="float32", weights="16"):
    """The model of `path` in memory."""
    return paceline.load_target(path, dtype, "cpu", with_tokenizer=False, weights=weights)[0]


def asked_for(path, dtype="float32", weights="16"):
    return Asked(str(path), Weights(weights), getattr(torch, dtype), torch.device("cpu"), False)


def folder_for(path, dtype="float32", weights="16"):
    """The folder that the model of `path` is repacked into."""
    asked = asked_for(path, dtype, weights)
    origin = origin_of(asked)
    return folder_of(origin, Device(asked.device, origin.dtype))


def budget(path, fetched, dtype="float32", weights="16", buffers=BUFFERS):
    """The bytes with which exactly `fetched` layers are fetched."""
    asked = asked_for(path, dtype, weights)
    origin = origin_of(asked)
    device = Device(asked.device, origin.dtype)
    folder = folder_of(origin, device)
    said = repacked(origin, folder, device, str(path))
    sizes = [folder.record(name).size for name in said["layers"]]
    chosen = spread(fetched, len(sizes)) if fetched else ()
    kept = sum(size for number, size in enumerate(sizes) if number not in chosen)
    return folder.record(RESIDENT).size + kept + buffers * max((sizes[number] for number in chosen), default=0)


def streamed(path, fetched=LAYERS, dtype="float32", weights="16", buffers=BUFFERS, kind="disk"):
    """The model of `path`, of which `fetched` layers are fetched for each forward: none, or more than `buffers`."""
    size = budget(path, fetched, dtype, weights, buffers)
    model = load_streamed(asked_for(path, dtype, weights), kind, size, str(path), buffers=buffers)[0]
    about = streamer_of(model).about
    assert about.layers - about.resident_layers == fetched
    return model


def text(model, ids, **options):
    """What `generate` writes by eager steps, and the logits of every token."""
    settings = dict(max_new_tokens=12, do_sample=False, executor="eager", output_logits=True)
    out = paceline.generate(model, ids, return_dict_in_generate=True, **{**settings, **copy.copy(options)})
    return out.sequences, torch.stack(out.logits)


def assert_same(model, other, ids, **options):
    """Both write the same, from logits of the same bits."""
    (text_of_one, logits), (text_of_other, others) = (text(each, ids, **options) for each in (model, other))
    assert torch.equal(text_of_one, text_of_other) and torch.equal(logits, others)
