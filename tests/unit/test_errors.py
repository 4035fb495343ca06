"""How a program ends: its exit code, its last words, and who hears them."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capdist import errors
from capdist.commands import train as launcher
from capdist.errors import (
    CapdistError,
    CheckpointError,
    DataError,
    Mistake,
    NumericsError,
    ProcessError,
    Stopped,
    StorageError,
    UsageError,
    nearest,
    nearest_name,
    reason_of,
    run_program,
)

PROMISED = {
    UsageError: 2,
    DataError: 3,
    CheckpointError: 4,
    StorageError: 5,
    NumericsError: 6,
    ProcessError: 7,
}


@pytest.fixture(autouse=True)
def _no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPDIST_EXIT_FOLDER", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def _raiser(error: BaseException) -> Callable[[], None]:
    def program() -> None:
        raise error

    return program


def test_reasons_of_libraries_are_one_line_that_says_what_is_wrong() -> None:
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict({"weight": torch.zeros(4, 2), "bias": torch.zeros(3)})
    assert "size mismatch for weight" in reason_of(caught.value)
    assert "\n" not in reason_of(caught.value)
    assert reason_of(ValueError()) == "ValueError"
    assert len(reason_of(ValueError("x" * 1000))) == 200


@pytest.mark.parametrize("result", [None, 0, 3, "text", False])
def test_returning_is_success(result: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(lambda: result) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("error_class", "code"), PROMISED.items())
def test_expected_errors_print_one_line_a_mistake(
    error_class: type[CapdistError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(_raiser(error_class("a.yaml:3: wrong", "größe: wrong too"))) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "capdist: error: a.yaml:3: wrong\ncapdist: error: größe: wrong too\n"


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_signals_end_with_the_codes_of_shells(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(_raiser(Stopped(number, "stopped; repeat with --resume"))) == code
    assert capsys.readouterr().err == "capdist: error: stopped; repeat with --resume\n"


def test_a_signal_does_not_change_the_code_of_the_next() -> None:
    first, second = Stopped(2, "a"), Stopped(15, "b")
    assert (first.exit_code, second.exit_code) == (130, 143)


def test_every_class_has_a_code_of_its_own() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CapdistError)]
    codes = {c: c.exit_code for c in classes if c not in (CapdistError, Stopped)}
    assert codes == PROMISED


def test_a_subclass_keeps_the_code_of_its_kind() -> None:
    class BrokenPhotoError(DataError):
        pass

    assert run_program(_raiser(BrokenPhotoError("x"))) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS])
def test_full_disks_and_permissions_are_no_bug(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(_raiser(OSError(number, os.strerror(number), "/runs/x"))) == 5
    err = capsys.readouterr().err
    assert err.startswith(f"capdist: error: /runs/x: {os.strerror(number)}; ")
    assert err.count("\n") == 1


def test_a_full_disk_without_a_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(_raiser(OSError(errno.ENOSPC, "No space left on device"))) == 5
    assert capsys.readouterr().err.startswith("capdist: error: input/output: No space left on device; ")


def test_a_really_full_device(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert run_program(lambda: Path("/dev/full").write_text("x")) == 5
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "close other programs"),
        (errno.EIO, "check the disk or the network"),
        (errno.ESTALE, "check the disk or the network"),
        (errno.ETIMEDOUT, "check the disk or the network"),
    ],
)
def test_failing_disks_and_too_many_files_have_remedies_of_their_own(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(_raiser(OSError(number, os.strerror(number), "/runs/x"))) == 5
    err = capsys.readouterr().err
    assert err.startswith(f"capdist: error: /runs/x: {os.strerror(number)}; ")
    assert remedy in err
    assert "free space" not in err
    assert err.count("\n") == 1


def _ask_torch_for_too_much() -> None:
    torch.empty(10**15)


def _ask_numpy_for_too_much() -> None:
    np.empty(10**15)


@pytest.mark.parametrize(
    ("program", "first"),
    [
        (_ask_torch_for_too_much, "you tried to allocate 4000000000000000 bytes"),
        (_ask_numpy_for_too_much, "Unable to allocate"),
        (
            _raiser(torch.OutOfMemoryError("CUDA out of memory. Tried 20 GiB.\nsecond")),
            "CUDA out of memory. Tried 20 GiB.",
        ),
        (_raiser(RuntimeError("CUDA error: out of memory\nsecond")), "CUDA error: out of memory"),
        (_raiser(MemoryError()), "memory ran out"),
        (_raiser(MemoryError("Caught MemoryError in worker 0.\nsecond")), "Caught MemoryError in worker 0."),
        (_raiser(OSError(errno.ENOMEM, "Cannot allocate memory")), "Cannot allocate memory"),
    ],
    ids=["torch", "numpy", "cuda", "cuda driver", "python", "worker", "system"],
)
def test_lack_of_memory_is_no_bug_and_says_what_to_lower(
    program: Callable[[], None], first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(program) == 7
    err = capsys.readouterr().err
    assert err.startswith("capdist: error: ")
    assert err.count("\n") == 1
    assert first in err
    assert "second" not in err
    for key in ("data.batch_size", "evaluation.batch_size", "--batch-size"):
        assert key in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        AssertionError("ours"),
        KeyError("ours"),
        RecursionError("ours"),
        RuntimeError("ours"),
        OSError("ours"),
        OSError(errno.ENOENT, "ours"),
        CapdistError("ours"),
    ],
    ids=repr,
)
def test_everything_else_is_our_bug_and_shows_its_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(_raiser(error)) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in program" in err
    assert type(error).__name__ in err
    assert "ours" in err


def test_control_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(_raiser(KeyboardInterrupt())) == 130
    err = capsys.readouterr().err
    assert err.startswith("capdist: error: interrupted")
    # A run that is in its final report has saved everything: nothing may be said to be lost.
    assert "nothing" not in err
    assert "anything" not in err
    assert "--resume" in err
    assert "Traceback" not in err


def test_a_program_that_exits_by_itself_is_let_go() -> None:
    with pytest.raises(SystemExit) as caught:
        run_program(_raiser(SystemExit(9)))
    assert caught.value.code == 9


@pytest.mark.parametrize("error", [UsageError("a", "b"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_debug_adds_the_traceback_and_leaves_the_last_words_last(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_code = run_program(_raiser(error))
    plain = capsys.readouterr().err
    assert "Traceback" not in plain
    assert run_program(_raiser(error), debug=True) == plain_code
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith(plain)


PROGRAM = """
import sys
from capdist.errors import DataError, run_program

