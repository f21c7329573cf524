"""What is checked: published shapes with random weights, executors that can run; what cannot be checked is refused."""

import json

import pytest
import torch
from paceline.spec import cli
from paceline.spec.check import shapes
from paceline.spec.check.subject import all_executors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(model_type="t5"), "t5 is no causal language model"),
        (dict(model_type="rwkv", hidden_size=32, num_hidden_layers=2, vocab_size=64), "keeps a recurrent state"),
        (dict(model_type="llama", max_position_embeddings=16), "has a context of 16 tokens"),
        (["a", "list"], "gives no configuration"),
    ],
)
def test_models_that_cannot_be_checked_are_refused(config, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["check", "--config", str(tmp_path / "config.json"), "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "/nowhere/check.json"], "/nowhere/check.json cannot be written"),
        (["-o", "{}/a", "--markdown", "{}/a"], "is named for two outputs"),
        (["-o", "{}"], "is a folder"),
        (["-o", "/dev/null"], "is no ordinary file"),
        (["-o", "-"], "'-' names no file"),
        (["--device", "meta"], "neither a CPU nor a CUDA device"),
        (["--dtype", "float8_e4m3fn"], "is none of auto, float32"),
        (["--config", ""], "gives no configuration"),
        (["--shape", "gpt-5"], "choose one of smollm2-135m, qwen3-0.6b"),
        (["--executors", "eager,fast"], "has 'fast', which is none"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--dtype", "int3"], "is none of auto, float32"),
        (["--config", "/nowhere.json"], "gives no configuration"),
        (["--model", "/no/such/folder"], "gives no configuration"),
    ],
)
def test_mistakes_are_refused_before_any_work(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "random_model", lambda *args: pytest.fail("work was begun"))
    assert cli.main(["check", *(option.replace("{}", str(tmp_path)) for option in options)]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 2_000_000_000)
    assert cli.main(["check", "--shape", "llama-3.1-8b", "--dtype", "bfloat16", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "llama-3.1-8b: 16.06 GB of weights in bfloat16" in said and "2.00 GB that are free on cpu" in said


def test_shapes_are_those_that_were_published():
    """Parameters as the models' cards count them."""
    counts = {
        "smollm2-135m": 134_515_008, "qwen3-0.6b": 596_049_920, "llama-3.2-1b": 1_235_814_400,
        "gemma-2-2b": 2_614_341_888, "llama-3.1-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360,
    }  # fmt: skip
    for name, count in counts.items():
        assert shapes.weight_bytes(shapes.shape_config(name), torch.float32) == 4 * count, name


def test_random_weights_give_logits_of_a_real_size():
    for name in ("smollm2-135m", "mixtral-tiny", "gemma-2-2b"):
        config = shapes.shape_config(name)
        small = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=512, head_dim=32)
        for key, value in small.items():
            setattr(config, key, value)
        config.num_attention_heads, config.num_key_value_heads = 4, 2
        if hasattr(config, "layer_types") and config.layer_types:
            config.layer_types = config.layer_types[:2]
        model = shapes.random_model(config, torch.float32, torch.device("cpu"))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        with torch.no_grad():
            logits = model(torch.randint(5, 512, (1, 16))).logits
        assert 2 < logits.std() < 4, name
        assert model.config._attn_implementation == ("eager" if name == "gemma-2-2b" else "sdpa")
        again = shapes.random_model(config, torch.float32, torch.device("cpu"))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight), "the same weights every time"


def test_executors_are_named_or_all():
    assert all_executors("all") == ["eager", "cuda_graph_eager", "compiled", "cuda_graph_compiled"]
    assert all_executors("compiled, eager,compiled") == ["compiled", "eager"]
