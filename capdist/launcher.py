"""`capdist train`: a parent that starts `accelerate launch` and hands on the real exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from capdist.errors import EXIT_CODE_FILE_VARIABLE, ProcessError

_PLACE_OPTIONS = ("--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip",
                  "--main_process_port", "--mixed_precision", "--gpu_ids")  # fmt: skip
_PLACE_FLAGS = ("--cpu", "--multi_gpu")


def launch_training(arguments: Sequence[str]) -> int:
    """Train under `accelerate launch`.

    Args:
        arguments: Those of `capdist/train.py`, with those of `accelerate launch` that say where to train among them.

    Returns:
        The exit code of the training program.

    Raises:
        ProcessError: if a process died without a word.
    """
    place, what = _split(arguments)
    if "-h" in what or "--help" in what:
        from capdist.train import parse_arguments

        parse_arguments(["--help"])
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *_default_place(place), str(script), *what]
    with tempfile.TemporaryDirectory(prefix="capdist_") as codes:
        process = subprocess.Popen(command, env=os.environ | {EXIT_CODE_FILE_VARIABLE: codes}, start_new_session=True)

        def pass_on(number: int, frame: FrameType | None) -> None:
            # The launcher would kill the processes after its own grace; they save a checkpoint and end by themselves.
            for pid in _descendants(process.pid):
                os.kill(pid, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        launcher_code = process.wait()
        return _real_code(launcher_code, Path(codes))


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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
    if any(argument.startswith("--config_file") for argument in place):
        return place
    shipped = Path(__file__).resolve().parents[1] / "accelerate_config.yaml"
    return [*(["--config_file", str(shipped)] if shipped.exists() else []), *place]


def _descendants(pid: int) -> list[int]:
    """Return the training processes: descendants of the launcher that are not launchers of others."""
    import psutil

    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []
    return [child.pid for child in children] or [pid]


def _real_code(launcher_code: int, codes: Path) -> int:
    if launcher_code == 0:
        return 0
    found = {path.name: int(path.read_text()) for path in codes.iterdir()}
    if not found:
        raise ProcessError(
            f"the training processes ended without a word (launcher code {launcher_code}); most often memory ran out: "
            "lower data.batch_size or data.num_workers"
        )
    # When one process fails the others die of its absence, as bugs: the reason is the code that is not 1.
    return next((code for code in found.values() if code != 1), 1)
