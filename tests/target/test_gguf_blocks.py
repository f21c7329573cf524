"""Every block format gives the numbers that the package gguf gives, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from paceline.spec.target import gguf_blocks
from paceline.spec.target.gguf_blocks import TYPES, unpacked

from support.blocks import random_blocks

GROUP = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_hold_the_numbers_of_the_file(kind):
    for seed, scale in enumerate((0.01, 1e-7, 3.0)):  # the second: numbers below the normal ones
        data = random_blocks(kind, 37, 768, seed, scale)
        blocks = unpacked(kind, torch.from_numpy(data))
        truth = dequantize(data, GGMLQuantizationType[kind])
        assert blocks.dequantised().numpy().tobytes() == truth.astype(np.float32).tobytes()
        assert (blocks.group, blocks.bits) == (GROUP.get(kind, 32), 4 if int(kind[1]) <= 4 else 8)
        assert int(blocks.codes.max()) == 2 ** int(kind[1]) - 1 and int(blocks.codes.min()) == 0


def test_pieces_are_put_together(monkeypatch):
    data = torch.from_numpy(random_blocks("Q4_K", 37, 512))
    whole = unpacked("Q4_K", data)
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 10 * data.shape[1])
    pieces = unpacked("Q4_K", data)
    assert all(torch.equal(getattr(pieces, name), getattr(whole, name)) for name in ("codes", "scales", "offsets"))


def test_sizes_are_those_of_the_format():
    for kind, (size, *_) in TYPES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1] == size
