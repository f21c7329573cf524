"""The objective of heads: against a slow reference, against the traps that published code fell into, and against
decoding itself."""

import math

import paceline
import pytest
import torch
from paceline.drafters.medusa import HeadSettings, MedusaDrafter, MedusaHeads
from paceline.spec.target.taps import HEAD
from paceline.spec.tree import TreeShape
from paceline.training.objectives import heads as heads_objective
from paceline.training.objectives.heads import MedusaObjective
from paceline.training.objectives.known_tokens import frequent_tokens
from paceline.training.objectives.objective import NO_LABEL, Losses, acceptance, labelled
from paceline.training.objectives.target import ScaledHead

from conftest import fitted_heads, target_view, tiny_llama, whole_rows

MODES = ["independent", "markov", "hydra"]


def packed():
    """Two rows of packed documents: prompts (mask 0), answers (mask 1), a second turn, padding."""
    torch.manual_seed(9)
    return {
        "input_ids": torch.randint(1, 61, (2, 14)),
        "document": torch.tensor([[0] * 8 + [1] * 6, [0] * 3 + [1] * 7 + [-1] * 4]),
        "loss_mask": torch.tensor(
            [[0, 0, 0, 1, 1, 1, 0, 1] + [1, 1, 0, 0, 1, 1], [0, 1, 1] + [0, 0, 1, 1, 1, 1, 1] + [1] * 4]
        ),
    }


def view_of(model, batch):
    """Some hidden state for every position; the objective does not ask where it comes from."""
    torch.manual_seed(10)
    return target_view(model, batch["input_ids"])


def slow_labels(batch, row, place, depths):
    """How many guesses at `place` are judged, by the definition."""
    document, own = batch["document"][row].tolist(), batch["loss_mask"][row].tolist()
    if document[place] < 0 or place + 1 >= len(own) or document[place + 1] != document[place]:
        return 0
    count = 0
    while count < depths:
        label = place + 2 + count
        if label >= len(own) or document[label] != document[place] or not own[label]:
            break
        count += 1
    return count


def slow_losses(objective, batch, seen):
    """Position by position and head by head, as the formulas say."""
    heads, known = objective.heads, objective.heads.vocabulary.tolist()
    total, counted = 0.0, 0
    hits, tried = [0] * objective.depths, [0] * objective.depths
    for row, text in enumerate(batch["input_ids"].tolist()):
        for place in range(len(text)):
            right = True
            for depth in range(slow_labels(batch, row, place, objective.depths)):
                path, label = text[place + 1 : place + 2 + depth], text[place + 2 + depth]
                started = heads.start(seen.hidden[row, place])
                logits = heads.follow(started, depth, torch.tensor(path)).double()
                law = logits.log_softmax(-1)
                loss = 0.0
                if label in known:
                    loss -= objective.label_weight * law[known.index(label)]
                if objective.target_weight:
                    target = seen.lm_head(seen.hidden[row, place + 1 + depth])[known].double().softmax(-1)
                    loss += objective.target_weight * (target * (target.log() - law)).sum()
                counted += 1 if objective.target_weight else label in known
                total = total + objective.decay ** (depth + 1) * loss
                tried[depth] += right
                right = right and known[int(logits.argmax())] == label
                hits[depth] += right
    return total, counted, hits, tried


WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("known", [None, 30])
@pytest.mark.parametrize("mode", MODES)
def test_losses_equal_the_slow_reference(target, monkeypatch, mode, known, weights):
    batch = packed()
    seen = view_of(target, batch)
    heads = fitted_heads(target, mode, steps=3, known=known)
    objective = MedusaObjective(heads, *weights)
    total, counted, hits, tried = slow_losses(objective, batch, seen)
    slow = torch.autograd.grad(total, list(objective.parameters()), allow_unused=True)
    for chunk in (heads_objective._CHUNK, 1):  # all positions at once; one at a time
        monkeypatch.setattr(heads_objective, "_CHUNK", chunk)
        objective.zero_grad()
        losses = objective(batch, seen)
        losses.total.backward()
        assert torch.allclose(losses.total.double(), total, rtol=1e-5)
        assert (int(losses.counted), losses.hits.tolist(), losses.tried.tolist()) == (counted, hits, tried)
        for parameter, grad in zip(objective.parameters(), slow):
            assert torch.allclose(parameter.grad, grad, atol=1e-4), "gradients too, of every parameter"


def test_the_law_of_a_target_that_scales_its_logits_is_scaled_too(target):
    batch = packed()
    seen = view_of(target, batch)
    seen.lm_head = ScaledHead(seen.lm_head, 0.25, 2.0)
    objective = MedusaObjective(fitted_heads(target, "markov", steps=3, known=30), 0.0, 1.0)
    assert torch.allclose(objective(batch, seen).total.double(), slow_losses(objective, batch, seen)[0], rtol=1e-5)


