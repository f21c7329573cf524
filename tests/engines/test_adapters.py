"""PEFT adapters: their folders are targets, and a switch between calls is noticed by all that is kept."""

import copy
import json
import warnings

import paceline
import pytest
import torch
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaHeads
from paceline.spec import cli
from paceline.spec.engines import runs
from paceline.spec.engines.module_state import fingerprint
from paceline.spec.provenance import target_fingerprint
from paceline.spec.target.adapters import active_adapters, inside
from paceline.training.data.command import load_tokenizer

from support.kept_steps import IDS, assert_eager_text, decode
from support.models import tiny_llama
from support.sentences import sentence

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
GREEDY = dict(do_sample=False, max_new_tokens=12)
LORA = dict(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=4, lora_alpha=8, init_lora_weights=False)


def quiet(call, *args, **options):
    """What PEFT says about itself is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def wrapped(config, seed):
    model = tiny_llama(seed=9)
    torch.manual_seed(seed)
    return quiet(peft.get_peft_model, model, config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A base model and two adapters of it."""
    place = tmp_path_factory.mktemp("adapters")
    tiny_llama(seed=9).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    for seed, name in enumerate(("one", "two")):
        adapted = wrapped(peft.LoraConfig(base_model_name_or_path=str(place / "base"), **LORA), seed)
        adapted.peft_config["default"].base_model_name_or_path = str(place / "base")
        quiet(adapted.save_pretrained, place / name)
    return place


@pytest.fixture
def both(folders):
    """PEFT's model with both adapters."""
    model = quiet(peft.PeftModel.from_pretrained, tiny_llama(seed=9), folders / "one", adapter_name="one")
    quiet(model.load_adapter, folders / "two", adapter_name="two")
    return model.eval()


def texts_of(model):
    return quiet(model.generate, input_ids=IDS, pad_token_id=0, **GREEDY)


def test_an_adapter_folder_is_a_target(folders, both, capsys, tokenizer):
    for name in ("one", "two"):
        both.set_adapter(name)
        model, words = paceline.load_target(folders / name)
        assert type(model).__name__ == "LlamaForCausalLM" and not model.training and words("AB")["input_ids"]
        for drafter in (None, "ngram"):
            assert torch.equal(paceline.generate(model, IDS, drafter=drafter, **GREEDY), texts_of(both))
    tokens = []
    for name in ("base", "one", "two"):
        line = ["generate", "--model", str(folders / name), "--prompt", "ABAB", "--max-new-tokens", "8", "--json"]
        assert cli.main(line) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert len({tuple(text) for text in tokens}) == 3
    assert load_tokenizer(str(folders / "one"))[0]("AB")["input_ids"] == tokenizer("AB")["input_ids"]


@pytest.mark.parametrize("executor", ["eager", "tape"])
def test_switching_between_calls_is_noticed_by_kept_steps_packed_weights_and_prompts(both, tapes, executor):
    reuse, seen = paceline.PromptCache(), set()
    base = tiny_llama(seed=9)
    for name in ("one", "two", "one", None, "two"):
        if name is not None:
            both.set_adapter(name)
            expected = texts_of(both)
            assert torch.equal(decode(both, executor), expected)
            assert torch.equal(paceline.generate(both, IDS, reuse=reuse, executor="eager", **GREEDY), expected)
            with paceline.patch(both, "ngram", executor=executor) as patched:
                assert torch.equal(texts_of(both), expected) and patched.speculated == 1
            seen.add(tuple(expected[0].tolist()))
        else:
            with both.disable_adapter():
                assert torch.equal(decode(both, executor), texts_of(base))
                assert active_adapters(both) == ()
    assert len(seen) == 2
    both.merge_adapter()
    assert_eager_text(both, executor)
    assert torch.equal(decode(both, executor), expected), "two, in the weights themselves"
    both.unmerge_adapter()
    both.set_adapter("one")
    assert_eager_text(both, executor)
    assert not torch.equal(decode(both, executor), expected)
    quiet(both.delete_adapter, "two")
    assert_eager_text(both, executor)


@pytest.mark.slow
def test_a_compiled_step_serves_the_adapter_that_it_was_made_for(both, traced_only):
    for name in ("one", "two", "one"):
        both.set_adapter(name)
        assert torch.equal(decode(both, "compiled"), texts_of(both))
    runs.reset(inside(both))


def test_fingerprints_say_which_adapter_acts(folders, both, tmp_path):
    base, model = tiny_llama(seed=9), inside(both)
    prints = {name: target_fingerprint(paceline.load_target(folders / name)[0]) for name in ("one", "two")}
    assert len({*prints.values(), target_fingerprint(base)}) == 3
    weights = {}
    for name in ("one", "two"):
        both.set_adapter(name)
        assert target_fingerprint(model) == prints[name], "whatever it is called"
        assert target_fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == prints[name]
        weights[name] = fingerprint([model])
    both.set_adapter("one")
    assert fingerprint([model]) == weights["one"] != weights["two"]
    with both.disable_adapter():
        assert target_fingerprint(model) == target_fingerprint(base)


