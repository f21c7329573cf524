"""`paceline check`: what it finds on a tiny model, planted faults that it must name, its budget, what it refuses."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from paceline.drafters.untrained import untrained
from paceline.spec import step
from paceline.spec.bench.divergence import rounding_can_swap
from paceline.spec.check import captured, machine, shapes, verdict
from paceline.spec.check.budget import Clock, NotHere, OutOfTime, Task, run_tasks
from paceline.spec.check.lossless import DRAFTS, Lossless
from paceline.spec.check.record import FAILS, HOLDS, NOT_HERE, Check, Finding, Part
from paceline.spec.check.steps import SIZES
from paceline.spec.check.subject import Subject, all_executors
from paceline.spec.cli import main as cli
from paceline.spec.engines import captures
from paceline.spec.plan import step_times
from paceline.spec.state import DecodeState
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TreeShape
from paceline.spec.verify import Verdict
from tape import TapeExecutor, tape_executor

from conftest import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "tiny"
    tiny_llama(vocab=97).save_pretrained(path)
    return path


@pytest.fixture
def short(monkeypatch):
    """Few repeats and steps: the tests ask what is found, not how long it takes."""
    monkeypatch.setattr("paceline.spec.check.steps.REPEATS", 3)
    monkeypatch.setattr("paceline.spec.check.lossless.MOST_TOKENS", 12)
    monkeypatch.setattr("paceline.training.probe.SIZES", {"cpu": (1, 16)})


def run(folder, tmp_path, *options):
    """Exit code and JSON of a check of the tiny model with eager steps."""
    output = tmp_path / "check.json"
    line = ["check", "--model", str(folder), "--executors", "eager", "--device", "cpu", "--budget", "300"]
    return cli.main([*line, "-o", str(output), *options]), json.loads(output.read_text())


def parts(check):
    return {part["name"]: part for part in check["parts"]}


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


def mask_off_by_one(monkeypatch):
    """Every node sees one slot less of the text than it should."""
    view_of_nodes = SlotModel.view_of_nodes

    def off(self, base, tree, index):
        view = view_of_nodes(self, base, tree, index)
        rows = torch.arange(len(base), device=base.device)
        view.visible[rows, :, base - 1] = False
        return view

    monkeypatch.setattr(SlotModel, "view_of_nodes", off)


def verification_that_ignores_the_text(monkeypatch):
    """Every drafted leaf is accepted."""

    def all_accepted(rule, scores, proposal, keys, base, sampling):
        deepest = proposal.tree.depths.expand_as(proposal.tokens).argmax(-1)
        best, draws = scores.max(-1)
        pick = deepest[:, None]
        return Verdict.at(deepest, draws.gather(1, pick)[:, 0], best.gather(1, pick)[:, 0], proposal)

    monkeypatch.setattr(step, "verify", all_accepted)


def broken_probe(monkeypatch):
    def broken(subject):
        raise RuntimeError("the probe is broken\nand says more")

    monkeypatch.setattr(machine, "_bandwidth", broken)


def executor_that_fails_while_timed(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(step_times, "_forward_alone", broken)


def heads_that_learn_nan(monkeypatch):
    monkeypatch.setattr("paceline.training.objectives.heads.MedusaObjective.forward", _nan_losses)


def _nan_losses(self, batch, seen):
    from paceline.training.objectives.objective import Losses

    counts = torch.zeros(self.depths, dtype=torch.int64)
    total = sum(parameter.sum() for parameter in self.parameters()) * torch.nan
    return Losses(total, batch["loss_mask"].sum(), counts, counts)


def planner_that_fails(monkeypatch):
    monkeypatch.setattr("paceline.spec.check.worth.choose_tree", lambda *args: 1 / 0)


FAULTS = {
    mask_off_by_one: ("lossless", "self-test of the target", "does not follow the positions and masks", 1),
    verification_that_ignores_the_text: ("lossless", "ngram tree", "leaves the text of plain decoding at token", 1),
    broken_probe: ("machine", "memory read", "RuntimeError: the probe is broken", 0),
    executor_that_fails_while_timed: ("steps", "eager", "RuntimeError: no such kernel", 0),
    planner_that_fails: ("worth", "any", "ZeroDivisionError", 0),
    heads_that_learn_nan: ("training", "10 steps of heads", "loss", 0),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named_and_the_other_parts_go_on(folder, tmp_path, monkeypatch, short, fault):
    part, label, words, code = FAULTS[fault]
    fault(monkeypatch)
    got, check = run(folder, tmp_path)
    found = parts(check)
    failing = [f for f in found[part]["findings"] if f["verdict"] == FAILS]
    assert got == code and found[part]["verdict"] == FAILS
    named = " ".join(str(value) for value in failing[0]["what"].values())
    assert words in failing[0]["reason"] and (label in named or label == "any"), failing[0]
    others = {name for name in found if name != part and found[name]["verdict"] == FAILS}
    both = {"steps"} if fault is mask_off_by_one else set()  # no draft model can be made to be timed either
    assert others == both, "a fault of one part is not laid to another"
    assert all(found[name]["findings"] for name in found), "the other parts go on"
    assert check["sentence"].startswith("NOT every promise holds here") == (part == "lossless")


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


def subject_of(model, executors):
    return Subject("tiny", model, executors, untrained)


def test_a_captured_step_is_checked_and_a_stale_buffer_is_named(monkeypatch):
    """By tape: first as it is; then with a state that is rebound where it should be written."""

    def lossless():
        subject = subject_of(tiny_llama(vocab=97), ["tape"])
        clock = Clock(300, time.perf_counter())
        return list(run_tasks(Lossless(subject, clock).tasks(), clock))

    monkeypatch.setattr("paceline.spec.check.lossless.MOST_TOKENS", 8)
    with tape_executor(monkeypatch):
        sound = lossless()
        verdicts = {(f.what["promise"], f.verdict) for f in sound}
        assert (f"one capture for {captured.PROMPTS} prompts, read one step late", HOLDS) in verdicts
        assert ("a replayed step never waits", NOT_HERE) in verdicts and FAILS not in {v for _, v in verdicts}
        assert sum(f.what["promise"] == "same text" for f in sound) == 4 * (len(DRAFTS) + 1)
        admit = DecodeState.admit

        def rebinding(self, *args):
            admit(self, *args)
            self.lengths = self.lengths.clone()

        monkeypatch.setattr(DecodeState, "admit", rebinding)
        stale = lossless()
        failing = [f for f in stale if f.verdict == FAILS]
        assert failing and {f.what["executor"] for f in failing} == {"tape"}
        assert {f.verdict for f in stale if f.what.get("executor") is None} == {HOLDS}, "the target itself is sound"
    TapeExecutor.made.clear()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(model_type="t5"), "t5 is no causal language model"),
        (dict(model_type="mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64), "keeps a recurrent state"),
        (dict(model_type="llama", max_position_embeddings=16), "has a context of 16 tokens"),
        (["a", "list"], "gives no configuration"),
    ],
)
def test_models_that_cannot_be_checked_are_refused(config, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["check", "--config", str(tmp_path / "config.json"), "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err


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


def test_noise_is_not_taken_for_rounding(tmp_path, monkeypatch, short):
    config = tiny_llama(vocab=97).config
    model = shapes.random_model(config, torch.bfloat16, torch.device("cpu"))
    model.save_pretrained(tmp_path / "bf16")
    assert run(tmp_path / "bf16", tmp_path, "--dtype", "bfloat16")[0] == 0
    noise_on_many_nodes(monkeypatch)
    code, check = run(tmp_path / "bf16", tmp_path, "--dtype", "bfloat16")
    failing = [f for f in parts(check)["lossless"]["findings"] if f["verdict"] == FAILS]
    assert code == 1 and "where rounding explains" in failing[0]["reason"]


def test_sigterm_keeps_what_was_found(folder, tmp_path, monkeypatch, short):
    end = lambda self: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr("paceline.spec.check.steps.Steps._transformers", end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path)
    check = json.loads((tmp_path / "check.json").read_text())
    assert ended.value.code == 143 and check["interrupted"] and parts(check)["lossless"]["verdict"] == HOLDS
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_between_tasks_is_a_finding():
    def tasks():
        yield Task({"n": 0}, lambda: [Finding({"n": 0})])
        raise RuntimeError("in between")

    first, second = run_tasks(tasks(), Clock(10, time.perf_counter()))
    assert first.verdict == HOLDS and second.verdict == FAILS and "in between" in second.reason


def test_nothing_compared_is_not_called_lossless():
    about = [Finding({"promise": "self-test of the target"}), Finding({"promise": "same text"}, NOT_HERE, "no time")]
    empty = [Part(name, name) for name in ("machine", "steps", "worth", "training")]
    check = Check({}, [Part("lossless", "Lossless", True, about), *empty])
    assert verdict.verdict(check) == "No drafted text was compared with plain decoding." and not check.compared
    about.append(Finding({"promise": "same text", "executor": "eager"}))
    assert verdict.verdict(check) == "Lossless here: 2 of 3 checks hold, 1 could not be made." and check.compared


def test_ctrl_c_keeps_what_was_found(folder, tmp_path, monkeypatch, short, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.spec.check.steps.Steps._transformers", interrupted)
    code, check = run(folder, tmp_path)
    assert code == 130 and check["interrupted"] and "stopped" in capsys.readouterr().err
    found = parts(check)
    assert found["lossless"]["verdict"] == HOLDS and found["steps"]["findings"] and not found["training"]["findings"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "/nowhere/check.json"], "/nowhere/check.json cannot be written"),
        (["-o", "{}/a", "--markdown", "{}/a"], "is named twice"),
        (["-o", "{}"], "is no ordinary file"),
        (["-o", "/dev/null"], "is no ordinary file"),
        (["-o", "-"], "give a file for the JSON"),
        (["--config", "{}/a", "-o", "{}/a"], "is named twice"),
        (["--device", "meta"], "neither a CPU nor a CUDA device"),
        (["--dtype", "float8_e4m3fn"], "is none of auto, float32"),
        (["--config", ""], "gives no configuration"),
        (["--shape", "gpt-5"], "choose one of smollm2-135m, qwen3-0.6b"),
        (["--executors", "eager,fast"], "has 'fast', which is none"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--dtype", "int3"], "is none of auto, float32"),
        (["--config", "/nowhere.json"], "gives no configuration"),
        (["--model", "/no/such/folder"], "gives no configuration"),
    ],
)
def test_mistakes_are_refused_before_any_work(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "random_model", lambda *args: pytest.fail("work was begun"))
    assert cli.main(["check", *(option.replace("{}", str(tmp_path)) for option in options)]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "soon", "1e300"])
def test_a_budget_is_a_number_of_seconds(budget, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--budget", budget])
    assert ended.value.code == 2 and "not a number of seconds" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 2_000_000_000)
    assert cli.main(["check", "--shape", "llama-3.1-8b", "--dtype", "bfloat16", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "llama-3.1-8b: 16.06 GB of weights in bfloat16" in said and "2.00 GB that are free on cpu" in said


def test_shapes_are_those_that_were_published():
    """Parameters as the models' cards count them."""
    counts = {
        "smollm2-135m": 134_515_008, "qwen3-0.6b": 596_049_920, "llama-3.2-1b": 1_235_814_400,
        "gemma-2-2b": 2_614_341_888, "llama-3.1-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360,
    }  # fmt: skip
    for name, count in counts.items():
        assert shapes.weight_bytes(shapes.shape_config(name), torch.float32) == 4 * count, name


