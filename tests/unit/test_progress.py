"""Progress off a terminal: which lines, when, and with which figures. The bar is tested with real terminals."""

from __future__ import annotations

import logging

import pytest

from capdist import progress
from capdist.progress import Progress, format_duration


class Clock:
    """A clock that only a test moves, in seconds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "capdist")


def test_a_line_every_half_minute_and_one_at_the_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("encode train", 1200, "photo") as shown:
        for _ in range(12):  # 100 photos in 10 s
            clock.now_s += 10
            shown.update(100)
    assert caplog.messages == [
        "encode train: 300 of 1,200 photos, 10.0 photos/s, 1 min 30 s left",
        "encode train: 600 of 1,200 photos, 10.0 photos/s, 1 min 0 s left",
        "encode train: 900 of 1,200 photos, 10.0 photos/s, 30 s left",
        "encode train: 1,200 of 1,200 photos in 2 min 0 s, 10.0 photos/s",
    ]


def test_what_is_over_at_once_has_one_line(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("caption test", 40, "image", is_brief=True) as shown:
        clock.now_s += 0.5
        shown.update(40)
    assert caplog.messages == ["caption test: 40 of 40 images in 0 s, 80.0 images/s"]


def test_speed_and_time_left_are_those_of_this_start(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("encode train", 1000, "view", initial=900) as shown:
        clock.now_s += 40
        shown.update(20)
    assert caplog.messages == [
        "encode train: 920 of 1,000 views, 0.5 views/s, 2 min 40 s left",
        "encode train: 920 of 1,000 views in 40 s, 0.5 views/s",
    ]


def test_work_that_fails_says_how_far_it_came(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def fail_at_the_fifth() -> None:
        with Progress("check", 10, "photo") as shown:
            clock.now_s += 2
            [1 // (4 - item) for item in shown.each(range(10))]

    with pytest.raises(ZeroDivisionError):
        fail_at_the_fifth()
    assert caplog.messages == ["check: 4 of 10 photos in 2 s, 2.0 photos/s"]


def test_nothing_gets_beyond_its_total(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("caption test", 11, "image") as shown:
        clock.now_s += 1
        shown.update(2 * 6)  # two processes of six and five
    assert caplog.messages == ["caption test: 11 of 11 images in 1 s, 11.0 images/s"]


def test_training_has_a_line_for_each_report(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("scenes", 3000, "step", initial=1000, is_training=True) as shown:
        for step in range(1, 201):
            clock.now_s += 2
            shown.update()
            if step % 100 == 0:
                values = {"loss": 2.34567, "lr": 0.000123, "captions_per_second": 1234.4, "data_wait": 0.5}
                shown.report(values | {"epoch": (1000 + step) / 1100}, epochs=9)
    # 2 s a step: 1,900 and 1,800 steps are left.
    assert caplog.messages == [
        "scenes: epoch 1 of 9, step 1,100 of 3,000, loss 2.346, lr 0.00012, 1,234 captions/s, 1 h 3 min left",
        "scenes: epoch 2 of 9, step 1,200 of 3,000, loss 2.346, lr 0.00012, 1,234 captions/s, 1 h 0 min left",
    ]


@pytest.mark.parametrize("is_training", [False, True])
def test_only_the_main_process_speaks(clock: Clock, caplog: pytest.LogCaptureFixture, is_training: bool) -> None:
    with Progress("work", 10, "step", is_training=is_training, is_main=False) as shown:
        clock.now_s += 100
        shown.update(5)
        shown.report({"epoch": 1.0, "loss": 1.0, "lr": 1.0, "captions_per_second": 1.0, "data_wait": 0.0}, 1)
    assert not caplog.records


def test_no_work_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with Progress("caption test", 0, "image"):
        pass
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3599, "59 min 59 s"),
        (3600, "1 h 0 min"), (7384, "2 h 3 min"), (86399, "23 h 59 min"), (86400, "1 d 0 h"), (200000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
