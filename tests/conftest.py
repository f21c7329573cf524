"""Fixtures: tiny random models that run in milliseconds, and SmolLM2 where it can be fetched."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
settings.register_profile("paceline", deadline=None, derandomize=True)
settings.load_profile("paceline")


def tiny_llama(vocab=61, seed=0, **options):
    """A random Llama of two layers in float32; `pad` is token 0, there is no end of text by default."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def noisy_copy(model, noise=0.02, seed=1):
    """A draft model that mostly agrees with `model`."""
    torch.manual_seed(seed)
    copy = type(model)(model.config).eval()
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters()):
            mine.copy_(theirs + noise * torch.randn_like(theirs))
    return copy


def target_view(model, input_ids):
    """What the frozen target sees on rows (B, T) of one document each."""
    from paceline.spec.target.taps import HEAD, listening, put_taps
    from paceline.training.objectives.objective import TargetView

    put_taps(model, (HEAD,))
    with torch.no_grad(), listening() as heard:
        model(input_ids=input_ids, use_cache=False)
    return TargetView(heard, model.get_output_embeddings())


def whole_rows(input_ids):
    """A batch of rows that are one document each, all of it the target's own."""
    ones = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "loss_mask": ones, "document": ones * 0, "position_ids": ones.cumsum(1) - 1}


def fitted_heads(model, mode, steps=40, known=None, seed=0, **settings):
    """Heads of three levels that have learned a little of the model's own text: right now and then."""
    from paceline.drafters.medusa import HeadSettings, MedusaHeads
    from paceline.training.objectives.heads import MedusaObjective
    from paceline.training.objectives.known_tokens import frequent_tokens

    torch.manual_seed(seed)
    vocab = model.config.vocab_size
    options = dict(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, max_new_tokens=40)
    text = model.generate(torch.randint(1, vocab, (16, 4)), **options)
    batch, seen = whole_rows(text), target_view(model, text)
    vocabulary = known and frequent_tokens([batch], known, vocab)
    objective = MedusaObjective(
        MedusaHeads.make(HeadSettings(mode, **{"heads": 3, "rank": 8, **settings}), model, vocabulary), 1.0, 0.5
    )
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for _ in range(steps):
        losses = objective(batch, seen)
        (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.heads.requires_grad_(False).to(model.dtype)


@contextmanager
def as_traced(*models):
    """Linear layers of `models` compute as they do where a compiler traces them."""
    from paceline.spec.kernels.linears import packed_linears

    with pytest.MonkeyPatch.context() as patch, packed_linears(models):
        patch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Two threads on tiny tensors wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