def test_heads_belong_to_the_adapter_that_they_were_made_for(folders, both, tmp_path):
    both.set_adapter("one")
    model = inside(both)
    MedusaHeads.make(HeadSettings("hydra", heads=2), model).save(tmp_path / "heads")
    made_for = json.loads((tmp_path / "heads" / "config.json").read_text())["paceline_target"]
    assert made_for["name"].endswith("+adapter one")
    for target in (both, paceline.load_target(folders / "one")[0]):
        text = paceline.generate(target, IDS, drafter=tmp_path / "heads", **GREEDY)
        assert torch.equal(text, texts_of(both))
    both.set_adapter("two")
    sentence(lambda: paceline.generate(both, IDS, drafter=tmp_path / "heads", **GREEDY), "+adapter one", "+adapter two")
    sentence(lambda: paceline.load_drafter(tmp_path / "heads", tiny_llama(seed=9)), "use a drafter made for it")


def test_an_adapter_that_brings_tokens(folders, tmp_path, tokenizer):
    model = tiny_llama(seed=9)
    model.resize_token_embeddings(70, mean_resizing=False)
    torch.manual_seed(3)
    config = peft.LoraConfig(modules_to_save=["embed_tokens", "lm_head"], **LORA)
    adapted = quiet(peft.get_peft_model, model, config).eval()
    config.base_model_name_or_path = str(folders / "base")
    quiet(adapted.save_pretrained, tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    loaded, _ = paceline.load_target(tmp_path / "grown")
    assert loaded.config.vocab_size == 70
    assert torch.equal(paceline.generate(loaded, IDS, drafter="ngram", **GREEDY), texts_of(adapted))


def changed(folders, tmp_path, **settings):
    """A copy of the folder of an adapter with other settings."""
    import shutil

    shutil.copytree(folders / "one", tmp_path / "changed", dirs_exist_ok=True)
    path = tmp_path / "changed" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return tmp_path / "changed"


def test_adapters_that_cannot_be_loaded_are_refused_in_a_sentence(folders, tmp_path, monkeypatch, capsys):
    refused = {
        "cannot be loaded: folder": dict(base_model_name_or_path=str(tmp_path)),
        "names no base_model_name_or_path": dict(base_model_name_or_path=None),
        "is for revision v2 of owner/model": dict(base_model_name_or_path="owner/model", revision="v2"),
        "does not fit": dict(r=5),
        "does not fit ": dict(target_modules=["q_proj", "v_proj", "up_proj", "down_proj", "k_proj"]),
        "an activated LoRA": dict(alora_invocation_tokens=[3, 4]),
    }
    for words, settings in refused.items():
        sentence(lambda settings=settings: paceline.load_target(changed(folders, tmp_path, **settings)), words)
    sentence(lambda: paceline.load_target(folders / "one", weights="q4"), "is of dense layers")
    (changed(folders, tmp_path) / "adapter_model.safetensors").rename(tmp_path / "changed" / "adapter_model.bin")
    sentence(lambda: paceline.load_target(tmp_path / "changed"), "pickles are not read")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "ABC"}\n' * 3)
    assert cli.main(["quantise", str(folders / "one"), "-o", str(tmp_path / "q"), "--calibrate", str(prompts)]) == 2
    assert "merge_and_unload" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence(lambda: paceline.load_target(folders / "one"), "pip install peft")


def test_adapters_that_are_more_than_layers_are_refused(folders, tmp_path):
    tuned = wrapped(peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3), 0)
    for training in (True, False):  # a wrapper is in training when it is made
        tuned.train(training)
        sentence(lambda: paceline.generate(tuned, IDS, **GREEDY), "is more than a part of the model's layers")
        assert tuned.training == training
    tuned.peft_config["default"].base_model_name_or_path = str(folders / "base")
    quiet(tuned.save_pretrained, tmp_path / "tuned")
    sentence(lambda: paceline.load_target(tmp_path / "tuned"), "is more than a part of the model's layers")
    activated = wrapped(peft.LoraConfig(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM", **LORA), 0)
    sentence(lambda: paceline.generate(activated, IDS, **GREEDY), "an activated LoRA", "merge it")
    with paceline.patch(activated, "ngram") as patched, pytest.warns(UserWarning, match="activated LoRA"):
        activated.generate(input_ids=IDS, **GREEDY)
    assert patched.speculated == 0
