"""The log is always written and always readable; trackers are a courtesy that never stops a run."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration

from capdist.recipe.sections import Recipe
from capdist.training.tracking import Tracking
from tests.conftest import reset_accelerate


@pytest.fixture(autouse=True)
def _fresh_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no mode, an empty home; and accelerate's singletons as in a new process."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    reset_accelerate()
    yield
    reset_accelerate()


def _recipe(tmp_path: Path, *trackers: str) -> Recipe:
    recipe = Recipe(run={"name": "r", "output_dir": str(tmp_path)}, tracking={"with": trackers})
    recipe.run_folder.mkdir(exist_ok=True)
    return recipe


def _track(tmp_path: Path, step: int = 0, *trackers: str, log_with: Any = None) -> Tracking:
    recipe = _recipe(tmp_path, *trackers)
    project = ProjectConfiguration(project_dir=recipe.run_folder, logging_dir=recipe.run_folder)
    return Tracking(Accelerator(cpu=True, log_with=log_with, project_config=project), recipe, step)


def _log(tmp_path: Path) -> Path:
    return tmp_path / "r" / "log.jsonl"


def _lines(tmp_path: Path) -> list[dict[str, Any]]:
    text = _log(tmp_path).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def _write(tmp_path: Path, *steps: int, tail: str = "") -> None:
    _recipe(tmp_path)
    lines = [json.dumps({"step": step, "loss": step / 7, "note": "é\u2028x"}) + "\n" for step in steps]
    _log(tmp_path).write_text("".join(lines) + tail)


def test_one_json_object_a_line(tmp_path: Path) -> None:
    tracking = _track(tmp_path)
    tracking.log({"run": "r", "caption": "a dog\nruns \u2028 é"}, 0)
    tracking.log({"loss": 0.1 + 0.2, "meteor": None}, 10, group="train")
    assert _lines(tmp_path) == [
        {"step": 0, "run": "r", "caption": "a dog\nruns \u2028 é"},
        {"step": 10, "loss": 0.1 + 0.2, "meteor": None},
    ]
    assert len(_log(tmp_path).read_text().splitlines()) == 2


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    tracking = _track(tmp_path)
    for step in range(3):
        tracking.log({}, step)
        assert len(_lines(tmp_path)) == step + 1


@pytest.mark.parametrize(
    ("step", "kept"),
    [(0, []), (5, [0]), (10, [0, 10, 10]), (25, [0, 10, 10, 20]), (30, [0, 10, 10, 20, 30]), (99, [0, 10, 10, 20, 30])],
)
def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path, step: int, kept: list[int]) -> None:
    """A run that starts again from nothing (step 0) starts its log again too."""
    _write(tmp_path, 0, 10, 10, 20, 30)
    tracking = _track(tmp_path, step)
    tracking.log({"again": True}, step)
    assert [line["step"] for line in _lines(tmp_path)] == [*kept, step]


def test_final_scores_of_an_earlier_start_give_way_to_those_of_this_one(tmp_path: Path) -> None:
    first = _track(tmp_path, 0)
    first.log({"cider": 0.9}, 3)
    first.log({"split": "test", "final": True, "cider": 1.0}, 3)
    _track(tmp_path, 3).log({"split": "test", "final": True, "cider": 1.1}, 3)
    assert [line["cider"] for line in _lines(tmp_path)] == [0.9, 1.1]


def test_kept_lines_are_kept_byte_for_byte(tmp_path: Path) -> None:
    _write(tmp_path, 0, 10, 20)
    before = _log(tmp_path).read_bytes().splitlines(keepends=True)
    _track(tmp_path, 10)
    assert _log(tmp_path).read_bytes() == b"".join(before[:2])


def test_lines_that_cannot_be_flushed_leave_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that a power cut may empty must not take the place of a good one."""
    _write(tmp_path, 0, 10, 20)
    before = _log(tmp_path).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        _track(tmp_path, 10)
    assert _log(tmp_path).read_bytes() == before
    assert [path.name for path in _log(tmp_path).parent.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    "tail", ["{", '{"step": 20, "lo', '{"step": 20}', "\0" * 40], ids=["brace", "half", "all but its end", "zeros"]
)
def test_half_written_last_line_is_dropped(tmp_path: Path, tail: str) -> None:
    _write(tmp_path, 0, 10, tail=tail)
    _track(tmp_path, 30).log({}, 31)
    assert [line["step"] for line in _lines(tmp_path)] == [0, 10, 31]


@pytest.mark.parametrize(
    "junk",
    ["\0" * 40, '{"step": 10, "lo{"step": 11}', "", "{}", "3", '{"step": null}'],
    ids=["zeros", "two in one", "blank", "no step", "number", "null step"],
)
def test_damaged_line_does_not_stop_a_run(tmp_path: Path, junk: str) -> None:
    """A power cut leaves such lines; the checkpoints are whole, so the run must be able to go on."""
    _write(tmp_path, 0, 10)
    with _log(tmp_path).open("a") as file:
        file.write(junk + "\n" + json.dumps({"step": 20}) + "\n")
    tracking = _track(tmp_path, 30)
    tracking.log({}, 31)
    steps = [line["step"] for line in _lines(tmp_path) if isinstance(line, dict) and line.get("step") is not None]
    assert steps == [0, 10, 20, 31]


