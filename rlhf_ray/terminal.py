"""What every command does alike: print, and end with a message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rlhf_ray.errors import Interrupted, RlhfRayError, UserError

DEBUG = "RLHF_RAY_DEBUG"
WIDTH = 120
"""Columns of what is not printed to a terminal."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns every way in which a command can end into its message and exit code."""
    try:
        yield
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as error:
        _fail(str(error), error.exit_code)
    except RlhfRayError as error:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`rlhf-ray settings | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception:
        traceback.print_exc()
        _fail("an unexpected error; please report it with the lines above", 1)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM unwinds the process like Ctrl-C does, with exit code 143; the run itself may take the signal over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def show(what: Any) -> None:
    """Prints a text, or anything that rich can show, as it is; wide enough for tables where nobody sees the edge."""
    from rich.console import Console

    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH).print(what)


def say(text: str) -> None:
    """Prints what is not the command's result: a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Passes on output that has its own line ends."""
    sys.stdout.write(text)
    sys.stdout.flush()
