"""The bench on a tiny pair, as a user runs it: what is measured, that it goes on, and what it refuses."""

import json

import pytest
from paceline.spec import cli
from paceline.spec.bench.measure import Bench
from paceline.spec.bench.methods import parse_methods
from paceline.spec.bench.runfile import read_run
from paceline.spec.engines import pool

from support.models import noisy_copy, tiny_llama
from support.tape import tape_executor

PROMPTS = [
    {"id": 1, "category": "letters", "turns": ["ABCABCABC", "XYZ"]},
    {"id": 2, "category": "letters", "turns": ["XYZXYZ"]},
    {"id": "three", "category": "more", "turns": ["DEFDEFDEFDEFDEF", "ABAB"]},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_llama(max_position_embeddings=512)
    for name, weights in (("target", model), ("draft", noisy_copy(model))):
        weights.generation_config.eos_token_id = 17
        weights.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return folder


def command(pair, out, *more, methods=("ngram",)):
    base = ["bench", str(pair / "prompts.jsonl"), "-o", str(out), "--model", str(pair / "target")]
    return [*base, "--max-new-tokens", "12", "--methods", *methods, *more]


@pytest.mark.slow
def test_every_method_decodes_every_turn_to_the_same_text(pair, tmp_path):
    draft = str(pair / "draft")
    methods = ("ngram", f"{draft}:tree=3x2,name=draft", "transformers-lookup", f"transformers-assisted:drafter={draft}")
    out = tmp_path / "run.jsonl"
    assert cli.main(command(pair, out, "--repeats", "2", methods=methods)) == 0
    run = read_run(out)
    names = {method["name"]: method for method in run.methods}
    assert list(names)[0] == "ar" and "transformers" in names and len(names) == 6
    assert run.warning is None and len(run.records) == 6 * 5 * 2
    texts = {}
    for record in run.records:
        assert texts.setdefault((record.prompt, record.turn), record.tokens) == record.tokens
        assert record.identical is (None if record.method == "ar" else True) and record.seconds > 0
        ends = [i for i, token in enumerate(record.tokens) if token == 17]
        assert ends in ([], [len(record.tokens) - 1])
        if names[record.method]["executor"]:
            assert [token for event in record.events for token in event.committed] == record.tokens
        else:
            assert record.events == []
    order = [record.method for record in run.records if record.prompt == "1" and record.turn == 0]
    assert order[:6] != order[6:], "the order rotates"
    memory = run.header["memory"]
    draft = memory["drafters"]["draft"]
    assert (draft["weights"], draft["slot"]) == (memory["target"], memory["slot"])
    assert names["draft"]["shape"] == {"nodes": 10, "depth": 2, "parents": [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]}


def test_an_interrupted_bench_goes_on_and_repeats_nothing(pair, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    assert cli.main(command(pair, out)) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.rindex(b"\n", 0, -200) - 30])
    kept = out.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert cli.main(command(pair, out)) == 0
    assert out.read_bytes().startswith(kept)
    first, second = {}, {}
    for data, texts in ((whole, first), (out.read_bytes(), second)):
        for line in data.splitlines()[1:]:
            record = json.loads(line)
            texts[record["prompt"], record["turn"], record["method"]] = record["tokens"]
    assert first == second and len(second) == whole.count(b"\n") - 1 == out.read_bytes().count(b"\n") - 1
    assert cli.main(command(pair, out, "--temperature", "0.5")) == 2
    assert "temperature = 0.0 and now temperature = 0.5" in capsys.readouterr().err


