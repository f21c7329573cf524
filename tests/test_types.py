"""Types: mypy finds nothing in the decode core and the drafters, and their parts are named by the contracts."""

import ast
import subprocess
import sys
from importlib.util import find_spec

import pytest

PACKAGES = ("spec", "drafters")
# Parameters whose types are the package's contracts: without an annotation nothing below them would be checked.
PARTS = {
    "drafter", "engine", "executor", "model", "proposal", "request", "sampler", "session", "shape", "state", "target",
    "verdict",
}  # fmt: skip


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed (it comes with the extra 'test')")
def test_mypy_finds_nothing(root, tmp_path):
    (tmp_path / "paceline").symlink_to(root, target_is_directory=True)
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--cache-dir", "cache"]
    packages = [argument for name in PACKAGES for argument in ("-p", f"paceline.{name}")]
    done = subprocess.run([*command, *packages], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_parts_are_annotated(root):
    for path in (path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = sorted(argument.arg for argument in given if argument.annotation is None)
                assert not PARTS.intersection(bare), f"{path.relative_to(root)}: {node.name}({', '.join(bare)})"