def test_random_weights_give_logits_of_a_real_size():
    for name in ("smollm2-135m", "mixtral-tiny", "gemma-2-2b"):
        config = shapes.shape_config(name)
        small = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=512, head_dim=32)
        for key, value in small.items():
            setattr(config, key, value)
        config.num_attention_heads, config.num_key_value_heads = 4, 2
        if hasattr(config, "layer_types") and config.layer_types:
            config.layer_types = config.layer_types[:2]
        model = shapes.random_model(config, torch.float32, torch.device("cpu"))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        with torch.no_grad():
            logits = model(torch.randint(5, 512, (1, 16))).logits
        assert 2 < logits.std() < 4, name
        assert model.config._attn_implementation == ("eager" if name == "gemma-2-2b" else "sdpa")
        again = shapes.random_model(config, torch.float32, torch.device("cpu"))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight), "the same weights every time"


def test_a_budget_is_kept_and_every_outcome_recorded():
    def endless():
        while True:
            time.sleep(0.01)

    def absent():
        raise NotHere("no such thing here")

    def raising(error):
        def work():
            raise error

        return work

    clock = Clock(0.5, time.perf_counter())
    clock.begin(1.0)
    tasks = [
        Task({"n": 0}, lambda: [Finding({"n": 0})]),
        Task({"n": 1}, absent),
        Task({"n": 2}, raising(ValueError("a sentence"))),
        Task({"n": 3}, raising(KeyError("x"))),
        Task({"n": 4}, raising(torch.OutOfMemoryError("12 GB"))),
        Task({"n": 5}, lambda: [Finding({"n": 5})], seconds=1000.0),
        Task({"n": 6}, endless),
        Task({"n": 7}, lambda: [Finding({"n": 7})]),
        Task({"n": 8}, lambda: [Finding({"n": 8})], short=True),
    ]
    found = list(run_tasks(tasks, clock))
    assert [f.verdict for f in found] == [HOLDS, NOT_HERE, FAILS, FAILS, *[NOT_HERE] * 4, HOLDS]
    reasons = ["no such thing here", "a sentence", "KeyError: 'x'", "out of memory (12 GB)", "takes about 1000 s",
               "ran out of the part's share", "is used up"]  # fmt: skip
    for finding, words in zip(found[1:], reasons):
        assert words in finding.reason
    assert issubclass(OutOfTime, BaseException) and not issubclass(OutOfTime, Exception)


