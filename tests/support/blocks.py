"""Models whose linear layers are in blocks, rounded from dense ones."""

import copy

import torch
from paceline.spec.kernels.blocks import BlockLinear, Blocks
from torch import nn


def rounded(weight, bits=4, group=16, offsets=False):
    """A weight (N, K) rounded to the nearest numbers of blocks."""
    parts = weight.detach().float().unflatten(1, (-1, group))  # (N, K / group, group)
    least, most, top = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True), 2**bits - 1
    if offsets:
        zero, start, scales = 0, least.half(), ((most - least) / top).half()
    else:
        zero, start = 2 ** (bits - 1), torch.zeros_like(least)
        scales = (parts.abs().amax(-1, keepdim=True) / (zero - 1)).half()
    codes = ((parts - start.float()) / scales.float() + zero).round().clamp(0, top).to(torch.uint8)
    return Blocks(codes.flatten(1), scales[..., 0], start[..., 0] if offsets else None, zero, bits)


def in_blocks(model, bits=4, int8_activations=False):
    """A copy of `model` whose linear layers are all in blocks, with offsets in every other one. A tied head's
    embeddings get the numbers of the blocks."""
    model = copy.deepcopy(model)
    linears = {path: layer for path, layer in model.named_modules() if type(layer) is nn.Linear}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    for number, (path, layer) in enumerate(linears.items()):
        bias = None if layer.bias is None else layer.bias.detach().clone()
        blocks = rounded(layer.weight, bits, offsets=number % 2 == 0)
        model.set_submodule(path, BlockLinear(blocks, bias, int8_activations).eval())
    if tied:
        embeddings.weight = nn.Parameter(model.get_output_embeddings().dequantised())
    return model.eval()


def dense_copy(model, blocks_model):
    """`model` with the numbers of `blocks_model`."""
    from paceline.spec.target.weights import dense_state

    model = copy.deepcopy(model)
    model.load_state_dict(dense_state(blocks_model))
    return model.eval()
