"""A backend for linear layers is a line in the table."""

import paceline
import pytest
import torch
from paceline.spec.kernels import linears
from torch import nn

from support.models import tiny_llama


class Transposed:
    """Keeps a weight the other way round."""

    def __init__(self):
        self.traced = 0

    def takes(self, weight):
        return weight.dtype == torch.float64

    def pack(self, weight, bias=None):
        assert bias is None
        return linears.Packed(weight.T.contiguous())

    def linear(self, x, packed, outputs):
        self.traced += 1
        assert packed.tensor.shape == (x.shape[-1], outputs)
        return x @ packed.tensor


@pytest.mark.slow
def test_a_backend_is_a_line_in_the_table(ragged, monkeypatch, traced_only):
    backend, model = Transposed(), tiny_llama(seed=5, num_hidden_layers=1).double()
    monkeypatch.setattr(linears, "BACKENDS", [backend, *linears.BACKENDS])
    options = dict(do_sample=False, max_new_tokens=8)
    text = paceline.generate(model, *ragged, executor="compiled", **options)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert backend.traced >= len(layers) and all(layer.packed_weight.backend is backend for layer in layers)
    assert torch.equal(text, paceline.generate(model, *ragged, executor="eager", **options))
    single = tiny_llama(seed=5)
    linears.Packing([single])
    assert not any(layer.__dict__.get("packed_weight") and layer.packed_weight.backend is backend
                   for layer in single.modules())  # fmt: skip
