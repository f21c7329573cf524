"""`paceline data generate` with a tiny target, its prompts, what it wrote, and documents made of records."""

import json

from paceline.spec import cli
from paceline.spec.data.content import Unfit
from paceline.spec.data.forms import record
from paceline.training.data.documents import Reader

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a{% endif %}"

ENDS = [2, *range(30, 37)]  # so many that some answers end early


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write(path, entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return str(path)


def generate(folder, *arguments):
    options = ["--model", folder, "--max-new-tokens", "9", "--batch", "3", "--executor", "eager"]
    return cli.main(["data", "generate", *options, *map(str, arguments)])


PROMPTS = [
    {"prompt": "ABC"},
    {"turns": ["DEF", "GH"]},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "KLM"}], "source": "other"},
    {"messages": [{"role": "user", "content": "X"}, {"role": "assistant", "content": "no"}]},
]


# Documents.

PLAIN = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>Z{% endfor %}"
PLAIN += "{% if add_generation_prompt %}a{% endif %}"
END = frozenset([2])


def talk(*contents, **more):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)], **more}


def read(tokenizer, *entries, ends=END, **limits):
    """The documents of entries in their order, and in place of those that make none, why."""
    made = {}
    for number, entry in enumerate(entries):
        try:
            made[number] = record(entry, number, f"line {number}", {})
        except Unfit as error:
            made[number] = [error]
    records = [one for one in made.values() if not isinstance(one, list)]
    for one, documents in Reader(tokenizer, ends, **limits).documents(records):
        made[one.number] = [documents] if isinstance(documents, Unfit) else documents
    return [document for number in sorted(made) for document in made[number]]


def learnt(tokenizer, document):
    """The text that the loss is on."""
    return tokenizer.decode([token for token, counts in zip(document.tokens, document.loss) if counts])


def learnt_parts(tokenizer, document):
    """The same in its parts, one for each answer."""
    parts, before = [], 0
    for token, counts in zip(document.tokens, document.loss):
        if counts and not before:
            parts.append([])
        if counts:
            parts[-1].append(token)
        before = counts
    return [tokenizer.decode(part) for part in parts]
