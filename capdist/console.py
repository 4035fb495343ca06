"""How a program talks: to a person at a terminal, into a file that is read later, or hardly at all."""

from __future__ import annotations

import logging
import os
import sys

_logger = logging.getLogger("capdist")
_level = logging.INFO


def on_terminal() -> bool:
    """Return whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_quiet() -> bool:
    """Return whether only warnings and errors are wanted."""
    return _level > logging.INFO


def set_up_logging(*, quiet: bool = False) -> None:
    """Send log lines of capdist, and warnings of libraries, to standard error; off a terminal with date and time.

    Args:
        quiet: Whether to leave out progress and everything else that is no warning or error.
    """
    global _level
    _level = logging.WARNING if quiet else logging.INFO
    stamp = "" if on_terminal() else "%(asctime)s "
    logging.basicConfig(format=f"{stamp}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    _logger.setLevel(_level)


def speak(is_main: bool) -> None:
    """Let the main process say what it has to say, and the others only what is an error."""
    _logger.setLevel(_level if is_main else logging.ERROR)
