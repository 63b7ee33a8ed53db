"""What the examples share as programs: checked options, Ctrl-C, and one clear line at the end.

A program ends with status 0; 1, it has failed; 2, options or files do not fit and nothing was
begun; or 130, Ctrl-C. Only Python's own modules are imported here, so that ``--help`` and bad
options are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


class RefusedError(Exception):
    """Options or files do not fit: the message says what to do."""


class FailedError(Exception):
    """The run cannot go on: the message says why, and what there is."""


class Parser(argparse.ArgumentParser):
    """Argparse's, with the line that says what is wrong alone in place of below all options."""

    def __init__(self, description: str | None) -> None:
        first, _, rest = (description or "").partition("\n\n")
        super().__init__(
            description=first, epilog=rest, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {message} (--help describes the options)\n")


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0: give 0 or more")
    return value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0: give 1 or more")
    return value


def rate(text: str) -> float:
    if not (math.isfinite(value := float(text)) and value > 0):
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share, from 0 to less than 1")
    return value


def existing_file(name: str) -> Path:
    if Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder: name a file")
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}: check the path")
    return Path(name)


def existing_folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {name}: check the path")
    return Path(name)


def new_or_own_folder(name: str) -> Path:
    """A folder to write to, or a path at which one can be made."""
    nearest = Path(name).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is a file: name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{nearest} may not be written to: name another folder")
    return Path(name)


class StopRequest:
    """Makes of the first Ctrl-C a wish to stop after this step; the second one ends the program.

    That is as good as ``kill -9``, which checkpoints withstand: what was saved before stays.
    """

    def __init__(self, go_on: str) -> None:
        self.made, self._go_on = False, go_on

    def __enter__(self) -> StopRequest:
        self._usual = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        # Not by print: it may be in the middle of a line.
        if self.made:
            text = f"\nEnded at once. To go on from the last save:\n  {self._go_on}\n"
            os.write(2, text.encode())
            os._exit(INTERRUPTED)
        self.made = True
        os.write(2, b"\nStopping after this step, and saving. Ctrl-C again ends at once.\n")

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._usual)


def command(program: str, argv: Sequence[str]) -> str:
    """Returns the shell's command that runs a program."""
    here = Path.cwd()
    words = [
        str(path.relative_to(here) if path.is_relative_to(here) else path)
        for path in (Path(sys.executable), Path(program).absolute())
    ]
    return shlex.join([*words, *argv])


@contextlib.contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Takes errors for what they are where options and files are looked at: `RefusedError`."""
    try:
        yield
    except errors as error:
        raise RefusedError(str(error)) from error


def run(body: Callable[[], int], go_on: str) -> int:
    """Returns the status to end with, once it has been said, after all else, why.

    Args:
      body: returns a status; `INTERRUPTED` if it has stopped, and saved, because of Ctrl-C.
      go_on: the command with which to go on after Ctrl-C; "" if that is said elsewhere.
    """
    try:
        status = body()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (RefusedError, FailedError, OSError) as error:
        message = " ".join(str(error).split())
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        return REFUSED if isinstance(error, RefusedError) else FAILED
    if status == INTERRUPTED and go_on:
        print(f"\nInterrupted. To go on:\n  {go_on}", flush=True)
    return status


def leave(status: int) -> NoReturn:
    """Ends the program; a late Ctrl-C no longer matters."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


def start(description: str | None, argv: Sequence[str] | None = None) -> None:
    """Prepares a program without options that keeps nothing: ``--help``, and Ctrl-C."""
    Parser(description).parse_args(argv)

    def end(number: int, frame: Any) -> NoReturn:
        os.write(2, b"\nInterrupted; nothing is kept: the same command begins anew.\n")
        raise SystemExit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
