"""Logs of a run: always `log.jsonl`, and TensorBoard and wandb if the recipe says so."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from accelerate import Accelerator

from capdist.files import write_atomically
from capdist.recipe.sections import Recipe

LOG = "log.jsonl"
logger = logging.getLogger(__name__)


class Tracking:
    """Logs of a run. Trackers are optional: training goes on when one of them fails.

    Args:
        accelerator: Built with the recipe's trackers; only the main process writes.
        recipe: Gives the trackers, their settings and the run folder.
        step: Steps already taken; lines beyond them, from before a crash, are dropped and written again.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, step: int) -> None:
        self._accelerator = accelerator
        self._is_main = accelerator.is_main_process
        self._path = recipe.run_folder / LOG
        if self._is_main:
            _drop_lines_after(self._path, step)
            if "wandb" in recipe.tracking.with_:
                _choose_wandb_mode()
        self._start_trackers(recipe)

    def _start_trackers(self, recipe: Recipe) -> None:
        flat = {f"{section}.{key}": str(v) for section, keys in recipe.to_dict().items() for key, v in keys.items()}
        wandb = {"name": recipe.run.name, "config": recipe.to_dict(), "dir": str(recipe.run_folder)}
        folder = str(recipe.run_folder)  # the accelerator may have been built with the folder of an earlier stage
        self._accelerator.project_configuration.logging_dir = folder
        self._accelerator.project_configuration.set_directories(folder)
        try:
            self._accelerator.init_trackers(recipe.tracking.project, config=flat, init_kwargs={"wandb": wandb})
        except Exception as error:  # trackers raise their own classes; no such error may end a run
            logger.warning(f"trackers are off: {type(error).__name__}: {error}; {LOG} has everything")
            self._accelerator.trackers = []

    def log(self, values: Mapping[str, Any], step: int, *, group: str | None = None) -> None:
        """Write one line.

        Args:
            values: What to log, by name, in JSON types.
            step: Optimizer steps taken.
            group: Group of panels in the trackers; None writes the line to `log.jsonl` only.
        """
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {
            f"{group}/{n}": v for n, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)
        }
        if group and self._accelerator.trackers:
            try:
                self._accelerator.log(numbers, step=step)
            except Exception as error:  # as above
                logger.warning(f"trackers are off from step {step}: {error}")
                self._accelerator.trackers = []

    def close(self) -> None:
        """Flush and end the trackers, without waiting for other processes, because one may just have failed."""
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as above
                logger.warning(f"a tracker did not end well: {error}")
        self._accelerator.trackers = []


def _drop_lines_after(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _is_until(line, step)]
        write_atomically(path, "".join(kept) if step else "")


def _is_until(line: str, step: int) -> bool:
    """Return whether a line belongs to these steps. Final scores do not, because this start writes its own."""
    try:
        values = json.loads(line)
        return line.endswith("\n") and values["step"] <= step and not values.get("final")
    except (ValueError, KeyError, TypeError):
        return False


def _choose_wandb_mode() -> None:
    """Go offline when wandb would ask for a key or wait for a server, unless the user has chosen a mode."""
    if "WANDB_MODE" in os.environ:
        return
    reason = None
    if not (os.environ.get("WANDB_API_KEY") or _has_netrc_key()):
        reason = "no API key (`wandb login`)"
    elif not _uses_proxy() and not _is_reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        reason = "its server cannot be reached"
    if reason is not None:
        os.environ["WANDB_MODE"] = "offline"
        logger.warning(f"wandb logs offline: {reason}; `wandb sync` sends the run later")


def _uses_proxy() -> bool:
    """Return whether requests go through a proxy; a direct connection then proves nothing."""
    return bool(getproxies().keys() & {"https", "all"})


def _has_netrc_key() -> bool:
    import netrc

    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _is_reachable(url: str, timeout_s: float = 3.0) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s):
            return True
    except (OSError, ValueError):
        return False
