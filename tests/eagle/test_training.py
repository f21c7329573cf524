"""Training EAGLE: where it begins, that training and decoding see the same, and runs of the trainer."""

import shutil
from pathlib import Path

import paceline
import pytest
import torch
from accelerate.state import AcceleratorState
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.spec.target.load import load_target
from paceline.spec.tree import TreeShape
from paceline.training.objectives.eagle import EagleObjective
from paceline.training.objectives.objective import NO_LABEL, labelled
from paceline.training.objectives.target import OnlineTarget
from paceline.training.train import run

from support.models import tiny_llama, whole_rows
from support.sentences import sentence
from support.training_runs import assert_same_end, lines, settings, weights, write_both

pytestmark = pytest.mark.usefixtures("one_thread")


def texts_of(model, count=16, length=40, seed=3):
    """Texts of the model's own."""
    torch.manual_seed(seed)
    options = dict(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, max_new_tokens=length)
    return model.generate(torch.randint(1, 61, (count, 4)), **options)


def rows_of(batch):
    return [{name: values[row].tolist() for name, values in batch.items()} for row in range(len(batch["input_ids"]))]


def trained(model, text, steps, prompt=0, **section):
    """An objective that has read `text` after its first `prompt` tokens for some steps, and its losses before each."""
    batch = whole_rows(text)
    batch["loss_mask"] = (batch["position_ids"] >= prompt).long()
    torch.manual_seed(0)
    objective = EagleObjective.build({"kind": "eagle", **section}, model, rows_of(batch)).train()
    seen = OnlineTarget(model, objective.taps).view(batch, "", [])
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    losses = [objective(batch, seen)]
    for _ in range(steps):
        (losses[-1].total / losses[-1].counted).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(objective(batch, seen))
    return objective, losses


@pytest.mark.parametrize(
    "section", [{}, {"layout": "wide", "taps": [0, 1]}, {"taps": [0, 1], "parts": {"join_bias": True}}]
)
def test_layers_of_the_target_behind_a_ridge_regression_begin_better(target, section, capsys):
    """On text that nothing was fitted to: less loss and more right than with random weights."""
    fitting, text = texts_of(target), texts_of(target, seed=4)
    judged = {}
    for name, start in (("random", {}), ("fitted", {"layer_of_target": 1})):
        objective, _ = trained(target, fitting, 0, **section, **start)
        batch = whole_rows(text)
        losses = objective.eval()(batch, OnlineTarget(target, objective.taps).view(batch, "", []))
        judged[name] = losses.total.item() / losses.counted.item(), losses.hits[0].item()
    assert judged["fitted"][0] < 0.9 * judged["random"][0] and judged["fitted"][1] > 1.5 * judged["random"][1]
    assert "begins as layer 1 of the target; R2 of the state under it: 0." in capsys.readouterr().err


def test_layers_are_copies_and_join_is_the_ridge_regression(target):
    """Against least squares with the penalty as further rows, on transformers' own hidden states."""
    rows = rows_of(whole_rows(texts_of(target)))
    network = EagleObjective.build({"kind": "eagle", "layer_of_target": 1}, target, rows).network
    assert torch.equal(network.norm.weight, target.model.norm.weight)
    for name, parameter in target.model.layers[1].named_parameters():
        assert torch.equal(network.layers[0].get_parameter(name), parameter)

    def normed(states):
        return states / (states.square().mean(-1, keepdim=True) + target.config.rms_norm_eps).sqrt()

    given, goal = [], []
    with torch.no_grad():
        for row in rows[:12]:  # these have enough pairs
            ids = torch.tensor([row["input_ids"]])
            states = target.model(ids, output_hidden_states=True)
            embeddings = normed(target.model.embed_tokens(ids[0, 1:]))
            given.append(torch.cat([embeddings, normed(states.last_hidden_state[0, :-1])], -1))
            goal.append(states.hidden_states[1][0, 1:])
    given, goal = torch.cat(given).double(), torch.cat(goal).double()  # (P, 64), (P, 32)
    penalty = (1e-4 * given.square().sum(0).mean()).sqrt() * torch.eye(64)
    zeros = torch.zeros(64, 32)
    weight = torch.linalg.lstsq(torch.cat([given, penalty]), torch.cat([goal, zeros])).solution
    torch.testing.assert_close(network.join.weight.data, weight.T.float(), rtol=1e-3, atol=1e-4)