def test_shares_are_of_what_is_left():
    clock = Clock(100, time.perf_counter() - 20)
    clock.begin(0.25)
    assert clock.left == pytest.approx(20, abs=0.5)
    clock.begin(1.0)
    assert clock.left == pytest.approx(80, abs=0.5)


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


def test_executors_are_named_or_all():
    assert all_executors("all") == ["eager", "cuda_graph_eager", "compiled", "cuda_graph_compiled"]
    assert all_executors("compiled, eager,compiled") == ["compiled", "eager"]


@pytest.mark.parametrize(
    ("texts", "seconds", "kept"),
    [
        ([HOLDS] * 6 + [NOT_HERE], {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 2.0)}, True),
        ([HOLDS] * 6, {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 3.1)}, False),
        ([HOLDS] * 6 + [FAILS], {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 2.0)}, False),
        ([HOLDS] * 5 + [NOT_HERE], {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 2.0)}, None),
        ([HOLDS] * 6, {1: (2.0, 1.0), 4: (2.0, 1.0)}, None),
        ([HOLDS] * 6, {}, None),
    ],
)
def test_the_better_capture_is_kept_where_both_were_seen(monkeypatch, texts, seconds, kept):
    verdicts = []
    monkeypatch.setattr(verdict, "keep_verdict", lambda device, better: verdicts.append(better))
    lossless = Part("lossless", "Lossless", True, [Finding({"executor": "cuda_graph_compiled"}, own) for own in texts])
    timed = Part("steps", "Steps", False, [
        Finding({"executor": name, "rows": 1, "nodes": nodes}, figures={"step_seconds": pair[which]})
        for nodes, pair in seconds.items() for which, name in enumerate(("cuda_graph_eager", "cuda_graph_compiled"))
    ])  # fmt: skip
    verdict.keep_better_capture(torch.device("cpu"), Check({}, [lossless, timed]))
    assert verdicts == ([] if kept is None else [kept])


