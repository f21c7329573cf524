"""The contracts hold what is to come: toys of each kind, written against the protocols alone.

A drafter that attends over features of the whole prompt, a target whose weights are fetched before each layer, a
backend for linear layers, a recurrent target, and requests that enter and leave rows while others go on.
"""

from dataclasses import replace

import paceline
import pytest
import torch
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import runs
from paceline.spec.engines.executors import Compiled, Eager
from paceline.spec.engines.runs import open_engine
from paceline.spec.kernels import linears
from paceline.spec.noise import row_keys
from paceline.spec.proposal import NO_TOKEN, DrafterTraits, NoDrafter, Proposal
from paceline.spec.request import Request, RowSampling
from paceline.spec.rows import Rows
from paceline.spec.sampling import Sampler, warpers
from paceline.spec.target.protocol import Seen, TargetTraits
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from paceline.spec.verify import draft_sampling
from tape import TapeExecutor, tape_executor
from torch import nn

from conftest import fitted_heads, noisy_copy, tiny_llama

PROMPT = [5, 9, 33, 12, 7, 40, 5, 9, 33, 12]


def request(tokens, new_tokens, seed=0, temperature=0.0, ends=()):
    (key,) = row_keys([seed], 1, "cpu").tolist()
    return Request(tokens, new_tokens, tuple(key), ends, RowSampling(temperature or 1.0, tail=1 - 0.9))


def engine_of(target, drafter, shape, temperature=0.0, eos=4):
    blank = torch.zeros(target.traits.batch, 0, dtype=torch.long)
    sampler = Sampler(warpers(temperature, 0.9), temperature > 0, blank, blank.sum(1))
    return open_engine(target, drafter, shape, sampler, draft_sampling("match", temperature > 0), "match", eos)


@torch.no_grad()
def texts_of(executor, requests):
    """What the rows generate for requests that begin together; and how many steps that took."""
    rows, steps = Rows(executor, chunk=4), 0
    rows.admit(dict(enumerate(requests)))
    texts = {}
    while rows.live:
        arrival, steps = rows.step(), steps + 1
        for row, report in arrival.ended.items():
            assert not report.failed
            texts[row] = rows.text(row)[len(requests[row].tokens) :]
    return [texts[row] for row in range(len(requests))], steps


# A drafter that taps two layers and attends over the features of every token before the root.


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

    def copy_rows(self, other, rows):
        self.features.copy_(other.features[rows])
        self.known.copy_(other.known[rows])


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


# A target whose layers are on the device only while they run.


class Fetched(SlotModel):
    """Before a layer runs its weights are fetched, and afterwards they are gone."""

    def __init__(self, model, batch, capacity, taps=()):
        super().__init__(model, batch, capacity, taps)
        self.traits = replace(self.traits, static=False)
        self.fetched: list[int] = []
        for number, layer in enumerate(model.model.layers):
            store = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
            layer.register_forward_pre_hook(lambda layer, args, n=number, s=store: self.fetch(layer, n, s))
            layer.register_forward_hook(lambda layer, args, out: self.drop(layer))
            self.drop(layer)

    def fetch(self, layer, number, store):
        self.fetched.append(number)
        for name, parameter in layer.named_parameters():
            parameter.data = store[name].clone()

    def drop(self, layer):
        for parameter in layer.parameters():
            parameter.data = torch.empty(0)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_target_fetches_its_weights_before_each_layer(temperature):
    requests = [request(PROMPT, 9, 1), request(PROMPT[:3], 6, 2)]
    drafter, shape = MedusaDrafter(fitted_heads(tiny_llama(), "hydra", steps=5)), TreeShape.parse("3x2")
    resident = engine_of(SlotModel(tiny_llama(), 2, 64), NoDrafter(), TreeShape.chain(0), temperature)
    target = Fetched(tiny_llama(), 2, 64, drafter.traits.taps)
    engine = engine_of(target, drafter, shape, temperature)
    truth, _ = texts_of(Eager(resident), requests)
    texts, steps = texts_of(Eager(engine), requests)
    assert texts == truth and all(parameter.numel() == 0 for parameter in target.model.model.layers.parameters())
    assert target.fetched == [0, 1] * (3 + steps), "three spans of the prompts, and the steps"
    with pytest.raises(ValueError, match="executor='compiled' cannot take this step, in which the target waits"):
        Compiled(engine)


# A backend for linear layers.


class Transposed:
    """Keeps a weight the other way round."""

    def __init__(self):
        self.traced = 0

    def takes(self, weight):
        return weight.dtype == torch.float64

    def pack(self, weight):
        return weight.T.contiguous()

    def linear(self, x, packed, bias, outputs):
        self.traced += 1
        assert packed.shape == (x.shape[-1], outputs)
        return x @ packed if bias is None else x @ packed + bias


