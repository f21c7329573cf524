"""Draft models whose vocabulary is not the target's: padded, smaller, or another tokenizer's. The text stays the
target's, and what they draft are tokens in common."""

import copy

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.draft_weights import rounded
from paceline.drafters.token_overlap import SharedTokens, shared_tokens
from paceline.spec import cli
from paceline.spec.engines import runs
from paceline.spec.target.tokenizers import tokenizer_of
from paceline.training.objectives.objective import NO_LABEL
from paceline.training.ranks import judge_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from support.models import noisy_copy, tiny_llama, whole_rows
from support.reference import two_token_law
from support.sentences import sentence
from support.tape import tape_executor

pytestmark = pytest.mark.usefixtures("one_thread")

# The target's tokenizer and padding, the draft's tokenizer and padding.
PAIRS = {
    "more padding": ("bytes", 4, "bytes", 20),
    "less padding": ("bytes", 20, "bytes", 4),
    "fewer tokens": ("bytes", 0, "fewer bytes", 8),
    "more tokens": ("fewer bytes", 0, "bytes", 0),
    "another tokenizer": ("bytes", 0, "pieces", 0),
    "the other way": ("pieces", 0, "bytes", 3),
}
WAYS = {"greedy": dict(do_sample=False), "sampled": dict(do_sample=True, temperature=0.9, top_k=0, seed=5)}


def draft_for(model, shared, size, noise=0.02):
    """A draft model of `size` ids that mostly agrees with `model` on the tokens in common. Left to itself it would
    always draft another token."""
    draft = noisy_copy(copy.deepcopy(model), noise)
    draft.resize_token_embeddings(size, mean_resizing=False)
    embeddings, head = draft.get_input_embeddings().weight, draft.get_output_embeddings()
    with torch.no_grad():
        for rows, of in ((embeddings, model.get_input_embeddings()), (head.weight, model.get_output_embeddings())):
            rows.normal_(std=0.3)
            rows[shared.rows] = of.weight[shared.ids]
        head.bias = torch.nn.Parameter(torch.full((size,), 50.0).index_fill(0, shared.rows, 0.0))
    return draft


def ragged_prompts(size):
    torch.manual_seed(7)
    ids, mask = torch.randint(3, size, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :8] = 0, 0
    return ids * mask, mask


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tokenizers):
    """A target, a draft model, their tokenizers, and what these have in common."""
    name, padding, draft_name, draft_padding = PAIRS[request.param]
    both = tokenizers[name], tokenizers[draft_name]
    sizes = len(both[0]) + padding, len(both[1]) + draft_padding
    model = tiny_llama(vocab=sizes[0])
    shared = shared_tokens(*both, *sizes)
    return model, draft_for(model, shared, sizes[1]), both, shared


@pytest.mark.parametrize("tree", ["chain:3", "3x2x1", "dynamic:12x4x3"])
def test_the_text_is_the_targets_and_drafts_are_tokens_in_common(pair, tree):
    model, draft, (tokenizer, draft_tokenizer), shared = pair
    drafter = paceline.load_drafter(draft, model, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer)
    prompts, accepted = ragged_prompts(model.config.vocab_size), 0
    for rule, way in (("match", "greedy"), ("match", "sampled"), ("residual", "sampled"), ("typical", "sampled")):
        if rule == "residual" and tree.startswith("dynamic"):
            continue
        options = dict(max_new_tokens=16, pad_token_id=0, **WAYS[way])
        out = paceline.generate(
            model, *prompts, drafter=drafter, tree=tree, verify=rule, return_dict_in_generate=True, **options
        )
        if rule == "match":
            assert torch.equal(out.sequences, paceline.generate(model, *prompts, **options))
        drafted = {token for event in out.trace.events for token in event.tokens[1:]}
        assert drafted and drafted <= set(shared.ids.tolist())
        accepted += out.trace.summary()["num_accepted_draft_tokens"]
    assert accepted > 0


