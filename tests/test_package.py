"""The package as installed: names, layout, quick help, no import that pulls torch."""

import ast
import subprocess
import sys
import tomllib

import paceline
import pytest


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_the_package_list_is_the_tree(root):
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = [path.parent.relative_to(root).parts for path in root.rglob("__init__.py")]
    folders = {".".join(["paceline", *parts]) for parts in rooms if not parts or parts[0] not in ("tests", "build")}
    assert set(settings["packages"]) == folders
    modules = [path for name in ("spec", "drafters", "training") for path in (root / name).rglob("*.py")]
    assert all((path.parent / "__init__.py").exists() for path in modules), "a folder of modules is a package"


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
    unknown = {"spec": {"drafters", "training"}, "drafters": {"training"}}
    for folder, others in unknown.items():
        for path in (root / folder).rglob("*.py"):
            package = ["paceline", *path.relative_to(root).parts[:-1]]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    base = package[: len(package) - node.level + 1] if node.level else []
                    imported = [*base, *(node.module or "").split(".")]
                elif isinstance(node, ast.Import):
                    imported = node.names[0].name.split(".")
                else:
                    continue
                assert imported[0] != "paceline" or not others & set(imported[1:2]), (path, imported)


def imports(root):
    """{module: the modules of the package that it imports anywhere, but for types only}"""
    files = [path for name in ("spec", "drafters", "training") for path in (root / name).rglob("*.py")]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = {}
    for name, path in names.items():
        tree, package = ast.parse(path.read_text()), list(path.parent.relative_to(root).parts)
        types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        aside = {id(node) for branch in types for node in ast.walk(branch)}
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in aside:
                parts = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
                base = ".".join(parts)
                named = {f"{base}.{alias.name}" for alias in node.names} & names.keys()
                graph[name] |= named or {base} & names.keys()
    return graph


def test_no_module_imports_itself_by_way_of_others(root):
    """Not within a function either."""
    left = {name: others - {name} for name, others in imports(root).items()}
    assert sum(map(len, left.values())) > 300, "the graph has been read"
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle is among {sorted(left)}"


def test_rooms_and_files_are_small(root):
    files = [path for name in ("spec", "drafters", "training", "tests") for path in (root / name).rglob("*.py")]
    rooms = {path.parent for path in files}
    assert not {room: count for room in rooms if (count := sum(path.parent == room for path in files)) > 22}
    assert not {path: count for path in files if (count := len(path.read_text().splitlines())) > 300}
