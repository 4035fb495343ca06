"""`capdist train`: a parent that starts `accelerate launch` and hands on the real exit code.

Launchers turn every failure into 1 and add a traceback of their own. The training processes leave their code and what
they have to say in a folder instead, and the parent says it once, last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from capdist.errors import EXIT_FOLDER_VARIABLE, CapdistError, ProcessError

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
    from capdist.config import load_recipe
    from capdist.train import parse_arguments

    place, what = _split(arguments)
    parsed = parse_arguments(what)
    load_recipe(parsed.config, parsed.overrides)
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, "-m", "capdist.launcher", *_default_place(place), str(script), *what]
    with tempfile.TemporaryDirectory(prefix="capdist_") as folder:
        process = subprocess.Popen(command, env=os.environ | {EXIT_FOLDER_VARIABLE: folder}, start_new_session=True)
        _pass_signals_on(process)
        code = process.wait()
        return _outcome(code, Path(folder))


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
    shipped = Path(__file__).resolve().parents[1] / "accelerate_config.yaml"
    if any(argument.startswith("--config_file") for argument in place) or not shipped.exists():
        return place
    return ["--config_file", str(shipped), *place]


def _pass_signals_on(process: subprocess.Popen[bytes]) -> None:
    """Send signals to the training processes, past the launcher, which would not let them save a checkpoint."""
    import psutil

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process(process.pid).children():
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)


def _outcome(launcher_code: int, folder: Path) -> int:
    ends = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    # When one process fails, the others may die of its absence: the reason is with the one that knew why.
    told = next((end for end in ends if end["code"] != 1), None)
    if told is not None:
        error = CapdistError(*told["mistakes"])
        error.exit_code = told["code"]
        raise error
    if launcher_code and not ends:
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
