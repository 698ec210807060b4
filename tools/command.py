"""The common part of the tools' command lines: how they refuse bad input, print, and stop."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import ranks

__all__ = ["SEED", "CommandLine", "number", "raise_interrupt", "run", "sentence", "show"]

BAD_INPUT = 2  # exit status, as argparse has it
STOPPED = 130  # as a shell reports Ctrl-C


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that refuses in one line on stderr, without the usage, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Refuses input that argparse itself cannot parse."""
        self.refuse(f"{message}; {self.prog} --help lists the options")

    def refuse(self, message: object) -> NoReturn:
        if ranks.RANK:  # rank 0 says it
            self.exit(BAD_INPUT)
        self.exit(BAD_INPUT, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def number(kind: type, low: float, what: str, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number from ``low`` up to but not including ``high``, called ``what``."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


SEED = number(int, 0, "a whole number of 0 or more, below 2^63", high=2**63)


def sentence(error: BaseException) -> str:
    """The first line of ``error``. Below it, torch writes tracebacks of C++, and torch.fx the graph."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def show(text: str) -> None:
    """Prints ``text`` whole. Exits quietly if its reader, such as head, has gone, and with one line on a full disk."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again as it exits
        if not isinstance(error, BrokenPipeError):
            print(f"{_program()}: error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def run(main: Callable[[], object]) -> None:
    """Calls a tool's ``main``; Ctrl-C ends it in one line, with status 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except KeyboardInterrupt:
        print(f"{_program()}: stopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None


_interrupts: list[int] = []  # the signals of Ctrl-C, so far


def _interrupt(number: int, frame: object) -> NoReturn:
    _interrupts.append(number)
    raise KeyboardInterrupt


def raise_interrupt() -> None:
    """Raises KeyboardInterrupt if there was a Ctrl-C and it was lost: PyTorch's guards swallow each exception."""
    if _interrupts:
        raise KeyboardInterrupt


def _program() -> str:
    return Path(sys.argv[0]).name
