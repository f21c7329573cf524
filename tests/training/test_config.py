"""The configuration: files, overrides, and what is said of mistakes."""

import pytest
from paceline.training import config

TEXT = """
target: {model: tiny, hidden: online}
data: {folder: somewhere}
objective: {kind: draft_lm, layers: [0, 1]}
optimisation: {learning_rate: 3e-4, learning_rates: {head: 1}, mixed_precision: no}
budget: {tokens: 1e6}
run: {folder: runs/a}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    return path


def test_numbers_are_read_as_people_write_them(file):
    read = config.load(file)
    assert read.optimisation.learning_rate == 3e-4, "YAML 1.1 has it as a string"
    assert read.optimisation.learning_rates == {"head": 1.0}
    assert read.optimisation.mixed_precision == "no", "YAML 1.1 has it as false"
    assert read.budget.tokens == 1_000_000 and isinstance(read.budget.tokens, int)
    assert read.optimisation.batch == config.Optimisation().batch


def test_overrides_win_and_reach_everywhere(file):
    changes = ["optimisation.batch=8", "objective.layers=[1, 2, 3]", "run.trackers=[wandb]", "budget.tokens=null"]
    read = config.load(file, changes)
    assert read.optimisation.batch == 8 and read.objective == {"kind": "draft_lm", "layers": [1, 2, 3]}
    assert read.run.trackers == ["wandb"] and read.budget.tokens is None


def test_the_resolved_configuration_round_trips(file, tmp_path):
    read = config.load(file, ["run.seed=5"])
    (tmp_path / "again.yaml").write_text(config.dump(read))
    assert config.load(tmp_path / "again.yaml") == read


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.sede=1", "unknown key 'run.sede', did you mean 'seed'?"),
        ("optimisaton.batch=1", "unknown key 'optimisaton', did you mean 'optimisation'?"),
        ("run.seed=seven", "run.seed wants int, got 'seven'"),
        ("run.seed=1.5", "run.seed wants int, got 1.5"),
        ("run.seed=true", "run.seed wants int, got True"),
        ("run.trackers=wandb", "run.trackers wants list, got 'wandb'"),
        ("run.trackers=[paper]", "run.trackers has 'paper'"),
        ("target.trust_remote_code=1", "wants bool, got 1"),
        ("target.hidden=nearby", "choose of online, offline"),
        ("optimisation.learning_rate=fast", "wants float, got 'fast'"),
        ("optimisation.learning_rate=-1", "must be above 0"),
        ("optimisation.learning_rates.head=0", "learning_rates.head is 0.0; it must be above 0"),
        ("optimisation.batch=0", "optimisation.batch is 0; it must be at least 1"),
        ("optimisation.betas=[0.9]", "give two numbers"),
        ("optimisation=3", "optimisation wants keys and values"),
        ("run.seed.deeper=3", "'run.seed.deeper=3'"),
        ("run.seed", "write section.key=value"),
        ("run.seed=[", "no YAML value"),
    ],
)
def test_a_mistake_is_named_with_a_remedy(file, override, message):
    changes = ["run.seed=3", override] if "deeper" in override else [override]
    with pytest.raises(ValueError) as error:
        config.load(file, changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_keys_and_files(tmp_path):
    (tmp_path / "c.yaml").write_text("objective: {kind: x}\nrun: {folder: r}\n")
    with pytest.raises(ValueError, match="'data' is missing"):
        config.load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("just words")
    with pytest.raises(ValueError, match="holds no sections"):
        config.load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no YAML file"):
        config.load(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="neither a file nor a recipe"):
        config.load("smollm2-135m-drfat")
