"""How a program talks: to a person at a terminal, into a file that is read later, or only of what is wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LOGGER = "capdist"
# Variables with which libraries draw no bars; they must be set before the libraries are loaded.
_NO_BARS = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def on_terminal() -> bool:
    """Return whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_quiet() -> bool:
    """Return whether this process says only what is wrong: the user wants it so, or another process speaks."""
    return logging.getLogger(_LOGGER).level > logging.INFO


def shows_bars() -> bool:
    """Return whether this process draws bars for work that takes long."""
    return on_terminal() and not is_quiet()


def set_up_output(*, quiet: bool = False) -> None:
    """Send log lines of capdist, and warnings of libraries, to standard error; off a terminal with date and time.

    Call it before libraries are loaded, so that these draw no bars where there should be none. `build_accelerator`
    silences all processes but the main one.

    Args:
        quiet: Whether to say only what is wrong: warnings and errors, no progress and no results.
    """
    stamp = "" if on_terminal() else "%(asctime)s "
    logging.basicConfig(format=f"{stamp}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger(_LOGGER).setLevel(logging.WARNING if quiet else logging.INFO)
    if not shows_bars():
        for name, value in _NO_BARS.items():
            os.environ.setdefault(name, value)
    if quiet:
        os.environ.setdefault("WANDB_SILENT", "true")


def name_signal(number: int) -> str:
    """Return a signal as messages name it, such as `Ctrl-C (signal 2)`."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"{name} (signal {int(number)})"


def results(*, always: bool = False) -> Console:
    """Return where results are printed: standard output, or nowhere in a quiet process.

    Args:
        always: Whether a quiet process prints too, as it does what is wrong.
    """
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, quiet=is_quiet() and not always)
