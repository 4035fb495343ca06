"""`capdist train`: a parent that starts `accelerate launch` and hands on the real exit code.

Launchers turn every failure into 1 and add a traceback of their own. The training processes leave their code and what
they have to say in a folder instead, and the parent says it once, last.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from capdist.errors import EXIT_FOLDER_VARIABLE, CapdistError, ProcessError, Stopped

PLACE_FILE = "accelerate_config.yaml"
_PLACE_OPTIONS = (
    "--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port",
    "--mixed_precision", "--gpu_ids",
)  # fmt: skip
_PLACE_FLAGS = ("--cpu", "--multi_gpu")


def launch_training(arguments: Sequence[str]) -> int:
    """Train under `accelerate launch`.

    Args:
        arguments: Those of `capdist/train.py`; those of `accelerate launch` that say where to train may be among them.

    Returns:
        0, or 1 for a bug whose traceback the training process has printed.

    Raises:
        UsageError: for mistakes in the recipe, before anything is started.
        CapdistError: with what the training processes had to say and their exit code.
    """
    from capdist.recipe_file import load_recipe
    from capdist.train import parse_arguments

    place, what = _split(arguments)
    parsed = parse_arguments(what)
    load_recipe(parsed.config, parsed.overrides)
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, "-m", "capdist.launcher", *_default_place(place), str(script), *what]
    with tempfile.TemporaryDirectory(prefix="capdist_") as folder:
        process = subprocess.Popen(command, env=os.environ | {EXIT_FOLDER_VARIABLE: folder}, start_new_session=True)
        received = _pass_signals_on(process)
        code = process.wait()
        return _outcome(code, Path(folder), received)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that say where to train, and the others."""
    place: list[str] = []
    what: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument in _PLACE_FLAGS or argument.partition("=")[0] in _PLACE_OPTIONS:
            place.append(argument)
            if argument in _PLACE_OPTIONS and waiting:
                place.append(waiting.pop(0))
        else:
            what.append(argument)
    return place, what


def _default_place(place: list[str]) -> list[str]:
    """Add the shipped file where no other is named, and `--multi_gpu`, without which it starts a single process."""
    if any(argument.startswith("--config_file") for argument in place):
        return place
    here = Path(__file__).resolve().parent
    shipped = next(p for p in (here.parent / PLACE_FILE, here / PLACE_FILE) if p.exists())
    several = any("--num_processes" in argument for argument in place) and "--multi_gpu" not in place
    return ["--config_file", str(shipped), *place, *(["--multi_gpu"] if several and not _asks_for_one(place) else [])]


def _asks_for_one(place: list[str]) -> bool:
    words = " ".join(place).replace("=", " ").split()
    return words[words.index("--num_processes") + 1 :][:1] == ["1"]


def _pass_signals_on(process: subprocess.Popen[bytes]) -> list[int]:
    """Send signals to the training processes, past the launcher, which would not let them save a checkpoint.

    Returns:
        The signals that come, in their order.
    """
    import psutil

    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            for child in children or [psutil.Process(process.pid)]:
                child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    return received


def _outcome(launcher_code: int, folder: Path, received: list[int]) -> int:
    ends = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    # When one process fails, the others may die of its absence: the reason is with the one that knew why.
    told = next((end for end in ends if end["code"] != 1), None)
    if told is not None:
        error = CapdistError(*told["mistakes"])
        error.exit_code = told["code"]
        raise error
    if launcher_code and received:
        raise Stopped(received[0], f"stopped by signal {received[0]} before there was anything to save")
    if launcher_code and len(ends) < (ends[0]["processes"] if ends else 1):
        raise ProcessError(
            f"a training process died without a word (launcher code {launcher_code}); most often memory ran out: "
            "lower data.batch_size or data.num_workers"
        )
    return int(launcher_code != 0)


def _launch_quietly() -> int:
    """Be `accelerate launch`, without its traceback: what happened is told by the training processes."""
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except Exception:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_launch_quietly())
