"""The command line: `paceline demo | generate | plan | train ...`. A command loads when it runs.

A user's error ends in one line on stderr and exit code 2, Ctrl-C in exit code 130.
"""

import io
import os
import sys
import time
import warnings
from importlib import import_module

from .catalogue import COMMANDS, make_parser
from .outputs import check_files


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (args.command != "train" or any(item.startswith("-") for item in rest)):
        parser.prog = f"paceline {args.command}" if args.command else parser.prog
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help(sys.stderr)
        print("\npaceline: a COMMAND is required, for instance paceline demo", file=sys.stderr)
        return 2
    if rest:  # argparse takes no more overrides once it has seen an option
        args.overrides += rest
    args.started = started  # importing torch is part of what a person waits for
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that a terminal lacks must not end a command
    with warnings.catch_warnings():
        if not args.debug:
            _hush()
        return _run(args)


def _run(args) -> int:
    """The command, and its exit code."""
    try:
        check_files(vars(args).values())
        command = getattr(import_module(COMMANDS[args.command].module, __package__), args.command)
        return command(args) or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"paceline: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _hush() -> None:
    """Keep the warnings and bars of other packages out of the way of our own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _show_paceline_warning


def _show_paceline_warning(message: Warning | str, category: type[Warning], *location: object, **more: object) -> None:
    """Instead of `warnings.showwarning`."""
    if category.__module__.partition(".")[0] == __name__.partition(".")[0]:
        print(f"paceline: {message}", file=sys.stderr)
