"""Start capdist as users do: real processes, with a free port and a time limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "capdist" / "train.py"

SMALL = (
    "data.source=folder", "data.image_size=32", "data.batch_size=4", "data.captions_per_image=5",
    "text.min_frequency=1", "text.max_length=12",
    "encoder.name=resnet18", "encoder.weights=none", "encoder.stage=layer1", "decoder.embed_size=16",
    "decoder.hidden_size=24", "decoder.attention_size=16", "evaluation.beam_size=2", "evaluation.batch_size=8",
    "run.threads=1", "tracking.with=[]",
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
