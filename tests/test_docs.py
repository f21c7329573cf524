"""The pages say what is true: links lead somewhere, Python runs, commands parse, and what has a name is described.

Pages are README.md, CONTRIBUTING.md, CHANGELOG.md and docs/*.md. The Python blocks of a page run in order in one
namespace, on a tiny model that stands in the cache folder under SmolLM2's name. A block that cannot run here has
`<!-- not run: REASON -->` on the line before it; one with `<!-- file: NAME -->` is written there, to be imported.
"""

import dataclasses
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import paceline
import pytest
import torch
from paceline.drafters import shipped
from paceline.drafters.kinds import KINDS
from paceline.spec import cli, metrics, patch
from paceline.spec.bench.methods import parse_methods
from paceline.spec.check.shapes import SHAPES
from paceline.spec.engines import executors, runs
from paceline.spec.kernels import native
from paceline.spec.proposal import DrafterTraits
from paceline.spec.tree import TreeShape
from paceline.spec.verify import RULES
from paceline.training import config as configuration
from paceline.training.objectives.losses import NAMES as LOSSES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.blocks import write_tiny
from support.models import fitted_heads, noisy_copy, tiny_llama
from support.pages import PAGES, ROOT, anchors, blocks, commands, prose, words_of
from support.tape import tape_executor

COMMANDS = (
    "demo", "generate", "serve", "plan", "profile", "check", "bench", "report", "compare", "data generate",
    "data prepare", "train", "evaluate", "export", "push", "quantise", "convert", "drafters", "models",
)  # fmt: skip
OTHERS = {"--no-deps", "--debug", "--help", "--version"}  # options that are not of one command


# Links.


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page}: {target} is not there"
        if anchor:
            assert anchor in anchors(place.resolve().relative_to(ROOT)), f"{page}: {target} names no heading"


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text()))
    assert set(PAGES) - {"README.md"} <= linked


def test_the_readme_is_short_and_has_the_lines_of_ci():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert lines.count("    pip install -c constraints.txt -e . && paceline demo") == 1
    assert lines.count("    pip install -c constraints.txt -e '.[test]' && pytest") == 1


# Python.


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A cache folder with a tiny model under SmolLM2's name, and shipped drafters for it."""
    cache, pretrained = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("pretrained")
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    model = tiny_llama(vocab=len(vocab), max_position_embeddings=512)
    model.save_pretrained(cache / "smollm2-135m")
    tokenizer.save_pretrained(cache / "smollm2-135m")
    write_tiny(cache / "smollm2-135m" / "model.gguf")
    for name, mode in (("smollm2-135m-medusa", "independent"), ("smollm2-135m-hydra", "hydra")):
        fitted_heads(model, mode).save(pretrained / name)
        (pretrained / name / "acceptance.json").write_text(json.dumps({"measured": {"tokens_per_step": 1.5}}))
    noisy_copy(model).save_pretrained(pretrained / "smollm2-135m-draft")
    return cache, pretrained


@pytest.fixture
def desk(stand_ins, tmp_path, monkeypatch, one_thread):
    """An empty working folder that Python imports from; what a page changes is put back."""
    cache, pretrained = stand_ins
    kinds, loaded = dict(KINDS), set(sys.modules)
    native.prepare()  # from the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(cache))
    monkeypatch.setattr(shipped, "PRETRAINED", pretrained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    KINDS.clear()
    KINDS.update(kinds)
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_python(page, desk):
    """Run the Python blocks of a page; the namespace that they leave."""
    namespace = {"__name__": Path(page).stem}
    for block in blocks(page):
        if block.language != "python" or block.note.startswith("<!-- not run:"):
            continue
        if file := re.fullmatch(r"<!-- file: ([\w.]+) -->", block.note):
            (desk / file[1]).write_text(block.text)
            continue
        code = "\n" * (block.line - 1) + block.text  # so that an error names the page's own line
        exec(compile(code, str(ROOT / page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))])
def test_python_runs(page, desk, capsys):
    assert run_python(page, desk).keys() > {"__name__"}


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page):
    notes = [block.note for block in blocks(page) if block.note]
    for note in notes:
        assert re.fullmatch(r"<!-- (not run: .{10,}|file: [\w.]+) -->", note), f"{page}: {note}"
    assert len(re.findall("^<!-- (?:not run|file)", (ROOT / page).read_text(), re.M)) == len(notes), "each by a block"
    assert all(block.language for block in blocks(page)), f"{page}: a block names no language"


