"""`generate` as a drop-in: greedy text equals transformers' own, sampled text equals the seed's own, every
argument means what it means there, and what cannot be done is refused in one sentence."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import executors
from paceline.spec.noise import row_keys
from paceline.spec.step import step
from paceline.spec.target.slots import cache_argument
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from conftest import noisy_copy, tiny_llama
from reference import plain_text, two_token_law

NEW = 24


class Upwards(LogitsProcessor):
    """A user's processor that looks at the history: forbids tokens below the last one, mostly."""

    def __call__(self, input_ids, scores):
        floor = input_ids[:, -1:] % 20
        return scores.masked_fill(torch.arange(scores.shape[-1]) < floor, -torch.inf)


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


def drafters(draft, hydra):
    return {"none": None, "ngram": NgramDrafter(), "model": draft, "hydra": hydra}


CASES = {
    "plain": {},
    "eos": dict(eos_token_id=17, pad_token_id=0),
    "several eos": dict(eos_token_id=[17, 23, 5], pad_token_id=3),
    "min_new_tokens": dict(eos_token_id=[17, 23, 5, 30], min_new_tokens=9),
    "min_length": dict(eos_token_id=[17, 23, 5, 30], min_length=15),
    "max_length": dict(max_length=20, max_new_tokens=None),
    "repetition penalty": dict(repetition_penalty=1.7),
    "no repeat n-gram": dict(no_repeat_ngram_size=2),
    "encoder penalties": dict(encoder_repetition_penalty=1.5, encoder_no_repeat_ngram_size=2),
    "bad words": dict(bad_words_ids=[[17], [23, 5], [9, 9]]),
    "suppressed": dict(suppress_tokens=[17, 23, 5, 9], begin_suppress_tokens=[30, 31]),
    "forced eos": dict(eos_token_id=2, forced_eos_token_id=2),
    "sequence bias": dict(sequence_bias=[[[17], 4.0], [[23, 5], -9.0]]),
    "length decay": dict(exponential_decay_length_penalty=(5, 1.4), eos_token_id=17),
    "prefix function": dict(prefix_allowed_tokens_fn=lambda row, ids: [row + 3, 10, 20, 30 + int(ids[-1]) % 7]),
    "user processor": dict(logits_processor=LogitsProcessorList([Upwards()])),
    "config object": dict(generation_config=GenerationConfig(max_new_tokens=11, pad_token_id=0, do_sample=False)),
    "remove invalid values": dict(remove_invalid_values=True, renormalize_logits=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["none", "ngram", "model", "hydra"])
def test_greedy_text_equals_transformers(target, draft, hydra, ragged, case, which):
    ids, mask = ragged
    options = dict(do_sample=False, max_new_tokens=NEW) | CASES[case]
    if "generation_config" in options:
        options = CASES[case]
    truth = target.generate(ids, attention_mask=mask, **options)
    for tree in ("chain:3", "3x2x1"):
        got = paceline.generate(
            target,
            ids,
            mask,
            drafter=drafters(draft, hydra)[which],
            tree=tree if which != "none" else None,
            **options,
        )
        assert torch.equal(got, truth), tree


SAMPLING = {
    "temperature": dict(temperature=0.7, top_k=0),
    "top-k": dict(top_k=5),
    "top-p": dict(top_p=0.8, temperature=1.3, top_k=0),
    "min-p": dict(min_p=0.1, top_k=0),
    "typical": dict(typical_p=0.7, top_k=0),
    "epsilon": dict(epsilon_cutoff=0.02, top_k=0),
    "eta": dict(eta_cutoff=0.05, top_k=0),
    "top-h": dict(top_h=0.6, top_k=0),
    "history": dict(repetition_penalty=1.5, top_p=0.9, no_repeat_ngram_size=3),
    "user processor": dict(logits_processor=LogitsProcessorList([Upwards()]), top_k=8),
    "copies": dict(num_return_sequences=2, top_k=0, repetition_penalty=1.2),
    "ends": dict(top_k=0, eos_token_id=[17, 5, 30, 31, 32], pad_token_id=0),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampled_text_is_the_seed_s_whatever_the_drafter(target, draft, hydra, ragged, case):
    ids, mask = ragged
    options = dict(do_sample=True, max_new_tokens=NEW) | SAMPLING[case]
    for seed in (0, 5):
        truth = paceline.generate(target, ids, mask, seed=seed, **options)
        for drafter, tree in (
            ("ngram", None),
            (draft, "chain:4"),
            (draft, "4x2x1"),
            (draft, [-1, 0, 0, 1, 3]),
            (hydra, "4x2x1"),
        ):
            got = paceline.generate(target, ids, mask, drafter=drafter, tree=tree, seed=seed, **options)
            assert torch.equal(got, truth), (drafter, tree)


def test_plain_decoding_equals_the_slow_reference(target, ragged):
    """`drafter=None` against cache-less decoding of each row alone, greedy and sampled."""
    ids, mask = ragged
    greedy = paceline.generate(target, ids, mask, do_sample=False, max_new_tokens=NEW)
    sampled = paceline.generate(
        target, ids, mask, seed=9, do_sample=True, max_new_tokens=NEW, temperature=0.8, top_p=0.9, top_k=0
    )
    warpers = [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)]
    keys = row_keys(9, 3, "cpu")
    for row in range(3):
        prompt = ids[row][mask[row] == 1].tolist()
        assert greedy[row, 9:].tolist() == plain_text(target, prompt, NEW)
        assert sampled[row, 9:].tolist() == plain_text(target, prompt, NEW, warpers, keys[row])


def test_a_row_does_not_know_its_batch(target, draft, ragged):
    """The same text alone, with other mates, and with the other rows in another order."""
    ids, mask = ragged
    options = dict(do_sample=True, max_new_tokens=NEW, top_k=0, drafter=draft, tree="3x2")
    together = paceline.generate(target, ids, mask, seed=[11, 12, 13], **options)
    order = [2, 0, 1]
    shuffled = paceline.generate(target, ids[order], mask[order], seed=[13, 11, 12], **options)
    assert torch.equal(together[order], shuffled)
    for row, seed in enumerate((11, 12, 13)):
        keep = mask[row] == 1
        alone = paceline.generate(target, ids[row : row + 1, keep], seed=seed, **options)
        assert torch.equal(alone[0, keep.sum() :], together[row, 9:])
    first = paceline.generate(target, ids, mask, seed=11, **options)
    assert torch.equal(first[0], together[0]), "row r of an integer seed is stream (seed, r)"
    assert not torch.equal(first[1], together[1])


def test_residual_and_typical_decode_and_agree_at_temperature_zero(target, draft, ragged):
    ids, mask = ragged
    truth = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for rule in ("residual", "typical"):
        got = paceline.generate(
            target, ids, mask, drafter=draft, tree="3x2", verify=rule, do_sample=False, max_new_tokens=NEW
        )
        assert torch.equal(got, truth)
        texts = [
            paceline.generate(
                target,
                ids,
                mask,
                drafter=draft,
                tree="3x2",
                verify=rule,
                seed=1,
                do_sample=True,
                max_new_tokens=NEW,
            )
            for _ in range(2)
        ]
        assert torch.equal(*texts), "reproducible"


def test_scores_and_logits_are_transformers_own(target, draft, ragged):
    ids, mask = ragged
    options = dict(
        do_sample=False, max_new_tokens=12, repetition_penalty=1.3, eos_token_id=[17, 5], pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    truth = target.generate(ids, attention_mask=mask, **options)
    got = paceline.generate(target, ids, mask, drafter=draft, tree="2x2", **options)
    assert torch.equal(got.sequences, truth.sequences)
    assert len(got.scores) == len(truth.scores) and len(got.logits) == len(truth.logits)
    for index in range(len(truth.scores)):
        for row in range(3):
            if set(got.sequences[row, 9 : 9 + index].tolist()) & {17, 5}:
                assert not got.scores[index][row].any(), "zeros behind the end"
                continue
            assert torch.allclose(got.scores[index][row], truth.scores[index][row], atol=1e-4)
            assert torch.allclose(got.logits[index][row], truth.logits[index][row], atol=1e-4)


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


def test_the_cache_is_allocated_once_and_steps_do_not_grow(target, draft, ragged, monkeypatch):
    """Buffers keep their addresses, and no tensor that a step makes is larger late in a text than early."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest, addresses = [], set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest[-1].append(tensor.numel())
            return out

    def watched(engine, mark):
        caches = engine.target.cache, engine.session.slots.cache
        addresses.add(tuple(layer.keys.data_ptr() for cache in caches for layer in cache.layers))
        largest.append([])
        with Sizes():
            return step(engine, mark)

    monkeypatch.setattr(executors, "step", watched)
    ids, mask = ragged
    paceline.generate(target, ids, mask, drafter=draft, tree="3x2", do_sample=False, max_new_tokens=100)
    assert len(addresses) == 1 and len(largest) > 20
    assert largest[0] == largest[-1]


REFUSALS = {
    "beams": (dict(num_beams=2), "beam search"),
    "contrastive": (dict(penalty_alpha=0.6, top_k=4), "contrastive"),
    "guidance": (dict(guidance_scale=1.5), "CFG"),
    "assistant": (dict(assistant_model=object()), "drafter="),
    "typo": (dict(max_new_token=3), "did you mean 'max_new_tokens'"),
    "nonsense": (dict(qqqq=3), "does not take 'qqqq'"),
    "rule": (dict(verify="exact"), "match, residual, typical"),
    "executor": (dict(executor="quantum"), "eager"),
    "law": (dict(drafter="ngram", verify="residual", do_sample=True), "verify='match'"),
    "too long": (dict(max_new_tokens=300), "context of 256"),
    "no tokens": (dict(max_new_tokens=0), "at least 1 token"),
    "seeds": (dict(seed=[1, 2]), "2 entries for 3 rows"),
    "tree": (dict(drafter="ngram", tree="4y2"), "'chain:5'"),
    "stop strings": (dict(stop_strings=["x"]), "tokenizer"),
    "attentions": (
        dict(output_attentions=True, return_dict_in_generate=True),
        "attentions are not collected",
    ),
    "a cache": (dict(cache=DynamicCache()), "slot cache"),
    "a past": (dict(past_key_values=DynamicCache()), "slot cache"),
    "static cache": (dict(cache_implementation="static"), "slot cache"),
    "no cache": (dict(use_cache=False), "without a cache"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_sentence(target, ragged, case):
    options, words = REFUSALS[case]
    ids, mask = ragged
    with pytest.raises(ValueError, match=words) as caught:
        paceline.generate(target, ids, mask, **dict(max_new_tokens=4, pad_token_id=0) | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "at least 1 token"),
        (None, None, "at least 1 token"),
        (torch.tensor([1, 2]), None, "shape"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), "must agree"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]]), "left only"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 1]]), "left only"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "row 1"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(target, ids, mask, words):
    with pytest.raises(ValueError, match=words) as caught:
        paceline.generate(target, ids, mask, max_new_tokens=4)
    assert "\n" not in str(caught.value)


def test_other_vocabularies_and_encoder_decoders_are_refused(target, ragged):
    ids, mask = ragged
    other = ModelDrafter(tiny_llama(vocab=50))
    with pytest.raises(ValueError, match="vocabulary of 50 tokens and the target one of 61"):
        paceline.generate(target, ids, mask, drafter=other, max_new_tokens=4)
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    with pytest.raises(ValueError, match="encoder-decoder"):
        paceline.generate(t5, ids, max_new_tokens=4)


def test_nan_logits_end_in_a_sentence(ragged):
    broken = tiny_llama(seed=4)
    paceline.generate(broken, ragged[0], ragged[1], max_new_tokens=2)  # attached while still whole
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    for drafter in (None, "ngram"):
        with pytest.raises(ValueError, match=r"row 0: the scores .* are NaN"):
            paceline.generate(broken, ragged[0], ragged[1], drafter=drafter, max_new_tokens=4)
    fresh = tiny_llama(seed=4)
    with torch.no_grad():
        fresh.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|nan"):
        paceline.generate(fresh, ragged[0], ragged[1], max_new_tokens=4)


def test_drafts_beyond_the_context_do_no_harm():
    """A text that fills a context of learned positions to the last token, with trees that reach past it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=None)
    )
    model = model.eval()
    ids = torch.randint(1, 61, (2, 8))
    truth = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
    got = paceline.generate(
        model,
        ids,
        drafter=ModelDrafter(noisy_copy(model)),
        tree="2x2x1x1x1",
        do_sample=False,
        max_new_tokens=24,
    )
    assert torch.equal(got, truth)


