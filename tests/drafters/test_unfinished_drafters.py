"""What the author of a drafter is told: about objects that are none yet, proposals that do not fit, unknown names."""

from dataclasses import replace

import paceline
import pytest
import torch
from paceline.spec.proposal import NO_TOKEN, DrafterTraits, Proposal, Unremembering
from paceline.spec.tree import TokenTree, TreeShape


class Repeats:
    """Drafts the root's token again, with whatever is wrong in `wrong`."""

    name = "repeats"
    default_shape = TreeShape.chain(2)
    traits = DrafterTraits(follows_any_tree=True)

    def __init__(self, **wrong):
        self.wrong = wrong

    def open(self, request):
        return RepeatsSession(request, self.wrong)


class RepeatsSession(Unremembering):
    def __init__(self, request, wrong):
        self.tree, self.wrong = TokenTree.of(request.fixed_shape, request.device), wrong

    def propose(self, state):
        tokens = state.roots().repeat(1, self.tree.size - self.wrong.get("short", 0))
        terms = {"law": "deterministic", "coupling": "own"} | {k: v for k, v in self.wrong.items() if k != "short"}
        return Proposal(tokens, self.tree, **terms)


class Untraited:
    name, default_shape = "untraited", TreeShape.chain(1)

    def open(self, request):
        raise AssertionError("refused before")


def decode(model, ids, drafter):
    return paceline.generate(model, ids, drafter=drafter, max_new_tokens=6, do_sample=False, pad_token_id=0)


def test_a_whole_one_decodes(model, ids):
    assert torch.equal(decode(model, ids, Repeats()), decode(model, ids, None))


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        (Repeats, "is the class Repeats; pass an object"),
        (Untraited(), "is a Untraited without traits"),
        (7, "is a int; pass a name"),
        (Repeats(short=1), "2 tokens for a tree of 3 nodes"),
        (Repeats(law="determinstic"), "law='determinstic'; give one of deterministic, iid"),
        (Repeats(coupling="none"), "coupling='none'; give one of own, shared"),
    ],
)
def test_the_author_is_told_what_is_wrong(model, ids, drafter, words):
    with pytest.raises(ValueError, match=words) as caught:
        decode(model, ids, drafter)
    assert "\n" not in str(caught.value)


def test_a_proposal_is_whole():
    tree = TokenTree.of(TreeShape.chain(1), torch.device("cpu"))
    proposal = Proposal(torch.tensor([[5, NO_TOKEN]]), tree, "deterministic", "own")
    with pytest.raises(ValueError, match="3 tokens for a tree of 2 nodes"):
        replace(proposal, tokens=torch.tensor([[5, 6, 7]]))


def test_an_unknown_name_is_looked_for_once_and_quietly(model, monkeypatch, capfd):
    from huggingface_hub.utils import logging as hub
    from transformers import PreTrainedConfig

    asked, heard = [], hub.get_verbosity()

    def unreachable(name, **options):
        asked.append(name)
        hub.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise OSError("no network")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", unreachable)
    with pytest.raises(ValueError, match=r"'bigram' is no folder here .* choose ngram, one that `paceline drafters`"):
        paceline.load_drafter("bigram", model)
    assert asked == ["bigram"]
    assert capfd.readouterr().err == "looking for bigram on the model hub ... failed\n"
    assert hub.get_verbosity() == heard
