"""Types: in the decode core and the drafters, parts are annotated by the contracts (mypy itself runs in .ci/run)."""

import ast

PACKAGES = ("spec", "drafters")
# Parameters whose types are the package's contracts: without an annotation nothing below them would be checked.
PARTS = {
    "drafter", "engine", "executor", "model", "proposal", "request", "sampler", "session", "shape", "state", "target",
    "verdict",
}  # fmt: skip


def test_parts_are_annotated(root):
    for path in (path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = sorted(argument.arg for argument in given if argument.annotation is None)
                assert not PARTS.intersection(bare), f"{path.relative_to(root)}: {node.name}({', '.join(bare)})"
