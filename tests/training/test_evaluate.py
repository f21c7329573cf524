"""`paceline evaluate`: what is foretold of a drafter is what decoding does; what is kept with it."""

import json
import os
import shutil
from pathlib import Path

import paceline
import pytest
import torch
from paceline.drafters import shipped
from paceline.drafters.folder import target_identity
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaDrafter, MedusaHeads
from paceline.drafters.ngram import NgramDrafter
from paceline.spec import cli
from paceline.spec.plan.trees import best_tree, expected_tokens
from paceline.spec.tree import TreeShape
from paceline.training.data.prompts import digest, read_digests, turns_of, write_digests
from paceline.training.objectives.heads import MedusaObjective
from paceline.training.objectives.objective import NO_LABEL
from paceline.training.ranks import spans, walk
from paceline.training.train import run
from transformers import GenerationConfig

from support.models import fitted_heads, noisy_copy, target_view, tiny_llama, whole_rows
from support.training_runs import random_rows, settings, write_data, write_target

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A target, prompts of two categories, and data."""
    path = tmp_path_factory.mktemp("evaluation")
    write_target(path / "target", tokenizer)
    turns = {i: WORDS[i : i + 3 + i % 5] + WORDS[-i:] for i in range(1, 17)}
    lines = [{"category": "odd|*" if i % 2 else "even", "turns": [turn]} for i, turn in turns.items()]
    (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_data(path / "data", random_rows(10), random_rows(5, seed=1))
    return path


@pytest.fixture(scope="module")
def model(place):
    return paceline.load_target(place / "target")[0]


@pytest.fixture(scope="module")
def trained(model):
    """Heads that have learned the target's greedy texts, from other prompts than are decoded here."""
    torch.manual_seed(3)
    text = model.generate(
        torch.randint(3, 61, (64, 6)), do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0
    )
    batch, seen = whole_rows(text), target_view(model, text)
    objective = MedusaObjective(MedusaHeads.make(HeadSettings("hydra", heads=3), model))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for _ in range(60):
        losses = objective(batch, seen)
        (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.heads.requires_grad_(False)


@pytest.fixture
def heads(trained, tmp_path):
    trained.save(tmp_path / "heads", dtype=torch.float32)
    return tmp_path / "heads"


@pytest.fixture
def draft(place, model, tmp_path, tokenizer):
    """A draft model as the trainer saves it: an ordinary folder that says what it is."""
    noisy_copy(model).save_pretrained(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    (tmp_path / "draft" / "config.json").write_text(json.dumps({**config, "paceline_drafter": "draft_lm"}))
    return tmp_path / "draft"


def evaluate(place, drafter, *options, tokens=60):
    given = ["--model", str(place / "target"), "--prompts", str(place / "prompts.jsonl")]
    return cli.main(["evaluate", str(drafter), *given, "--max-new-tokens", str(tokens), *options])


def test_walking_ranks_is_what_a_tree_would_accept():
    """By hand: a tree of two children, the first with one child more."""
    shape, no = TreeShape((-1, 0, 0, 1)), NO_LABEL
    answer = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 3], [0, 3, no], [3, no, no]])
    # 0 0: two and a bonus, to place 3; there 0, then 3: one and a bonus, past the end.
    assert walk([answer], shape) == (2, 5)
    assert walk([answer], TreeShape.chain(0)) == (5, 5)
    assert walk([answer, answer[2:]], TreeShape.chain(1)) == (3 + 2, 8)


def test_answers_are_told_apart_by_their_places():
    judged = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]]).bool()
    ranks = torch.arange(6)[:, None]
    assert [part[:, 0].tolist() for part in spans(ranks, judged)] == [[0, 1], [2], [3], [4, 5]]
    assert spans(ranks[:0], judged & False) == []