def test_a_recorded_step_gives_the_same_text(pair, monkeypatch):
    """Under the rules of a captured step: nothing of the maps between ids is read on the host."""
    model, draft, _, shared = pair
    drafter, size = ModelDrafter(draft, shared=shared), model.config.vocab_size
    options = dict(max_new_tokens=12, pad_token_id=0, tree="3x2x1", **WAYS["sampled"])
    with tape_executor(monkeypatch) as tapes:
        for shift in (0, 1):  # of the second prompt nothing was seen when the step was recorded
            ids, mask = ragged_prompts(size)
            ids = (ids + shift) % size
            tape = paceline.generate(model, ids, mask, drafter=drafter, executor="tape", **options)
            assert torch.equal(tape, paceline.generate(model, ids, mask, **{**options, "tree": None}))
    assert len(tapes) == 1 and tapes[0].tape.offences == []
    runs.reset(model)


@pytest.mark.slow
def test_compiled_steps_give_the_same_text(tokenizers, traced_only):
    both = tokenizers["pieces"], tokenizers["bytes"]
    model, shared = tiny_llama(vocab=520, num_hidden_layers=1), shared_tokens(*both, 520, 400)
    drafter = ModelDrafter(draft_for(model, shared, 400), shared=shared)
    options = dict(max_new_tokens=12, pad_token_id=0, do_sample=False)
    compiled = dict(drafter=drafter, tree="chain:1", executor="compiled")
    for shift in (0, 1):
        ids, mask = ragged_prompts(520)
        ids = (ids + shift) % 520
        plain = paceline.generate(model, ids, mask, **options)
        assert torch.equal(paceline.generate(model, ids, mask, **compiled, **options), plain)


@pytest.mark.parametrize("rule", ["match", "residual"])
def test_whole_decoding_has_the_targets_law(rule):
    """As for trimmed heads: four thousand rows, the joint law of two tokens. The draft has five ids in another order,
    lacks a token, and would rather draft one that the target lacks."""
    model = tiny_llama(vocab=4, seed=1, bos_token_id=None)
    ids, rows = torch.tensor([0, 1, 3]), torch.tensor([4, 0, 2])
    shared = SharedTokens(ids, rows, torch.tensor([4, 0, 1, 2]), agree=False, of=4)
    drafter = ModelDrafter(draft_for(model, shared, 5), shared=shared)
    distance, accepted = two_token_law(model, drafter, rule)
    assert distance < 0.045 and 0.1 < accepted < 0.95


