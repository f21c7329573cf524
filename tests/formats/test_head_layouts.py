"""Medusa heads and MLP speculators of others give the logits of a slow reference, in every layout."""

import paceline
import pytest
import torch
from formats.published import (
    WIDTH,
    V,
    drawn,
    medusa,
    medusa_logits,
    mlp_logits,
    mlp_speculator,
    norm,
    stepping_target,
    write,
)  # fmt: skip
from paceline.drafters.formats.checkpoint import open_checkpoints
from paceline.drafters.formats.detect import detect
from paceline.drafters.formats.medusa import load_heads
from paceline.drafters.formats.mlp_speculator import load_speculator

from support.sentences import sentence

CONFIG = {
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "base_model_name_or_path": "someone/target",
}  # as in real files


@pytest.fixture(scope="module")
def stepping():
    return stepping_target(attention=0.0)


def of_engine(tensors):
    """The authors' names for a file in an engine's layout."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        renamed[f"{parts[1]}.{parts[3]}.linear.{parts[4]}" if parts[0] == "blocks" else f"{parts[1]}.2.weight"] = tensor
    return renamed


def named(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


MEDUSA = {
    "authors": (medusa, lambda t: t),
    "five heads": (lambda: medusa(heads=5), lambda t: t),
    "without heads (2)": (lambda: medusa(own=False), lambda t: t),
    "of a whole model": (lambda: named("medusa_head.", medusa()) | {"model.embed_tokens.weight": drawn(V, WIDTH)},
                         lambda t: {name.removeprefix("medusa_head."): x for name, x in t.items()}),
    "vllm": (lambda: medusa(engine=True), of_engine),
    "vllm without biases": (lambda: medusa(engine=True, bias=False), of_engine),
}  # fmt: skip


def loaded(folder, target, form="Medusa"):
    (checkpoint,) = open_checkpoints(folder)
    assert detect(checkpoint.config(), checkpoint.files) == form
    return (load_heads if form == "Medusa" else load_speculator)(checkpoint, target)


@torch.no_grad()
@pytest.mark.parametrize("layout", MEDUSA)
def test_medusa_logits_are_the_references(layout, target, tmp_path):
    make, by_authors = MEDUSA[layout]
    tensors = make()
    heads = loaded(write(tmp_path, tensors, CONFIG, "medusa_lm_head.safetensors"), target)
    count = len({name.split(".")[0] for name in by_authors(tensors) if name[0].isdigit()})
    assert heads.settings.heads == count and heads.settings.blocks == 2
    hidden = torch.randn(6, WIDTH)
    for head in range(count):
        expected = medusa_logits(by_authors(tensors), hidden, target.lm_head.weight, head=head)
        got = heads.follow(heads.start(hidden), head, torch.zeros(6, head + 1, dtype=torch.int64))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_engines_token_map_and_shared_head(target, tmp_path):
    ids = torch.randperm(V)[:20]
    tensors = medusa(engine=True, known=20) | {"token_map": ids}
    heads = loaded(write(tmp_path / "map", tensors, {}), target)
    hidden, order = torch.randn(4, WIDTH), ids.argsort()
    assert torch.equal(heads.vocabulary, ids[order]) and heads.trimmed
    got = heads.follow(heads.start(hidden), 1, torch.zeros(4, 2, dtype=torch.int64))
    tensors.pop("token_map")
    expected = medusa_logits(of_engine(tensors), hidden, None, head=1)[:, order]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for rows, own in ((target.lm_head.weight.detach().clone(), False), (drawn(V, WIDTH), True)):
        heads = loaded(
            write(tmp_path / str(own), medusa(engine=True, own=False) | {"lm_head.weight": rows}, {}), target
        )
        assert heads.settings.own_heads is own and heads.settings.heads == 3
        if own:
            assert all(torch.equal(part, rows) for part in heads.head_weight)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale_input", [False, True])
def test_mlp_speculator_logits_are_the_references(tied, scale_input, target, tmp_path):
    tensors = mlp_speculator(tied=tied)
    config = {"model_type": "mlp_speculator", "n_predict": 3, "scale_input": scale_input, "tie_weights": tied}
    heads = loaded(write(tmp_path, tensors, config), target, "MLPSpeculator")
    assert heads.settings.heads == 3
    hidden, paths = torch.randn(2, 1, WIDTH), torch.randint(0, V, (2, 4, 3))  # of two rows, four nodes
    for depth in range(3):
        got = heads.follow(heads.start(hidden), depth, paths[..., : depth + 1])
        for row in range(2):
            for node in range(4):
                path = paths[row, node, : depth + 1].tolist()
                expected = mlp_logits(tensors, hidden[row, 0], path, scale_input=scale_input)
                torch.testing.assert_close(got[row, node], expected, atol=1e-5, rtol=1e-5)


def right_medusa(stepping):
    """The first head says what comes two tokens later."""
    tensors = medusa(heads=2, blocks=1)
    tensors = {name: torch.zeros_like(x) if "linear" in name else x for name, x in tensors.items()}
    tensors["0.1.weight"] = stepping.lm_head.weight.detach().roll(7, 0)
    return tensors


def right_speculator():
    """Says x + 7 after x."""
    tensors = mlp_speculator(guesses=2)
    for i in range(2):
        tensors[f"speculator.proj.{i}.weight"].zero_()
        tensors[f"speculator.ln.{i}.weight"], tensors[f"speculator.ln.{i}.bias"] = torch.ones(20), torch.zeros(20)
        states = tensors[f"speculator.emb.{i}.weight"]
        states = torch.nn.functional.gelu(states / states.pow(2).mean(-1, keepdim=True).sqrt())
        tensors[f"speculator.head.{i}.weight"] = (states / states.norm(dim=-1, keepdim=True)).roll(7, 0)
    return tensors


def test_they_draft_and_the_text_is_the_targets(stepping, tmp_path):
    prompt = torch.tensor([[5, 9, 2], [1, 1, 8]])
    truth = stepping.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    write(tmp_path / "medusa", right_medusa(stepping), CONFIG, "medusa_lm_head.safetensors")
    write(tmp_path / "mlp", right_speculator(), {"model_type": "mlp_speculator", "n_predict": 2})
    for name, most in (("medusa", 1.85), ("mlp", 2.6)):
        generator = torch.get_rng_state()
        drafter = paceline.load_drafter(tmp_path / name, stepping)
        assert torch.equal(torch.get_rng_state(), generator)
        options = dict(do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
        out = paceline.generate(stepping, prompt, drafter=drafter, tree="2x1", **options)
        assert torch.equal(out.sequences, truth) and drafter.name == name
        assert out.trace.summary()["tokens_per_step"] > most
    assert drafter.traits.kind == "" and drafter.traits.deepest == 2


def test_untrained_ones_are_refused(stepping, tmp_path):
    config = CONFIG | {"base_model_name_or_path": "someone/else"}
    for name, tensors in (("medusa", medusa()), ("mlp", mlp_speculator())):
        folder = write(tmp_path / name, tensors, config)
        words = ("no more than by chance: it was made for another target, and its config names someone/else",)
        sentence(lambda folder=folder: paceline.load_drafter(folder, stepping), *words)


def changed(tensors, **changes):
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (lambda: changed(medusa(), **{"1.1.linear.weight": None}), {}, "lacks the tensor '1.1.linear.weight'"),
        (lambda: changed(medusa(), **{"1.1.linear.bias": None, "1.1.linear.b": drawn(WIDTH)}), {},
         "lacks the tensor '1.1.linear.bias' and has '1.1.linear.b', which it has no place for"),
        (lambda: changed(medusa(), **{"2.2.weight": None}), {}, "lacks the tensor '2.2.weight'"),
        (lambda: changed(medusa(), extra=drawn(3)), {}, "has a tensor 'extra', which its format has no place for"),
        (lambda: changed(medusa(), **{"0.0.linear.weight": drawn(WIDTH, 9)}), {},
         "'0.0.linear.weight' has shape [32, 9], and [32, 32] fits"),
        (lambda: medusa(known=70), {}, "'0.2.weight' has shape [70, 32], and [61, 32] fits"),
        (lambda: medusa(engine=True) | {"token_map": torch.tensor([1, 1])}, {}, "'token_map' is no list of tokens"),
        (lambda: medusa(engine=True) | {"token_map": torch.tensor([1, 99])}, {}, "drafts token 99"),
        (lambda: changed(mlp_speculator(), **{"speculator.ln.1.bias": None}), {}, "lacks the tensor 'ln.1.bias'"),
        (lambda: mlp_speculator(tied=True), {"n_predict": "3"}, "n_predict='3'"),
        (lambda: changed(mlp_speculator(), **{"speculator.proj.0.weight": drawn(20, 64)}), {},
         "'proj.0.weight' has shape [20, 64], and [20, 32] fits"),
        (lambda: changed(mlp_speculator(), **{"speculator.emb.0.weight": norm(4)}), {}, "'emb.0.weight' has shape [4]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(target, tmp_path, tensors, config, words):
    folder = write(tmp_path / "drafter", tensors(), config)
    sentence(lambda: paceline.load_drafter(folder, target), words, str(folder))
