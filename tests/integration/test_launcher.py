"""`capdist train` as the parent of a real two-process run: signals, deaths, exit codes, nothing left running."""

from __future__ import annotations

import json
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

from tests.processes import REPOSITORY, SMALL, TRAIN, check_finished, run

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
    step = re.search(r"stopped by .* \(signal \d+\) after step (\d+); checkpoint saved", last)
    assert step, error[-3000:]
    assert "Traceback" not in error
    checkpoint = long_run.folder / "checkpoints" / f"step_{int(step[1]):08d}"
    assert (checkpoint / "manifest.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_loader_processes_outlive_a_signal_to_all(
    photos: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """As terminals and schedulers send it: to every process of the job, not only to the one that knows what to do."""
    arguments = [*SMALL, f"data.path={photos}", f"run.output_dir={tmp_path}", "run.name=long", "training.log_every=1"]
    arguments += ["training.epochs=100000", "evaluation.every_epochs=1000", "checkpoint.every_steps=1000000"]
    command = [sys.executable, str(TRAIN), "--config", "configs/scenes.yaml", *arguments, "data.num_workers=2"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    ) as process:
        log = tmp_path / "long" / "log.jsonl"
        end = time.monotonic() + 120
        while not (log.exists() and "loss" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        os.killpg(process.pid, number)
        try:
            _, error = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == code, error[-3000:]
    assert "checkpoint saved" in error.splitlines()[-1]
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "loader processes are still there"


def test_the_death_of_a_process_is_told(long_run: Run) -> None:
    ranks = long_run.ranks()
    assert len(ranks) == 2
    ranks[1].kill()
    returned, error = long_run.finish()
    assert returned == 7, error[-3000:]
    assert "died without a word" in error.splitlines()[-1]


def _train(photos: Path, folder: Path, place: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `capdist train` for two steps, with nothing said about the processor but what `place` says."""
    arguments = [*SMALL, f"data.path={photos}", f"run.output_dir={folder}", "run.name=short", "training.max_steps=2"]
    command = ["-m", "capdist.cli", "train", *place, "--config", "configs/scenes.yaml", *arguments]
    return run([*command, "training.warmup_steps=0"], ACCELERATE_USE_CPU="false", **environment)


def test_several_processes_on_a_cpu(photos: Path, tmp_path: Path) -> None:
    result = _train(photos, tmp_path, ["--cpu", "--num_processes", "2"])
    check_finished(result)
    start = json.loads((tmp_path / "short" / "log.jsonl").read_text().splitlines()[0])
    assert (start["num_processes"], start["device"].partition(":")[0]) == (2, "cpu")


FAULT = """
import os, sys

if os.environ.get("RANK") == os.environ["FAULTY_RANK"]:
    sys.path.insert(0, os.environ["REPOSITORY"])
    from capdist.training.loop import Loop

    def fail(*arguments):
        return {}["no such key"]

    Loop.train = fail
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_bug_in_one_of_several_processes_is_a_bug(photos: Path, tmp_path: Path, rank: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    place = ["--cpu", "--num_processes", "2"]
    environment = {"PYTHONPATH": str(tmp_path), "FAULTY_RANK": rank, "REPOSITORY": str(REPOSITORY)}
    result = _train(photos, tmp_path, place, **environment)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "KeyError: 'no such key'" in result.stderr
    assert "memory" not in result.stderr


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (["--config_file", "nowhere.yaml"], "`nowhere.yaml` does not exist"),
        (["--num_processes", "two"], "invalid int value: 'two'"),
        (["--cpu", "--num_processes", "0"], "at least 2 processes"),
    ],
    ids=["no such file", "no number", "no process"],
)
def test_a_mistake_in_the_launch_is_told(photos: Path, tmp_path: Path, place: list[str], said: str) -> None:
    result = _train(photos, tmp_path, place)
    assert result.returncode == 2, result.stderr[-3000:]
    (line,) = result.stderr.splitlines()
    assert line.startswith("capdist: error: accelerate launch refuses its options: ")
    assert said in line