@pytest.mark.parametrize("tree", [None, "chain:3", "3x2x2"])
@pytest.mark.parametrize("kind", ["heads", "draft"])
def test_what_is_foretold_is_what_decoding_does(place, request, kind, tree):
    """On the target's own answers the replay takes exactly the steps that decoding takes, and p alone comes close."""
    folder = request.getfixturevalue(kind)
    assert evaluate(place, folder, *(["--tree", tree] if tree else [])) == 0
    found = json.loads((folder / "acceptance.json").read_text())
    measured, estimated = found["measured"], found["estimated"]
    assert (measured["steps"], measured["tokens"]) == (estimated["replayed"]["steps"], estimated["replayed"]["tokens"])
    assert measured["tokens"] == 16 * 60 and measured["tokens_per_step"] == measured["tokens"] / measured["steps"] > 1.1
    assert estimated["tree"]["tokens_per_step"] == pytest.approx(measured["tokens_per_step"], rel=0.08)
    if tree is None:
        assert {"nodes": measured["nodes"], **estimated["replayed"]} in found["by_size"], "one of the sizes is its own"
    shape = TreeShape(tuple(measured["parents"]))
    assert estimated["tree"]["tokens_per_step"] == pytest.approx(expected_tokens(found["p"], shape), abs=1e-4)
    assert set(found["categories"]) == {"even", "odd|*"}
    for name in ("prompts", "steps", "tokens"):
        assert sum(own[name] for own in found["categories"].values()) == measured[name]
    assert found["how"]["prompts"]["file"] == "prompts.jsonl" and len(found["accuracy"]) == len(found["p"])
    assert str(place) not in (folder / "acceptance.json").read_text() + (folder / "README.md").read_text()


def test_a_target_with_penalties_is_decoded_as_foretold(place, heads, tmp_path):
    shutil.copytree(place / "target", tmp_path / "target")
    GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=3).save_pretrained(tmp_path / "target")
    shutil.copy(place / "prompts.jsonl", tmp_path)
    assert evaluate(tmp_path, heads) == 0
    found = json.loads((heads / "acceptance.json").read_text())
    assert found["measured"]["steps"] == found["estimated"]["replayed"]["steps"]


def test_the_default_tree_is_then_the_best_small_one(place, model, heads, draft):
    for folder in (heads, draft):
        before = paceline.load_drafter(folder, model).default_shape
        assert evaluate(place, folder) == 0
        found = json.loads((folder / "acceptance.json").read_text())
        after = paceline.load_drafter(folder, model).default_shape
        assert after == best_tree(found["p"], 4, 4)[0] != before  # on a CPU


def test_held_out_rows_may_be_the_text(place, heads):
    assert evaluate(place, heads, "--data", str(place / "data")) == 0
    found = json.loads((heads / "acceptance.json").read_text())
    assert found["how"]["counted"] == "teacher-forced on held-out rows of data"
    assert found["estimated"]["replayed"]["tokens"] == found["labels"][0] > 0


def test_rows_of_another_tokenizer_are_not_the_text(place, heads, tmp_path, capsys):
    write_data(tmp_path / "data", random_rows(2), random_rows(2), tokenizer="another")
    assert evaluate(place, heads, "--data", str(tmp_path / "data")) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_judged_on_text_is_counted_in_decoding(place, heads, tmp_path, capsys):
    out = tmp_path / "ngram.json"
    assert evaluate(place, "ngram", "-o", str(out), tokens=20) == 0
    assert "tokens per step" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["how"]["counted"].startswith("a wide tree") and found["measured"]["steps"] > 0
    assert evaluate(place, heads, "-o", str(tmp_path / "o.json"), "--temperature", "0.9", tokens=20) == 0
    assert not (heads / "acceptance.json").exists(), "with -o the folder stays as it is"
    assert json.loads((tmp_path / "o.json").read_text())["how"]["temperature"] == 0.9


def test_training_prompts_among_the_prompts_are_counted(place, heads, capsys):
    turns = sorted(turns_of(str(place / "prompts.jsonl")))
    write_digests(heads / "prompts.sha256", {digest(turn.upper()) for turn in turns[:3]} | {digest("another")})
    assert evaluate(place, heads, tokens=8) == 0
    assert json.loads((heads / "acceptance.json").read_text())["how"]["prompts"]["in_training"] == 3
    assert "it will look too good" in capsys.readouterr().err
    assert "3 are among the 4 in the training data" in (heads / "README.md").read_text()


