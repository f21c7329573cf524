"""Weights that are elsewhere: on disk, on no device at all, or fetched before each layer by a toy target."""

from dataclasses import replace

import paceline
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from paceline.drafters.medusa import MedusaDrafter
from paceline.spec.engines.executors import Compiled, Eager
from paceline.spec.proposal import NoDrafter
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TreeShape

from support.engines import PROMPT, engine_of, request, texts_of
from support.models import fitted_heads, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)


def test_weights_that_are_nowhere_are_told_from_offloaded_ones(ids, truth, tmp_path):
    with torch.device("meta"):
        nowhere = tiny_llama(vocab=64)
    sentence(lambda: paceline.generate(nowhere, ids, **GREEDY), "on the meta device", "from_pretrained")
    half = tiny_llama(vocab=64)
    half.lm_head.to("meta")
    sentence(lambda: paceline.generate(half, ids, **GREEDY), "on the meta device")
    for offload in (cpu_offload, lambda model, **device: disk_offload(model, str(tmp_path / "all"), **device)):
        model = tiny_llama(vocab=64)
        offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model.generate(ids, **GREEDY), truth)
        sentence(lambda model=model: paceline.generate(model, ids, **GREEDY), "offloaded", "load it onto one device")


def test_a_target_of_which_a_layer_is_on_disk_is_decoded(ids, truth, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.0"] = "disk"
    model = dispatch_model(tiny_llama(vocab=64), places, "cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(paceline.generate(model, ids, drafter="ngram", **GREEDY), truth)


class Fetched(SlotModel):
    """Before a layer runs its weights are fetched, and afterwards they are gone."""

    def __init__(self, model, batch, capacity, taps=()):
        super().__init__(model, batch, capacity, taps)
        self.traits = replace(self.traits, static=False)
        self.fetched: list[int] = []
        for number, layer in enumerate(model.model.layers):
            store = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
            layer.register_forward_pre_hook(lambda layer, args, n=number, s=store: self.fetch(layer, n, s))
            layer.register_forward_hook(lambda layer, args, out: self.drop(layer))
            self.drop(layer)

    def fetch(self, layer, number, store):
        self.fetched.append(number)
        for name, parameter in layer.named_parameters():
            parameter.data = store[name].clone()

    def drop(self, layer):
        for parameter in layer.parameters():
            parameter.data = torch.empty(0)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_target_fetches_its_weights_before_each_layer(temperature):
    requests = [request(PROMPT, 9, 1), request(PROMPT[:3], 6, 2)]
    drafter, shape = MedusaDrafter(fitted_heads(tiny_llama(), "hydra", steps=5)), TreeShape.parse("3x2")
    resident = engine_of(SlotModel(tiny_llama(), 2, 64), NoDrafter(), TreeShape.chain(0), temperature)
    target = Fetched(tiny_llama(), 2, 64, drafter.traits.taps)
    engine = engine_of(target, drafter, shape, temperature)
    truth, _ = texts_of(Eager(resident), requests)
    texts, steps = texts_of(Eager(engine), requests)
    assert texts == truth and all(parameter.numel() == 0 for parameter in target.model.model.layers.parameters())
    assert target.fetched == [0, 1] * (3 + steps), "three spans of the prompts, and the steps"
    with pytest.raises(ValueError, match="executor='compiled' cannot take this step, in which the target waits"):
        Compiled(engine)