def test_layers_that_do_not_fit_are_refused_by_name(target):
    rows = rows_of(whole_rows(texts_of(target, 2)))

    def build(model=target, rows=rows, **section):
        return EagleObjective.build({"kind": "eagle", **section}, model, rows)

    for section, words in (
        ({"layer_of_target": 0}, "layer_of_target is 0 and must be from 1 to 1"),
        ({"layer_of_target": 1, "layers": 2}, "must be from 1 to 0"),
        ({"layer_of_target": 1, "layout": "eagle1"}, "needs the norms of the target's layers"),
        ({"layer_of_target": 1, "layer": {"intermediate_size": 24}}, "leave its sizes out of objective.layer"),
        ({"layer_of_target": 1, "layer": {"model_type": "qwen3"}}, "lack self_attn.k_norm.weight"),
        ({"layer_of_target": 1, "layer": {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}}, "compute"),
        ({"parts": {"norm": True}}, "objective.parts has 'norm'"),
        ({"layers": 0}, "objective.layers is 0"),
        ({"layer": {"num_hidden_layers": 3}}, "give their number as objective.layers"),
        ({"layout": "wide"}, "the target has 2 layers, too few"),
        ({"taps": ["heda"]}, "taps has 'heda'"),
        ({"taps": [1.5]}, "taps has 1.5"),
        ({"taps": [True]}, "taps has True"),
        ({"feature_weight": float("nan")}, "objective.feature_weight is nan"),
        ({"steps": 0}, "objective.steps is 0; it must be at least 1"),
        ({"decay": 0.0}, "objective.decay is 0.0"),
        ({"losses": {"jsd": 1.0}}, "objective.losses has jsd; EAGLE is trained by forward_kl and cross_entropy"),
        ({"taps": [0, 1], "feature_weight": 0.1}, "are fused here; set it to 0"),
        ({"layer": {"hidden_size": 64, "head_dim": 16}}, "hidden_size=64 is not the target's 32"),
        ({"start": str(Path(__file__).parent)}, "holds no EAGLE network"),
    ):
        sentence(lambda section=section: build(**section), words)
    sentence(lambda: build(rows=[], layer_of_target=1), "there are none; leave it out")


@pytest.mark.parametrize("section", [{"known_tokens": 40}, {"layout": "wide", "taps": [0, 1], "layers": 2}])
def test_training_and_decoding_see_the_same(target, section):
    """Every step of decoding accepts as much as the label ranks say at its place, with a chain and with a tree."""
    objective, _ = trained(target, texts_of(target), 25, depths=3, **section)
    drafter = EagleDrafter(objective.network.eval())
    torch.manual_seed(21)
    prompts, compared = torch.randint(1, 61, (4, 7)), 0
    for tree in ("chain:3", "3x3x3"):
        width = TreeShape.parse(tree).max_children
        options = dict(do_sample=False, max_new_tokens=48, return_dict_in_generate=True)
        out = paceline.generate(target, prompts, drafter=drafter, tree=tree, **options)
        batch = whole_rows(out.sequences)
        ranks, judged = EagleObjective.judge(drafter, target, 3)(batch)
        placed = torch.full((4, 55, 3), NO_LABEL)
        placed[judged] = ranks
        assert torch.equal(judged, labelled(batch, 3)[..., 0])
        for row, events in out.trace.rows():
            root = 6  # the position of the root: the last prompt token
            for event in events:
                mine = placed[row, root - 1].tolist()
                if NO_LABEL not in mine:
                    assert len(event.accepted) == next((d for d, rank in enumerate(mine) if rank >= width), 3)
                    compared += len(event.accepted) > 0
                root += len(event.committed)
    assert compared > 15


def test_one_text_overfitted_is_drafted_whole():
    """A network that knows one text by heart reaches nearly the most that a chain can bring, in decoding."""
    model = tiny_llama(seed=6)
    prompt = torch.tensor([[5, 9, 2, 33]])
    text = model.generate(prompt, do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0)
    objective, losses = trained(model, text, 80, prompt=4, layer_of_target=1, losses={"cross_entropy": 1.0})
    assert losses[-1].tokens_per_step() > 3.9, "4 is the most with three steps"
    out = paceline.generate(
        model, prompt, drafter=EagleDrafter(objective.network.eval()), tree="chain:3", do_sample=False,
        max_new_tokens=60, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, text)
    assert out.trace.summary()["tokens_per_step"] > 3.7, "4 is the most, and the last step is cut"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_both(tmp_path_factory.mktemp("eagle"), tokenizer)


