"""What compiled code computes for a row must not depend on the rows beside it; where it is kept."""

import os

import pytest
import torch
from paceline.spec.engines import inductor
from paceline.spec.engines.inductor import compiled
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
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


@pytest.mark.parametrize(("named", "kept"), [(None, "ours"), ("torch's", "ours"), ("/elsewhere", "/elsewhere")])
def test_code_is_kept_in_our_cache_folder_unless_another_is_named(named, kept, monkeypatch, tmp_path):
    """Torch names its own folder in the environment as soon as it is imported."""
    monkeypatch.setattr(inductor, "_try_compiler", lambda: None)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", {"torch's": default_cache_dir()}.get(named, str(named)))
    if named is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    inductor.prepare()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == {"ours": str(tmp_path / "inductor")}.get(kept, kept)
