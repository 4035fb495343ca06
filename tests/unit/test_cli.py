"""The commands that need no training: what they print, when, and how they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capdist import cli
from capdist.data.images import Preprocessing
from capdist.model_folder import TrainedModel, save_pretrained
from capdist.models.caption_model import build_model
from capdist.recipe.decoders import SoftAttentionSection
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import EncoderSection
from capdist.text.vocabulary import Vocabulary
from tests.conftest import draw_photos
from tests.processes import REPOSITORY

SEARCH = SearchSettings(beam_size=2, length_penalty=0.0, min_length=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model folder with random weights."""
    encoder = EncoderSection(name="resnet18", last_block="layer1", weights="none", grid=2)
    decoder = SoftAttentionSection(embed_size=8, hidden_size=8, attention_size=8)
    vocabulary = Vocabulary(["a", "red", "dog", "runs"])
    torch.manual_seed(0)
    network = build_model(encoder, decoder, vocab_size=len(vocabulary), pad_id=vocabulary.pad_id).eval()
    preprocessing = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(TrainedModel(network, vocabulary, preprocessing, encoder, decoder, 5, SEARCH, {}), folder)
    return str(folder)


@pytest.fixture
def five(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five photos, the fourth broken, captioned two at a time."""
    monkeypatch.setattr(cli, "PHOTOS_AT_ONCE", 2)
    photos = sorted(draw_photos(tmp_path / "photos", {"test": 5}).glob("*.png"))
    photos[3].write_bytes(photos[3].read_bytes()[:60])
    return photos


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_all_but_a_broken_photo_are_captioned(model: str, five: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("caption", model, str(five[0].parent)) == 3
    printed = capsys.readouterr()
    assert [line.partition(": ")[0] for line in printed.out.splitlines()] == [
        str(photo) for photo in five if photo != five[3]
    ]
    (error,) = [line for line in printed.err.splitlines() if line]
    assert error.startswith(f"capdist: error: {five[3]}")


def test_attention_and_json_of_all_but_a_broken_photo_are_whole(
    model: str, five: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looked_at = tmp_path / "looked" / "at"
    assert run("caption", model, *map(str, five), "--json", "--attention", str(looked_at)) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(photo) for photo in five if photo != five[3]]
    assert all(row.keys() == {"image", "caption", "log_probability"} for row in rows)
    assert {path.name for path in looked_at.iterdir()} == {
        f"{photo.stem}_attention.png" for photo in five if photo != five[3]
    }


def test_captions_do_not_depend_on_how_many_are_printed_at_once(
    model: str, five: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    five[3].unlink()
    printed = []
    for at_once in (1, 3, 9):
        monkeypatch.setattr(cli, "PHOTOS_AT_ONCE", at_once)
        assert run("caption", model, str(five[0].parent)) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].count("\n") == 4
    assert len(set(printed)) == 1


def test_search_settings_are_options(model: str, five: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    five[3].unlink()

    def words(*options: str) -> set[int]:
        assert run("caption", model, str(five[0].parent), "--json", *options) == 0
        return {len(json.loads(line)["caption"].split()) for line in capsys.readouterr().out.splitlines()}

    assert words("--min-length", "5", "--beam-size", "1") == {5}
    assert run("caption", model, str(five[0]), "--beam-size", "2", "--consensus", "4") == 2
    printed = capsys.readouterr().err
    assert printed == "capdist: error: consensus: 4 does nothing with fewer than 3 beams; take more\n"
    assert run("caption", model, str(five[0]), "--length-penalty", "6") == 2
    assert capsys.readouterr().err.startswith("capdist: error: Invalid value for '--length-penalty': ")


def test_scores_for_a_folder_that_is_not_there_are_a_mistake_of_usage(
    model: str, five: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "no" / "scores.json"
    asked = ("--source", "folder", "--path", str(five[0].parent), "--output", str(output))
    assert run("evaluate", model, *asked) == 2
    assert capsys.readouterr().err.startswith(f"capdist: error: --output: {output.parent}: no such folder")


def test_scores_are_not_written_over_a_folder(
    model: str, five: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("found out too late")

    monkeypatch.setattr("capdist.inference.captioner.Captioner.from_pretrained", load)
    folder = five[0].parent
    assert run("evaluate", model, "--source", "folder", "--path", str(folder), "--output", str(folder)) == 2
    assert capsys.readouterr().err == f"capdist: error: --output: {folder}: is a folder; name a file in it\n"


@pytest.mark.slow
def test_scores_that_cannot_be_written_end_all_processes_alike(model: str, tmp_path: Path) -> None:
    """Started without a launcher, which would end the others for them."""
    photos = draw_photos(tmp_path / "photos", {"test": 4})
    command = [sys.executable, "-m", "capdist.cli", "evaluate", model, "--source", "folder", "--path", str(photos)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Without Java, whose METEOR takes longer than all the rest.
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": str(tmp_path)}
    processes = [
        subprocess.Popen(
            # A name too long for what is written first: found out only once there are scores to write.
            [*command, "--output", str(tmp_path / ("a" * 250))],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [5, 5], said
    assert not any("Traceback" in text for text in said), said
    assert sorted(path.suffix for path in photos.iterdir()) == [".jsonl", *[".png"] * 4]
