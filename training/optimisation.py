"""AdamW over an objective's parameter groups, and the learning rate schedule. Knows no trainer."""

import math

import torch
from torch import nn

from .config import Optimisation, suggest


def schedule(step: int, steps: int, settings: Optimisation) -> float:
    """The share of the highest learning rate at `step`: linear warm-up, then a cosine down to `final`."""
    warm = math.ceil(settings.warm_up * steps)
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return settings.final + (1 - settings.final) * (1 + math.cos(math.pi * along)) / 2


def adamw(objective: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """AdamW over the objective's parameter groups; matrices decay, vectors (norms, biases) do not."""
    named = objective.parameter_groups()
    for name in settings.learning_rates:
        if name not in named:
            raise ValueError(f"optimisation.learning_rates has no group {name!r}{suggest(name, named)}")
    listed = [id(parameter) for group in named.values() for parameter in group]
    trained = {id(parameter) for parameter in objective.parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained, "every trained parameter is in one group"
    groups = []
    for name, parameters in named.items():
        highest = settings.learning_rates.get(name, settings.learning_rate)
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
            chosen = [parameter for parameter in parameters if (parameter.ndim >= 2) == matrices]
            groups.append({"params": chosen, "weight_decay": decay, "highest": highest, "lr": highest})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=tuple(settings.betas))
