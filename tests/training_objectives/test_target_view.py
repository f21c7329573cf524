"""What the frozen target hands over: the LM head's true input, documents apart, logits as its own."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec.recurrent.documents import Documents
from paceline.spec.target import taps
from paceline.spec.target.taps import HEAD, hidden_states
from paceline.training.data.rows import open_data
from paceline.training.objectives.heads import MedusaObjective
from paceline.training.objectives.target import (
    ROWS_PER_FILE,
    OfflineTarget,
    OnlineTarget,
    hidden_bytes,
    logit_head,
    write_hidden_states,
)

from support.families import KINDS, STATEFUL, build, tiny
from support.models import tiny_llama
from support.training_runs import pack, random_rows, write_data

TAPS = (1, HEAD, 0)


MODELS = {
    "sdpa": lambda: tiny_llama(attn_implementation="sdpa"),
    "eager": lambda: tiny_llama(attn_implementation="eager"),
    **{name: partial(build, name, STATEFUL[name]) for name in KINDS.values()},
}


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_a_pack_do_not_see_each_other(name):
    model = MODELS[name]()
    texts = [list(range(3, 12)), list(range(20, 25)), [7, 7, 8]]
    row = pack([(text, [1] * len(text)) for text in texts], 24)
    ids, positions = (torch.tensor([row[name]]) for name in ("input_ids", "position_ids"))
    with torch.no_grad():
        hidden = hidden_states(model, (HEAD,), ids, positions)[HEAD]
        alone = [model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]
    torch.testing.assert_close(hidden[0, :17], torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert hidden.isfinite().all(), "padding too"


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_no_more_than_half_of_what_is_read_of_documents_apart_is_padding(lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = Documents(positions)
    tokens = torch.arange(1, positions.shape[1] + 1)[None]
    read = documents.apart(tokens)
    assert 2 * sum(lengths) >= sum(rows.numel() for rows in read)
    assert torch.equal(documents.packed([rows[..., None] for rows in read])[..., 0], tokens)


def test_losses_are_those_of_documents_read_at_once(monkeypatch):
    model = build("lfm2", STATEFUL["lfm2"])
    batch = {name: torch.tensor([row[name] for row in random_rows(3)]) for name in random_rows(1)[0]}
    objective = MedusaObjective.build({"kind": "medusa", "heads": 2}, model)
    target = OnlineTarget(model)
    with torch.no_grad():
        grouped = objective(batch, target.view(batch, "train", [])).total
        monkeypatch.setattr(taps, "Documents", lambda positions, at_once: Documents(positions, at_once=True))
        assert torch.allclose(grouped, objective(batch, target.view(batch, "train", [])).total, rtol=1e-5)


def test_no_logits_are_computed():
    model = tiny_llama()
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    ids = torch.arange(6)[None]
    hidden = hidden_states(model, (HEAD,), ids, ids)[HEAD]
    assert rows == [0] and hidden.shape == (1, 6, 32)
    handle.remove()
    assert model(input_ids=ids).logits.shape == (1, 6, 61), "and the model is as before"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"attention_bias": True}),
        ("gemma2", {"final_logit_softcapping": 0.5, "attn_implementation": "eager"}),
        ("cohere", {"logit_scale": 0.07}),
        ("granite", {"logits_scaling": 3.0}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ],
)
def test_the_head_gives_the_logits_of_the_model(family, options):
    model = tiny(family, **options)
    ids = torch.randint(3, 61, (2, 9))
    positions = torch.arange(9).expand(2, -1)
    seen = OnlineTarget(model).view({"input_ids": ids, "position_ids": positions}, "train", [0, 1])
    with torch.no_grad():
        torch.testing.assert_close(seen.lm_head(seen.hidden), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_whose_logits_come_about_otherwise_is_refused():
    model = tiny_llama()
    forward = model.forward

    def odd(**inputs):
        out = forward(**inputs)
        out.logits = out.logits.roll(1, dims=-1)
        return out

    model.forward = odd
    with pytest.raises(ValueError, match="gives other logits than its own"):
        logit_head(model)


def test_hidden_states_on_disk_are_those_of_the_model_and_survive_a_kill(tmp_path):
    model = tiny_llama()
    data = write_data(tmp_path / "data", random_rows(ROWS_PER_FILE + 7), random_rows(3, seed=1))
    splits, _ = open_data(data)
    rows = splits["train"]
    folder = tmp_path / "hidden"
    write_hidden_states(model, "train", rows, folder, rank=0, ranks=2, taps=TAPS)
    assert [path.name for path in folder.iterdir()] == ["train-000000.safetensors"]
    first = (folder / "train-000000.safetensors").stat().st_mtime_ns
    (folder / "train-000001.99.unfinished").write_bytes(b"half")
    write_hidden_states(model, "train", rows, folder, rank=0, ranks=1, taps=TAPS)
    assert (folder / "train-000000.safetensors").stat().st_mtime_ns == first, "what is there is kept"
    need = hidden_bytes(model, TAPS, len(rows), rows.length)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert need <= size < 1.01 * need
    chosen = [ROWS_PER_FILE + 6, 0, ROWS_PER_FILE - 1]
    batch = rows.batch(chosen)
    sources = OnlineTarget(model, TAPS), OfflineTarget(folder, logit_head(model), TAPS)
    theirs, mine = (torch.cat([*source.view(batch, "train", chosen).tapped.values()], -1) for source in sources)
    real = batch["document"] >= 0
    assert len(batch["document"][real].unique()) > 1 and not real.all(), "several documents, and padding"
    torch.testing.assert_close(mine[real], theirs[real], rtol=1e-5, atol=1e-5)
    assert not mine[~real].any()