def test_labels_are_the_targets_own_tokens_of_one_document():
    batch = packed()
    judged = labelled(batch, 3)
    for row in range(2):
        for place in range(14):
            count = slow_labels(batch, row, place, 3)
            assert judged[row, place].tolist() == [True] * count + [False] * (3 - count)
    assert judged[0, 1].tolist() == [True] * 3, "the first answer token is guessed from the last prompt token but one"
    assert judged[0, 0].tolist() == [False] * 3, "a prompt token is never guessed, nor what stands behind it"
    assert judged[0, 6].tolist() == [False] * 3, "not across documents"
    assert judged[1, 9:].sum() == 0, "not in padding, whatever its mask says"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_labels_and_the_text_before_them_matters(target, mode):
    """Tokens that are no label and stand on no path, and states that nothing is guessed from, change nothing."""
    batch = packed()
    objective = MedusaObjective(fitted_heads(target, mode, steps=3))
    seen = view_of(target, batch)
    before = objective(batch, seen)
    judged = labelled(batch, 3)
    used = torch.zeros(2, 14, dtype=torch.bool)
    for row, place, depth in judged.nonzero().tolist():
        used[row, place + 1 : place + 3 + depth] = True
    assert (~used).sum() > 6
    batch["input_ids"] = torch.where(used, batch["input_ids"], 60)
    seen.tapped[HEAD] = torch.where(judged.any(-1)[..., None], seen.hidden, 1e3)
    after = objective(batch, seen)
    assert torch.equal(before.total, after.total) and torch.equal(before.hits, after.hits)


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


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_labels_gives_zero_and_zero_gradients(target, mode):
    batch = packed()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, own_heads=True), target))
    losses = objective(batch, view_of(target, batch))
    losses.total.backward()
    assert losses.total.item() == int(losses.counted) == int(losses.tried.sum()) == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in objective.parameters())
    assert objective.label_ranks(batch, view_of(target, batch)).shape == (0, 4)


def test_labels_that_the_heads_do_not_know_count_as_misses(target):
    batch = packed()
    batch["input_ids"] = batch["input_ids"] % 20 + 1
    heads = MedusaHeads.make(HeadSettings(heads=3), target, torch.arange(40, 50))
    losses = MedusaObjective(heads)(batch, view_of(target, batch))
    assert losses.total.item() == int(losses.counted) == 0
    assert int(losses.tried[0]) == int(labelled(batch, 3)[..., 0].sum()) and not losses.hits.any()
    ranks = MedusaObjective(heads).label_ranks(batch, view_of(target, batch))
    assert set(ranks.flatten().tolist()) == {61, NO_LABEL}
    counts = acceptance(MedusaObjective(heads), [(batch, view_of(target, batch))], width=20)
    assert not any(map(any, counts.hits)), "nor is an unknown token a child of any rank"


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(target, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (61,) and tensor.ndim > 1:
                    largest = max(largest, tensor.numel() // 61)
            return out

    text = torch.randint(1, 61, (4, 64))
    monkeypatch.setattr(heads_objective, "_CHUNK", 61 * 3 * 10)
    for mode in MODES:
        objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, heads=3, rank=8), target), 1.0, 1.0)
        seen = target_view(target, text)
        with Sizes():
            objective(whole_rows(text), seen).total.backward()
    assert 10 <= largest <= 61, "a chunk of ten positions and three heads, and the LM head itself"


def test_estimated_tokens_per_step_is_one_plus_the_products():
    losses = Losses(torch.zeros(()), torch.tensor(8), torch.tensor([6, 3, 0]), torch.tensor([8, 6, 3]))
    assert math.isclose(losses.tokens_per_step(), 1 + 0.75 + 0.75 * 0.5)
    assert Losses(*[torch.zeros(2)] * 4).tokens_per_step() == 1


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


def test_acceptance_counts_what_ranks_say(target):
    """Against counting in plain Python, over two batches."""
    objective = MedusaObjective(fitted_heads(target, "hydra", known=40))
    batches = [packed(), whole_rows(torch.randint(1, 61, (3, 20)))]
    views = [(batch, target_view(target, batch["input_ids"])) for batch in batches]
    for width in (1, 4, 61):
        counts = acceptance(objective, iter(views), width)
        hits, trials = [[0] * width for _ in range(3)], [0] * 3
        for batch, seen in views:
            for ranks in objective.label_ranks(batch, seen).tolist():
                for depth, rank in enumerate(ranks):
                    if rank == NO_LABEL:
                        break
                    trials[depth] += 1
                    if rank >= min(width, 40):
                        break
                    hits[depth][rank] += 1
        assert counts.hits == hits and counts.trials == [[trial] * width for trial in trials]
        assert all(sum(row) <= 1 + 1e-9 for row in counts.rates(weight=0))
    losses = [objective(*view) for view in views]
    counts = acceptance(objective, views, 1)
    assert [row[0] for row in counts.hits] == sum(loss.hits for loss in losses).tolist(), "first guesses, both ways"
    assert [row[0] for row in counts.trials] == sum(loss.tried for loss in losses).tolist()
