"""The plan before a run, and `paceline train` as a user runs it."""

import pytest
from paceline.spec import cli
from paceline.spec.target.load import load_target
from paceline.training import config as configuration
from paceline.training.budget import make_plan
from paceline.training.data.rows import open_data
from paceline.training.objectives.draft_lm import DraftObjective
from paceline.training.optimisation import adamw
from paceline.training.train import objective_of

from support.models import tiny_llama
from support.training_runs import random_rows, settings, write_data, write_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("budget")
    write_target(path / "target", tokenizer)
    write_data(path / "data", random_rows(10), random_rows(5, seed=1))
    (path / "run.yaml").write_text(configuration.dump(settings(path, budget__tokens=1)))
    return path


def test_the_plan_counts_what_is_there(folder):
    config = settings(folder, budget={"tokens_per_param": 0.5})
    objective = DraftObjective.build(config.objective, load_target(config.target.model)[0])
    rows = open_data(config.data.folder)[0]["train"]
    plan = make_plan(config, objective, 61, rows)
    embeddings = 2 * 61 * 32
    layer = 4 * 32 * 32 - 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert plan.trained == embeddings + layer + 32 and plan.trained_vocabulary == embeddings and plan.frozen == 0
    assert plan.tokens == round(plan.trained / 2)
    real = sum(len([d for d in rows.split[i]["document"] if d >= 0]) for i in range(10)) / 10
    assert (plan.steps - 1) * 4 * real < plan.tokens <= plan.steps * 4 * real
    assert plan.epochs == plan.steps * 4 / 10
    shared = settings(folder, objective__embeddings="target", objective__head="target")
    objective = DraftObjective.build(shared.objective, load_target(config.target.model)[0])
    plan = make_plan(shared, objective, 61, rows)
    assert plan.trained == layer + 32 and plan.frozen == embeddings and plan.trained_vocabulary == 0


def test_the_command_plans_trains_and_refuses(folder, capsys):
    call = ["train", str(folder / "run.yaml")]
    assert cli.main([*call, "--plan"]) == 0
    out = capsys.readouterr().out
    for words in ("11.68k trained, 7.776k without embeddings", "Chinchilla: 20", "checkpoints", "tokens/s"):
        assert words in out
    assert not (folder / "run").exists()
    assert cli.main([*call, "target.hidden=offline", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "hidden       46.1 kB" in out and not list((folder / "data").glob("hidden-*"))
    assert cli.main([*call, "--resume", "run.trackers=[]"]) == 0
    assert "starting from the beginning" in capsys.readouterr().err
    assert (folder / "run" / "latest" / "model.safetensors").exists()
    for extra, words in (
        ([], "go on with it by --resume, or choose another folder"),
        (["run.sede=3"], "unknown key 'run.sede', did you mean 'seed'?"),
        (["--resume", "objective.layers=[0]"], "objective.layers is [0] now and was [1]"),
    ):
        assert cli.main([*call, *extra]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("paceline: ") and words in err
    assert cli.main(["train", "smollm2-135m-drft"]) == 2
    assert "did you mean 'smollm2-135m-draft'" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["medusa", "hydra", "draft", "draft-pretrain", "eagle"])
def test_shipped_recipes_make_an_objective(recipe):
    config = configuration.load(f"smollm2-135m-{recipe}")
    assert config.target.model == "smollm2-135m"
    target = tiny_llama(vocab=9000, num_hidden_layers=30)
    made = objective_of(config.objective).build(config.objective, target, random_rows(2))
    assert made.depths == 4 and adamw(made, config.optimisation).param_groups


def test_the_recipe_for_a_gpu_plans_with_what_it_trains(tmp_path, tokenizer, capsys):
    """With a tiny Llama of as many layers and tokens in the place of the 8 B."""
    target = write_target(tmp_path / "target", tokenizer, vocab=33000, num_hidden_layers=32)
    write_data(tmp_path / "data", random_rows(6), random_rows(2, seed=1))
    places = [f"target.model={target}", f"data.folder={tmp_path / 'data'}", f"run.folder={tmp_path / 'run'}"]
    small = ["budget.tokens=100", "optimisation.batch=2", "optimisation.mixed_precision=no"]
    assert cli.main(["train", "llama-3.1-8b-eagle3", "--plan", *places, *small]) == 0
    out, err = capsys.readouterr()
    attention, mlp = 64 * (32 + 16 + 16) + 32 * 32, 3 * 32 * 48
    assert f"{(attention + mlp + 96 * 32 + 32000 * 32 + 4 * 32) / 1e6:.4g}M trained" in out and "tokens/s" in out
    assert "begins as layer 31 of the target" in err
