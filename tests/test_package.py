"""The package as installed: names, layout, quick help, no import that pulls torch."""

import subprocess
import sys
import tomllib

import paceline
import pytest


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_the_package_list_is_the_tree(root):
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"paceline"} | {f"paceline.{path.parent.name}" for path in root.glob("[a-z]*/__init__.py")}
    assert set(settings["packages"]) == folders
    assert not [path for name in ("spec", "drafters", "training") for path in (root / name).glob("*/*.py")], "flat"


def test_public_names_load_on_first_use():
    for name in paceline.__all__:
        assert getattr(paceline, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = paceline.nothing_like_this


def test_importing_and_helping_do_not_load_torch(tmp_path):
    code = "import sys, paceline, paceline.spec.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    done = run("-c", code + "assert 'torch' not in sys.modules and 'transformers' not in sys.modules", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "demo" in done.stdout


def test_dependencies_point_one_way(root):
    """`spec` knows neither drafters nor training (but for names loaded when called), `drafters` not training."""
    for path in root.glob("spec/*.py"):
        assert "from ..drafters" not in path.read_text() and "from ..training" not in path.read_text(), path
    for path in root.glob("drafters/*.py"):
        assert "..training" not in path.read_text(), path


def test_the_tree_is_tidy(root):
    done = run("-m", "ruff", "check", str(root))
    assert done.returncode == 0, done.stdout
