"""The ``poise`` command: list, info, cite, run, verify, report, doctor.

Exit codes: 0 fine; 1 a claim was refuted; 2 bad usage or bad input; 3 a run failed, its state is kept.
With ``--json`` stdout carries one JSON value on its last line and nothing else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from poise.core.lab.errors import BadInput, RunFailed


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"poise: {message} (see `{self.prog} --help`)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is returned."""
    options = _parser().parse_args(arguments)
    from poise.core.lab import commands

    try:
        return getattr(commands, f"{options.command}_command")(options)
    except BadInput as error:
        return _fail(2, error)
    except RunFailed as error:
        return _fail(3, error)
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        sys.stderr.close()
        return 0


def _fail(code: int, error: Exception) -> int:
    print(f"poise: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="poise", description="Regularization as published, ready for your own training loop.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    def command(name: str, text: str, json: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if json:
            sub.add_argument("--json", action="store_true", help="print one JSON value as the last line of stdout")
        return sub

    sub = command("list", "every installed method")
    sub.add_argument("--package", metavar="P", help="only the methods of this package")

    sub = command("info", "what a method is, how to use it, what it claims and what was verified")
    sub.add_argument("method", metavar="P/METHOD")

    sub = command("cite", "BibTeX of methods", json=False)
    sub.add_argument("methods", metavar="P/METHOD", nargs="+")

    sub = command("run", "run a method's experiment under one seed")
    sub.add_argument("method", metavar="P/METHOD")
    sub.add_argument(
        "--arm", metavar="A", nargs="+", action="extend", default=[], help="only these arms (default: all)"
    )
    sub.add_argument("--seed", type=_natural, default=0, metavar="N")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: a new one below runs/)")
    sub.add_argument(
        "--resume", action="store_true", help="go on with the run in --out (default: the newest of these settings)"
    )
    sub.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change settings of the preset"
    )
    sub.add_argument(
        "--tracker", metavar="NAME", action="append", help="accelerate's trackers (default: tensorboard; none for none)"
    )
    _shared(sub)

    sub = command("verify", "put the claims of methods to the test over seeds")
    sub.add_argument("methods", metavar="P/METHOD", nargs="*")
    sub.add_argument("--all", action="store_true", help="every installed method")
    sub.add_argument("--package", metavar="P", help="every method of this package")
    sub.add_argument("--seeds", type=_positive, default=5, metavar="N", help="seeds 0..N-1 (default: 5)")
    sub.add_argument("--jobs", type=_positive, metavar="N", help="processes at a time (default: one per core)")
    sub.add_argument("--engine", choices=["local", "ray"], default="local")
    sub.add_argument("--root", type=Path, default=Path("runs/verify"), metavar="DIR", help="where runs are kept")
    sub.add_argument(
        "--results", type=Path, metavar="DIR", help="where verdicts go (default: docs/results of the workspace)"
    )
    _shared(sub)

    sub = command("report", "write a self-contained HTML page about runs")
    sub.add_argument("runs", type=Path, metavar="RUN_DIR", nargs="+")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")

    command("doctor", "what works on this machine and what is missing")
    return parser


def _shared(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--preset", default="quick", metavar="NAME", help="quick (embedded data, default), paper, or another one"
    )
    sub.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    sub.add_argument("--data", type=Path, metavar="DIR", help="a published data set, for presets that read one")


def _natural(text: str) -> int:
    return _at_least(0, text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
