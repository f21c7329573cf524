"""Building our kernels where something is in the way, with compilers that are shell scripts."""

import shutil

import pytest
from paceline.spec.kernels import native

GOOD = """#!/bin/sh
for word; do [ "$last" = -o ] && to=$word; last=$word; done
case "$*" in
*-shared*) echo 'extern "C" int panel_outputs() { return 5; }' | GXX -shared -fPIC -x c++ -o "$to" - ;;
*) touch "$to" ;;
esac
"""
FAILS = """#!/bin/sh
for word; do [ "$last" = -o ] && to=$word; last=$word; done
case "$*" in
*linears.cpp*) touch "$to"; echo "linears.cpp:1: error: no space left" >&2; exit 1 ;;
esac
"""
KILLED = '#!/bin/sh\ncase "$*" in *linears.cpp*) kill -9 $$ ;; esac\n'


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A function that builds with a script as g++, and perhaps another as clang++."""
    monkeypatch.setattr(native, "level", lambda: "avx2")
    monkeypatch.delenv("CXX", raising=False)
    gxx = shutil.which("g++")

    def build(script, other=None, cache=tmp_path / "cache"):
        paths = {}
        for name, text in {"g++": script, "clang++": other}.items():
            if text is not None:
                path = tmp_path / name
                path.write_text(text.replace("GXX", str(gxx)))
                path.chmod(0o755)
                paths[name] = str(path)
        monkeypatch.setattr(native.shutil, "which", paths.get)
        monkeypatch.setattr(native, "cache_folder", lambda: cache)
        return native._library_file.__wrapped__()

    return build


def test_it_is_built_once(build, tmp_path, capsys):
    assert build(GOOD).panel_outputs() == 5
    assert build(FAILS).panel_outputs() == 5, "what is there is not compiled again"
    assert capsys.readouterr().err.count("compiling our own kernels, once ...") == 1
    assert [path.suffix for path in (tmp_path / "cache/native").iterdir()] == [".so"]


@pytest.mark.parametrize("script, reason", [(FAILS, "linears.cpp:1: error: no space left"), (KILLED, "SIGKILL")])
def test_a_compiler_that_fails_half_way_leaves_a_line_and_no_file(build, tmp_path, capsys, script, reason):
    assert build(script) is None
    waiting, said = capsys.readouterr().err.splitlines()
    assert waiting == "compiling our own kernels, once ... failed"
    assert said.startswith("our own kernels are not used, torch's are (") and reason in said
    assert not list((tmp_path / "cache/native").iterdir())


def test_another_compiler_is_tried(build, capsys):
    assert build(FAILS, GOOD).panel_outputs() == 5
    assert "torch's are" not in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_written_is_no_hindrance(build, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert build(GOOD, cache=tmp_path / "file").panel_outputs() == 5
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("our own kernels are compiled anew each time, because") and "PACELINE_CACHE" in first
