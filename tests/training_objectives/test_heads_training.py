"""Training heads: the traps that published code fell into, and that training and decoding see the same."""

import paceline
import pytest
import torch
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaDrafter, MedusaHeads
from paceline.spec.target.taps import HEAD
from paceline.spec.tree import TreeShape
from paceline.training.objectives.heads import MedusaObjective
from paceline.training.objectives.known_tokens import frequent_tokens
from paceline.training.objectives.objective import NO_LABEL, labelled

from support.models import fitted_heads, target_view, tiny_llama, whole_rows
from support.packed import packed, view_of

MODES = ["independent", "markov", "hydra"]


@pytest.mark.parametrize("mode", MODES)
def test_no_label_is_off_by_one(target, mode):
    """Text that counts 1 2 3 ...: heads trained on it guess two, three, four further than their state's token."""
    text = (torch.arange(40)[None] + torch.arange(8)[:, None]) % 59 + 1
    batch, seen = whole_rows(text), target_view(target, text)
    states = torch.nn.functional.one_hot(text % 32, 32).float() * 5 + torch.nn.functional.one_hot(text // 32, 32)
    seen.tapped[HEAD] = states
    objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, heads=3, blocks=2, rank=32), target))
    train(objective, batch, seen, steps=150)
    for token in (7, 20, 30):
        place = text[0].tolist().index(token)
        started = objective.heads.start(seen.hidden[0, place])
        path = torch.tensor([token + 1, token + 2, token + 3])
        guesses = [int(objective.heads.follow(started, d, path[: d + 1]).argmax()) for d in range(3)]
        assert guesses == [token + 2, token + 3, token + 4]