def test_log_of_a_new_run(tmp_path: Path) -> None:
    tracking = _track(tmp_path)
    assert not _log(tmp_path).exists()
    tracking.log({"a": 1}, 0)
    assert _lines(tmp_path) == [{"step": 0, "a": 1}]


@pytest.fixture
def server() -> Iterator[str]:
    """Something that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def _mode(tmp_path: Path) -> str | None:
    """Return the mode that a run with wandb ends up with; the accelerator starts no tracker here."""
    started = time.perf_counter()
    _track(tmp_path, 0, "tensorboard", "wandb").log({}, 0)
    assert time.perf_counter() - started < 5
    return os.environ.get("WANDB_MODE")


def test_wandb_goes_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{server}")
    assert _mode(tmp_path) == "offline"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://127.0.0.1:9", "https://no-such-host.invalid"])
def test_wandb_goes_offline_when_its_server_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert _mode(tmp_path) == "offline"


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "http://[::1", "http://127.0.0.1:99999", "nonsense", ""])
def test_address_that_is_none_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert _mode(tmp_path) == "offline"


def test_wandb_stays_online_with_a_key_and_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{server}")
    assert _mode(tmp_path) is None


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "http_proxy", None])
def test_behind_a_proxy_wandb_stays_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://127.0.0.1:9")
    for other in [other for other in os.environ if other.lower().endswith("_proxy")]:
        monkeypatch.delenv(other)
    if name is not None:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert _mode(tmp_path) == ("offline" if name in ("http_proxy", None) else None)


@pytest.mark.parametrize("place", ["home", "variable"])
@pytest.mark.parametrize("machine", ["ours", "another"])
def test_key_of_wandb_login_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, place: str, machine: str
) -> None:
    """`wandb login` writes host and port as `machine`, into `~/.netrc` or the file that NETRC names."""
    path = tmp_path / (".netrc" if place == "home" else "keys")
    path.write_text(f"machine {server if machine == 'ours' else 'example.org'}\n  login user\n  password {'k' * 40}\n")
    path.chmod(0o600)
    if place == "variable":
        monkeypatch.setenv("NETRC", str(path))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{server}")
    assert _mode(tmp_path) == (None if machine == "ours" else "offline")


@pytest.mark.parametrize("content", [b"machine", b"\xff\xfe\x00", b"nonsense here"])
def test_broken_netrc_counts_as_no_key(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".netrc").write_bytes(content)
    assert _mode(tmp_path) == "offline"


@pytest.mark.parametrize("mode", ["online", "offline", "disabled", "shared"])
def test_mode_that_the_user_chose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert _mode(tmp_path) == mode


def test_run_without_wandb_leaves_its_mode_alone(tmp_path: Path) -> None:
    _track(tmp_path, 0, "tensorboard")
    assert "WANDB_MODE" not in os.environ


class _Tracker(GeneralTracker):
    """Notes what it is told, and fails where it is asked to."""

    name = "noting"
    requires_logging_directory = False

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in = fails_in
        self.heard: list[tuple[str, Any]] = []

    @property
    def tracker(self) -> list[tuple[str, Any]]:
        return self.heard

    def _hear(self, what: str, values: Any) -> None:
        self.heard.append((what, values))
        if what == self.fails_in:
            raise ConnectionError("the server hung up")

    def start(self) -> None:
        self._hear("start", None)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._hear("configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._hear("log", (step, values))

    def finish(self) -> None:
        self._hear("finish", None)


def test_trackers_hear_numbers_by_group(tmp_path: Path) -> None:
    tracker = _Tracker()
    tracking = _track(tmp_path, log_with=tracker)
    tracking.log({"device": "cpu", "num_processes": 2}, 0)
    tracking.log({"loss": 1.5, "note": "x", "meteor": None, "final": True, "steps": 3}, 10, group="train")
    tracking.close()
    assert [what for what, _ in tracker.heard] == ["start", "configuration", "log", "finish"]
    assert tracker.heard[2][1] == (10, {"train/loss": 1.5, "train/steps": 3})
    configuration = tracker.heard[1][1]
    assert configuration["run.name"] == "r"
    assert configuration["training.learning_rate"] == "0.001"


@pytest.mark.parametrize("phase", ["start", "configuration", "log", "finish"])
def test_failing_tracker_never_stops_the_log(tmp_path: Path, phase: str) -> None:
    tracker = _Tracker(phase)
    tracking = _track(tmp_path, log_with=tracker)
    for step in range(3):
        tracking.log({"loss": 1.0}, step, group="train")
    tracking.close()
    assert [line["step"] for line in _lines(tmp_path)] == [0, 1, 2]
    assert [what for what, _ in tracker.heard].count(phase) == 1  # it is not asked again


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = _track(tmp_path, 0, "tensorboard", log_with="tensorboard")
    for step in (10, 20):
        tracking.log({"loss": step / 4}, step, group="train")
    tracking.close()
    (events,) = [path for path in (tmp_path / "r").rglob("events.out.tfevents.*") if path.parent.name == "capdist"]
    curves = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("train/loss")] == [(10, 2.5), (20, 5.0)]
