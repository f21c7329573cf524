"""Criteria, streamers, stop strings and processors: each is asked as by transformers, one token at a time."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

NEW = 24


class Seen(StoppingCriteria):
    """A user's criterion that remembers everything that it was shown."""

    def __init__(self, stop_at=None):
        self.shown, self.stop_at = [], stop_at

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append(input_ids.tolist())
        hit = input_ids[:, -1] == self.stop_at if self.stop_at else torch.zeros(len(input_ids), dtype=torch.bool)
        return hit


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("eos", [None, [17, 5]])
def test_criteria_and_streamers_see_one_token_at_a_time(target, draft, ragged, eos):
    ids, mask = ragged
    options = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
    plain = target.generate(ids, attention_mask=mask, **options)
    for stop_at in (None, int(plain[0, 13]), int(plain[2, 11])):
        shown = []
        for run in (
            lambda **more: target.generate(ids, attention_mask=mask, **options, **more),
            lambda **more: paceline.generate(target, ids, mask, drafter=draft, tree="3x1x1", **options, **more),
        ):
            seen, streamer = Seen(stop_at), Recorder()
            sequences = run(stopping_criteria=[seen], streamer=streamer)
            shown.append((sequences.tolist(), seen.shown, streamer.puts, streamer.ended))
        assert shown[0] == shown[1]


def test_stop_strings(target, draft, ragged, tokenizer):
    ids, mask = ragged
    plain = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    word = tokenizer.decode(plain[1, 14:16])
    options = dict(
        do_sample=False,
        max_new_tokens=NEW,
        stop_strings=[word],
        tokenizer=tokenizer,
        eos_token_id=2,
        pad_token_id=0,
    )
    truth = target.generate(ids, attention_mask=mask, **options)
    out = paceline.generate(target, ids, mask, drafter=draft, tree="chain:5", return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, truth)
    assert (truth != plain[:, : truth.shape[1]]).any(), "the string did stop a row"
    config = GenerationConfig(stop_strings=word, max_new_tokens=NEW, eos_token_id=2, pad_token_id=0)
    again = paceline.generate(
        target, ids, mask, drafter=draft, tree="chain:5", generation_config=config, tokenizer=tokenizer
    )
    assert torch.equal(again, truth)
    for row, events in out.trace.rows():
        text = [token for event in events for token in event.committed]
        assert text == truth[row, 9 : 9 + len(text)].tolist()
        assert all(t == 0 for t in truth[row, 9 + len(text) :].tolist()), "the trace ends where the text ends"


class Biased(LogitsProcessor):
    """Knows its rows: a bias (B, V), and looks at the history so that it cannot run vectorised."""

    def __init__(self, bias):
        self.bias = bias

    def __call__(self, input_ids, scores):
        return scores + self.bias * (1 + input_ids.shape[1] % 2)


def test_a_processor_that_knows_its_rows_gets_its_rows(target, draft, ragged):
    ids, mask = ragged
    torch.manual_seed(0)
    options = dict(logits_processor=[Biased(torch.randn(3, 61))], do_sample=False, max_new_tokens=16)
    truth = target.generate(ids, attention_mask=mask, **options)
    for drafter in (None, "ngram", draft):
        assert torch.equal(paceline.generate(target, ids, mask, drafter=drafter, **options), truth)


class Walled(LogitsProcessor):
    """Forbids everything from a length on; a processor that is never asked there does no harm."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        assert input_ids.shape[1] < self.length, "asked behind the end"
        return scores


def test_nothing_is_asked_behind_the_last_token(target, draft, ragged):
    ids, mask = ragged
    plan = {length: [3 + length % 50] for length in range(9, 25)}
    options = dict(do_sample=False, max_new_tokens=16, pad_token_id=0)
    truth = target.generate(ids, attention_mask=mask, prefix_allowed_tokens_fn=lambda _, x: plan[len(x)], **options)
    for drafter in ("ngram", draft, ModelDrafter(target)):
        for tree in ("chain:5", "3x2x1"):
            more = options | dict(drafter=drafter, tree=tree)
            got = paceline.generate(target, ids, mask, prefix_allowed_tokens_fn=lambda _, x: plan[len(x)], **more)
            assert torch.equal(got, truth)
            paceline.generate(target, ids, mask, logits_processor=[Walled(25)], **more)


def test_a_prefix_function_is_asked_for_copies_as_by_transformers(target, draft, ragged):
    ids, mask = ragged
    options = dict(do_sample=True, num_return_sequences=2, max_new_tokens=8)
    forced = dict(prefix_allowed_tokens_fn=lambda place, text: [7 * place + len(text)])
    truth = target.generate(ids, attention_mask=mask, **options, **forced)
    for drafter in (None, "ngram", draft):
        assert torch.equal(paceline.generate(target, ids, mask, drafter=drafter, **options, **forced), truth)
