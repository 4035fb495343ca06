"""Start capdist as users do: real processes, with a free port and a time limit."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "capdist" / "train.py"

SMALL = (
    "data.source=folder", "data.image_size=32", "data.batch_size=4", "data.captions_per_image=5",
    "text.min_frequency=1", "text.max_length=12",
    "encoder.name=resnet18", "encoder.weights=none", "encoder.last_block=layer1", "decoder.embed_size=16",
    "decoder.hidden_size=24", "decoder.attention_size=16", "evaluation.beam_size=2", "evaluation.batch_size=8",
    "encoder.batch_size=8", "run.threads=1", "tracking.with=[]", "training.encoder_learning_rate=null",
)  # fmt: skip
"""Overrides that make a run small."""


def run(command: list[str], *, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python and return what it printed."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=REPOSITORY,
    )


def launch(
    script: Path, arguments: list[str], *, processes: int = 1, timeout_s: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script under `accelerate launch` with one or more processes on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    many = ["--multi_gpu", f"--main_process_port={port}"] if processes > 1 else []
    place = [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    return run(
        ["-m", "accelerate.commands.launch", *place, *many, str(script), *arguments],
        timeout_s=timeout_s,
        ACCELERATE_USE_CPU="true",
        **environment,
    )


def check_finished(result: subprocess.CompletedProcess[str]) -> None:
    """Fail with everything that was printed if the command failed."""
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"


@dataclass(frozen=True)
class OnTerminal:
    """What a command left on a terminal.

    Attributes:
        returncode: Of the command.
        output: Everything written to the terminal, with its control characters.
    """

    returncode: int
    output: str


def run_on_terminal(
    command: list[str], *, columns: int = 80, timeout_s: float = 240, interrupt_at: str = "", **environment: str
) -> OnTerminal:
    """Run a command of this Python whose input, output and errors are a terminal.

    Args:
        command: Arguments of Python.
        columns: Of the terminal.
        timeout_s: After which the command is killed.
        interrupt_at: Text at which Ctrl-C is typed, once; none = never.
        environment: More variables.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose Ctrl-C the command gets
        env=inherited | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(theirs)
    killer = Timer(timeout_s, process.kill)
    killer.start()
    output = bytearray()
    with suppress(OSError):  # Linux says so when the last process has closed the terminal
        while chunk := os.read(ours, 65536):
            output += chunk
            if interrupt_at and interrupt_at.encode() in output:
                os.write(ours, b"\x03")
                interrupt_at = ""
    os.close(ours)
    returncode = process.wait()
    killer.cancel()
    return OnTerminal(returncode, output.decode())