def eagle_run(folder, name, **changes):
    section = {
        "kind": "eagle",
        "layer_of_target": 1,
        "known_tokens": 40,
        "taps": [0, "head"],
        "losses": {"forward_kl": 1},
    }
    return settings(folder, name, objective=section, run__keep=9, **changes)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_target_of_16_bits_is_trained_for_in_either_precision(folder, precision):
    """Losses and ranks, with the frozen head in the target's dtype and all that is trained in float32."""
    changes = {"target__dtype": "bfloat16", "optimisation__mixed_precision": precision, "budget__tokens": 1}
    config = eagle_run(folder, f"bfloat16-{precision}", **changes)
    AcceleratorState._reset_state(reset_partial_state=True)  # lets this process have another precision
    assert run(config) is None
    AcceleratorState._reset_state(reset_partial_state=True)
    (line,) = (line for line in lines(config) if "eval/loss" in line)
    assert line["eval/acc_1"] is not None
    assert {tensor.dtype for tensor in weights(config, 1).values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_and_from_states_on_disk(folder):
    """A run resumed half-way ends with the same weights; so does one with the states of both taps read from disk, and
    one with states of 8 bits nearly."""
    whole, resumed = eagle_run(folder, "whole"), eagle_run(folder, "resumed")
    assert run(whole) is None
    half = Path(resumed.run.folder)
    half.mkdir()
    shutil.copytree(Path(whole.run.folder) / "step-00000006", half / "step-00000006")
    (half / "metrics.jsonl").write_text((Path(whole.run.folder) / "metrics.jsonl").read_text())
    assert run(resumed, resume=True) is None
    assert_same_end(resumed, whole)
    reference = weights(whole)
    for bits, tolerance in ((16, 1e-5), (8, 0.05)):
        config = eagle_run(folder, f"offline-{bits}", target__hidden="offline", target__hidden_bits=bits)
        assert run(config) is None
        mine = weights(config)
        for name, tensor in reference.items():
            assert (mine[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-4, name
    kept = sorted(path.name.removeprefix("hidden-")[13:] for path in (folder / "data").glob("hidden-*"))
    assert kept == ["float32-taps-0-head", "float32-taps-0-head-8bits"]


def test_a_trained_folder_is_loaded_goes_on_and_describes_itself(folder, capsys):
    config = eagle_run(folder, "loaded", budget__tokens=1)
    assert run(config) is None
    made = Path(config.run.folder) / "latest"
    model, _ = load_target(folder / "target")
    drafter = paceline.load_drafter(made, model)
    assert isinstance(drafter, EagleDrafter) and len(drafter.network.vocabulary) == 40
    card = (made / "README.md").read_text()
    assert "| kind | eagle |" in card and "| known tokens | 40 |" in card and "| intermediate size | 48 |" in card
    section = {**config.objective, "start": str(made)}
    capsys.readouterr()
    again = EagleObjective.build(section, model, [])
    assert "gives the network, and objective.layer_of_target has no effect" in capsys.readouterr().err
    assert again.network.origin["name"] == "latest" and again.network.norm.weight.dtype == torch.float32
    for name, tensor in again.network.stored().items():
        assert torch.equal(tensor, drafter.network.state_dict()[name].to(tensor.dtype)), name
    trained_names = {name for name, parameter in again.network.named_parameters() if parameter.requires_grad}
    assert trained_names == {name for name, _ in again.network.named_parameters()} - {"lm_head.weight"}
    rows = [{"input_ids": [5] * 9 + [7] * 3, "loss_mask": [True] * 12}]
    wider = EagleObjective.build({**section, "known_tokens": 42}, model, rows).network
    known = drafter.network.vocabulary.tolist()
    commonest = [token for token in (5, 7, *range(61)) if token not in known]
    assert wider.vocabulary.tolist() == sorted([*known, *commonest[:2]]), "and what it knew"
    assert torch.equal(wider.lm_head.weight, model.get_output_embeddings().weight[wider.vocabulary])
    for name, tensor in again.network.stored().items():
        assert name == "vocabulary" or torch.equal(tensor, wider.state_dict()[name]), name
    for change, words in (
        ({"taps": [1, "head"]}, "has taps (0, 'head') and the objective asks for (1, 'head')"),
        ({"known_tokens": 30}, "objective.known_tokens is 30 and 40 in"),
    ):
        sentence(lambda change=change: EagleObjective.build({**section, **change}, model, []), words)
