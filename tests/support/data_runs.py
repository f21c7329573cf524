"""`paceline data generate` with a tiny target, its prompts, and what it wrote."""

import json

from paceline.spec import cli

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a{% endif %}"

ENDS = [2, *range(30, 37)]  # so many that some answers end early


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
