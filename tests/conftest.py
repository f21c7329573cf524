"""Fixtures: tiny random models that run in milliseconds, and SmolLM2 where it can be fetched."""

import os
import shutil
import tempfile
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
# Shared by all tests and workers, also by those whose cache folder is another.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "paceline-tests-inductor"))

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from support.models import fitted_heads, noisy_copy, tiny_llama

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
settings.register_profile("paceline", deadline=None, derandomize=True)
settings.load_profile("paceline")


@pytest.fixture(scope="module")
def one_thread():
    """Two threads on tiny tensors wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def traced_only(monkeypatch):
    """Compiled steps are traced into one graph as ever, which then runs by torch's own kernels: making others takes ten
    seconds and more. For what is decided while tracing; the kernels are compared in engines/test_compiled_step.py."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


# A model, a prompt and its greedy text by transformers; rooms that need others have fixtures of these names.


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab=64)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(2)
    return torch.randint(3, 64, (1, 10))


@pytest.fixture(scope="module")
def truth(model, ids):
    return model.generate(ids, do_sample=False, max_new_tokens=12)


@pytest.fixture(scope="session")
def target():
    return tiny_llama()


@pytest.fixture(scope="session")
def draft(target):
    from paceline.drafters.draft_model import ModelDrafter

    return ModelDrafter(noisy_copy(target))


@pytest.fixture(scope="session")
def hydra(target):
    from paceline.drafters.medusa import MedusaDrafter

    return MedusaDrafter(fitted_heads(target, "hydra", known=40))


@pytest.fixture(scope="session")
def ragged():
    """Three prompts of different length, padded on the left: (input_ids, attention_mask)."""
    torch.manual_seed(7)
    ids = torch.randint(1, 61, (3, 9))
    ids[0, 5:] = ids[0, 1:5]  # something for prompt lookup to find
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :8] = 0
    return ids * mask, mask


@pytest.fixture(scope="session")
def tokenizer():
    """61 one-letter words, "a" to "Z" and beyond, spoken without spaces, with a small chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(0x41, 0x41 + 58)]
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}A"
    return made


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 with its tokenizer; skips where it cannot be fetched."""
    import paceline

    try:
        return paceline.load_target("smollm2-135m", dtype=torch.float32)
    except ValueError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def root():
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e '.[browser]')")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
