"""The tensors of a published EAGLE file by the names of `EagleNetwork`, and what is said where one is wrong.

Knows no configuration, and nothing of the target.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .eagle_names import KNOWN, OFFSETS, network_name, published_name

# Beside the network: a list that follows from another one, what is computed, and copies of the target's norm and head.
_BESIDE = (KNOWN, "rotary_emb.", "verifier_norm.", "verifier_lm_head.")


class EagleTensors(dict[str, Tensor]):
    """The tensors of a file by the network's names. `wide` tells EAGLE-3, whose layers are wide, from EAGLE-1 and 2."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        names = {
            name: full
            for name, full in checkpoint.plain_names().items()
            if not name.startswith(_BESIDE) and not name.endswith(".inv_freq")
        }
        self.first = next((spelt for spelt in ("midlayer.", "transformer.") if begins(names, spelt)), "layers.0.")
        marked = self.first == "midlayer." or "layers.0.hidden_norm.weight" in names
        if not marked and OFFSETS not in names:
            names.pop("embed_tokens.weight", None)  # EAGLE-1's is a copy of the target's, which its reference takes
        loaded = checkpoint.tensors(names.values())
        tensors = {name: loaded[full] for name, full in names.items()}
        self.wide = marked or (OFFSETS in names and not _joins(tensors))
        named = {name: network_name(name, self.wide) for name in tensors}
        super().__init__({ours: tensors[name] for name, ours in named.items() if ours is not None})
        self.spelt = {ours: name for name, ours in named.items() if ours is not None}
        self.unknown = [name for name, ours in named.items() if ours is None]
        if not self.wide:
            self.pop("embeddings", None)
        self._drop_second_norms()

    def refused(self, why: str) -> ValueError:
        return self.checkpoint.refused(why)

    def published(self, name: str) -> str:
        """A tensor of the network as this file spells it."""
        if name in self.spelt:
            return self.spelt[name]
        spelt = published_name(name, self.wide)
        return self.first + spelt.removeprefix("layers.0.") if spelt.startswith("layers.0.") else spelt

    def need(self, name: str, dimensions: int = 2) -> Tensor:
        """A tensor that there must be."""
        tensor = self.get(name)
        if tensor is None:
            also = f" and has {self.unknown[0]!r}, which it has no place for" if self.unknown else ""
            raise self.refused(f"it lacks the tensor {self.published(name)!r}{also}; fetch the drafter again")
        if tensor.ndim != dimensions or 0 in tensor.shape:
            shape = list(tensor.shape)
            raise self.refused(f"tensor {self.published(name)!r} has shape {shape}; fetch the drafter again")
        return tensor

    def check(self, expected: dict[str, Tensor]) -> None:
        """Raise ValueError unless names and shapes are those of `expected`."""
        extra = [*self.unknown, *(self.published(name) for name in self if name not in expected)]
        for name, tensor in expected.items():
            shape, wanted = list(self.need(name, tensor.ndim).shape), list(tensor.shape)
            if shape != wanted:
                raise self.refused(
                    f"tensor {self.published(name)!r} has shape {shape} and the others ask for {wanted}; fetch the "
                    "drafter again"
                )
            if tensor.is_floating_point():
                self.checkpoint.check_weights(self.published(name), self[name])
        if extra:
            raise self.refused(
                f"it has a tensor {extra[0]!r}, which layers of Llama and Qwen3 have no place for; it is of another "
                "architecture, which is not read"
            )

    def _drop_second_norms(self) -> None:
        """Of layers behind the first, engines read one norm under either of two names, and files may hold both."""
        names = [name for name in self if name.endswith(".hidden_norm.weight") and not name.startswith("layers.0.")]
        for name in names:
            second, kept = self.pop(name), name.replace("hidden_norm", "input_layernorm")
            first = self.setdefault(kept, second)
            if second.shape != first.shape or not (torch.equal(second, first) or bool((second == 1).all())):
                raise self.refused(f"tensors {name!r} and {kept!r} differ, and engines read either; keep one of them")


def begins(names: Iterable[str], beginning: str) -> bool:
    """Whether one of the names begins so."""
    return any(name.startswith(beginning) for name in names)


def _joins(tensors: dict[str, Tensor]) -> bool:
    """Whether attention reads what `fc` makes, as in EAGLE-1, and not twice as much."""
    joint = tensors.get("fc.weight", tensors.get("fusion_fc.weight"))
    queries = next((tensor for name, tensor in tensors.items() if name.endswith(".self_attn.q_proj.weight")), None)
    return joint is not None and queries is not None and joint.shape[:1] == queries.shape[1:]