def test_a_draft_model_recomputes_nothing(target, ragged, monkeypatch):
    """After a commit every slot of the draft's cache below the pair that starts a step holds what a
    cache-less forward of the committed text gives, although only drafted nodes were ever forwarded."""
    drafter = ModelDrafter(noisy_copy(target, noise=0.005))
    engines = []

    def watched(engine, mark):
        engines.append(engine)
        return step(engine, mark)

    monkeypatch.setattr(executors, "step", watched)
    ids, mask = ragged
    out = paceline.generate(
        target,
        ids,
        mask,
        drafter=drafter,
        tree="2x2x1",
        do_sample=False,
        max_new_tokens=40,
        return_dict_in_generate=True,
    )
    assert out.trace.summary()["tokens_per_step"] > 1.5
    engine = engines[-1]
    for row in range(3):
        length = int(engine.state.lengths[row])
        kept = length - 2  # all but the leaf that may be missing, and the root
        with torch.no_grad():
            out = drafter.model(engine.state.tokens[row : row + 1, :kept], use_cache=True)
            truth = out[cache_argument(drafter.model)]
        # A row that had ended earlier is followed no further than its last own step.
        layer = engine.session.slots.cache.layers[1]
        mine = layer.by_row(layer.keys)[row, : kept - 4]  # (T, H * D)
        theirs = truth.layers[1].keys[0].transpose(0, 1).flatten(1)
        assert torch.allclose(mine, theirs[: kept - 4], atol=1e-4)


