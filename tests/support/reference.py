"""Slow and obvious verification, one row at a time in double precision. The oracle of the fast rules."""

import itertools
import math

import torch
from paceline import generate
from paceline.spec import noise
from paceline.spec.target.protocol import spans
from paceline.spec.target.slots import SlotModel

EPSILON, DELTA = 0.09, 0.3


def walk_match(parents, tokens, draws):
    """Follow the target's own draws from the root; returns the path of accepted nodes."""
    path = [0]
    while True:
        hit = [n for n, p in enumerate(parents) if p == path[-1] and tokens[n] == draws[path[-1]]]
        if not hit:
            return path
        if len(hit) == 1:
            path.append(hit[0])
            continue
        # Duplicate siblings: the one below which most is accepted.
        tails = [walk_match_from(parents, tokens, draws, n) for n in hit]
        return path + max(tails, key=len)


def walk_match_from(parents, tokens, draws, node):
    hits = [n for n, p in enumerate(parents) if p == node and tokens[n] == draws[node]]
    return [node] + max((walk_match_from(parents, tokens, draws, n) for n in hits), key=len, default=[])


def walk_residual(parents, tokens, target, draft, coins):
    """Recursive rejection over children in draft order (Sequoia, Algorithm 2): the path, and what is left
    of the target's law at its end. `target[n]`, `draft[n]` are lists of probabilities, `coins[depth][rank]`."""
    path, law = [0], list(target[0])
    while True:
        node = path[-1]
        q = list(draft[node])
        accepted = None
        for rank, child in enumerate(n for n, p in enumerate(parents) if p == node):
            token = tokens[child]
            if coins[len(path) - 1][rank] * q[token] < law[token]:
                accepted = child
                break
            left = [max(a - b, 0.0) for a, b in zip(law, q)]
            law = [x / sum(left) for x in left] if sum(left) > 0 else law
            q[token] = 0.0
            total = sum(q)
            q = [x / total for x in q] if total > 0 else q
        if accepted is None:
            return path, law
        path.append(accepted)
        law = list(target[accepted])


def walk_typical(parents, tokens, target):
    """The longest path of typical tokens, the likeliest of equals (Medusa, section 2.3.1)."""
    best, best_key = [0], (0, 0.0)
    for node in range(len(parents)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        total, fine = 0.0, True
        for above, below in itertools.pairwise(path):
            law = target[above]
            entropy = -sum(p * math.log(p) for p in law if p > 0)
            p = law[tokens[below]] if tokens[below] >= 0 else 0.0
            fine = fine and p > min(EPSILON, DELTA * math.exp(-entropy))
            total += math.log(p) if p > 0 else -math.inf
        if fine and (len(path) - 1, total) > best_key:
            best, best_key = path, (len(path) - 1, total)
    return best


def plain_draw(log_probs, key, position, stream=noise.TARGET):
    """One row's draw at one position: argmax of log p + g."""
    vocab = torch.arange(len(log_probs))
    g = noise.gumbel(key[None], torch.tensor([[position]]), stream, vocab)[0, 0]
    return int((log_probs + g).argmax())


@torch.no_grad()
def plain_text(model, prompt, count, processors=(), key=None):
    """Autoregressive decoding without cache, batch or tree: one row's next `count` tokens.

    With `key`, the row's noise stream, it samples; the position of a token is its index in the text."""
    text = torch.tensor([prompt])
    for _ in range(count):
        scores = model(input_ids=text, use_cache=False).logits[:, -1].float()
        for processor in processors:
            scores = processor(text, scores)
        token = int(scores.argmax()) if key is None else plain_draw(scores[0], key, text.shape[1])
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
    return text[0, len(prompt) :].tolist()


def two_token_law(model, drafter, rule: str, rows: int = 4_000):
    """The total variation between the joint law of two tokens behind one prompt, as a `model` of four tokens has
    it, and as many rows of whole drafted decoding show it; and the share of drafted tokens that stood."""
    prompt = torch.tensor([[2, 3, 1]])
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        longer = torch.cat([prompt.expand(4, -1), torch.arange(4)[:, None]], dim=1)
        joint = (first[:, None] * model(longer).logits[:, -1].softmax(-1)).flatten()
    out = generate(
        model, prompt.expand(rows, -1), drafter=drafter, tree="2x1", verify=rule, seed=8, do_sample=True, top_k=0,
        max_new_tokens=2, return_dict_in_generate=True,
    )  # fmt: skip
    pairs = (out.sequences[:, 3] * 4 + out.sequences[:, 4]).bincount(minlength=16) / rows
    return (pairs - joint).abs().sum() / 2, out.trace.summary()["draft_acceptance_rate"]


class CheckedRows:
    """Rows of slots that hold texts, and what their nodes' logits must be, by forwards of each path without cache."""

    def __init__(self, model, lengths, chunk=3, capacity=64, seed=0):
        self.model, self.generator = model, torch.Generator().manual_seed(seed)
        self.texts = [self.tokens(length).tolist() for length in lengths]
        self.slots = SlotModel(model, len(lengths), capacity)
        self.read(chunk)

    def tokens(self, *shape):
        return torch.randint(3, 64, shape, generator=self.generator)

    def read(self, chunk, rows=None):
        lengths = torch.tensor([len(text) for text in self.texts])
        prompt = torch.tensor([text + [0] * (int(lengths.max()) - len(text)) for text in self.texts])
        for span in spans(prompt, lengths, chunk, rows):
            self.slots.read(span)

    @property
    def base(self):
        return torch.tensor([len(text) - 1 for text in self.texts])

    @torch.no_grad()
    def step(self, tree, nodes, again=False, check=True):
        """A forward of random tokens on `tree` (twice if `again`, first of others), a commit of the path to nodes[row],
        None where the row is done. The largest error of a node's logits."""
        tokens = self.tokens(len(self.texts), tree.size)
        tokens[:, 0] = torch.tensor([text[-1] for text in self.texts])
        if again:
            self.slots.forward_nodes(tokens.flip(1), self.base, tree)
        logits = self.slots.forward_nodes(tokens, self.base, tree).logits
        error = max(map(self.error, range(len(self.texts)), logits, tokens, [tree] * len(tokens))) if check else 0.0
        ends = [node or 0 for node in nodes]
        one = tree.paths.shape[0] == 1
        paths = torch.stack([tree.paths[0 if one else row, node] for row, node in enumerate(ends)])
        depths = [int(tree.depths[0 if one else row, node]) for row, node in enumerate(ends)]
        counts = torch.tensor([0 if node is None else depth + 1 for node, depth in zip(nodes, depths)])
        self.slots.commit(self.base, paths, counts)
        for row, count in enumerate(counts.tolist()):
            self.texts[row] += tokens[row, paths[row, 1:count]].tolist() + self.tokens(1 if count else 0).tolist()
        return error

    def error(self, row, logits, tokens, tree):
        """Of all nodes of a row: each leaf's path in a forward of its own."""
        tree_row = min(row, tree.paths.shape[0] - 1)
        worst = 0.0
        for node in range(tree.size):
            path = tree.paths[tree_row, node, : int(tree.depths[tree_row, node]) + 1]
            ids = torch.tensor([self.texts[row][:-1] + tokens[path].tolist()])
            truth = self.model(input_ids=ids, use_cache=False).logits[0, -1]
            worst = max(worst, float((logits[node] - truth).abs().max() / truth.abs().max().clamp(min=1)))
        return worst