@pytest.mark.parametrize(
    ("drafter", "options", "words"),
    [
        ("ngram", [], "give a file with -o"),
        ("none", ["-o", "x.json"], "none is no drafter"),
        ("ngram", ["-o", "x.json", "--data", "d"], "leave it out here"),
        ("ngram", ["-o", "x.json", "--temperature", "-1"], "at least 0"),
        ("ngram", ["-o", "nowhere/x.json"], "nowhere/x.json cannot be written"),
        ("smollm2-135m-nothing", ["-o", "x.json"], "smollm2-135m-nothing"),
    ],
)
def test_mistakes_end_in_a_sentence(place, capsys, drafter, options, words):
    assert evaluate(place, drafter, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("paceline: ") and words in error


def test_a_trained_folder_plans_its_tree_and_is_decoded_in_training(place, model):
    config = settings(
        place, "run", objective={"kind": "medusa", "heads": 2}, run__decode_prompts=str(place / "prompts.jsonl"),
        run__evaluate_every=5,
    )  # fmt: skip
    assert run(config) is None
    folder = Path(config.run.folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["eval/measured_tokens_per_step"] >= 1 for line in lines if "eval/loss" in line)
    found = json.loads((folder / "best" / "acceptance.json").read_text())
    reported = {line["step"]: line for line in lines if "eval/loss" in line}[found["how"]["step"]]
    hits, trials = found["counts"]["hits"], found["counts"]["trials"]
    assert hits[0][0] / trials[0][0] == pytest.approx(reported["eval/acc_1"])
    depth = paceline.load_drafter(folder / "best", model).traits.deepest
    assert list(best_tree(found["p"], 16, depth)[0].parents) == found["estimated"]["tree"]["parents"]
    card = (folder / "best" / "README.md").read_text()
    assert "# run\n" in card and "has not been measured" in card and str(place) not in card
    assert json.loads((folder / "best" / "training.json").read_text())["config"]["target"]["model"] == "target"


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "PRETRAINED", tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_auto_is_the_best_that_ships_for_this_target(model, target, pretrained):
    """`target` is the same model, loaded otherwise; another one gets ngram. The fastest is the best, and where none was
    timed the one that commits the most per step."""
    for name, number in (("weak", 1.5), ("strong", 2.5), ("unmeasured", None)):
        fitted_heads(model, "independent", steps=0).save(pretrained / name)
        if number:
            (pretrained / name / "acceptance.json").write_text(json.dumps({"measured": {"tokens_per_step": number}}))
    noisy_copy(model).save_pretrained(pretrained / "draft")
    config = json.loads((pretrained / "draft" / "config.json").read_text())
    config |= {"paceline_drafter": "draft_lm", "paceline_target": target_identity(model)}
    (pretrained / "draft" / "config.json").write_text(json.dumps(config))
    (pretrained / "draft" / "acceptance.json").write_text(json.dumps({"measured": {"tokens_per_step": 3.0}}))
    assert paceline.load_drafter("auto", target).name == "draft+ngram", "3 tokens per step"
    speeds = {"cpu": {"times": {"strong": 1.9, "weak": 1.4, "draft": 1.7, "unmeasured": 2.0}}}
    shipped.speeds_file().write_text(json.dumps(speeds))
    assert paceline.load_drafter("auto", target).name == "strong+ngram"
    assert shipped.speeds("cuda") == shipped.speeds("cpu")
    heads = paceline.load_drafter("auto", model)
    assert [type(part) for part in heads.parts] == [MedusaDrafter, NgramDrafter], "prompt lookup beside them"
    assert paceline.load_drafter("auto", tiny_llama(seed=1)).name == "ngram"


def test_shipped_names_are_folders_or_a_sentence(model, pretrained, capsys):
    with pytest.raises(ValueError, match=r"smollm2-135m-medusa is not in this copy .* paceline train smollm2"):
        paceline.load_drafter("smollm2-135m-medusa", model)
    fitted_heads(model, "hydra", steps=0).save(pretrained / "smollm2-135m-hydra")
    assert paceline.load_drafter("smollm2-135m-hydra", model).name == "smollm2-135m-hydra"
    assert cli.main(["drafters"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped.NAMES) and "not in this copy" in out


def test_every_drafter_that_ships_was_timed():
    """One without a speed would never be chosen."""
    here = {name for name in shipped.NAMES if (shipped.PRETRAINED / name / "config.json").is_file()}
    assert here <= shipped.speeds("cpu").keys()


@pytest.mark.parametrize("name", shipped.NAMES)
def test_no_shipped_drafter_was_trained_on_a_prompt_that_measures_it(root, name):
    """The digests that come with it, against the prompts of the tests and of PACELINE_BENCH."""
    folder = shipped.PRETRAINED / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{name} is not in this copy")
    trained = read_digests(folder)
    assert trained, "every shipped drafter says what it was trained on"
    for file in filter(None, (root / "tests" / "spec_bench_24.jsonl", os.environ.get("PACELINE_BENCH"))):
        assert not {digest(turn) for turn in turns_of(str(file))} & trained
