"""Exit codes, and which error ends with which."""

from __future__ import annotations

import os
import signal
import sys

import click

from ..errors import PipelineFailed, PublishError, SluicewayError, TransportError, Unsupported

OK = 0
GAVE_UP = 1
USAGE = 2
BROKER = 3
INTERRUPTED = 128 + signal.SIGINT
NO_READER = 128 + signal.SIGPIPE


class Fault(click.ClickException):
    """An error that ends the command: one line for the user, and an exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: SluicewayError) -> int:
    """The exit code of an error that reached the command line."""
    if isinstance(error, (PipelineFailed, PublishError)):
        return GAVE_UP
    if isinstance(error, TransportError) and not isinstance(error, Unsupported):
        return BROKER
    return USAGE


def code_of_exit(error: SystemExit) -> int:
    """The exit code of a SystemExit, as Python itself has it; a text goes to standard error."""
    if error.code is None:
        return OK
    if isinstance(error.code, int):
        return error.code
    click.echo(str(error.code), err=True)
    return GAVE_UP


def forget_stdout() -> None:
    """Nobody reads standard output any more: what is still written to it, also at exit, goes nowhere."""
    try:
        stdout = sys.__stdout__.fileno() if sys.__stdout__ is not None else 1
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stdout)
        os.close(null)
    except (OSError, ValueError):  # not a real file: then it has no reader to miss
        return
