"""What compiled code computes for a row must not depend on the rows beside it."""

import pytest
import torch
from paceline.spec.engines.inductor import compiled
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.mark.slow
@torch.no_grad()
def test_the_norm_of_a_row_has_the_same_bits_alone_and_among_others():
    """Wide rows too, whose sums torch would share among threads where there is a single row."""
    width, rows = 4096, 5
    norm, given = LlamaRMSNorm(width), torch.randn(40, rows, width)
    one, several = torch.zeros(1, 1, width), torch.zeros(1, rows, width)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone, together = compiled(lambda: norm(one)), compiled(lambda: norm(several))
        for numbers in given:
            one[0, 0], several[0] = numbers[0], numbers
            assert torch.equal(alone()[0, 0], together()[0, 0])
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
