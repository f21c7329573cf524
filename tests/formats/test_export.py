"""`paceline export` of draft models and Medusa heads, its advice, and what it refuses."""

import functools
import json
import shlex

import paceline
import pytest
import torch
from paceline.drafters.formats.engines import CHECKED, ENGINES, advise
from paceline.drafters.formats.export_order import weights_read
from paceline.drafters.medusa import MedusaHeads
from paceline.spec import cli
from paceline.spec.plan.trees import expected_tokens
from paceline.spec.tree import TreeShape
from paceline.training.objectives.draft_lm import DraftObjective
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.draft_lms import SIZES, build
from support.families import SUPPORTED
from support.families import build as build_family
from support.models import fitted_heads, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
P = [[0.8, 0.1], [0.7, 0.1], [0.6, 0.1], [0.5, 0.1]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def target(request):
    return tiny_llama(tie_word_embeddings=request.param)


def exporting(*arguments):
    return functools.partial(paceline.export_drafter, *arguments)


@pytest.fixture
def draft(target, tmp_path):
    """A draft model without the target's weights that knows 20 tokens, in a folder."""
    rows = [{"input_ids": torch.arange(20)[None], "loss_mask": torch.ones(1, 20)}]
    settings = dict(embeddings="target", head="target", known_tokens=20, save={"without_target_weights": True})
    torch.manual_seed(4)
    made = DraftObjective.build({"kind": "draft_lm", "sizes": SIZES, **settings}, target, rows)
    made.save(tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("to", ["vllm", "sglang", "transformers"])
def test_a_draft_model_is_completed(target, draft, tmp_path, tokenizer, to):
    done = paceline.export_drafter(draft, target, to, tmp_path / "out", tokenizer, "someone/target")
    read, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(61, (2, 9))
    drafter = paceline.load_drafter(draft, target)
    expected = drafter.model(input_ids=ids).logits  # of the known tokens
    logits = read(input_ids=ids).logits
    assert logits.shape[-1] == 61
    torch.testing.assert_close(logits[..., drafter.vocabulary], expected)
    rows = target.get_output_embeddings().weight
    assert torch.equal(read.get_output_embeddings().weight, rows), "the whole head"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name in config if "paceline" in name or name == "known_tokens"]
    assert config["vocab_size"] == 61
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours("AB")["input_ids"] == tokenizer("AB")["input_ids"]
    assert any("learned 20 tokens" in note for note in done.notes)
    method = {"vllm": "draft_model", "sglang": "STANDALONE", "transformers": "assistant_model"}[to]
    assert str(tmp_path / "out") in done.serve and method in done.serve
    assert done.tokens == 3 and any("has not been measured" in note for note in done.notes)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "out").iterdir()), "read by anyone"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in readme and all(note in readme for note in done.notes)


