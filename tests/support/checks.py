"""`paceline check` of a tiny model, and its parts by name."""

import json

from paceline.spec import cli


def run(folder, tmp_path, *options):
    """Exit code and JSON of a check of the tiny model with eager steps."""
    output = tmp_path / "check.json"
    line = ["check", "--model", str(folder), "--executors", "eager", "--device", "cpu", "--budget", "300"]
    return cli.main([*line, "-o", str(output), *options]), json.loads(output.read_text())


def parts(check):
    return {part["name"]: part for part in check["parts"]}