def program():
    print("result")
    raise DataError("mistake")

sys.exit(run_program(program))
"""


def test_messages_come_after_what_was_printed() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode, done.stdout) == (3, "result\ncapdist: error: mistake\n")


def test_a_message_is_not_lost_when_standard_output_is_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert "capdist: error: mistake" in done.stderr


# --- the parent's folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UsageError("a", "größe"), {"code": 2, "mistakes": ["a", "größe"]}),
        (UsageError(Mistake("a.b", "c", "d", "e")), {"code": 2, "mistakes": ["e: a.b: c; d"]}),
        (DataError("photo \udcff.jpg"), {"code": 3, "mistakes": ["photo \udcff.jpg"]}),
        (Stopped(15, "stopped"), {"code": 143, "mistakes": ["stopped"]}),
        (ValueError("bug"), {"code": 1, "mistakes": []}),
    ],
    ids=["usage", "a key", "surrogate", "signal", "bug"],
)
def test_under_a_parent_the_end_is_written_not_printed(
    error: Exception,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CAPDIST_EXIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert run_program(_raiser(error)) == expected["code"]
    assert [path.name for path in tmp_path.iterdir()] == ["rank_3"]
    assert json.loads((tmp_path / "rank_3").read_bytes()) == expected | {"lost_peers": False, "processes": 5}
    err = capsys.readouterr().err
    assert "capdist: error" not in err
    assert ("Traceback" in err) == (expected["code"] == 1)


def test_an_end_counts_the_processes_of_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines with two processes each, all of which lose the network, none died without a word."""
    monkeypatch.setenv("CAPDIST_EXIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in ("2", "3"):
        monkeypatch.setenv("RANK", rank)
        run_program(_raiser(RuntimeError("Connection closed by peer")))
    assert [json.loads((tmp_path / f"rank_{rank}").read_bytes())["processes"] for rank in (2, 3)] == [2, 2]
    assert launcher._outcome(1, tmp_path, []) == 1


# The first four are what real processes said whose peer was killed, killed while sending, slept, or held the store.
PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561]"
LOST = [
    RuntimeError(f"{PAIR} Connection closed by peer [127.0.0.1]:40366. This is typically caused by a remote worker."),
    RuntimeError(f"{PAIR} Read error [127.0.0.1]:60048: Connection reset by peer. This is typically caused by"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"),
    torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    torch.distributed.DistStoreError("wait timeout after 300000ms"),
    torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp: remote process exited"),
]
NOT_LOST = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError(f"{PAIR} op.preamble.length <= op.nbytes. 8 vs 4"),  # our collectives do not match
    ConnectionError("Connection reset by peer"),  # a download
    ValueError("Timed out waiting"),
    DataError("Connection closed by peer"),
]