def test_a_verdict_that_cannot_be_kept_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "captures").write_text("a file where a folder should be")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    with pytest.raises(ValueError, match="cannot be written"):
        captures.keep_verdict(torch.device("cuda"), True)


def check_file(path, seconds=0.02, verdict=HOLDS):
    about = {
        "subject": {"name": "tiny", "dtype": "float32", "device": "cpu"}, "machine": {"cpu": "a CPU", "gpu": None},
        "created": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    texts = Finding({"promise": "same text", "executor": "eager"}, verdict, figures={"parted": 0})
    timed = Finding({"executor": "eager", "rows": 1, "nodes": 8}, figures={"step_seconds": seconds, "parents": [-1]})
    made = Check(about, [Part("lossless", "Lossless", True, [texts]), Part("steps", "Steps", False, [timed])])
    path.write_text(json.dumps(made.as_dict("")))
    return str(path)


def test_two_checks_side_by_side(tmp_path, capsys):
    a, b = check_file(tmp_path / "a.json"), check_file(tmp_path / "b.json", 0.03)
    assert cli.main(["compare", a, b]) == 0
    said = capsys.readouterr().out
    assert "A: tiny, float32, a CPU" in said
    (line,) = [line for line in said.splitlines() if "step ms" in line]
    assert line.split() == ["steps:", "eager,", "1,", "8", "step", "ms", "20.00", "30.00", "1.50"]
    broken = check_file(tmp_path / "c.json", verdict=FAILS)
    assert cli.main(["compare", a, broken]) == 1 and cli.main(["compare", broken, a]) == 0
    (tmp_path / "run.jsonl").write_text('{"kind": "paceline-bench"}\n{}\n')
    capsys.readouterr()
    assert cli.main(["compare", a, str(tmp_path / "run.jsonl")]) == 2
    assert "no file of paceline check" in capsys.readouterr().err
    (tmp_path / "d.json").write_text('{"kind": "paceline-check", "parts": [{}]}')
    assert cli.main(["compare", a, str(tmp_path / "d.json")]) == 2
    assert "damaged check" in capsys.readouterr().err


def test_untrained_drafters_leave_the_target_as_it_was():
    model = tiny_llama(vocab=97)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in ("ngram", "draft model", "medusa", "hydra"):
        assert untrained(kind, model).default_shape == untrained(kind, model).default_shape
    noisy = untrained("draft model", model).model
    assert not torch.equal(noisy.lm_head.weight, model.lm_head.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(untrained("medusa", model).default_shape, TreeShape)