def train(objective, batch, seen, steps, rate=0.01):
    optimizer = torch.optim.Adam(objective.parameters(), lr=rate)
    for _ in range(steps):
        losses = objective(batch, seen)
        (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_no_two_heads_or_blocks_are_one(target, mode):
    """Each head's weights have a gradient of their own (published code repeated one block K times)."""
    batch = packed()
    objective = MedusaObjective(fitted_heads(target, mode, steps=0, blocks=2))
    objective(batch, view_of(target, batch)).total.backward()
    gradients = objective.heads.weight.grad.flatten(0, 1)
    for one in range(6):
        for other in range(one):
            assert not torch.allclose(gradients[one], gradients[other], rtol=1e-3)


def test_the_head_vocabulary_is_the_commonest_of_the_targets_own_tokens():
    rows = [
        {"input_ids": [9, 9, 9, 4, 4, 7, 7, 5], "loss_mask": [0, 0, 0, 1, 1, 1, 1, 1]},
        {"input_ids": torch.tensor([7, 5, 9]), "loss_mask": torch.tensor([1, 0, 0])},
    ]
    assert frequent_tokens(rows, 1, 10).tolist() == [7]
    assert frequent_tokens(rows, 2, 10).tolist() == [4, 7]
    assert frequent_tokens(rows, 3, 10).tolist() == [4, 5, 7]
    assert frequent_tokens(rows, 5, 10).tolist() == [0, 1, 4, 5, 7], "unseen tokens fill up, the lower ids first"
    for size in (0, 11):
        with pytest.raises(ValueError, match="at most the target's 10"):
            frequent_tokens(rows, size, 10)
    with pytest.raises(ValueError, match="none of the target's own tokens"):
        frequent_tokens([{"input_ids": [1, 2], "loss_mask": [0, 0]}], 2, 10)


def test_an_objective_is_built_from_its_section_of_a_configuration(target):
    rows = [{"input_ids": [9, 9, 4, 7], "loss_mask": [0, 1, 1, 1]}]
    section = dict(kind="medusa", mode="markov", heads=2, rank=4, known_tokens=2, target_weight=0.5, decay="0.9")
    objective = MedusaObjective.build(section, target, rows)
    assert objective.heads.settings == HeadSettings("markov", heads=2, rank=4)
    assert objective.heads.vocabulary.tolist() == [4, 7]
    assert (objective.label_weight, objective.target_weight, objective.decay) == (1.0, 0.5, 0.9)
    assert not MedusaObjective.build({}, target).heads.trimmed
    for section, words in (
        (dict(head=2), "unknown key 'objective.head', did you mean 'heads'"),
        (dict(heads="many"), "objective.heads wants int"),
        (dict(mode="eagle"), "choose of independent, markov, hydra"),
        (dict(blocks=0), "blocks=0 must be a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            MedusaObjective.build(section, target, rows)


def test_objectives_that_make_no_sense_are_refused(target):
    heads = MedusaHeads.make(HeadSettings(), target)
    for options, words in (
        (dict(label_weight=0.0), "nor both zero"),
        (dict(target_weight=-1.0), "must not be negative"),
        (dict(decay=0.0), "decay=0.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            MedusaObjective(heads, **options)


def test_every_parameter_is_in_one_group(target):
    names = {"independent": {"blocks"}, "markov": {"blocks", "markov"}, "hydra": {"blocks", "path"}}
    for mode in MODES:
        for own in (False, True):
            objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, own_heads=own), target))
            groups = objective.parameter_groups()
            assert set(groups) == names[mode] | ({"lm_heads"} if own else set())
            grouped = [id(parameter) for group in groups.values() for parameter in group]
            assert sorted(grouped) == sorted(map(id, objective.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_one_text_overfitted_is_drafted_whole(mode):
    """Heads that know one text by heart reach the most that a chain can bring, in decoding."""
    model = tiny_llama(seed=6)
    prompt = torch.tensor([[5, 9, 2, 33]])
    text = model.generate(prompt, do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0)
    batch, seen = whole_rows(text), target_view(model, text)
    batch["loss_mask"] = batch["loss_mask"].clone()
    batch["loss_mask"][:, :4] = 0
    objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, heads=3), model))
    losses = train(objective, batch, seen, steps=200)
    assert losses.tokens_per_step() > 3.9
    out = paceline.generate(
        model, prompt, drafter=MedusaDrafter(objective.heads), tree="chain:3", do_sample=False, max_new_tokens=60,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, text)
    assert out.trace.summary()["tokens_per_step"] > 3.7, "4 is the most, and the last step is cut"


@pytest.mark.parametrize("known", [None, 40])
@pytest.mark.parametrize("mode", MODES)
def test_training_and_decoding_see_the_same(target, mode, known):
    """Every step of decoding with a chain accepts as much as the teacher-forced ranks say at its place, and drafts
    what the heads say there of the text; with a tree, as far as the ranks lie within its width."""
    heads = fitted_heads(target, mode, known=known)
    drafter, objective = MedusaDrafter(heads), MedusaObjective(heads)
    torch.manual_seed(21)
    prompts = torch.randint(1, 61, (6, 7))
    compared = 0
    for tree in ("chain:3", "3x3x3"):
        width = TreeShape.parse(tree).max_children
        options = dict(do_sample=False, max_new_tokens=40, return_dict_in_generate=True)
        out = paceline.generate(target, prompts, drafter=drafter, tree=tree, **options)
        batch = whole_rows(out.sequences)
        seen = target_view(target, out.sequences)
        ranks = objective.label_ranks(batch, seen)  # (n, 3) of all positions with labels, row after row
        placed = torch.full((6, 47, 3), NO_LABEL)
        placed[labelled(batch, 3)[..., 0]] = ranks
        for row, events in out.trace.rows():
            root = 6  # the position of the root: the last prompt token
            for event in events:
                mine = placed[row, root - 1].tolist()
                if NO_LABEL not in mine:
                    leading = next((depth for depth, rank in enumerate(mine) if rank >= width), 3)
                    assert len(event.accepted) == leading
                    first = heads.follow(heads.start(seen.hidden[row, root - 1]), 0, out.sequences[row, root, None])
                    children = [token for token, parent in zip(event.tokens, event.parents) if parent == 0]
                    assert children == heads.vocabulary[first.topk(width).indices].tolist()
                    compared += leading > 0
                root += len(event.committed)
    assert compared > 20
