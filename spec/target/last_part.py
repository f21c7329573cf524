"""The last part of a causal LM: the logits of a few positions, from what its decoder gave for all of them.

The logits of a large tree take more memory than anything else in a step (512 nodes of a vocabulary of 152,000 tokens:
311 MB), and a verification rule that follows one path needs next to none of them. The model's own forward computes
those, LM head, caps, scales and all, in a copy on the same weights in which a stand-in takes the decoder's place. Where
a model is built otherwise, which the first forward shows, its logits are computed at once. Knows nothing of trees.
"""

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .taps import Tap, layer_stacks, put_module_tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Heard = dict[Tap | str, Any]  # what the taps of a forward told


class LastPart:
    """What `model` does with what its decoder returned. The decoder is the outermost module around all layers whose
    forward is called; which one that is a first forward shows. `agrees` says whether the logits are the model's own;
    None before that forward."""

    def __init__(self, model: "PreTrainedModel"):
        self.agrees: bool | None = None
        self._model = model
        self._around = _around_layers(model)
        for path in self._around:
            put_module_tap(model, path)

    def check(self, heard: Heard, tokens: Tensor, nodes: Tensor, logits: Tensor) -> bool:
        """Whether it gives the model's own `logits` (B, n, V) at `nodes` (n,) of a forward of `tokens` (B, N), bit for
        bit, asked for in another order. Where they are all alike that shows nothing, and counts as no."""
        called = [path for path in self._around if path in heard]
        alike = torch.equal(logits, logits.flip(1))
        self.agrees = bool(called) and not alike and "forward" not in vars(self._model)  # a replaced one runs all of it
        if self.agrees:
            self._decoder, self._stand_in = called[0], _Given()
            self._rest = _with(self._model, called[0].split("."), self._stand_in)
            try:
                again = self.logits(heard, tokens, nodes.flip(0).expand(len(tokens), -1)).flip(1)
                self.agrees = torch.equal(again.nan_to_num(), logits.nan_to_num())
            except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError):
                self.agrees = False  # it looks at more than the states
        return self.agrees

    def logits(self, heard: Heard, tokens: Tensor, nodes: Tensor) -> Tensor:
        """The logits (B, n, V), float32, at `nodes` (B, n) of a forward of `tokens` (B, N)."""
        returned = heard[self._decoder]
        states = returned[0]  # (B, N, H), in a tuple or one of transformers' outputs
        chosen = states.gather(1, nodes[..., None].expand(-1, -1, states.shape[2]))
        if isinstance(returned, tuple):
            self._stand_in.returns = (chosen, *returned[1:])
        else:
            self._stand_in.returns = type(returned)(**{**returned, "last_hidden_state": chosen})
        try:
            return self._rest(input_ids=tokens.gather(1, nodes), use_cache=False).logits.float()
        finally:
            self._stand_in.returns = None


def _around_layers(model: "PreTrainedModel") -> list[str]:
    """The paths of the modules around all decoder layers, the outermost first."""
    names = zip(*(path.split(".")[:-1] for path in layer_stacks(model)))
    shared = [alike[0] for alike in itertools.takewhile(lambda alike: len({*alike}) == 1, names)]
    return [".".join(shared[:count]) for count in range(1, len(shared) + 1)]


def _with(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """A copy of `module` on the same weights, with `replacement` at `path`."""
    if not path:
        return replacement
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._modules[path[0]] = _with(module.get_submodule(path[0]), path[1:], replacement)
    return copied


class _Given(nn.Module):
    """Stands in for a decoder: returns what it was given to return."""

    returns: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returns
