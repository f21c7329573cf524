"""Continuous refill: every text is what `generate` gives for it alone, whatever rows and neighbours it had."""

from functools import cache

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import executors, runs
from paceline.spec.serve.job import Job
from paceline.spec.serve.lanes import Lane
from paceline.spec.serve.texts import Text, decode_texts
from paceline.spec.target.selftest import attach
from paceline.spec.tree import TreeShape

from support.models import noisy_copy, tiny_llama
from support.tape import tape_executor

ENDS = [17, 23, 5]


@pytest.fixture(scope="module")
def model():
    made = tiny_llama(seed=3, max_position_embeddings=512)
    made.generation_config.eos_token_id = ENDS
    made.generation_config.pad_token_id = 0
    return made


@pytest.fixture(scope="module")
def texts():
    """Eleven texts of 1 to 36 tokens, to be continued by 1 to 20, with something to look up."""
    torch.manual_seed(11)
    made = []
    for number in range(11):
        tokens = torch.randint(30, 61, (1 + (number * 7) % 40,)).tolist()
        tokens[len(tokens) // 2 :] = tokens[: len(tokens) - len(tokens) // 2]
        new = 1 + (number * 13) % 20
        made.append(Text(tokens, new, 100 + number, len(tokens) + new, number))
    return made


def alone(model, text, temperature, top_p=1.0):
    """The reference: `generate` on this text only."""
    return _alone(model, tuple(text.tokens), text.new_tokens, text.seed, temperature, top_p)


@cache
def _alone(model, tokens, new_tokens, seed, temperature, top_p):
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    sampling = sampling if temperature else dict(do_sample=False)
    ids = torch.tensor([tokens])
    out = paceline.generate(model, ids, torch.ones_like(ids), max_new_tokens=new_tokens, seed=[seed], **sampling)
    return out[0, len(tokens) :].tolist()


def collect(model, texts, **options):
    got = {}

    def finish(text, tokens, failed):
        assert text.name not in got and not failed
        got[text.name] = tokens

    decode_texts(model, texts, finish, **options)
    return got


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("which", ["none", "ngram", "model"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_text_is_what_generate_gives(model, texts, which, temperature, batch):
    drafter = {"none": None, "ngram": NgramDrafter(), "model": ModelDrafter(noisy_copy(model))}[which]
    tree = None if which == "none" else TreeShape.parse("2x2x1")
    got = collect(model, texts, batch=batch, drafter=drafter, tree=tree, temperature=temperature, top_p=0.9)
    assert got == {text.name: alone(model, text, temperature, 0.9) for text in texts}
    ended = sum(tokens[-1] in ENDS for tokens in got.values())
    assert 0 < ended < len(texts), "both ways of ending must occur"


def test_texts_of_very_different_room_are_decoded_apart(model, texts):
    torch.manual_seed(2)
    long = [Text(torch.randint(30, 61, (300,)).tolist(), 9, 7 + i, 320, f"long {i}") for i in range(3)]
    capacities = []

    class Counting(NgramDrafter):
        def open(self, request):
            capacities.append(request.capacity)
            return super().open(request)

    mixed = [long[0], *texts, *long[1:]]
    assert collect(model, mixed, batch=3, drafter=Counting()) == {text.name: alone(model, text, 0.0) for text in mixed}
    assert min(capacities) == 64 and max(capacities) == 384, "a long text costs the short ones nothing"


def test_a_row_goes_on_with_the_text_that_follows(model, texts):
    """A second turn is put behind the first at once, before the texts that wait."""
    got = {}

    def finish(text, tokens, failed):
        number, turn = text.name
        got[text.name] = tokens
        if turn == 0:
            return Text([*text.tokens, *tokens, 40 + number], 9, 50, text.room, (number, 1))
        return None

    first = [Text(t.tokens, t.new_tokens, t.seed, t.room + 10, (t.name, 0)) for t in texts]
    decode_texts(model, first, finish, batch=3, drafter=NgramDrafter())
    for text in texts:
        answer = alone(model, text, 0.0)
        assert got[text.name, 0] == answer
        follow = Text([*text.tokens, *answer, 40 + text.name], 9, 50, 256)
        assert got[text.name, 1] == alone(model, follow, 0.0)


def test_what_goes_wrong_with_a_text_is_told_as_what_it_is(model, texts, monkeypatch):
    """`finish` hears of NaN only."""

    def fails(self, report, logits):
        raise IndexError("something")

    monkeypatch.setattr(Job, "take", fails)
    with pytest.raises(RuntimeError, match=r"this text has failed \(IndexError: something\)"):
        collect(model, texts[:1], batch=1)


def test_reading_a_prompt_leaves_the_others_alone(model, texts, monkeypatch):
    """It runs the rows of prompts that are read together only, which are of similar length."""
    shapes, advance = [], Lane.advance

    def watched(self):
        lengths = [len(job.request.tokens) for job in self.jobs.values()]
        hook = lambda m, a, k: shapes.append((k["input_ids"].shape[0], lengths))  # noqa: E731
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        advance(self)
        handle.remove()

    monkeypatch.setattr(Lane, "advance", watched)
    collect(model, texts, batch=3)
    assert len(shapes) >= 4 and all(rows == len(lengths) <= 3 for rows, lengths in shapes)
    assert all(length <= 1.25 * lengths[0] + 8 for _, lengths in shapes for length in lengths)


def test_few_rows_left_go_on_in_a_smaller_batch(model, texts):
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda m, a, k: sizes.append(k["input_ids"].shape) if k["input_ids"].shape[1] == 1 else None, with_kwargs=True
    )
    long = [Text([40, 41 + i], 30 if i < 1 else 4, 5, 64, i) for i in range(8)]
    got = collect(model, long, batch=8, temperature=1.0)
    handle.remove()
    assert got == {text.name: alone(model, text, 1.0) for text in long}
    assert [shape[0] for shape in sizes][-1] == 1 and sizes[1][0] == 8


def test_a_row_whose_scores_fail_is_reported_and_its_place_used_again(model, texts):
    """A token that no good text has gets a broken embedding; neighbours and successors do not notice."""
    truth = {text.name: alone(model, text, 0.0) for text in texts}
    used = {token for text in texts for token in [*text.tokens, *truth[text.name]]}
    poison = next(token for token in range(61) if token not in used)
    broken = tiny_llama(seed=3, max_position_embeddings=512)
    broken.generation_config.eos_token_id = ENDS
    attach(broken)  # the self-test, while it is whole
    with torch.no_grad():
        broken.model.embed_tokens.weight[poison] = float("nan")
    bad = [Text([31, poison, 32], 5, 1, 8, f"bad {i}") for i in range(3)]
    got, failures = {}, set()

    def finish(text, tokens, failed):
        if failed:
            failures.add(text.name)
        else:
            got[text.name] = tokens

    decode_texts(broken, [texts[0], bad[0], *texts[1:5], bad[1], *texts[5:], bad[2]], finish, batch=3)
    assert failures == {"bad 0", "bad 1", "bad 2"} and got == truth


def test_a_recorded_step_takes_refills(model, texts, monkeypatch):
    """Under the rules of a captured step, read at once and one step late."""
    for lag in (0, 1):
        with tape_executor(monkeypatch) as tapes:
            runs.reset(model)
            monkeypatch.setattr(executors.EXECUTORS["tape"], "lag", lag, raising=False)
            got = collect(model, texts, batch=3, drafter=NgramDrafter(), temperature=0.9, executor="tape")
        assert got == {text.name: alone(model, text, 0.9) for text in texts}
        assert tapes[0].tape.offences == [] and tapes[0].replays > 10
    runs.reset(model)


@pytest.mark.parametrize(
    ("text", "words"),
    [(Text([], 4, 0, 9), "no token"), (Text([3], 0, 0, 9), "no room"), (Text([3] * 500, 80, 0, 580), "context of 512")],
)
def test_texts_that_cannot_be_continued_are_refused(model, text, words):
    with pytest.raises(ValueError, match=words):
        decode_texts(model, [text], lambda *_: None, batch=2)