def test_a_backend_is_a_line_in_the_table(ragged, monkeypatch):
    backend, model = Transposed(), tiny_llama(seed=5).double()
    monkeypatch.setattr(linears, "BACKENDS", [backend, *linears.BACKENDS])
    options = dict(do_sample=False, max_new_tokens=8)
    text = paceline.generate(model, *ragged, executor="compiled", **options)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert backend.traced >= len(layers) and all(layer.packed_weight.backend is backend for layer in layers)
    assert torch.equal(text, paceline.generate(model, *ragged, executor="eager", **options))
    single = tiny_llama(seed=5)
    linears.pack([single])
    assert not any(layer.__dict__.get("packed_weight") and layer.packed_weight.backend is backend
                   for layer in single.modules())  # fmt: skip


# A recurrent target: a state instead of slots.


class Recurrent:
    """s' = tanh(A s + e(token)) for every token, logits W s'. A forward keeps what the nodes put in, and no state."""

    def __init__(self, batch, capacity=64, vocab=61, size=16):
        generator = torch.Generator().manual_seed(4)
        self.step, self.embeddings, self.head = (
            torch.randn(rows, size, generator=generator) for rows in (size, vocab, vocab)
        )
        self.model = None
        self.traits = TargetTraits(batch, capacity, torch.device("cpu"), vocab)
        self.packable = ()
        self.states = torch.zeros(batch, size)  # after the committed text without the root
        self.inputs = torch.zeros(batch, 64, size)  # of the nodes of the last forward

    @property
    def nbytes(self):
        return self.states.nbytes

    def next(self, states, inputs):
        return torch.tanh(0.4 * states @ self.step.T + inputs)

    def clear(self, rows=None):
        self.states[slice(None) if rows is None else rows] = 0

    def read(self, span):
        states = self.states[span.index]
        for tokens, positions in zip(span.tokens.T, span.positions.T):
            moved = self.next(states, self.embeddings[tokens])
            states = torch.where((positions >= 0)[:, None], moved, states)
        self.states[span.index] = states

    def forward(self, proposal, base):
        inputs = self.embeddings[proposal.tokens.clamp(min=0)]  # (B, N, H)
        self.inputs[:, : inputs.shape[1]] = inputs
        parents = proposal.tree.parents.expand(len(inputs), -1)
        states = [self.next(self.states, inputs[:, 0])]
        for node in range(1, inputs.shape[1]):
            above = torch.stack(states, 1).gather(1, parents[:, node, None, None].expand(-1, 1, inputs.shape[2]))[:, 0]
            states.append(self.next(above, inputs[:, node]))
        return Seen(torch.stack(states, 1) @ self.head.T, None)

    def commit(self, base, path, count):
        for column in range(path.shape[1]):
            node = path[:, column, None, None].expand(-1, 1, self.inputs.shape[2])
            moved = self.next(self.states, self.inputs.gather(1, node)[:, 0])
            self.states.copy_(torch.where((column < count)[:, None], moved, self.states))

    def copy_rows(self, other, rows):
        self.states.copy_(other.states[rows])


class Guessing:
    """Drafts random tokens out of a few, so that now and then one is right."""

    name = "guessing"
    default_shape = TreeShape.parse("4x3x2")
    traits = DrafterTraits(follows_any_tree=True)

    def __init__(self, tokens):
        self.tokens, self.generator = torch.tensor(tokens), torch.Generator().manual_seed(0)

    def open(self, request):
        self.tree = TokenTree.of(request.shape, request.device)
        return self

    packable, nbytes = (), 0

    def clear(self, rows=None):
        pass

    def read(self, span, features):
        assert features is None

    def propose(self, state):
        drawn = torch.randint(len(self.tokens), (len(state.done), self.tree.size - 1), generator=self.generator)
        return Proposal(torch.cat([state.roots(), self.tokens[drawn]], 1), self.tree, "deterministic", "own")

    def follow(self, base, path, count, features):
        assert features is None


