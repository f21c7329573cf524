"""Files on this machine: the cache folder, whether a file can be written, and writing whole or not at all."""

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """`$PACELINE_CACHE`, or `paceline` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PACELINE_CACHE") or Path(base) / "paceline")


def check_writable(path: str | Path, appended: bool = False, make_folders: bool = False) -> None:
    """Raise ValueError where a file cannot be written at `path`: whole, or where `appended` at its end. With
    `make_folders` those above may be missing. It is tried, and nothing is left there."""
    path = Path(path)
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.exists() and (appended or not (path.is_file() or path.is_dir())):
            return
        target = path.resolve()
        while make_folders and not target.parent.exists():
            target = target.parent
        _try_to_make(target if appended else _unfinished(target))
    except OSError as error:
        raise _not_written(path, error) from error


def _try_to_make(path: Path) -> None:
    try:
        open(path, "xb").close()
    except FileExistsError:  # left by a kill, or in use
        return
    path.unlink()


def _not_written(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written ({error.strerror or error}); choose another place")


@contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """The folders above `path` are there in the block. Those that were made for it go where it ends in an error. Raises
    ValueError where they cannot be made."""
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_written(path, error) from error
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it was not made, or another process uses it by now
                folder.rmdir()
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there replaces `path` when the block ends.

    After an error the old file is unchanged; after a kill it is either the old one or the complete new one, because the
    new file is synced to disk before it is renamed. It takes the permissions of the old one."""
    path = Path(path)
    beside = _unfinished(path)
    try:
        yield beside
        if path.is_file():
            shutil.copymode(path, beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def lock(file: IO | int, wait: bool = False) -> bool:
    """Keep other processes from an open file or folder until it is closed. False where another has it, unless that is
    to be waited for. Where the system, or the file system, has no locks, nobody is kept from it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_json(path: str | Path, value: dict, sort_keys: bool = False) -> None:
    """Write a JSON file by `whole`."""
    with whole(path) as beside:
        beside.write_text(json.dumps(value, indent=1, sort_keys=sort_keys) + "\n", encoding="utf-8")


def write_output(path: str | Path, text: str) -> None:
    """Write `text` to an output as a user names it: "-" is standard output, a pipe or a device is written to, and a
    file is written by `whole`, where a link leads to. Raises ValueError where that fails."""
    if str(path) == "-":
        sys.stdout.write(text)
        return
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        with whole(path.resolve()) as beside:
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise _not_written(path, error) from error


def check_absent(folder: str | Path) -> None:
    """Raise ValueError where there is a `folder` that is to be made."""
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already; remove it or give another folder")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends; an error or Ctrl-C leaves
    nothing. Raises ValueError where `path` exists or cannot be made."""
    path = Path(path)
    check_absent(path)
    with folders_above(path):
        try:
            work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        except OSError as error:
            raise _not_written(path, error) from error
        try:
            yield work
            work.chmod(0o755)  # as a folder is made usually; a temporary one is closed to others
            os.replace(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
