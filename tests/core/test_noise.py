"""The sampling noise: the right law, and a function of nothing but seed, position, stream and token."""

import math

import pytest
import torch
from paceline.spec import noise
from torch.fx.experimental.proxy_tensor import make_fx

VOCAB = torch.arange(1000)


def test_gumbel_has_the_gumbel_law():
    sample = noise.gumbel(noise.row_keys(5, 20, "cpu"), torch.arange(50).expand(20, -1), noise.TARGET, VOCAB)
    values = sample.flatten().double().sort().values  # a million
    truth = torch.exp(-torch.exp(-values))
    empirical = (torch.arange(len(values)) + 0.5) / len(values)
    assert (truth - empirical).abs().max() < 1.95 / math.sqrt(len(values)), "Kolmogorov-Smirnov at 0.1 %"


@pytest.mark.slow
def test_the_tail_that_decides_is_fine_grained():
    sample = noise.gumbel(noise.row_keys(1, 64, "cpu"), torch.arange(64).expand(64, -1), 0, torch.arange(4096))
    assert torch.isfinite(sample).all()
    top = sample.flatten().topk(1000).values
    assert len(top.unique()) > 995, "the winners of a race must not tie"


@pytest.mark.parametrize("law", [[0.5, 0.25, 0.15, 0.1], [0.97, 0.01, 0.01, 0.01]])
def test_a_draw_follows_the_law(law):
    keys = noise.row_keys(3, 50_000, "cpu")
    g = noise.gumbel(keys, torch.full((50_000, 1), 17), noise.TARGET, torch.arange(4))[:, 0]
    counts = (torch.tensor(law).log() + g).argmax(-1).bincount(minlength=4).double()
    expected = 50_000 * torch.tensor(law, dtype=torch.float64)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3, "chi-square with 3 degrees of freedom at 0.1 %"


def test_neighbouring_positions_streams_rows_and_tokens_are_uncorrelated():
    keys = noise.row_keys(0, 8, "cpu")
    positions = torch.arange(8).expand(8, -1)
    base = noise.gumbel(keys, positions, noise.TARGET, VOCAB)
    others = {
        "stream": (noise.gumbel(keys, positions, noise.DRAFT, VOCAB), base),
        "position": (base[:, 1:], base[:, :-1]),
        "row": (base[1:], base[:-1]),
        "token": (base[..., 1:], base[..., :-1]),
    }
    for name, (left, right) in others.items():
        pair = torch.stack([left.flatten(), right.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4.5 / math.sqrt(pair.shape[1]), name


def test_noise_knows_the_seed_but_not_the_place_in_the_batch():
    many = noise.row_keys([4, 9, 4], 3, "cpu")
    assert torch.equal(many[0], many[2])
    assert torch.equal(noise.row_keys(4, 2, "cpu")[0], many[0]), "row 0 of seed 4 is a batch of one with seed 4"
    assert not torch.equal(noise.row_keys(4, 2, "cpu")[1], many[0])
    wide = noise.gumbel(many, torch.tensor([[3, 5], [5, 3], [5, 5]]), 0, VOCAB)
    lone = noise.gumbel(many[1:2], torch.tensor([[5]]), 0, torch.tensor([10, 20]))
    assert torch.equal(wide[1, 0, [10, 20]], lone[0, 0])
    assert torch.equal(wide[0, 1], wide[2, 0])


def test_the_stream_never_changes():
    """A seed must mean the same text in every release; these values were computed once, in plain Python."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    import hashlib

    digest = hashlib.blake2b(b"42,1", digest_size=8).digest()
    low, high = (int.from_bytes(part, "little") for part in (digest[:4], digest[4:]))
    first = mix(low ^ mix((7 * 4 + 2) % 2**32))
    second = mix((high + first) % 2**32)
    word = mix((mix(((123 * 0x9E3779B1) % 2**32) ^ first) + second) % 2**32)
    assert word == 1269833339
    got = noise.uniform(noise.row_keys(42, 2, "cpu")[1:], torch.tensor([[7]]), noise.ACCEPT, torch.tensor([123]))
    assert got.item() == pytest.approx((word + 0.5) / 2**32, rel=1e-6)


def test_noise_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert noise.gumbel(noise.row_keys(0, 1, "cpu"), torch.tensor([[0]]), 0, VOCAB).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_compiler_sees_a_product_of_an_index():
    """Inductor computes with an `arange` as with an index, on a GPU in 32 bits, where hashing would overflow."""

    def inside_a_step(keys, positions):
        return noise.uniform(keys, positions, noise.TARGET, torch.arange(1000))

    graph = make_fx(inside_a_step)(noise.row_keys(0, 2, "cpu"), torch.arange(6).view(2, 3)).graph
    indices = [node for node in graph.nodes if "arange" in str(node.target)]
    assert indices
    for index in indices:
        assert not [user for user in index.users if user.target is torch.ops.aten.mul.Tensor]