@pytest.mark.parametrize("sampled", [False, True])
def test_the_toy_drafter_keeps_the_contract(desk, ragged, monkeypatch, sampled):
    """Its text is plain decoding's in a ragged batch, and a step of it waits for nothing on the host."""
    page = "docs/add-a-drafter.md"
    (file,) = [block for block in blocks(page) if "successor.py" in block.note]
    (desk / "successor.py").write_text(file.text)
    assert len(file.text.splitlines()) <= 60
    from successor import Successor

    model, options = tiny_llama(), dict(max_new_tokens=24, do_sample=sampled, seed=3, return_dict_in_generate=True)
    plain = paceline.generate(model, *ragged, **options)
    for tree in (None, "chain:4", "3x2x1", "1"):
        drafted = paceline.generate(model, *ragged, drafter=Successor(), tree=tree, **options)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert sampled or drafted.trace.summary()["num_accepted_draft_tokens"] > 0
    with tape_executor(monkeypatch) as tapes:
        replayed = paceline.generate(model, *ragged, drafter=Successor(), executor="tape", **options)
    assert torch.equal(plain.sequences, replayed.sequences)
    assert tapes[0].replays > 3 and not tapes[0].tape.offences
    runs.reset(model)


# Commands.


def parsed(words, monkeypatch):
    """What the real parser makes of the words behind `paceline`."""
    seen = []

    class Module:
        def __getattr__(self, name):
            return seen.append

    monkeypatch.setattr(sys.modules["paceline.spec.cli.main"], "import_module", lambda *names: Module())
    assert cli.main(words) == 0
    return seen[0]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch, capsys):
    for words in commands(page):
        if words[0] == "accelerate":
            words = words[words.index("paceline.spec.cli") :]
        elif words[0] != "paceline":
            continue
        try:
            args = parsed(words[1:], monkeypatch)
        except SystemExit:
            pytest.fail(f"{page}: {shlex.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
        check_values(args)


def check_values(args):
    """What the parser leaves to the commands."""
    given = SimpleNamespace(**{"tree": None, "verify": "match", "drafter": "ngram", "methods": [], **vars(args)})
    if given.tree not in (None, "auto") and not given.tree.endswith(".json"):
        TreeShape.parse(given.tree)
    assert given.verify in RULES
    for name in given.drafter.split("+"):
        assert not name.startswith("smollm2-135m-") or name in shipped.NAMES
    if given.methods:
        assert parse_methods(given.methods, given.executor, given.temperature)
    if given.command == "check":
        assert given.shape in SHAPES
    if given.command == "train" and not given.config.endswith(".yaml"):
        configuration.load(given.config, given.overrides)


@pytest.fixture(scope="module")
def helps():
    """What each command says of itself."""
    found = {}
    for name in COMMANDS:
        with pytest.MonkeyPatch.context() as patched:
            lines = []
            patched.setattr(sys, "stdout", SimpleNamespace(write=lines.append, flush=lambda: None))
            with pytest.raises(SystemExit) as ended:
                cli.main([*name.split(), "--help"])
            assert ended.value.code == 0
        found[name] = "".join(lines)
    return found


def test_every_command_and_option_that_is_named_is_there(helps):
    options = set(re.findall(r"--[a-z][\w-]*", " ".join(helps.values()))) | OTHERS
    for page in PAGES:
        for word in words_of(page):
            if named := re.match(r"paceline ([a-z]+)", word):
                assert any(command.split()[0] == named[1] for command in COMMANDS), f"{page}: {word}"
            if not word.startswith(("pip ", "pytest ", "accelerate ")):
                assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", word)) <= options, f"{page}: {word}"


def test_quick_commands_run(desk, capsys):
    for command, said in (("models", "smollm2-135m"), ("drafters", "smollm2-135m-hydra")):
        assert any(["paceline", command] in list(commands(page)) for page in PAGES)
        assert cli.main([command]) == 0
        assert said in capsys.readouterr().out


# What has a name is described where a reader looks for it.


def described():
    """(page, names that have to stand there in backquotes)"""
    arguments = [name for name, own in inspect.signature(paceline.generate).parameters.items() if own.kind == 3]
    own = set(arguments) - {"streamer", "tokenizer"}  # as in transformers
    yield "docs/generate.md", {f"{name}=" for name in own}
    yield "docs/generate.md", {*patch.SETTINGS} | {f'"{name}"' for name in executors.executor_names()}
    yield "docs/lossless.md", {f'"{name}"' for name in RULES}
    yield "docs/bench.md", {re.sub(r"\W.*", "", name) for name in metrics.summary([])}
    yield "docs/add-a-drafter.md", {field.name for field in dataclasses.fields(DrafterTraits)} - {"parts"}
    kinds = (configuration.Target, configuration.Data, configuration.Budget, configuration.Optimisation)
    yield "docs/train.md", {field.name for kind in (*kinds, configuration.Run) for field in dataclasses.fields(kind)}
    yield "docs/train.md", {*shipped.NAMES, *LOSSES}
    yield "docs/gpu.md", {*SHAPES}


@pytest.mark.parametrize("page, names", list(described()))
def test_what_has_a_name_is_described(page, names):
    words = " ".join(words_of(page))
    missing = {name for name in names if not re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", words)}
    assert not missing, f"{page} does not name {', '.join(sorted(missing))}"
