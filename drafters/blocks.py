"""Linear layers of drafters in blocks of few bits, rounded to the nearest codes as they are loaded.

Whatever a drafter proposes, the target checks: coarser weights cost acceptance and never change the text. Knows nothing
of kinds of drafters.
"""

import torch
from torch import Tensor, nn

from ..spec.kernels.block_linear import BlockLinear
from ..spec.quantise.grid import nearest
from ..spec.target.weights import Weights, may_be_packed

GROUP = 32  # inputs that share a scale


@torch.no_grad()
def in_blocks(weight: Tensor, bias: Tensor | None, weights: Weights) -> BlockLinear:
    """A linear layer of `weight` (N, K), rounded to the nearest codes; K is a multiple of `GROUP`."""
    assert weights.bits is not None, "dense weights stay as they are"
    blocks = nearest(weight.detach(), weights.bits, GROUP, clipped=False)
    return BlockLinear(blocks, None if bias is None else bias.detach(), weights.int8_activations)


def put_in_blocks(model: nn.Module, weights: Weights, kept: nn.Module | None = None) -> None:
    """Replace the linear layers of `model` whose inputs fall into groups, except for `kept`. Embeddings stay, those of
    a tied head too."""
    for path, layer in list(model.named_modules()):
        if may_be_packed(path, layer) and layer is not kept and layer.in_features % GROUP == 0:
            model.set_submodule(path, in_blocks(layer.weight, layer.bias, weights))
