"""GGUF files made in tests: random blocks of every type, and whole files of tiny models."""

import numpy as np

SCALES = {  # of each type: the places of its half-precision numbers in a block
    "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "Q8_0": [0],
}  # fmt: skip


def random_blocks(kind, rows, columns, seed=0, scale=0.01):
    """The bytes (rows, bytes of a row) of a weight (rows, columns): random, but for scales that are sane."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    width, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows, columns // width, size), dtype=np.uint8)
    for start in SCALES[kind]:
        numbers = random.normal(0, scale, data.shape[:2]).astype(np.float16)
        data[..., start : start + 2] = numbers[..., None].view(np.uint8)
    return data.reshape(rows, -1)