def test_it_reads_the_targets_tokens_as_its_own(tokenizers):
    """What it proposes first are the best common tokens by its own logits on the ids of its own."""
    both = tokenizers["bytes"], tokenizers["pieces"]
    model, shared = tiny_llama(vocab=400), shared_tokens(*both, 400, 520)
    draft = draft_for(model, shared, 520)
    prompt = torch.randint(3, 400, (1, 12), generator=torch.Generator().manual_seed(2))
    out = paceline.generate(
        model, prompt, drafter=ModelDrafter(draft, shared=shared), tree="chain:2", max_new_tokens=3,
        do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    read = shared.reads[prompt]
    for token in out.trace.events[0].tokens[1:]:
        best = draft(read).logits[0, -1, shared.rows].argmax()
        assert shared.ids[best] == token
        read = torch.cat([read, shared.rows[best].view(1, 1)], dim=1)


def test_a_loaded_model_stays_as_it_is_and_serves_several_targets(tokenizers):
    both = tokenizers["bytes"], tokenizers["pieces"]
    model, padded, shared = tiny_llama(vocab=400), tiny_llama(vocab=410), shared_tokens(*both, 400, 520)
    draft = draft_for(model, shared, 520)
    head, before = draft.get_output_embeddings(), draft(torch.arange(5)[None]).logits
    given = dict(zip(("tokenizer", "draft_tokenizer"), both))
    first = paceline.load_drafter(draft, model, **given)
    assert paceline.load_drafter(draft, model) is first, "what was compared is kept"
    second = paceline.load_drafter(draft, padded, **given)
    for target, drafter, size in ((model, first, 400), (padded, second, 410)):
        assert drafter.traits.vocab_size == size and len(drafter.reads) == size
        prompt = torch.tensor([[5, 6, size - 1]])
        options = dict(do_sample=False, max_new_tokens=8, pad_token_id=0)
        for given_as in (drafter, draft):
            assert torch.equal(
                paceline.generate(target, prompt, drafter=given_as, **options),
                paceline.generate(target, prompt, **options),
            )
    assert draft.get_output_embeddings() is head and torch.equal(draft(torch.arange(5)[None]).logits, before)
    with torch.no_grad():
        draft.get_output_embeddings().weight.mul_(2.0)
    assert paceline.load_drafter(draft, model) is not first, "it copied rows that have changed"
    twin = copy.deepcopy(draft)
    assert paceline.load_drafter(twin, model, **given).model.model is twin.model


def test_padding_needs_no_second_head(tokenizers):
    model, draft = tiny_llama(vocab=404), tiny_llama(vocab=420)
    drafter = paceline.load_drafter(draft, model, tokenizer=tokenizers["bytes"], draft_tokenizer=tokenizers["bytes"])
    trimmed, whole = drafter.model.get_output_embeddings().weight, draft.get_output_embeddings().weight
    assert trimmed.shape[0] == 400 and trimmed.data_ptr() == whole.data_ptr()


def test_reused_prompts_and_refilled_rows_keep_the_text(tokenizers):
    both = tokenizers["pieces"], tokenizers["bytes"]
    model, shared = tiny_llama(vocab=520), shared_tokens(*both, 520, 400)
    drafter, cache = ModelDrafter(draft_for(model, shared, 400), shared=shared), paceline.PromptCache()
    text, options = ragged_prompts(520)[0][:1], dict(do_sample=False, max_new_tokens=10, pad_token_id=0)
    for _ in range(2):
        plain = paceline.generate(model, text, **options)
        text = paceline.generate(model, text, drafter=drafter, reuse=cache, **options)
        assert torch.equal(text, plain)
    assert cache.tokens_reused > 0


def test_folders_are_compared_by_tokens_not_by_size(tokenizers, tmp_path, capsys):
    """Sizes that are equal by chance; and, from the command line, one line that says what is in common."""
    folders = {}
    for name, tokenizer in (("target", tokenizers["bytes"]), ("draft", tokenizers["pieces"])):
        folders[name] = str(tmp_path / name)
        tiny_llama(vocab=520).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    model, _ = paceline.load_target(folders["target"])
    drafter = paceline.load_drafter(folders["draft"], model)
    shared = shared_tokens(tokenizers["bytes"], tokenizers["pieces"], 520, 520)
    assert torch.equal(drafter.vocabulary, shared.ids) and torch.equal(drafter.reads, shared.reads)
    share = shared.share_of(tokenizers["bytes"])
    said = capsys.readouterr().err
    assert f"drafter draft has another tokenizer: it drafts {len(shared.ids)} of 400, {share:.1%}" in said
    assert f"at most {1 + share + share**2 + share**3 + share**4:.1f} tokens per step" in said
    line = ["--model", folders["target"], "--prompt", "Tree of tokens", "--max-new-tokens", "12"]
    texts = []
    for which in ("none", folders["draft"]):
        assert cli.main(["generate", *line, "--drafter", which]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    same = paceline.load_drafter(tiny_llama(vocab=520), model)
    assert same.vocabulary is None and "tokenizer" not in capsys.readouterr().err, "nothing tells them apart"


def test_what_cannot_be_compared_or_hardly_overlaps_is_refused(tokenizers, tmp_path):
    model, draft = tiny_llama(vocab=400), tiny_llama(vocab=410)
    sentence(
        lambda: paceline.load_drafter(draft, model), "410 tokens", "of 400", "the target's tokenizer", "tokenizer="
    )
    given = {"tokenizer": tokenizers["bytes"]}
    sentence(lambda: paceline.load_drafter(draft, model, **given), "its tokenizer", "draft_tokenizer=")
    words = copy.deepcopy(tokenizers["pieces"])
    words.backend_tokenizer.normalizer = None
    draft.save_pretrained(tmp_path)
    few = copy.deepcopy(tokenizers["bytes"])
    renamed = {f"{token}~": index for token, index in few.get_vocab().items()}
    few.get_vocab = lambda: renamed
    text = sentence(lambda: paceline.load_drafter(tmp_path, model, draft_tokenizer=few, **given), "0%", "ngram")
    assert "below 50%" in text


def test_it_is_judged_by_the_tokens_that_it_reads(tokenizers):
    """Ranks of the text's tokens among those in common, by its plain logits; others are never proposed."""
    both = tokenizers["bytes"], tokenizers["pieces"]
    model, shared = tiny_llama(vocab=400), shared_tokens(*both, 400, 520)
    draft = draft_for(model, shared, 520).double()  # in which no two logits are as close as rounding
    rows = torch.randint(3, 400, (2, 14), generator=torch.Generator().manual_seed(4))
    rows[1, 5] = next(token for token in range(400) if token not in shared.ids)
    ranks, judged = judge_of(ModelDrafter(draft, shared=shared), model, 2)(whole_rows(rows))
    logits = draft(shared.reads[rows]).logits[:, :-1, shared.rows]
    wanted = []
    for row, column in judged.nonzero().tolist():
        place = (shared.ids == rows[row, column + 1]).nonzero()
        own = logits[row, column]
        wanted.append(int((own > own[place[0, 0]]).sum()) if len(place) else 400)
    assert ranks[:, 0].tolist() == wanted and 400 in wanted and (ranks[:, 1] == NO_LABEL).sum() == 2


def test_transformers_can_run_it_beside(pair):
    """The draft as an ordinary model of the target's ids, with which `bench` compares transformers' own loop."""
    model, draft, _, shared = pair
    drafter = ModelDrafter(draft, shared=shared)
    prompt, options = ragged_prompts(model.config.vocab_size)[0][:1], dict(do_sample=False, max_new_tokens=8)
    text = model.generate(prompt, assistant_model=drafter.traits.causal_lm, **options)
    assert torch.equal(text, model.generate(prompt, **options))


def test_weights_in_blocks_keep_the_rows_in_common(tokenizers):
    both = tokenizers["bytes"], tokenizers["pieces"]
    model, shared = tiny_llama(vocab=400), shared_tokens(*both, 400, 520)
    blocks = rounded(ModelDrafter(draft_for(model, shared, 520), shared=shared), "q4").model
    once_more = ModelDrafter(
        blocks, shared=SharedTokens(torch.tensor([3, 5]), torch.tensor([2, 0]), shared.reads, False, 400)
    )
    head, trimmed = blocks.get_output_embeddings(), once_more.model.get_output_embeddings()
    assert torch.equal(trimmed.dequantised(), head.dequantised()[[2, 0]])


def test_a_folder_without_a_tokenizer_has_none(tmp_path, capfd):
    """Of a config alone transformers makes a tokenizer of a token or two."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=61, intermediate_size=48, **sizes)).eval()
    model.save_pretrained(tmp_path)
    loaded, _ = paceline.load_target(tmp_path, with_tokenizer=False)
    capfd.readouterr()
    assert tokenizer_of(loaded) is None is tokenizer_of(model) and capfd.readouterr().err == ""
    assert paceline.load_drafter(tmp_path, loaded).vocabulary is None