@pytest.mark.parametrize(
    ("error", "lost"), [*((error, True) for error in LOST), *((error, False) for error in NOT_LOST)], ids=repr
)
def test_an_end_says_whether_only_the_peers_were_lost(
    error: Exception, lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPDIST_EXIT_FOLDER", str(tmp_path))
    run_program(_raiser(error))
    assert json.loads((tmp_path / "rank_0").read_bytes())["lost_peers"] is lost


def test_under_a_parent_success_leaves_nothing_and_rank_0_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPDIST_EXIT_FOLDER", str(tmp_path))
    assert run_program(lambda: None) == 0
    assert not list(tmp_path.iterdir())
    assert run_program(_raiser(NumericsError("loss is nan"))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0"]


@pytest.mark.parametrize("folder", ["gone", ""])
def test_a_parent_that_cannot_be_reached_loses_nothing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPDIST_EXIT_FOLDER", str(tmp_path / folder / "x") if folder else "")
    assert run_program(_raiser(ProcessError("rank 1 died"))) == 7
    assert capsys.readouterr().err == "capdist: error: rank 1 died\n"


# --- the errors themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_class", PROMISED)
@pytest.mark.parametrize("mistakes", [(), ("a",), ("a", "b: 3"), (Mistake("a.b", "wrong", "right", "x:1"), "c")])
def test_errors_travel_between_processes(error_class: type[CapdistError], mistakes: tuple[Mistake | str, ...]) -> None:
    error = error_class(*mistakes)
    assert str(error) == "\n".join(map(str, mistakes))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is error_class
        assert again.mistakes == error.mistakes
        assert str(again) == str(error)


def test_a_stop_travels_with_its_code() -> None:
    again = pickle.loads(pickle.dumps(Stopped(15, Mistake("run.name", "stopped"))))
    assert (again.exit_code, again.mistakes) == (143, (Mistake("run.name", "stopped"),))


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (Mistake("", "all there is to say"), "all there is to say"),
        (Mistake("data.path", "missing"), "data.path: missing"),
        (Mistake("", "missing", "give it"), "missing; give it"),
        (Mistake("", "missing", place="a.yaml:3"), "a.yaml:3: missing"),
        (Mistake("data.path", "a: b; c", "d: e", "a.yaml:3"), "a.yaml:3: data.path: a: b; c; d: e"),
    ],
)
def test_a_mistake_is_printed_as_place_key_text_and_hint(mistake: Mistake, line: str) -> None:
    assert str(mistake) == line
    assert str(mistake.at("run a")) == f"run a: {line}"
    assert mistake.at("run a") == replace(mistake, place=f"run a: {mistake.place}" if mistake.place else "run a")


def test_a_text_is_a_mistake_about_no_key() -> None:
    error = UsageError("data.path: missing; give it", Mistake("data.path", "missing", "give it"))
    assert error.mistakes == (
        Mistake("", "data.path: missing; give it"),
        Mistake("data.path", "missing", "give it"),
    )
    assert error.lines == ("data.path: missing; give it",) * 2


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


KNOWN = ["resnet18", "scenes", "flickr8k", "karpathy", "hub", "folder"]


@pytest.mark.parametrize("name", ["scene", "sceens", "flickr30k", "Folder", "foldr", "karpaty", "hubb"])
def test_nearest_suggests_the_closest(name: str) -> None:
    closest = min(KNOWN, key=lambda known: _distance(name, known))
    assert nearest_name(name, KNOWN) == closest
    assert nearest(name, KNOWN) == f"; did you mean '{closest}'?"


@pytest.mark.parametrize("name", ["", "zzzz", "Ω"])
def test_nearest_lists_all_when_nothing_is_close(name: str) -> None:
    assert nearest_name(name, iter(KNOWN)) is None
    assert nearest(name, iter(KNOWN)) == "; known: flickr8k, folder, hub, karpathy, resnet18, scenes"
