"""`capdist train` without the training: what is passed to `accelerate launch`, and what is made of how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from capdist.commands import train as launcher
from capdist.errors import CapdistError, ProcessError, Stopped, UsageError


def _end(folder: Path, rank: int, code: int, *mistakes: str, lost: bool = False, processes: int = 2) -> None:
    end = {"code": code, "mistakes": mistakes, "lost_peers": lost, "processes": processes}
    (folder / f"rank_{rank}").write_text(json.dumps(end))


# --- what is passed on ----------------------------------------------------------------------------------------------


def _started(arguments: list[str]) -> tuple[Any, dict[str, str]]:
    """Return what accelerate's own parser and checks make of the command line, and the environment beside it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    place, environment = launcher._default_place(launcher.split_arguments(arguments)[0])
    return _validate_launch_command(launch_command_parser().parse_args([*place, "train.py"]))[0], environment


@pytest.mark.parametrize("more", [[], ["--mixed_precision", "bf16"], ["--config_file", "accelerate_config.yaml"]])
@pytest.mark.parametrize("number", [["--num_processes", "2"], ["--num_processes=2"]])
def test_several_processes_on_a_cpu(number: list[str], more: list[str]) -> None:
    asked, environment = _started(["--cpu", *number, *more])
    # The simple launcher, which `--cpu` chooses, would start one process.
    assert (asked.multi_gpu, asked.cpu, asked.num_processes) == (True, False, 2)
    assert environment == {"ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize("number", [[], ["--num_processes", "1"], ["--num_processes=1"]])
def test_one_process_on_a_cpu(number: list[str]) -> None:
    asked, environment = _started(["--cpu", *number])
    assert (asked.multi_gpu, asked.cpu, asked.num_processes) == (False, True, 1)
    assert environment == {}


def test_several_processes_on_gpus() -> None:
    asked, environment = _started(["--num_processes", "4"])
    assert (asked.multi_gpu, asked.cpu, asked.num_processes) == (True, False, 4)
    assert environment == {}


def test_an_option_without_its_value() -> None:
    with pytest.raises(UsageError, match="--num_processes needs a value"):
        launcher.split_arguments(["--config", "x.yaml", "--num_processes"])


@pytest.mark.parametrize("number", [["--num-processes", "2"], ["--num-processes=2"]])
def test_options_may_be_spelt_with_hyphens(number: list[str]) -> None:
    asked, _ = _started(["--mixed-precision=bf16", *number, "--config-file", "accelerate_config.yaml", "--multi-gpu"])
    assert (asked.multi_gpu, asked.num_processes, asked.mixed_precision) == (True, 2, "bf16")
    assert asked.config_file == "accelerate_config.yaml"


def test_another_way_to_be_several_is_left_alone() -> None:
    asked, _ = _started(["--use_fsdp", "--fsdp_version=2", "--num_processes", "2"])
    assert (asked.use_fsdp, asked.multi_gpu, asked.num_processes) == (True, False, 2)


def _options_of_accelerate() -> list[tuple[str, bool]]:
    """Return each spelling of each option, and whether it takes a value."""
    from accelerate.commands.launch import launch_command_parser

    ours = {"-h", "--help", "--debug", "--quiet", "-q", "-m", "--module", "--no_python", "--no-python"}
    actions = launch_command_parser()._actions
    return [(name, a.nargs != 0) for a in actions for name in a.option_strings if name not in ours]


@pytest.mark.parametrize(("option", "takes_value"), _options_of_accelerate())
def test_every_option_of_accelerate_is_passed_on(option: str, takes_value: bool) -> None:
    place, what = launcher.split_arguments(["--resume", option, "3", "run.seed=1", "--config", "x.yaml", "--debug"])
    name = "-" + option[1:].replace("-", "_") if option[:2] != "--" else "--" + option[2:].replace("-", "_")
    assert place == [name, *["3"] * takes_value]
    assert what == ["--resume", *["3"] * (not takes_value), "run.seed=1", "--config", "x.yaml", "--debug"]


# --- signals --------------------------------------------------------------------------------------------------------


PARENT = """
import os, signal, subprocess, sys, time
from capdist.commands.train import _Signals

signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "ignoring" else signal.SIG_DFL)
signals = _Signals()
if sys.argv[1] == "early":
    os.kill(os.getpid(), signal.SIGTERM)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
signals.pass_on_to(child.pid)
if sys.argv[1] == "late":
    os.kill(os.getpid(), signal.SIGHUP)
if sys.argv[1] == "ignoring":
    os.kill(os.getpid(), signal.SIGHUP)
    child.kill()
print(child.wait(), signals.received, flush=True)
"""


@pytest.mark.parametrize(
    ("when", "said"),
    [("early", "-15 [15]"), ("late", "-15 [1]"), ("ignoring", "-9 []")],
)
def test_signals_reach_training_unless_they_are_ignored(when: str, said: str) -> None:
    """One that comes before there is a process is not lost; and with `nohup`, a logout ends nothing."""
    done = subprocess.run([sys.executable, "-c", PARENT, when], capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == said, done.stderr


def test_signals_are_heard_before_there_is_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    at_start: dict[int, object] = {}

    def popen(*arguments: object, **options: object) -> None:
        at_start.update({number: signal.getsignal(number) for number in before})
        raise OSError("enough")

    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        with pytest.raises(OSError, match="enough"):
            launcher.launch_training([])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert all(at_start[number] is not signal.SIG_DFL for number in before)


# --- the launcher ---------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Return a function that is the launcher process, given its arguments, up to the parent's outcome."""

    def run(arguments: list[str]) -> int:
        monkeypatch.setenv("CAPDIST_EXIT_FOLDER", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["launcher", *arguments, str(tmp_path / "train.py")])
        return launcher._outcome(launcher._launch_quietly(), tmp_path, [])

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cpu", "--multi_gpu", "--num_processes", "2"], "You can only use one of `--cpu`, `--multi_gpu`"),
        (["--multi_gpu", "--num_processes", "0"], "at least 2 processes"),
        (["--multi_gpu", "--num_processes", "2", "--gpu_ids", "0"], "Less than two GPU ids"),
        (["--config_file", "nowhere.yaml"], "`nowhere.yaml` does not exist"),
        (["--num_processes", "two"], "invalid int value: 'two'"),
        (["--mixed_precision", "fp12"], "invalid choice: 'fp12'"),
        (["--num_machines", "2", "--cpu"], "main process IP"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_accelerate_refuses_is_told(
    options: list[str], said: str, launch: Callable[[list[str]], int], capfd: pytest.CaptureFixture[str]
) -> None:
    named = [] if "--config_file" in options else ["--config_file", "accelerate_config.yaml"]
    with pytest.raises(UsageError) as caught:
        launch([*named, *options])
    (line,) = caught.value.lines
    assert said in line
    assert "\n" not in line
    assert "memory" not in line
    assert "Traceback" not in capfd.readouterr().err


def test_what_argparse_has_said_is_not_said_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launcher", "--cpu"])
    code = launcher._launch_quietly()
    assert "training_script" in capfd.readouterr().err
    assert launcher._outcome(code, tmp_path, []) == 2


@pytest.mark.parametrize(
    "failure",
    [
        subprocess.CalledProcessError(1, "train.py"),
        ChildFailedError("train.py", {0: ProcessFailure(0, 1, 1, "error.json")}),
        SignalException("stopped", signal.SIGTERM),
        SystemExit(1),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_process_that_failed_is_no_mistake_in_the_options(
    failure: BaseException, launch: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: object) -> None:
        raise failure

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    with pytest.raises(ProcessError, match="died without a word"):
        launch([])


def test_a_mistake_of_the_launch_does_not_hide_what_a_process_said(
    tmp_path: Path, launch: Callable[[list[str]], int]
) -> None:
    _end(tmp_path, 0, 3, "no photo", processes=1)
    with pytest.raises(CapdistError) as caught:
        launch(["--config_file", "nowhere.yaml"])
    assert (caught.value.exit_code, caught.value.lines) == (3, ("no photo",))


# --- what the ends of the processes come to -------------------------------------------------------------------------


@pytest.mark.parametrize("bug", [0, 1, 2])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_bug_of_one_process_is_a_bug(tmp_path: Path, bug: int, lost: int) -> None:
    """The launcher may kill the others of three before or after they notice that one is gone."""
    _end(tmp_path, bug, 1, processes=3)
    for rank in [rank for rank in range(3) if rank != bug][:lost]:
        _end(tmp_path, rank, 1, lost=True, processes=3)
    assert launcher._outcome(1, tmp_path, []) == 1


@pytest.mark.parametrize("there", [[], [0], [1]])
def test_a_process_that_vanished_is_told(tmp_path: Path, there: list[int]) -> None:
    for rank in there:
        _end(tmp_path, rank, 1, lost=True)
    with pytest.raises(ProcessError, match="died without a word"):
        launcher._outcome(1, tmp_path, [])


def test_processes_that_all_failed_of_their_network_are_not_missing(tmp_path: Path) -> None:
    for rank in range(2):
        _end(tmp_path, rank, 1, lost=True)
    assert launcher._outcome(1, tmp_path, []) == 1


def test_who_knows_the_reason_is_heard(tmp_path: Path) -> None:
    _end(tmp_path, 0, 1, lost=True)
    _end(tmp_path, 1, 5, "disk full")
    with pytest.raises(CapdistError, match="disk full") as caught:
        launcher._outcome(1, tmp_path, [])
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("there", [[], [0]])
def test_a_signal_is_told_without_claiming_what_was_saved(tmp_path: Path, there: list[int]) -> None:
    for rank in there:
        _end(tmp_path, rank, 1, lost=True)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM \(signal 15\)") as caught:
        launcher._outcome(-15, tmp_path, [15])
    assert caught.value.exit_code == 143
    # The final report comes after the last checkpoint.
    assert "anything" not in str(caught.value)
    assert "--resume" in str(caught.value)


def test_a_bug_after_a_signal_is_not_hidden(tmp_path: Path) -> None:
    _end(tmp_path, 0, 1, processes=1)
    assert launcher._outcome(1, tmp_path, [15]) == 1


def test_success(tmp_path: Path) -> None:
    assert launcher._outcome(0, tmp_path, []) == 0
    assert os.listdir(tmp_path) == []