def test_drafters_by_name_and_folder(target, ragged, tmp_path, tokenizer):
    ids, mask = ragged
    noisy_copy(target).save_pretrained(tmp_path / "draft")
    tokenizer.save_pretrained(tmp_path / "draft")
    drafter = paceline.load_drafter(tmp_path / "draft", target)
    assert drafter.name == "draft"
    truth = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for named in (drafter, str(tmp_path / "draft"), "ngram"):
        assert torch.equal(
            paceline.generate(target, ids, mask, drafter=named, do_sample=False, max_new_tokens=NEW), truth
        )
    with pytest.raises(ValueError, match="vocabulary of 61 tokens and the target one of 50"):
        paceline.load_drafter(tmp_path / "draft", tiny_llama(vocab=50))


@pytest.mark.parametrize("rule", ["match", "residual"])
def test_decoding_with_a_draft_model_has_the_targets_law(rule):
    """Four thousand rows of one prompt: the joint law of the first two tokens, whole decoder included.

    Chance alone gives a total variation of about 0.025 here; drafts verified as if they were the target's
    would give several times as much."""
    model = tiny_llama(vocab=4, seed=1, bos_token_id=None)
    drafter = ModelDrafter(noisy_copy(model, noise=0.3))
    prompt = torch.tensor([[2, 3, 1]])
    with torch.no_grad():
        first, other = (m(prompt).logits[0, -1].softmax(-1) for m in (model, drafter.model))
    assert (first - other).abs().sum() / 2 > 0.1, "the draft is another law"
    distance, accepted = two_token_law(model, drafter, rule)
    assert distance < 0.045 and 0.1 < accepted < 0.9
