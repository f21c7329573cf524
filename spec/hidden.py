"""The last hidden state of a model: what goes into its LM head, heard at the head's door.

Taking the head's own input is right for every family: after the final norm and any projection, and before what
some do to the logits (Gemma 2 caps them, Cohere scales them; both keep their order). The hook is put on a head
once, for drafters that ask, and is deaf outside of `listening`. Knows nothing of what the states are for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor

_active = threading.local()
_heads: "WeakSet[torch.nn.Module]" = WeakSet()


def lm_head(model) -> torch.nn.Module:
    """The LM head, a linear map from the last hidden state to the logits. Raises ValueError where there is none."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or head.weight.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} has no linear LM head to take the last hidden state from; use a draft model or "
            "'ngram' as drafter"
        )
    return head


def listen(model) -> None:
    """Make the LM head of `model` tell what goes into it while `listening`."""
    head = lm_head(model)
    if head not in _heads:
        head.register_forward_pre_hook(_tell)
        _heads.add(head)


def _tell(head: torch.nn.Module, inputs: tuple) -> None:
    heard = getattr(_active, "heard", None)
    if heard is not None:
        heard.append(inputs[0])


@contextmanager
def listening() -> Iterator[list[Tensor]]:
    """Collects the inputs of LM heads that are listened to, in this thread."""
    _active.heard = []
    try:
        yield _active.heard
    finally:
        _active.heard = None


def last_heard(heard: list[Tensor]) -> Tensor:
    """What the LM head was given last. Raises ValueError where it was not called."""
    if not heard:
        raise ValueError("the model does not call its LM head, so its hidden states cannot be read; use 'ngram'")
    return heard[-1]
