"""A drafter that attends over features of the whole prompt, written against the protocol alone."""

import paceline
import torch
from paceline.spec.engines import runs
from paceline.spec.proposal import NO_TOKEN, DrafterTraits, Proposal
from paceline.spec.tree import TokenTree, TreeShape

from support.engines import PROMPT
from support.models import tiny_llama
from support.tape import tape_executor


class Attending:
    """Proposes what stood behind the earlier token whose features are most like the last one's."""

    name = "attending"
    default_shape = TreeShape.chain(3)
    traits = DrafterTraits(taps=(0, 1), follows_any_tree=True)

    def open(self, request):
        return AttendingSession(request)


class AttendingSession:
    packable = ()

    def __init__(self, request):
        self.tree, size = TokenTree.of(request.shape, request.device), 2 * request.target.config.hidden_size
        self.features = torch.zeros(request.batch, request.capacity, size)
        self.known = torch.zeros(request.batch, 1, dtype=torch.long)  # how many tokens have features
        self.read_tokens = 0

    @property
    def nbytes(self):
        return self.features.nbytes

    def clear(self, rows=None):
        self.features[slice(None) if rows is None else rows] = 0
        self.known[slice(None) if rows is None else rows] = 0

    def read(self, span, features):
        last = self.features.shape[1] - 1
        for row, states, positions in zip(range(len(self.features))[span.index], features, span.positions):
            self.features[row, torch.where(positions >= 0, positions, last)] = states
            self.known[row] += (positions >= 0).sum()
            self.read_tokens += int((positions >= 0).sum())

    def propose(self, state):
        places = torch.arange(self.features.shape[1])
        query = self.features.gather(1, (self.known - 1).clamp(min=0)[..., None].expand(-1, 1, self.features.shape[2]))
        likeness = torch.cosine_similarity(self.features, query, dim=-1)  # (B, T)
        likeness = torch.where(places < self.known - 1, likeness, -2.0)
        at = likeness.argmax(-1, keepdim=True) + 1 + torch.arange(1, self.tree.size)  # behind the root's like
        drafted = state.tokens.gather(1, at.clamp(max=state.tokens.shape[1] - 1))
        drafted = torch.where(at < state.lengths[:, None], drafted, NO_TOKEN)
        return Proposal(torch.cat([state.roots(), drafted], 1), self.tree, "deterministic", "own")

    def follow(self, base, path, count, features):
        columns = torch.arange(path.shape[1])
        places = torch.where(columns < count[:, None], base[:, None] + columns, self.features.shape[1] - 1)  # (B, D+1)
        states = features.gather(1, path[..., None].expand(-1, -1, features.shape[2]))
        self.features.scatter_(1, places[..., None].expand(-1, -1, features.shape[2]), states)
        self.known += count[:, None]

    def copy_rows(self, other, rows, into=None):
        into, shared = slice(None) if into is None else into, min(self.features.shape[1], other.features.shape[1])
        self.features[into, :shared] = other.features[rows, :shared]
        self.known[into] = other.known[rows]


def test_a_drafter_attends_over_features_of_the_whole_prompt(ragged, monkeypatch):
    model = tiny_llama(seed=3)
    texts = torch.tensor([PROMPT * 3, PROMPT * 3]), torch.ones(2, 30, dtype=torch.long)
    options = dict(do_sample=False, max_new_tokens=16, prefill_chunk=7, return_dict_in_generate=True)
    for prompt in (texts, ragged):
        plain = paceline.generate(model, *prompt, **options)
        drafted = paceline.generate(model, *prompt, drafter=Attending(), **options)
        assert torch.equal(plain.sequences, drafted.sequences)
        with tape_executor(monkeypatch) as tapes:
            runs.reset(model)
            replayed = paceline.generate(model, *prompt, drafter=Attending(), executor="tape", **options)
        assert torch.equal(plain.sequences, replayed.sequences) and not tapes[0].tape.offences
        assert tapes[0].replays > 3
        session = tapes[0].engine.session
        assert session.read_tokens == int(prompt[1].sum()) - len(prompt[0]), "all of the prompts but the roots"
    assert len(drafted.trace.events) < 16 * 3, "and some drafts are right"
    runs.reset(model)
