"""`capdist train` as the parent of a real two-process run: signals, deaths, exit codes, nothing left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import REPOSITORY, SMALL

pytestmark = pytest.mark.slow


class Run:
    """A run that would go on for hours, once its training has begun."""

    def __init__(self, photos: Path, folder: Path) -> None:
        arguments = [*SMALL, f"data.path={photos}", f"run.output_dir={folder}", "run.name=long", "training.log_every=1"]
        arguments += ["training.epochs=100000", "evaluation.every_epochs=1000", "checkpoint.every_steps=1000000"]
        command = [sys.executable, "-m", "capdist.cli", "train", "--num_processes", "2", "--config"]
        self.folder = folder / "long"
        self.error = folder / "stderr.txt"
        with self.error.open("w") as error:
            self.process = subprocess.Popen(
                [*command, "configs/scenes.yaml", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=error,
                cwd=REPOSITORY,
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            )
        self.wait_for(lambda: "loss" in self.log(), 120)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def log(self) -> str:
        path = self.folder / "log.jsonl"
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition: object, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            assert self.process.poll() is None, self.error.read_text()[-3000:]
            assert time.monotonic() < end, self.error.read_text()[-3000:]
            time.sleep(0.2)

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes."""
        return [p for p in self.family if p.is_running() and any("train.py" in word for word in p.cmdline()[1:3])]

    def finish(self) -> tuple[int, str]:
        """Return exit code and standard error, and make sure that nothing goes on."""
        code = self.process.wait(timeout=90)
        _, alive = psutil.wait_procs(self.family, timeout=10)
        assert not alive, "processes of the run are still there"
        return code, self.error.read_text()


@pytest.fixture
def long_run(photos: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(photos, tmp_path)
    yield run
    for process in run.family:
        if process.is_running():
            process.kill()
    run.process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint(long_run: Run, number: signal.Signals, code: int) -> None:
    assert '"num_processes": 2' in long_run.log()
    long_run.process.send_signal(number)
    returned, error = long_run.finish()
    assert returned == code, error[-3000:]
    last = error.splitlines()[-1]
    step = re.search(r"stopped by signal \d+ after step (\d+); checkpoint saved", last)
    assert step, error[-3000:]
    assert "Traceback" not in error
    checkpoint = long_run.folder / "checkpoints" / f"step_{int(step[1]):08d}"
    assert (checkpoint / "manifest.json").exists()


def test_the_death_of_a_process_is_told(long_run: Run) -> None:
    ranks = long_run.ranks()
    assert len(ranks) == 2
    ranks[1].kill()
    returned, error = long_run.finish()
    assert returned == 7, error[-3000:]
    assert "died without a word" in error.splitlines()[-1]