def test_a_draft_model_with_all_its_weights_stays_what_it_is(target, tmp_path):
    objective = build(target, sizes=SIZES)
    objective.save(tmp_path / "draft")
    paceline.export_drafter(tmp_path / "draft", target, "vllm", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("draft", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def medusa(file, config, hidden, head):
    """Logits (K, V) as Medusa v1 and TGI compute them."""
    tensors, logits = load_file(file), []
    for number in range(config["medusa_num_heads"]):
        x = hidden
        for block in range(config["medusa_num_layers"]):
            name = f"{number}.{block}.linear"
            x = x + F.silu(tensors.pop(f"{name}.weight") @ x + tensors.pop(f"{name}.bias"))
        shared = config.get("version") == "2"
        logits.append((head if shared else tensors.pop(f"{number}.{config['medusa_num_layers']}.weight")) @ x)
    assert not tensors, "every tensor has its place"
    return torch.stack(logits)


@pytest.mark.parametrize(
    "settings", [dict(known=40), dict(), dict(own_heads=True), dict(own_heads=True, blocks=2)], ids=str
)
def test_heads_are_in_medusas_layout(target, tmp_path, settings):
    heads = fitted_heads(target, "independent", steps=2, **settings)
    heads.save(tmp_path / "heads", torch.float32)
    done = paceline.export_drafter(tmp_path / "heads", target, "tgi", tmp_path / "out", target_name="someone/target")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    golden = {
        "medusa_num_heads": 3, "medusa_num_layers": settings.get("blocks", 1),
        "base_model_name_or_path": "someone/target",
    }  # fmt: skip
    assert config == golden | ({} if "own_heads" in settings else {"version": "2"}), "and no architectures"
    hidden = torch.randn(32)
    loaded = MedusaHeads.load(paceline.drafters.folder.read_folder(tmp_path / "heads"), target)
    expected = loaded.start(hidden)[0]  # (K, V')
    logits = medusa(tmp_path / "out" / "medusa_lm_head.safetensors", config, hidden, target.lm_head.weight)
    torch.testing.assert_close(logits[:, loaded.vocabulary], expected, rtol=1e-5, atol=1e-5)
    assert "vLLM has dropped" in done.notes[0] and "SGLang has none" in done.notes[0]
    assert any("40 tokens" in note for note in done.notes) == ("known" in settings)
    assert "--speculate 3" in done.serve


REFUSED = [
    (dict(mode="hydra"), "tgi", "mode: independent"),
    (dict(mode="markov"), "tgi", "mode: independent"),
    (dict(), "vllm", "--to tgi"),
    (dict(), "transformers", "--to tgi"),
    (dict(blocks=2), "tgi", "objective.blocks: 1"),
    (dict(own_heads=True, known=40), "tgi", "without objective.known_tokens"),
]


@pytest.mark.parametrize(("settings", "to", "words"), REFUSED)
def test_heads_that_no_engine_runs_are_refused(tmp_path, settings, to, words):
    target = tiny_llama()
    heads = fitted_heads(target, **{"mode": "independent", "steps": 1, **settings})
    heads.save(tmp_path / "heads")
    assert sentence(exporting(tmp_path / "heads", target, to, tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_what_has_no_form_or_place_is_refused(target, draft, tmp_path):
    target.save_pretrained(tmp_path / "model")
    (tmp_path / "there").mkdir()
    cases = [
        (draft, "speculators", "new", "--to vllm, sglang or transformers"),
        (draft, "tgi", "new", "TGI runs none"),
        (draft, "ollama", "new", "choose one of vllm"),
        (draft, "vllm", "there", "is there already"),
        ("ngram", "vllm", "new", "no weights to export"),
        ("auto", "vllm", "new", "is not one drafter"),
        (f"{draft}+ngram", "vllm", "new", "is not one drafter"),
        (tmp_path / "model", "vllm", "new", "an ordinary model"),
        (tmp_path / "there", "vllm", "new", "config.json"),
    ]
    for drafter, to, folder, words in cases:
        assert sentence(exporting(drafter, target, to, tmp_path / folder), words)
    assert not (tmp_path / "new").exists()
    assert sentence(exporting(draft, tiny_llama(seed=5), "vllm", tmp_path / "new"), "was made for target")


def test_a_folder_that_reads_differently_is_not_left_behind(target, draft, tmp_path, monkeypatch):
    """As if a number were lost on the way to the disk."""
    from paceline.drafters.formats import export_draft_lm

    def damaged(model):
        broken = type(model)(model.config)
        broken.load_state_dict(model.state_dict())
        broken.model.norm.weight.data[0] += 1
        return broken

    monkeypatch.setattr(export_draft_lm, "as_ordinary", damaged)
    assert sentence(exporting(draft, target, "vllm", tmp_path / "out"), "does not give the drafter's logits")
    assert not (tmp_path / "out").exists()


# The number of draft tokens.


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9])
def test_the_advice_is_the_best_chain_of_the_stated_model(share):
    """Every length tried, by the sum of products of p."""

    def speed(length):
        tokens = expected_tokens(P, TreeShape.chain(length))
        return tokens / (1 + length * (share + CHECKED))

    best = max(range(5), key=speed)
    advice = advise(P, share)
    assert advice.tokens == max(best, 1)
    if best:
        assert f"{speed(best):.2f} times plain decoding" in advice.why
    else:
        assert "none pays" in advice.why
    assert advise(P, share, deepest=2).tokens <= 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_token_reads_the_experts_that_it_goes_to(family):
    half = build_family(family, {**SUPPORTED[family], "num_experts_per_tok": 2})
    whole = build_family(family, {**SUPPORTED[family], "num_experts_per_tok": 4})
    experts = sum(part.numel() for name, part in whole.named_parameters() if "experts" in name)
    everything = sum(part.numel() for part in whole.parameters()) - 64 * 32  # embeddings
    assert weights_read(whole) == everything and weights_read(half) == everything - experts // 2


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_read_where_they_are_the_head(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    layers = sum(part.numel() for part in model.model.layers.parameters()) + 32  # and the final norm
    assert weights_read(model) == layers + 61 * 32


@pytest.mark.parametrize("to", ["vllm", "speculators"])
def test_the_command_is_typed_as_it_stands(to, tmp_path):
    engine = ENGINES[to]
    words = shlex.split(engine.command("eagle3", str(tmp_path), "it's here", 4))
    config = {"method": "eagle3", "model": "it's here", "num_speculative_tokens": 4}
    assert words[:3] == ["vllm", "serve", str(tmp_path)] and json.loads(words[-1]) == config
    if to == "speculators":  # a hub id is found in the folder
        assert shlex.split(engine.command("eagle3", "someone/target", "out", 4)) == ["vllm", "serve", "out"]


def test_the_command_line(target, draft, tmp_path, capsys, tokenizer):
    target.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (draft / "acceptance.json").write_text(json.dumps({"p": P}))
    where = ["--model", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["export", str(draft), "--to", "vllm", *where]) == 0
    said = capsys.readouterr().out
    (command,) = [line for line in said.splitlines() if line.startswith("    ")]
    words = shlex.split(command)
    config = json.loads(words[-1])
    assert words[:3] == ["vllm", "serve", str(tmp_path / "model")] and config["model"] == str(tmp_path / "out")
    assert "the planner's choice" in said and "tokens per step" in said and "not that of plain decoding" in said
    assert cli.main(["export", str(draft), "--to", "vllm", *where]) == 2
    assert "is there already" in capsys.readouterr().err
