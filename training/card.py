"""The model card of a drafter folder, written from its files alone.

`training.json` records the run that made the drafter: configuration, versions, data and last figures. `README.md` is
generated from it, `config.json`, `acceptance.json` and the header of the weights, so it can be written again whenever
one of them changes.
"""

import json
import math
import re
from importlib import resources
from pathlib import Path

import jinja2
import yaml
from safetensors import safe_open

from ..drafters.shipped import shipped_folder
from ..spec.files import whole, write_json
from ..spec.plan.trees import Acceptance
from .config import Config
from .data.prompts import DIGESTS, read_digests, write_digests
from .records import shown


def write_record(folder: Path, about: dict, config: Config) -> None:
    """Write `training.json` and `prompts.sha256` into a checkpoint of a run on the data that `about` describes."""
    papers, state = folder / "trainer", json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    record = {
        "step": state["step"],
        "tokens": round(state["tokens"]),
        "config": shown(yaml.safe_load((papers / "config.yaml").read_text(encoding="utf-8"))),
        "versions": json.loads((papers / "versions.json").read_text(encoding="utf-8")),
        "data": shown(about),
        "figures": _last_figures(folder.parent / "metrics.jsonl", state["step"]),
    }
    write_json(folder / "training.json", record, sort_keys=True)
    digests, earlier = read_digests(config.data.folder), config.objective.get("start")
    earlier_digests = read_digests(shipped_folder(earlier) or earlier) if earlier else set()
    if digests is not None and earlier_digests is not None:
        write_digests(folder / DIGESTS, digests | earlier_digests)


def _last_figures(path: Path, step: int) -> dict[str, float]:
    """The last reported value of every figure, up to `step`."""
    figures: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        reported = json.loads(line)
        if reported.pop("step") <= step:
            figures |= {name: value for name, value in reported.items() if value is not None}
    return figures


def write_card(folder: Path) -> None:
    """Write `README.md` of a drafter folder, whole or not at all. Raises ValueError for files that cannot be read."""
    try:
        text = card(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"the card of {folder} cannot be written ({type(error).__name__}: {error}); train or evaluate again"
        ) from error
    with whole(folder / "README.md") as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def card(folder: Path) -> str:
    """The card's text, Markdown with a YAML header."""
    config, training = _read(folder / "config.json"), _read(folder / "training.json")
    acceptance, digests = _read(folder / "acceptance.json"), read_digests(folder)
    base = config.get("paceline_target") or {"name": "unknown", "fingerprint": "unknown"}
    name = folder.name
    if training and (name in ("best", "latest") or name.startswith("step-")):
        name = Path(training["config"]["run"]["folder"]).name
    header = {"library_name": "paceline", "tags": ["speculative-decoding", "paceline"]}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base["name"]):
        header["base_model"] = base["name"]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": escaped, "fenced": fenced, "yaml": _yaml}
    template = resources.files("paceline.training").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        header=header, name=name, base=base, config=config, training=training, acceptance=acceptance,
        weights=_weights(folder), prompts=None if digests is None else len(digests), python=_python(name, base["name"]),
        shell=f"paceline generate --model {json.dumps(base['name'])} --drafter {json.dumps(name)} --chat 'Hello'",
        accuracy=_accuracy(acceptance), sizes=_sizes(config),
    )  # fmt: skip


def _read(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _weights(folder: Path) -> dict[str, float]:
    """How many numbers the weights' file holds (from its header) and its size."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return {"count": count, "megabytes": file.stat().st_size / 1e6}


def _sizes(config: dict) -> dict:
    """The settings that say how large the network is, of heads, draft models and the layers of EAGLE."""
    config = {**config, **config.get("layer", {})}
    names = ("mode", "heads", "blocks", "rank", "known_tokens", "hidden_size", "num_hidden_layers")
    names += ("intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {name.replace("_", " "): config[name] for name in names if config.get(name) is not None}


def _accuracy(acceptance: dict) -> list[dict]:
    """For each depth: p of the first three ranks, and the number of labels it was counted on."""
    counts = acceptance.get("counts")
    if not counts:
        return []
    judged = Acceptance(counts["hits"], counts["trials"])
    return [
        {"p": p[:3], "trials": trials[0]} for p, trials in zip(acceptance["p"], judged.trials) if trials and trials[0]
    ]


def _python(name: str, base: str) -> str:
    return (
        "import paceline\n\n"
        f"model, tokenizer = paceline.load_target({json.dumps(base)})\n"
        f"drafter = paceline.load_drafter({json.dumps(name)}, model)  # this folder\n"
        'inputs = tokenizer("Hello", return_tensors="pt")\n'
        "out = paceline.generate(model, **inputs, drafter=drafter, max_new_tokens=64)\n"
        "print(tokenizer.decode(out[0]))"
    )


def escaped(value) -> str:
    """`value` as one line of text, with Markdown's special characters escaped."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", text)


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _yaml(value) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
