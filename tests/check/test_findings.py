"""What a check finds: a sound model holds in every part, rounding is told from faults."""

from dataclasses import replace

import pytest
import torch
from paceline.drafters.untrained import untrained
from paceline.spec.bench.divergence import rounding_can_swap
from paceline.spec.check import shapes, verdict
from paceline.spec.check.lossless import DRAFTS
from paceline.spec.check.record import FAILS, HOLDS, NOT_HERE, Check, Finding, Part
from paceline.spec.check.steps import SIZES
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TreeShape

from support.checks import parts, run
from support.models import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_a_check_of_a_sound_model_holds_in_every_part(folder, tmp_path, capsys, short):
    code, check = run(folder, tmp_path, "--markdown", str(tmp_path / "check.md"))
    assert code == 0
    found = parts(check)
    assert {name: part["verdict"] for name, part in found.items()} == dict.fromkeys(found, HOLDS)
    texts = [f for f in found["lossless"]["findings"] if f["what"]["promise"] == "same text"]
    assert len(texts) == 4 * len(DRAFTS) and all(f["figures"]["parted"] == 0 for f in texts)
    drafted = [f["figures"]["tokens_per_step"] for f in texts if f["what"]["drafter"] == "draft model"]
    assert max(drafted) > 1.5, "drafts were accepted, so that more than the root was at stake"
    steps = [f for f in found["steps"]["findings"] if "nodes" in f["what"]]
    assert {(f["what"]["rows"], f["what"]["nodes"]) for f in steps} == set(SIZES)
    for finding in steps:
        figures = finding["figures"]
        assert figures["step_seconds"] > 0 and figures["forward_seconds"] > 0 and figures["of_roofline"] > 0
        assert figures["of_plain"] == pytest.approx(figures["step_seconds"] / steps[0]["figures"]["step_seconds"])
    drafting = {f["what"]["drafter"] for f in found["steps"]["findings"] if "drafter" in f["what"]}
    assert drafting == {"ngram", "hydra", "medusa", "draft model"}
    assert len(found["worth"]["findings"]) == 4 * 3
    assert found["training"]["findings"][0]["figures"]["tokens_per_second"] > 0
    assert check["units"]["step_seconds"] == "s" and check["command"].startswith("paceline")
    assert check["versions"]["torch"] == torch.__version__ and check["subject"]["dtype"] == "float32"
    assert check["subject"]["parameters"] == sum(p.numel() for p in tiny_llama(vocab=97).parameters())
    said = capsys.readouterr()
    assert "of weights in float32, about" in said.err and said.out.strip().splitlines()[-1] == check["sentence"]
    assert check["sentence"].startswith("Lossless here: 22 of 22 checks hold")
    assert "| same text | eager |" in (tmp_path / "check.md").read_text()


def test_nan_weights_are_named(folder, tmp_path, short):
    model = tiny_llama(vocab=97)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    code, check = run(tmp_path / "nan", tmp_path)
    found = parts(check)
    assert code == 1 and "NaN logits" in found["lossless"]["findings"][0]["reason"]
    assert "relative error nan" in found["training"]["findings"][0]["reason"]
    timed = [f for f in found["steps"]["findings"] if "nodes" in f["what"]]
    assert len(timed) == len(SIZES) and {f["verdict"] for f in timed} == {HOLDS}, "NaN takes as long as a number"


@pytest.mark.slow
def test_a_vocabulary_of_five_words_can_be_checked(tmp_path, short):
    tiny_llama(vocab=5, bos_token_id=1, pad_token_id=0).save_pretrained(tmp_path / "five")
    code, check = run(tmp_path / "five", tmp_path)
    texts = [f for f in parts(check)["lossless"]["findings"] if f["what"]["promise"] == "same text"]
    assert code == 0 and {f["verdict"] for f in texts} == {HOLDS}


def noise_on_many_nodes(monkeypatch):
    """Forwards of several nodes are off by what rounding never is, which would excuse any text that parts."""
    forward_nodes = SlotModel.forward_nodes

    def noisy(self, tokens, base, tree, nodes=None):
        seen = forward_nodes(self, tokens, base, tree, nodes)
        if tokens.shape[1] == 1:
            return seen
        noise = 0.2 * torch.randn(seen.logits.shape, generator=torch.Generator().manual_seed(1))
        return replace(seen, logits=seen.logits + noise)

    monkeypatch.setattr(SlotModel, "forward_nodes", noisy)


@pytest.mark.slow
def test_noise_is_not_taken_for_rounding(tmp_path, monkeypatch, short):
    config = tiny_llama(vocab=97).config
    model = shapes.random_model(config, torch.bfloat16, torch.device("cpu"))
    model.save_pretrained(tmp_path / "bf16")
    assert run(tmp_path / "bf16", tmp_path, "--dtype", "bfloat16")[0] == 0
    noise_on_many_nodes(monkeypatch)
    code, check = run(tmp_path / "bf16", tmp_path, "--dtype", "bfloat16")
    failing = [f for f in parts(check)["lossless"]["findings"] if f["verdict"] == FAILS]
    assert code == 1 and "where rounding explains" in failing[0]["reason"]


def test_nothing_compared_is_not_called_lossless():
    about = [Finding({"promise": "self-test of the target"}), Finding({"promise": "same text"}, NOT_HERE, "no time")]
    empty = [Part(name, name) for name in ("machine", "steps", "worth", "training")]
    check = Check({}, [Part("lossless", "Lossless", True, about), *empty])
    assert verdict.verdict(check) == "No drafted text was compared with plain decoding." and not check.compared
    about.append(Finding({"promise": "same text", "executor": "eager"}))
    assert verdict.verdict(check) == "Lossless here: 2 of 3 checks hold, 1 could not be made." and check.compared


def test_rounding_explains_near_ties_only():
    logits = torch.tensor([1.0, 1.3, -2.0, 0.0])
    same = lambda scores: scores  # noqa: E731
    assert rounding_can_swap(logits, 1, 0, 0.2, same) == (True, pytest.approx(0.3))
    assert rounding_can_swap(logits, 1, 0, 0.1, same) == (False, pytest.approx(0.3))
    assert not rounding_can_swap(logits, 2, 0, 0.2, same)[0], "neither is the best"

    def nucleus(scores):
        """Only tokens of at least 1.05, with noise that favours token 0 whenever it may be drawn."""
        return torch.where(scores >= 1.05, scores, -torch.inf) + torch.tensor([5.0, 0.0, 0.0, 0.0])

    assert rounding_can_swap(logits, 1, 0, 0.1, nucleus)[0], "rounding can let a token into the nucleus"
    assert not rounding_can_swap(logits, 1, 0, 0.02, nucleus)[0]


def test_untrained_drafters_leave_the_target_as_it_was():
    model = tiny_llama(vocab=97)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in ("ngram", "draft model", "medusa", "hydra"):
        assert untrained(kind, model).default_shape == untrained(kind, model).default_shape
    noisy = untrained("draft model", model).model
    assert not torch.equal(noisy.lm_head.weight, model.lm_head.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(untrained("medusa", model).default_shape, TreeShape)
