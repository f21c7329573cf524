"""EAGLE's unroll, slowly: for each draft a chain of its own, and the losses by plain autograd."""

import torch
from paceline.spec.target.taps import HEAD, listening, put_taps
from paceline.training.objectives.objective import labelled


def states_of_chain(network, tokens, features, root, steps):
    """The LM head's input and the feature fed back, at each of `steps` of the draft whose root's pair is `root`: the
    network reads the pairs up to there, and then, one at a time, what it fed back with the text's tokens."""
    put_taps(network, (HEAD, network.feedback))
    read, before = tokens[1 : root + 2], network.fused(features[: root + 1])
    out = []
    for step in range(steps):
        with listening() as heard:
            network(read[None], before[None], torch.arange(len(read))[None])
        states, fed = (heard[tap][0, -1] for tap in (HEAD, network.feedback))
        out.append((states, fed))
        after = root + 2 + step
        read = torch.cat([read, tokens[after : after + 1] if after < len(tokens) else tokens[:1]])
        before = torch.cat([before, fed[None]])
    return out


def documents(batch, seen, taps):
    """Of each document with labels: its tokens (L,), features (L, F) and LM head's inputs (L, H), and which guesses of
    the first 8 are judged (L, 8)."""
    judged = labelled(batch, 8)
    for row, of_row in enumerate(batch["document"]):
        for number in of_row.unique():
            mine = of_row == number
            if number >= 0 and judged[row][mine].any():
                features = torch.cat([seen.tapped[tap][row][mine] for tap in taps], -1)
                yield batch["input_ids"][row][mine], features, seen.hidden[row][mine], judged[row][mine]


def losses_of_chains(objective, batch, seen):
    """The loss of `EagleObjective`, from its formula."""
    network, settings = objective.network, objective.settings
    ids, total = network.vocabulary, 0.0
    for tokens, features, hidden, judged in documents(batch, seen, network.settings.taps):
        law = torch.log_softmax(seen.lm_head(hidden)[:, ids], -1)  # (L, V')
        for root in judged[:, 0].nonzero()[:, 0].tolist():
            for step, (states, fed) in enumerate(states_of_chain(network, tokens, features, root, settings.steps)):
                if not judged[root, step]:
                    continue
                at, weight = root + 1 + step, settings.decay**step
                log_probs = torch.log_softmax(network.lm_head(states), -1)
                divergence = (law[at].exp() * (law[at] - log_probs)).sum()
                total = total + weight * settings.losses.get("forward_kl", 0) * divergence
                label = (ids == tokens[at + 1]).nonzero().flatten()
                if len(label):
                    total = total - weight * settings.losses.get("cross_entropy", 0) * log_probs[label[0]]
                distance = torch.nn.functional.smooth_l1_loss(fed, features[at]) if settings.feature_weight else 0.0
                total = total + weight * settings.feature_weight * distance
    return total