class Checked(Recurrent):
    """Every forward runs twice, and leaves no trace; every state is that of the committed text, read anew."""

    def forward(self, proposal, base):
        before = self.states.clone()
        self.forwards = getattr(self, "forwards", 0) + 1
        super().forward(replace(proposal, tokens=proposal.tokens.flip(1)), base)
        seen = super().forward(proposal, base)
        assert torch.equal(before, self.states)
        return seen


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rejected_nodes_leave_no_trace_in_a_recurrent_state(temperature):
    requests = [request(PROMPT, 30, 1), request(PROMPT[:1], 12, 2), request(PROMPT[:5], 20, 3)]
    plain, steps = texts_of(Eager(engine_of(Recurrent(3), NoDrafter(), TreeShape.chain(0), temperature)), requests)
    assert steps == 30
    drafter, target = Guessing(sorted({token for text in plain for token in text})[:20]), Checked(3)
    executor = Eager(engine_of(target, drafter, drafter.default_shape, temperature))
    texts, steps = texts_of(executor, requests)
    assert texts == plain and steps < 30, "some drafts are right"
    state = executor.engine.state
    for row in range(3):
        alone = torch.zeros(target.states.shape[1])
        for token in state.tokens[row, : int(state.lengths[row]) - 1]:
            alone = target.next(alone, target.embeddings[token])
        torch.testing.assert_close(target.states[row], alone)
    kept = target.states.clone()
    with torch.no_grad():
        executor.run(lambda phase: None)
    assert torch.equal(kept, target.states), "a step changes nothing of rows that are done"


def test_a_recurrent_step_can_be_captured():
    """By tape: the toy reads nothing on the host."""
    requests = [request(PROMPT, 14, 1), request(PROMPT[:2], 9, 2)]
    plain, _ = texts_of(Eager(engine_of(Recurrent(2), NoDrafter(), TreeShape.chain(0))), requests)
    tape = TapeExecutor(engine_of(Recurrent(2), NgramDrafter(), TreeShape.parse("2x2")))
    assert texts_of(tape, requests)[0] == plain and tape.replays > 3 and tape.tape.offences == []


# Requests that enter and leave while others go on.

DRAFTERS = {
    "none": lambda model: (NoDrafter(), TreeShape.chain(0)),
    "ngram": lambda model: (NgramDrafter(), TreeShape.parse("2x2")),
    "model": lambda model: (paceline.load_drafter(noisy_copy(model), model), TreeShape.parse("2x2x1")),
    "hydra": lambda model: (MedusaDrafter(fitted_heads(model, "hydra", steps=20)), TreeShape.parse("3x2x1")),
}


def alone(model, asked):
    """The reference: `generate` on this text only."""
    ids, sampled = torch.tensor([asked.tokens]), asked.sampling.temperature != 1.0
    options = dict(do_sample=True, temperature=asked.sampling.temperature, top_k=0, top_p=0.9)
    options = options if sampled else dict(do_sample=False)
    seed = next(seed for seed in range(9) if tuple(row_keys([seed], 1, "cpu")[0].tolist()) == asked.key)
    out = paceline.generate(
        model, ids, torch.ones_like(ids), max_new_tokens=asked.new_tokens, seed=[seed],
        eos_token_id=list(asked.ends) or None, pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(asked.tokens) :].tolist()


@pytest.mark.parametrize("lag", [None, 0, 1])
@pytest.mark.parametrize("name", DRAFTERS)
def test_requests_enter_and_leave_while_another_goes_on(name, lag, monkeypatch):
    """Two rows: one text goes on for forty tokens; beside it others end, are evicted, and follow one another, each
    with its own seed, temperature and ends of text. Eager, and by tape read at once or one step late."""
    model = tiny_llama(seed=3)
    drafter, shape = DRAFTERS[name](model)
    target = SlotModel(model, 2, 128, drafter.traits.taps)
    engine = engine_of(target, drafter, shape, temperature=0.7)
    monkeypatch.setattr(TapeExecutor, "lag", lag or 0)
    rows = Rows(Eager(engine) if lag is None else TapeExecutor(engine), chunk=4)
    free = alone(model, request(PROMPT[:4], 12, 4, 1.3))
    asked = {
        "long": request(PROMPT, 40, 1, 0.7),
        "short": request(PROMPT[:7], 5, 2, 0.4),
        "evicted": request(PROMPT[2:], 30, 3, 0.9),
        "ending": request(PROMPT[:4], 12, 4, 1.3, ends=(free[5], 60)),
        "last": request(PROMPT[5:6], 7, 5, 0.6),
    }
    waiting, names, texts, steps = list(asked), {}, {}, 0
    while waiting or rows.live:
        for row in rows.free if waiting else ():
            names[row] = waiting.pop(0)
            with torch.no_grad():
                rows.admit({row: asked[names[row]]})
            if not waiting:
                break
        with torch.no_grad():
            arrival, steps = rows.step(), steps + 1
        assert steps < 500
        for row in arrival.ended:
            texts[names[row]] = rows.text(row)[len(asked[names[row]].tokens) :]
        rows.evict([row for row in rows.live if names[row] == "evicted" and row in arrival.reports])
    assert "evicted" not in texts and asked.keys() - {"evicted"} == texts.keys()
    for one, text in texts.items():
        assert text == alone(model, asked[one]), one
    assert texts["ending"] == free[: free.index(free[5]) + 1]
    runs.reset(model)
