"""The parser of one command: help with an example at its end, errors in one sentence."""

import argparse
from collections.abc import Callable
from typing import Any

from .outputs import Input, Output


class Parser(argparse.ArgumentParser):
    """Ends a wrong call with one sentence and exit code 2."""

    def reads(self, *names: str, kind: type[Input] = Input, **options: Any) -> None:
        """Add an option that names what is read."""
        self.add_argument(*names, type=kind, **options)

    def writes(self, *names: str, kind: type[Output] = Output, **options: Any) -> None:
        """Add an option that names what is written."""
        self.add_argument(*names, type=kind, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what it takes\n")


def add_command(commands, name: str, about: str, options: Callable[[Parser], None], example: str) -> None:
    """A command (or a step of one) beneath `commands`; `about` begins small and has no full stop."""
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options(parser)