def test_it_ends_with_the_number_to_quote_and_what_to_do_next(pair, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    for _ in ("measured", "complete already"):
        assert cli.main(command(pair, out)) == 0
        verdict, beside, following = capsys.readouterr().out.splitlines()
        assert "times plain decoding" in verdict and "identical on 5/5 texts" in beside
        assert following == f"a page of it: paceline report {out} -o report.html"


def test_ctrl_c_says_what_is_kept(pair, tmp_path, capsys, monkeypatch):
    whole, calls = Bench._round, []

    def second_is_interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(self, *arguments)

    monkeypatch.setattr(Bench, "_round", second_is_interrupted)
    out = tmp_path / "run.jsonl"
    assert cli.main(command(pair, out)) == 130
    assert f"{out} keeps 3 texts; the same command goes on with the others" in capsys.readouterr().err
    assert len(read_run(out).records) == 3


def test_the_first_turns_alone(pair, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    assert cli.main(command(pair, out, "--turns", "1")) == 0
    run = read_run(out)
    assert {record.turn for record in run.records} == {0} and len(run.of("ngram")) == len(PROMPTS)
    assert cli.main(command(pair, out)) == 2
    assert "turns = 1 and now turns = null" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(pair, tmp_path / "none.jsonl", "--turns", "0"))
    assert stopped.value.code == 2 and not (tmp_path / "none.jsonl").exists()


def test_no_step_is_made_while_measuring(pair, tmp_path, monkeypatch):
    """Prompts of two sizes in turns, by plain decoding and by ngram: four steps, each recorded once. Where the longest
    comes first, its two serve all."""
    longer = [PROMPTS[0], {"id": 4, "turns": ["ABC" * 90]}, PROMPTS[1], {"id": 5, "turns": ["XYZ" * 90]}]
    monkeypatch.setattr(pool, "KEPT", 1)
    for prompts, steps in ((longer, 4), (longer[1:], 2)):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        with tape_executor(monkeypatch) as tapes:
            ask = command(pair, tmp_path / f"run{steps}.jsonl", methods=["ngram:executor=tape"])
            ask[1] = str(tmp_path / "prompts.jsonl")
            assert cli.main(ask) == 0
        assert len(tapes) == steps


def test_batches_and_sampling_give_the_text_of_single_prompts(pair, tmp_path):
    texts = []
    for batch in ("1", "3"):
        out = tmp_path / f"{batch}.jsonl"
        assert cli.main(command(pair, out, "--batch", batch, "--temperature", "0.8")) == 0
        run = read_run(out)
        assert all(record.identical for record in run.of("ngram"))
        assert all(record.identical is None for record in run.of("transformers"))
        texts.append({record.key: record.tokens for record in run.records if record.method != "transformers"})
        shared = {record.group: set() for record in run.records}
        for record in run.records:
            shared[record.group].add(record.seconds)
        assert all(len(seconds) == 1 for seconds in shared.values())
    assert texts[0] == texts[1]


def test_where_a_lossy_rule_leaves_the_text_the_margin_is_kept(pair, tmp_path, monkeypatch):
    """A baseline whose text is bent at one place is told from the method's there."""
    from paceline.spec.bench.methods import Decoder

    plain = Decoder.decode

    def bent(self, batch, seeds, new_tokens):
        texts, trace, seconds = plain(self, batch, seeds, new_tokens)
        if self.method.kind == "drafted":
            texts[:, -3] = 5
        return texts, trace, seconds

    monkeypatch.setattr(Decoder, "decode", bent)
    out = tmp_path / "run.jsonl"
    assert cli.main(command(pair, out)) == 0
    run = read_run(out)
    truths = {record.key: record.tokens for record in run.of("ar")}
    apart = [record for record in run.of("ngram") if not record.identical]
    assert apart
    for record in apart:
        truth = truths[record.prompt, record.turn, "ar", 0]
        assert record.tokens[record.difference.position] != truth[record.difference.position]
        assert record.tokens[: record.difference.position] == truth[: record.difference.position]
        assert record.difference.margin >= 0 and 0 < record.difference.spacing < 1e-3


def test_methods_bring_their_baselines():
    methods = parse_methods(["ngram:executor=compiled", "ngram:tree=chain:5,temperature=0.7"], "eager", 0.0)
    found = {method.name: method.baseline for method in methods}
    assert found["ngram:executor=compiled"] == "ar:executor=compiled"
    assert found["ngram:tree=chain:5,temperature=0.7"] == "ar:temperature=0.7"
    assert {method.temperature for method in methods if method.kind == "transformers"} == {0.0, 0.7}
    assert methods[[m.name for m in methods].index("ngram:tree=chain:5,temperature=0.7")].tree == "chain:5"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ngram:depth=3", "is not one of tree="),
        ("ngram:tree=", "is not one of tree="),
        ("ngram:rule=luck", "rules are match"),
        ("ngram:executor=fast", "executors cuda_graph, eager"),
        ("ngram:temperature=warm", "temperature is not a number"),
        ("ngram:tree=tall", "neither 'chain:5'"),
        ("ar:tree=4x2", "takes no tree="),
        ("transformers:executor=eager", "takes no executor="),
        ("transformers-assisted", "needs drafter="),
        ("transformers-assisted:drafter=ngram", "no draft model"),
        ("./none-such", "no such folder"),
    ],
)
def test_wrong_methods_end_in_a_sentence(pair, tmp_path, capsys, method, words):
    assert cli.main(command(pair, tmp_path / "r.jsonl", methods=[method])) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()
