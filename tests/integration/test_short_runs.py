"""Short runs as a whole: self-critical ones are on-policy, stages go on from each other, and each ends with a model."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from capdist.commands.features import fill_cache
from capdist.errors import CheckpointError, Stopped, UsageError
from capdist.evaluation import report
from capdist.recipe.reading import load_recipe, load_stages
from capdist.train import train
from capdist.training.loop import Loop
from capdist.training.validation import Validation
from tests.conftest import draw_photos, reset_accelerate
from tests.processes import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Train a run on six photos and return its folder and its last weights."""
    monkeypatch.setattr(report, "final_report", lambda *rest: ("none", {}))  # takes longer than all the rest
    photos = draw_photos(tmp_path / "photos", {"train": 6, "validation": 2})
    frozen = ("encoder.trainable_from=null", "encoder.batch_norm=frozen", "training.warmup_steps=0")

    def train_run(
        name: str, *more: str, recipe: str | Path = "configs/scenes.yaml", resume: bool = False
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        reset_accelerate()
        places = (f"data.path={photos}", f"run.output_dir={tmp_path}", f"run.name={name}")
        result = train(load_stages(recipe, [*SMALL, *frozen, *places, *more]), resume=resume)
        checkpoint = result.folder / "checkpoints" / f"step_{result.steps:08d}"
        return result.folder, load_file(checkpoint / "model.safetensors")

    return train_run


SCST = ("training.objective=scst", "training.max_steps=2")


def test_a_run_that_trains_its_encoder_averages_and_goes_on(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Weights that lie channels last, pixels instead of features, and a start folder that is gone."""
    start, _ = run("start", "training.max_steps=1")
    gone = start.rename(tmp_path / "elsewhere")
    more = ("encoder.trainable_from=layer1", "training.ema_decay=0.5", f"training.start_from={gone / 'model'}", *SCST)
    folder, _ = run("pixels", *more)
    shutil.rmtree(gone)
    _, longer = run("pixels", *more, "training.max_steps=3", resume=True)
    averages = [load_file(folder / "checkpoints" / f"step_{step:08d}" / "average.safetensors") for step in (2, 3)]
    name = "encoder.network.layer1.0.conv1.weight"
    assert not torch.equal(averages[0][name], averages[1][name])
    # After step 3 the average keeps min(0.5, 4 / 13) of what it was.
    expected = averages[0][name] * 4 / 13 + longer[name] * 9 / 13
    torch.testing.assert_close(averages[1][name], expected, rtol=1e-5, atol=1e-7)


def test_the_temperature_divides_the_logits_of_the_start_once(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start, weights = run("start", "training.max_steps=1")
    still = (
        *SCST,
        f"training.start_from={start / 'model'}",
        "training.learning_rate=1e-9",
        "training.weight_decay=0.0",
    )
    _, sharpened = run("sharp", *still, "scst.temperature=0.5")
    _, resumed = run("sharp", *still, "scst.temperature=0.5", "training.max_steps=3", resume=True)
    for name, tensor in weights.items():
        expected = tensor / 0.5 if name.startswith("decoder.head.") else tensor
        for found in (sharpened, resumed):
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_a_start_that_is_never_surpassed_stays_the_best(run) -> None:  # type: ignore[no-untyped-def]
    start, _ = run("start", "evaluation.select_by=bleu_1", "training.epochs=30", "training.learning_rate=0.02")
    more = ("training.learning_rate=10.0", "evaluation.select_by=bleu_1")
    folder, _ = run("worse", *SCST, f"training.start_from={start / 'model'}", *more)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = [(line["step"], line["bleu_1"]) for line in lines if "bleu_1" in line]
    assert [step for step, _ in scores] == [0, 2]
    assert scores[0][1] > scores[1][1]
    kept, began = (load_file(f / "model" / "model.safetensors") for f in (folder, start))
    assert all(torch.equal(tensor, began[name]) for name, tensor in kept.items())


def test_a_finished_stage_is_left_alone(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  a:\n  b:\n    training: {objective: scst}\n")
    run("run", "training.max_steps=1", recipe=recipe)
    shutil.rmtree(tmp_path / "run-a" / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run-a").rglob("*")}
    more = ("training.max_steps=1", "stages.b.training.max_steps=2")
    run("run", *more, recipe=recipe, resume=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run-a").rglob("*")} == before
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


def test_a_stage_that_did_not_happen_as_the_recipe_says_is_not_passed_over(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  a:\n  b:\n")
    run("run", "training.max_steps=1", recipe=recipe)
    with pytest.raises(CheckpointError, match="run-a: this stage is over; training.max_steps was 1, now 2"):
        run("run", "training.max_steps=2", recipe=recipe, resume=True)
    with pytest.raises(CheckpointError, match=r"run-a: .* data.batch_size was 4, now 2"):
        run("run", "training.max_steps=1", "stages.a.data.batch_size=2", recipe=recipe, resume=True)
    run("run", "training.max_steps=1", "training.log_every=3", recipe=recipe, resume=True)
    recipe.write_text("stages:\n  a:\n  between:\n  b:\n")
    with pytest.raises(CheckpointError, match="run-between: has no config.yaml and model/"):
        run("run", "training.max_steps=1", recipe=recipe, resume=True)


def test_a_block_that_a_later_stage_cannot_train_is_named_before_the_first_begins(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  a:\n  b:\n")
    with pytest.raises(UsageError, match="layer4"):
        run("run", "training.max_steps=1", "stages.b.encoder.trainable_from=layer4", recipe=recipe)
    assert not list(tmp_path.glob("run*"))


def test_the_model_that_is_kept_is_the_average(run) -> None:  # type: ignore[no-untyped-def]
    folder, weights = run("run", "training.ema_decay=0.5", "training.max_steps=3", "evaluation.every_epochs=9")
    average = load_file(folder / "checkpoints" / "step_00000003" / "average.safetensors")
    kept = load_file(folder / "model" / "model.safetensors")
    assert average.keys() == {name for name in kept if name.startswith(("decoder.", "projection."))}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.items())
    assert not any(torch.equal(tensor, weights[name]) for name, tensor in average.items())


def test_samples_are_learned_by_the_network_that_drew_them(run) -> None:  # type: ignore[no-untyped-def]
    start, _ = run("start", "training.max_steps=1")
    scst = (*SCST, f"training.start_from={start / 'model'}")
    _, plain = run("plain", *scst, "decoder.dropout=0.0")
    _, dropped = run("dropped", *scst, "decoder.dropout=0.5")
    _, other = run("other", *scst, "decoder.dropout=0.0", "scst.samples=4")
    assert all(torch.equal(tensor, dropped[name]) for name, tensor in plain.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


def test_features_made_ahead_are_those_of_the_model_that_a_run_starts_from(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trains = ("encoder.trainable_from=layer1", "training.learning_rate=1e-3")
    start, _ = run("start", "training.max_steps=1", *trains)
    folder, _ = run("one", f"training.start_from={start / 'model'}", "training.max_steps=1")
    stores = sorted((tmp_path / ".features").glob("*/features.npy"))
    shutil.rmtree(tmp_path / ".features")
    reset_accelerate()
    fill_cache(load_recipe(folder / "config.yaml"))
    assert sorted((tmp_path / ".features").glob("*/features.npy")) == stores


def test_a_run_resumed_with_no_step_left_still_ends_with_a_model(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell_to_stop(loop: Loop, *_: object) -> None:
        if loop.state.step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "_log_training", tell_to_stop)
    with pytest.raises(Stopped, match="after step 2"):
        run("short", "training.max_steps=9", "training.log_every=1", "evaluation.every_epochs=9")
    assert not (tmp_path / "short" / "model").exists()
    folder, weights = run("short", "training.max_steps=2", "evaluation.every_epochs=9", resume=True)
    kept = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in kept.items())
    assert json.loads((folder / "checkpoints" / "step_00000002" / "state.json").read_text())["state"]["best_step"] == 2


def _validations(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["cider"]) for line in lines if line.get("split") == "validation"]


def test_a_stop_at_the_end_of_an_epoch_saves_before_it_validates(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = ("data.batch_size=6", "data.captions_per_image=5", "training.log_every=1", "training.epochs=3")
    straight, expected = run("straight", *epochs)
    assert [step for step, _ in _validations(straight)] == [1, 2, 3]

    def tell_to_stop(loop: Loop, *_: object) -> None:
        if loop.state.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log_training", tell_to_stop)
        with pytest.raises(Stopped, match="after step 2"):
            run("stopped", *epochs)
    assert [step for step, _ in _validations(tmp_path / "stopped")] == [1]
    folder, resumed = run("stopped", *epochs, resume=True)
    assert _validations(folder) == _validations(straight)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_no_model_is_kept_without_the_checkpoint_of_its_step(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_power(loop: Loop, *_: object) -> None:
        if loop.state.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "_log_training", lose_power)
    with pytest.raises(KeyboardInterrupt):
        run("run", "data.batch_size=6", "training.log_every=1", "training.epochs=3", "checkpoint.every_steps=100")
    assert (tmp_path / "run" / "model").is_dir()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_signal_after_the_last_step_ends_the_program(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Validation.__call__

    def validate_and_hear(validation: Validation, *rest: Any) -> float:
        signal.raise_signal(signal.SIGTERM)
        return validate(validation, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", validate_and_hear)
        with pytest.raises(Stopped, match="after the last step; all is saved") as stopped:
            run("run", "training.max_steps=1")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    folder, _ = run("run", "training.max_steps=1", resume=True)
    assert len(_validations(folder)) == 1


def test_a_word_head_is_of_training_only(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    same = ("encoder.projection=8", "evaluation.every_epochs=9")
    more = ("training.word_presence=1.0", *same)
    straight, expected = run("straight", "training.max_steps=3", *more)
    run("halting", "training.max_steps=1", *more)
    _, resumed = run("halting", "training.max_steps=3", *more, resume=True)
    assert expected.keys() == resumed.keys() >= {"word_head.weight", "word_head.bias"}
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    _, plain = run("plain", "training.max_steps=3", *same)
    assert not torch.equal(plain["projection.weight"], expected["projection.weight"])
    kept = load_file(straight / "model" / "model.safetensors")
    assert kept.keys() == plain.keys()
    _, rewarded = run("rewarded", f"training.start_from={straight / 'model'}", *SCST, *more)
    assert rewarded.keys() == plain.keys()
