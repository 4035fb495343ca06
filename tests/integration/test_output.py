"""What a user sees of a run: a bar on a terminal, time-stamped lines in a file, once from several processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processes import SMALL, TRAIN, check_finished, launch, run, run_on_terminal

pytestmark = pytest.mark.slow

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


def _arguments(photos: Path, folder: Path, *more: str) -> list[str]:
    """Two epochs of eight steps, a line each three, a validation an epoch."""
    small = [*SMALL, f"data.path={photos}", f"run.output_dir={folder}", "run.name=small", "training.epochs=2"]
    return ["--config", "scenes", *small, "training.log_every=3", "training.warmup_steps=0", *more]


def _stamped(text: str) -> list[str]:
    """Return log lines without their time stamps; each must have one."""
    lines = text.splitlines()
    assert all(re.match(STAMP, line) for line in lines), text
    return [re.sub(f"^{STAMP}", "", line) for line in lines]


def test_a_file_gets_time_stamped_lines_once_from_two_processes(photos: Path, tmp_path: Path) -> None:
    result = launch(TRAIN, _arguments(photos, tmp_path, "data.batch_size=2"), processes=2, PATH=str(tmp_path))
    check_finished(result)
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr + result.stdout
    own = [line for line in result.stderr.splitlines() if re.match(STAMP, line)]
    said = _stamped("\n".join(own))
    log = [json.loads(line) for line in (tmp_path / "small" / "log.jsonl").read_text().splitlines()]
    figures = r"loss (\d+\.\d{3}), lr ([\d.e-]+), [\d,]+ captions/s, \d+ s left"
    found = [m for line in said if (m := re.fullmatch(rf"small: epoch (\d) of 2, step (\d+) of 16, {figures}", line))]
    assert [(int(m[1]), int(m[2])) for m in found] == [(1, 3), (1, 6), (2, 9), (2, 12), (2, 15), (2, 16)]
    training = [line for line in log if "loss" in line]
    assert [(m[3], float(m[4])) for m in found] == [
        (f"{line['loss']:.3f}", pytest.approx(line["lr"], rel=0.05, abs=1e-9)) for line in training
    ]
    assert found[-1][0].endswith(" captions/s, 0 s left")
    assert sum(line.startswith("caption validation: 10 of 10 images in ") for line in said) == 2
    assert sum(line.startswith("caption test: 10 of 10 images in ") for line in said) == 1


def test_a_terminal_gets_a_bar_of_its_width(photos: Path, tmp_path: Path) -> None:
    shown = run_on_terminal(["-m", "capdist", "train", "--cpu", *_arguments(photos, tmp_path)], PATH=str(tmp_path))
    assert shown.returncode == 0, shown.output
    pieces = [CONTROL.sub("", piece) for piece in re.split(r"[\r\n]+", shown.output)]
    bars = [piece for piece in pieces if "|" in piece and "[" in piece]
    assert any(re.match(r"small epoch 1/2: \|.*\| \d+/16 \[.*, loss \d\.\d{3}, [\d,]+ captions/s", bar) for bar in bars)
    assert any(re.match(r"small epoch 2/2: \|.*\| 16/16 \[", bar) for bar in bars)
    assert max(map(len, bars)) <= 80
    assert not re.search(STAMP, shown.output)
    assert " left" not in shown.output


def test_ctrl_c_gives_the_prompt_back_once_the_checkpoint_is_saved(photos: Path, tmp_path: Path) -> None:
    endless = ["training.epochs=100000", "evaluation.every_epochs=1000", "checkpoint.every_steps=1000000"]
    command = ["-m", "capdist", "train", "--cpu", *_arguments(photos, tmp_path, *endless)]
    shown = run_on_terminal(command, interrupt_at="small epoch 1/", PATH=str(tmp_path))
    assert shown.returncode == 130, shown.output
    last = shown.output.splitlines()[-1]
    stopped = r"capdist: error: stopped by Ctrl-C \(signal 2\) after step (\d+); checkpoint saved, --resume continues"
    found = re.fullmatch(stopped, CONTROL.sub("", last))
    assert found, shown.output
    assert (tmp_path / "small" / "checkpoints" / f"step_{int(found[1]):08d}" / "manifest.json").exists()
    assert "Traceback" not in shown.output


def test_reading_and_encoding_say_their_ends_in_a_file(photos: Path, tmp_path: Path) -> None:
    check = run(["-m", "capdist", "check", "--config", "scenes", *SMALL, f"data.path={photos}"])
    check_finished(check)
    assert [re.sub(r" in .*", "", line) for line in _stamped(check.stderr)] == ["check: 50 of 50 photos"]
    cached = _arguments(photos, tmp_path, "encoder.trainable_from=null", "encoder.batch_norm=frozen")
    features = run(["-m", "capdist", "features", *cached], ACCELERATE_USE_CPU="true")
    check_finished(features)
    said = [re.sub(r" in .*", "", line) for line in _stamped(features.stderr)]
    for split, count in (("train", 30), ("validation", 10), ("test", 10)):
        assert said.count(f"encode {split}: {count} of {count} photos") == 1
    assert "\x1b" not in features.stdout + check.stdout


def test_quiet_training_says_only_what_is_wrong(photos: Path, tmp_path: Path) -> None:
    quiet = ["--quiet", "tracking.with=[wandb]", "evaluation.consensus=4"]
    command = ["-m", "capdist", "train", "--cpu", *_arguments(photos, tmp_path), *quiet]
    result = run(command, PATH=str(tmp_path), WANDB_MODE="offline")
    check_finished(result)
    assert result.stdout == ""
    (warning,) = _stamped(result.stderr)
    assert warning.startswith("recipe: evaluation.consensus does nothing with fewer than 3 beams")
    assert (tmp_path / "small" / "samples.png").exists()
    again = run(command, PATH=str(tmp_path))
    assert again.returncode == 2
    (mistake,) = again.stderr.splitlines()
    assert mistake.startswith(f"capdist: error: {tmp_path}/small: already holds a run")
    assert again.stdout == ""

    output, model = tmp_path / "scores.json", str(tmp_path / "small" / "model")
    score = ["-m", "capdist", "evaluate", model, "--source", "folder", "--path", str(photos), "--output", str(output)]
    for quiet in ([], ["-q"]):
        result = run([*score, *quiet], PATH=str(tmp_path))
        check_finished(result)
        assert bool(result.stdout) == bool(result.stderr) == (not quiet)
        assert json.loads(output.read_text())["settings"]["num_images"] == 10
        output.unlink()


@pytest.mark.parametrize("command", ["check", "features"])
def test_other_commands_may_be_quiet_too(photos: Path, tmp_path: Path, command: str) -> None:
    frozen = ["encoder.trainable_from=null", "encoder.batch_norm=frozen"]
    arguments = ["-m", "capdist", command, *_arguments(photos, tmp_path, *frozen), "-q"]
    in_file = run(arguments)
    assert (in_file.returncode, in_file.stdout, in_file.stderr) == (0, "", "")
    on_terminal = run_on_terminal(arguments)
    assert (on_terminal.returncode, on_terminal.output) == (0, "")


def test_quiet_check_still_warns(photos: Path, tmp_path: Path) -> None:
    twice = tmp_path / "photos"
    shutil.copytree(photos, twice)
    shutil.copy(twice / "train_0000.png", twice / "train_0001.png")
    result = run(["-m", "capdist", "check", "--config", "scenes", *SMALL, f"data.path={twice}", "--quiet"])
    check_finished(result)
    (line,) = result.stdout.splitlines()
    assert line.startswith("warning: 2 photos are the same, byte for byte")
    assert result.stderr == ""


def test_libraries_draw_no_bars_in_a_file(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"", "path": None}] * 3, "caption": ["a dog"] * 3})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    command = ["-m", "capdist", "check", "--config", "scenes", "data.source=hub", f"data.path={tmp_path}"]
    result = run(command, HF_HOME=str(tmp_path / "cache"))
    assert "\r" not in result.stderr
    assert "Generating" not in result.stderr, "a bar of datasets"
