"""A training run's configuration: dataclasses, read from one YAML file and `section.key=value` overrides.

Overrides win over the file, the file over defaults. Unknown keys and wrong types raise ValueError in one sentence. The
section `objective` is not checked here but by the objective of the kind that it names. Knows nothing of torch.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

TRACKERS = {"tensorboard", "wandb", "trackio", "mlflow"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """The frozen model that is drafted for."""

    model: str = "smollm2-135m"  # a folder, a GGUF file, a short name or a hub id
    dtype: str = "auto"
    weights: str = "16"  # or the blocks of a quantised model, as for load_target
    hidden: Literal["online", "offline"] = "online"  # run the target, or read its hidden states from disk
    hidden_bits: Literal[8, 16] = 16  # of a number on disk: 8 with a scale for each token, or as the target computes it
    hidden_folder: str | None = None  # of the hidden states; by default beside the data
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    folder: str  # as `paceline data prepare` writes it
    held_out_rows: int = 256  # evaluate on at most so many rows


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many tokens to train on: `tokens`, or else `tokens_per_param` for every trained parameter.

    Chinchilla recommends 20 tokens per parameter (Hoffmann et al., arXiv:2203.15556). The default is ten times that,
    because a draft model is run far more than it is trained.
    """

    tokens: int | None = None
    tokens_per_param: float = 200


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW with a cosine schedule."""

    batch: int = 32  # rows per step, over all processes
    micro_batch: int = 4  # rows per forward of one process
    learning_rate: float = 1e-3
    learning_rates: dict[str, float] = field(default_factory=dict)  # for single parameter groups
    warm_up: float = 0.02  # share of the steps
    final: float = 0.1  # the last learning rate, as a share of the highest
    weight_decay: float = 0.1  # on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 1.0  # norm of the gradient
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"  # auto is bf16 where the device supports it natively


@dataclass(frozen=True, kw_only=True)
class Run:
    folder: str
    seed: int = 0
    log_every: int = 10  # steps
    evaluate_every: int = 200
    save_every: int = 200
    keep: int = 2  # checkpoints, beside the best
    decode_prompts: str | None = None  # a few prompts (JSONL) to decode at every evaluation too
    trackers: list[str] = field(default_factory=list)  # of `TRACKERS`


@dataclass(frozen=True, kw_only=True)
class Config:
    objective: dict[str, Any]  # `kind`, and the settings of that kind
    data: Data
    run: Run
    target: Target = field(default_factory=Target)
    budget: Budget = field(default_factory=Budget)
    optimisation: Optimisation = field(default_factory=Optimisation)

    def __post_init__(self):
        for name, value, least in (
            ("optimisation.batch", self.optimisation.batch, 1),
            ("optimisation.micro_batch", self.optimisation.micro_batch, 1),
            ("data.held_out_rows", self.data.held_out_rows, 0),
            ("run.log_every", self.run.log_every, 1),
            ("run.evaluate_every", self.run.evaluate_every, 1),
            ("run.save_every", self.run.save_every, 1),
            ("run.keep", self.run.keep, 1),
            ("run.seed", self.run.seed, 0),
            ("budget.tokens", self.budget.tokens, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"config: {name} is {value}; it must be at least {least}")
        for name, value in (
            ("optimisation.learning_rate", self.optimisation.learning_rate),
            ("optimisation.clip", self.optimisation.clip),
            ("budget.tokens_per_param", self.budget.tokens_per_param),
            *((f"optimisation.learning_rates.{k}", v) for k, v in self.optimisation.learning_rates.items()),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"config: {name} is {value}; it must be above 0")
        for name in ("warm_up", "final"):
            if not 0 <= getattr(self.optimisation, name) <= 1:
                raise ValueError(f"config: optimisation.{name} is a share between 0 and 1")
        if len(self.optimisation.betas) != 2 or not all(0 <= beta < 1 for beta in self.optimisation.betas):
            raise ValueError(f"config: optimisation.betas is {self.optimisation.betas}; give two numbers below 1")
        if unknown := set(self.run.trackers) - TRACKERS:
            raise ValueError(
                f"config: run.trackers has {min(unknown)!r}; choose of tensorboard, wandb, trackio, mlflow"
            )


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The configuration in the YAML file `path` (or of the shipped recipe of that name), with `key=value`s."""
    file = Path(path)
    if not file.is_file():
        file = _recipe(str(path))
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no sections; a configuration looks like those in configs/")
    for override in overrides:
        _override(settings, override)
    return read(Config, settings)


def dump(config: Config) -> str:
    """YAML from which `load` makes the same configuration."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read(kind, settings: Any, where: str = ""):
    """An instance of the dataclass `kind` from a mapping, types checked; `where` is its dotted name in messages."""
    if not isinstance(settings, dict):
        raise ValueError(f"config: {where} wants keys and values, got {settings!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    types_ = typing.get_type_hints(kind)
    for key in settings:
        if key not in fields:
            raise ValueError(f"config: unknown key {_dotted(where, key)!r}{suggest(key, fields)}")
    for name, f in fields.items():
        if name not in settings and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"config: {_dotted(where, name)!r} is missing; it has no default")
    return kind(**{key: _value(types_[key], value, _dotted(where, key)) for key, value in settings.items()})


def suggest(key: str, known) -> str:
    near = difflib.get_close_matches(str(key), list(known), 1)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _value(wanted, value: Any, where: str):
    """`value` converted to the type `wanted`; raises ValueError where it cannot be."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if dataclasses.is_dataclass(wanted):
        return read(wanted, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(kind for kind in arguments if kind is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            if value is False and "no" in arguments:  # YAML 1.1 reads a bare no as false
                return "no"
            raise ValueError(f"config: {where} is {value!r}; choose of {', '.join(map(str, arguments))}")
        return value
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(arguments[1], item, _dotted(where, key)) for key, item in value.items()}
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4 as a string
        except ValueError:
            pass
    if wanted is int and isinstance(value, float | str) and _whole(value):  # and 1e9 as a string too
        return int(float(value))
    if origin is None and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise ValueError(f"config: {where} wants {getattr(origin or wanted, '__name__', wanted)}, got {value!r}")


def _whole(value: float | str) -> bool:
    try:
        return float(value).is_integer()
    except ValueError:
        return False


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _override(settings: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not key:
        raise ValueError(f"{override!r} is no override; write section.key=value")
    for section in sections:
        inner = settings.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{override!r}: {section!r} is not a section")
        settings = inner
    try:
        settings[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: {text!r} is no YAML value") from error


def _recipe(name: str) -> Path:
    shipped = {file.name.removesuffix(".yaml"): file for file in resources.files("paceline.configs").iterdir()}
    shipped = {recipe: file for recipe, file in shipped.items() if file.name.endswith(".yaml")}
    if name in shipped:
        return shipped[name]
    raise ValueError(f"configuration {name!r} is neither a file nor a recipe{suggest(name, shipped)}")
