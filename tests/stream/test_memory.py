"""The memory of a process that decodes with a streamed target: what was announced, and not the model's size."""

import json
import os
import re
import subprocess
import sys

import pytest
from paceline.spec.stream import layout, reader
from stream.streaming import LAYERS, USUAL, budget, saved

DECODE = """
import json, os, sys
from pathlib import Path
import paceline, torch
from paceline.spec.kernels import native
from paceline.spec.stream.layout import StreamFolder
StreamFolder.tested = lambda *ignored: True
torch.set_num_threads(1)
native.prepare()
os.environ["PACELINE_CACHE"] = sys.argv[3]
def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
model, _ = paceline.load_target(
    sys.argv[1], "float32", "cpu", with_tokenizer=False, stream="disk", resident=sys.argv[2]
)
loaded = memory("VmRSS")
paceline.generate(model, torch.arange(3, 603)[None], max_new_tokens=3, do_sample=False)
print(json.dumps([loaded, memory("VmHWM")]))
"""
SIZES = dict(
    vocab_size=1000, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12,
    head_dim=64, max_position_embeddings=1024,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell a process's most memory")
def test_decoding_takes_as_much_as_was_announced(tmp_path, cache, monkeypatch):
    """A prompt of 600 tokens, by a process that may keep two of six layers of 28 MB. With all of
    them in memory it would take 113 MB more."""
    for module in (reader, layout):
        monkeypatch.setattr(module, "PIECE", 8 << 20)  # as in the process that decodes
    path = saved("llama", tmp_path / "model", **SIZES)
    room = budget(path, LAYERS)  # and repacks it
    command = [sys.executable, "-c", DECODE, str(path), str(room), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PACELINE_CACHE": USUAL})
    assert done.returncode == 0, done.stderr
    loaded, most = json.loads(done.stdout.splitlines()[-1])
    said = re.search(r"about (\d+\.\d+) GB, (\d+\.\d+) GB while a long prompt is read, and (\d+) MB more", done.stderr)
    taken, reading, more = float(said[1]), float(said[2]), float(said[3])
    announced = 1e9 * reading + 1e3 * more * 603
    assert 0.01 < reading - taken < 0.05 and more == pytest.approx(37)
    assert loaded < 1e9 * taken + 20e6 and most < 1.1 * announced + 30e6, done.stderr
