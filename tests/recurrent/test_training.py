"""Training for and of models with states, from data to the text that is drafted."""

from pathlib import Path

import paceline
import pytest
import torch
from paceline.spec.target.load import load_target
from paceline.training.objectives.draft_network import from_layers
from paceline.training.train import run

from support.families import STATEFUL, build
from support.training_runs import lines, random_rows, settings, write_data

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVES = {
    "lfm2": {"kind": "medusa", "heads": 2},
    "mamba2": {"kind": "draft_lm", "layers": [1], "losses": {"forward_kl": 1.0}},
}


def test_a_list_that_is_not_of_layers_stays_whole():
    """Of two multipliers, and two bounds of step sizes, in models of two layers."""
    for name in ("falcon_h1", "mamba2"):
        made = from_layers(build(name, STATEFUL[name]), [1]).eval()
        assert made(torch.tensor([[3, 4, 5]]), use_cache=False).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_drafter_learns_from_a_target_with_states_and_drafts_for_it(name, tokenizer, tmp_path):
    """Heads, and a draft model with states of its own."""
    build(name, STATEFUL[name]).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    write_data(tmp_path / "data", random_rows(10), random_rows(5, seed=1))
    config = settings(tmp_path, objective=OBJECTIVES[name], optimisation__learning_rate=0.01)
    assert run(config) is None
    losses = [line["train/loss"] for line in lines(config) if "train/loss" in line]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    target, _ = load_target(str(tmp_path / "target"))
    drafter = paceline.load_drafter(str(Path(config.run.folder) / "best"), target)
    prompt = torch.tensor([random_rows(1)[0]["input_ids"][:9]])
    ways = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(paceline.generate(target, prompt, drafter=drafter, **ways), target.generate(prompt, **ways))
