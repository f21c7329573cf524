"""Which model families can be targets: tree steps against cache-less forwards, on tiny random models.

Contexts are longer than the windows and chunks, so that those decide. Families that cannot follow
explicit positions and masks must be refused with a sentence.
"""

import pytest
import torch
from paceline.spec.target.cache import bytes_per_token
from paceline.spec.target.protocol import spans
from paceline.spec.target.selftest import attach
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape

from support.families import REFUSED, SIZES, STATEFUL, SUPPORTED, build

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("name", [*SUPPORTED, *STATEFUL])
def test_tree_steps_equal_cacheless_forwards(name):
    """Two ragged rows, three steps with commits of different paths: every node's logits to 1e-5 of the largest."""
    model = build(name, (SUPPORTED | STATEFUL)[name])
    attach(model)
    shape = TreeShape.parse("2x2x1")
    tree = TokenTree.of(shape, "cpu")
    torch.manual_seed(3)
    texts = [torch.randint(3, 64, (length,)).tolist() for length in (11, 8)]
    slots = SlotModel(model, 2, capacity=64)
    for span in spans(torch.tensor([texts[0], [*texts[1], 0, 0, 0]]), torch.tensor([11, 8]), chunk=4):
        slots.read(span)
    for step in range(3):
        base = torch.tensor([len(text) - 1 for text in texts])
        tokens = torch.randint(3, 64, (2, tree.size))
        tokens[:, 0] = torch.tensor([text[-1] for text in texts])
        logits = slots.forward_nodes(tokens, base, tree).logits
        for row, text in enumerate(texts):
            for node in range(tree.size):
                nodes = tree.paths[0, node, : tree.depths[0, node] + 1]
                ids = torch.tensor([text[:-1] + tokens[row, nodes].tolist()])
                truth = model(input_ids=ids, use_cache=False).logits[0, -1]
                assert (logits[row, node] - truth).abs().max() <= 1e-5 * max(1, truth.abs().max())
        chosen = [tree.size - 1 - step, 2 + step]
        slots.commit(base, tree.paths[0, chosen], tree.depths[0, chosen] + 1)
        for row, node in enumerate(chosen):
            path = tree.paths[0, node, 1 : tree.depths[0, node] + 1]
            texts[row] += [*tokens[row, path].tolist(), 5 + step]
    held = slots.nbytes - (0 if slots.cache.states is None else slots.cache.states.nbytes)
    if name not in ("gpt_neox", "falcon", "deepseek_v3"):  # whose heads of keys their configurations tell otherwise
        assert held == 2 * 64 * bytes_per_token(model)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_are_refused_in_a_sentence(name):
    model = build(name, REFUSED[name])
    with pytest.raises(ValueError) as caught:
        attach(model)
    sentence = str(caught.value)
    assert "\n" not in sentence and type(model).__name__ in sentence and "; use a model" in sentence, sentence
    reason = "recurrent state" if name in ("recurrent_gemma", "rwkv") else "cannot be decoded with trees"
    assert reason in sentence


def test_other_attention_and_training_mode_are_refused(target):
    model = build("llama", SIZES)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        attach(model)
    model.eval()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        attach(model)


@torch.no_grad()
def test_the_hook_leaves_other_forwards_alone(target, ragged):
    """Before, between and after slot forwards the stock masks answer, in this thread and in others."""
    import threading

    ids, mask = ragged
    before = target(input_ids=ids, attention_mask=mask).logits
    slots = SlotModel(target, len(ids), capacity=64)
    for span in spans(ids, mask.sum(1), chunk=512):
        slots.read(span)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(target(input_ids=ids, attention_mask=mask).logits))
    thread.start()
    thread.join()
    assert torch.equal(before, target(input_ids=ids, attention_mask=mask).logits)
    assert torch.allclose(before, seen[0])
