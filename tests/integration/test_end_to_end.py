"""Train, evaluate, caption, check: the promises of files, keys and exit codes, by real processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capdist import Captioner
from capdist.errors import UsageError
from capdist.model_folder import load_pretrained, save_pretrained
from capdist.text.vocabulary import Vocabulary
from tests.processes import REPOSITORY, SMALL, TRAIN, check_finished, launch, run

pytestmark = pytest.mark.slow

METRICS = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor"}


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["--config", "configs/scenes.yaml", *SMALL, f"data.path={photos}", f"run.output_dir={folder}"]
    arguments += ["run.name=small", "training.epochs=3", "training.log_every=2", "encoder.trainable_from=all"]
    arguments += ["tracking.with=[tensorboard, wandb]", "evaluation.consensus=4"]
    result = launch(TRAIN, arguments, WANDB_MODE="offline")
    check_finished(result)
    assert "constant caption" in result.stdout
    assert "evaluation.consensus does nothing with fewer than 3 beams" in result.stderr
    return folder / "small"


def test_a_run_leaves_what_is_promised(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all("step" in line for line in lines)
    assert lines[0].keys() >= {"num_processes", "device", "mixed_precision", "versions"}
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]
    assert all(line.keys() >= {"loss", "lr", "captions_per_second"} for line in training)
    validations = [line for line in lines if line.get("split") == "validation"]
    assert [line["step"] for line in validations] == [8, 16, 24]
    assert all(line.keys() >= METRICS - {"meteor"} for line in validations)
    assert lines[-1]["split"] == "test"
    assert lines[-1].keys() >= METRICS
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step_00000016", "step_00000024"]
    assert sorted(p.name for p in (trained / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "vocabulary.json",
    ]  # fmt: skip
    assert (trained / "config.yaml").exists()
    assert list(trained.rglob("events.out.tfevents*"))
    assert list(trained.rglob("offline-run-*"))
    assert not list(trained.rglob(".tmp*"))


def test_the_best_model_is_the_one_kept(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    scores = [line["cider"] for line in lines if line.get("split") == "validation"]
    state = json.loads((trained / "checkpoints" / "step_00000024" / "state.json").read_text())["state"]
    assert state["best_score"] == max(scores)
    assert state["best_step"] == 8 * (scores.index(max(scores)) + 1)


def test_the_resolved_recipe_trains_the_same_again(trained: Path, tmp_path: Path) -> None:
    overrides = [f"run.output_dir={tmp_path}", "tracking.with=[]"]
    check_finished(run([str(TRAIN), "--config", str(trained / "config.yaml"), *overrides]))
    weights = "checkpoints/step_00000024/model.safetensors"
    assert (tmp_path / "small" / weights).read_bytes() == (trained / weights).read_bytes()


def test_evaluate_writes_what_is_promised(trained: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    command = ["-m", "capdist.cli", "evaluate", str(trained / "model"), "--source", "folder", "--path", str(photos)]
    check_finished(run([*command, "--split", "test", "--beam-size", "2", "--output", str(output)]))
    result = json.loads(output.read_text())
    assert result["metrics"].keys() >= METRICS
    assert result["settings"]["num_images"] == 10
    assert result["settings"]["num_references"] == 50
    assert {"split", "beam_size", "tokeniser", "model_sha256"} <= result["settings"].keys()
    assert result["settings"]["search"]["consensus"] is None, "two beams have nothing to agree on"
    assert len(result["captions"]) == 10
    assert all(row.keys() == {"image_id", "caption", "references"} for row in result["captions"])
    final = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    for name in METRICS - {"meteor"}:
        assert result["metrics"][name] == pytest.approx(final[name], abs=1e-9)


def test_evaluate_of_an_ensemble_of_one_model_scores_as_the_model(trained: Path, photos: Path, tmp_path: Path) -> None:
    output, model = tmp_path / "scores.json", str(trained / "model")
    command = ["-m", "capdist.cli", "evaluate", model, "--with", model, "--source", "folder", "--path", str(photos)]
    # Without Java, whose METEOR takes longer than all the rest.
    check_finished(run([*command, "--beam-size", "2", "--consensus", "0", "--output", str(output)], PATH=str(tmp_path)))
    result = json.loads(output.read_text())
    assert result["settings"]["search"]["consensus"] is None
    digest = json.loads((trained / "model" / "config.json").read_text())["sha256"]["model.safetensors"]
    assert (result["settings"]["model_sha256"], result["settings"]["members_sha256"]) == (digest, [digest, digest])
    final = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    for name in METRICS - {"meteor"}:
        assert result["metrics"][name] == pytest.approx(final[name], abs=1e-9)


def test_an_ensemble_of_two_vocabularies_exits_with_4(trained: Path, photos: Path, tmp_path: Path) -> None:
    model = load_pretrained(trained / "model")
    others = Vocabulary(model.vocabulary.words[:3:-1])
    save_pretrained(replace(model, vocabulary=others), tmp_path / "other")
    command = ["-m", "capdist.cli", "caption", str(trained / "model"), "--with", str(trained / "model")]
    result = run([*command, "--with", str(tmp_path / "other"), str(photos / "test_0000.png")])
    assert result.returncode == 4
    (line,) = result.stderr.splitlines()
    assert f"{tmp_path / 'other'}: its vocabulary" in line
    assert str(trained / "model") in line


def test_evaluate_names_the_split_it_has_not(trained: Path, photos: Path) -> None:
    command = ["-m", "capdist.cli", "evaluate", str(trained / "model"), "--source", "folder", "--path", str(photos)]
    result = run([*command, "--split", "exam"])
    assert result.returncode == 3
    assert "train, validation, test" in result.stderr.splitlines()[-1]


def test_caption_command(trained: Path, photos: Path, tmp_path: Path) -> None:
    two = [str(photos / "test_0000.png"), str(photos / "test_0001.png")]
    command = ["-m", "capdist.cli", "caption", str(trained / "model"), *two, "--json", "--attention", str(tmp_path)]
    result = run(command)
    check_finished(result)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["image"] for row in rows] == two
    assert all(row["caption"] and row["log_probability"] < 0 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"test_0000_attention.png", "test_0001_attention.png"}
    assert Image.open(tmp_path / "test_0000_attention.png").width > 200


def test_caption_command_says_no_word_twice_where_asked(trained: Path, photos: Path) -> None:
    ten = sorted(map(str, photos.glob("test_*.png")))
    free = [caption.words for caption in Captioner.from_pretrained(trained / "model").caption(ten)]
    assert any(len(set(words)) < len(words) for words in free), "nothing to forbid"
    result = run(["-m", "capdist.cli", "caption", str(trained / "model"), *ten, "--json", "--no-repeat-ngram", "1"])
    check_finished(result)
    said = [json.loads(line)["caption"].split() for line in result.stdout.splitlines()]
    assert len(said) == 10
    assert all(words and len(set(words)) == len(words) for words in said)


def test_python_interface_takes_every_kind_of_image(trained: Path, photos: Path) -> None:
    captioner = Captioner.from_pretrained(trained / "model")
    path = photos / "test_0002.png"
    picture = Image.open(path)
    kinds = [str(path), path, picture, np.asarray(picture)]
    captions = captioner.caption(kinds, beam_size=3, return_attention=True)
    assert len({caption.text for caption in captions}) == 1
    assert captioner.caption(path, beam_size=3)[0].text == captions[0].text
    attention = captions[0].attention
    assert attention is not None
    assert attention.shape == (len(captions[0].words), 64)
    np.testing.assert_allclose(attention.sum(dim=1).numpy(), 1, atol=1e-5)


def test_photos_may_be_captioned_at_another_size(trained: Path, photos: Path) -> None:
    captioner = Captioner.from_pretrained(trained / "model", image_size=96)
    path = photos / "test_0002.png"
    larger = Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BILINEAR)
    of_file, of_larger = captioner.caption([path, larger], return_attention=True)
    assert of_file.attention is not None
    assert of_file.attention.shape[1] == (96 // 4) ** 2, "not a cell for every 4 x 4 pixels"
    assert of_file.log_probability == pytest.approx(of_larger.log_probability)
    command = ["-m", "capdist.cli", "caption", str(trained / "model"), str(path), "--json", "--image-size", "96"]
    result = run(command)
    check_finished(result)
    assert json.loads(result.stdout)["log_probability"] == pytest.approx(of_file.log_probability, rel=1e-4)


def test_a_split_may_be_scored_at_another_size(trained: Path, photos: Path, tmp_path: Path) -> None:
    output, command = tmp_path / "scores.json", ["-m", "capdist.cli", "evaluate", str(trained / "model")]
    command += ["--source", "folder", "--path", str(photos)]
    # Without Java, whose METEOR takes longer than all the rest.
    check_finished(run([*command, "--image-size", "96", "--output", str(output)], PATH=str(tmp_path)))
    result = json.loads(output.read_text())
    assert result["settings"]["image_size"] == 96
    captioner = Captioner.from_pretrained(trained / "model", image_size=96)
    files = [photos / f"test_{number:04d}.png" for number in range(10)]
    assert [row["caption"] for row in result["captions"]] == [caption.text for caption in captioner.caption(files)]
    refused = run([*command, "data.image_size=96", "data.captions_column=text"])
    assert refused.returncode == 2
    assert "data.image_size=96: not for evaluating" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("size", [0, 31, 4096])
def test_a_size_that_makes_no_sense_is_refused(trained: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"image_size: {size} pixels a side"):
        Captioner.from_pretrained(trained / "model", image_size=size)


@pytest.mark.parametrize("arguments", [["nowhere.png"], ["."]])
def test_caption_without_photos_exits_with_3(trained: Path, tmp_path: Path, arguments: list[str]) -> None:
    paths = [str(tmp_path / argument) for argument in arguments]
    result = run(["-m", "capdist.cli", "caption", str(trained / "model"), *paths])
    assert result.returncode == 3
    assert str(tmp_path) in result.stderr


def test_a_damaged_model_folder_exits_with_4(trained: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    result = run(["-m", "capdist.cli", "caption", str(folder), str(photos / "test_0000.png")])
    assert result.returncode == 4
    assert "model.safetensors" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_check_lists_what_is_wrong(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for name in ("train_0001.png", "test_0001.png"):
        (folder / name).write_bytes(b"<html>not found</html>")
    command = ["-m", "capdist.cli", "check", "--config", "configs/scenes.yaml", "data.source=folder"]
    clean = run([*command, f"data.path={photos}"])
    check_finished(clean)
    result = run([*command, f"data.path={folder}"])
    assert result.returncode == 3
    lines = [line for line in result.stderr.splitlines() if line.startswith("capdist: error:")]
    assert any("train_0001.png" in line for line in lines)
    assert any("test_0001.png" in line for line in lines)


@pytest.mark.flickr8k
def test_the_published_recipe_takes_steps_on_real_photos(flickr8k: Path, tmp_path: Path) -> None:
    overrides = [f"data.path={flickr8k}", "data.limit=64", "encoder.name=resnet50", "encoder.weights=none"]
    overrides += ["training.max_steps=20", "training.log_every=1", f"run.output_dir={tmp_path}", "tracking.with=[]"]
    check_finished(run([str(TRAIN), "--config", str(REPOSITORY / "configs/flickr8k_seed.yaml"), *overrides]))
    lines = [json.loads(line) for line in (tmp_path / "flickr8k_seed" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
