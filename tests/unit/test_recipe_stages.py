"""Recipes in stages: what each stage is, where it lives, what it starts from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from capdist.errors import UsageError
from capdist.recipe.reading import load_recipe, load_stages, save_recipe
from capdist.training.start import check_networks

RECIPE = """
run:
  name: photos
  output_dir: there
training:
  epochs: 9
  learning_rate: 1e-3
stages:
  words:
  look:
    encoder: {trainable_from: layer4}
    training:
      epochs: 2
      encoder_learning_rate: 1e-5
  reward:
    training: {objective: scst, learning_rate: 5e-5}
    scst:
      samples: 4
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def _mistakes(folder: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        load_stages(_write(folder, text), overrides)
    return caught.value.lines


def test_each_stage_is_the_recipe_with_its_changes(tmp_path: Path) -> None:
    words, look, reward = load_stages(_write(tmp_path, RECIPE))
    assert [s.training.epochs for s in (words, look, reward)] == [9, 2, 9]
    assert [s.training.learning_rate for s in (words, look, reward)] == [1e-3, 1e-3, 5e-5]
    assert [s.encoder.trainable_from for s in (words, look, reward)] == [None, "layer4", None]
    assert [s.training.objective for s in (words, look, reward)] == ["cross_entropy", "cross_entropy", "scst"]
    assert [s.scst.samples for s in (words, look, reward)] == [5, 5, 4]


def test_the_last_stage_is_the_run_and_each_starts_from_the_one_before(tmp_path: Path) -> None:
    stages = load_stages(_write(tmp_path, RECIPE), ["run.name=mine"])
    assert [str(s.run_folder) for s in stages] == ["there/mine-words", "there/mine-look", "there/mine"]
    assert [s.training.start_from for s in stages] == [None, "there/mine-words/model", "there/mine-look/model"]


def test_overrides_hold_in_all_stages(tmp_path: Path) -> None:
    stages = load_stages(_write(tmp_path, RECIPE), ["training.epochs=1", "training.start_from=old/model"])
    assert [s.training.epochs for s in stages] == [1, 1, 1]
    assert stages[0].training.start_from == "old/model"
    assert stages[1].training.start_from == "there/photos-words/model"


def test_the_frozen_recipe_of_flickr8k_is_the_first_stage_of_the_whole() -> None:
    alike = ["data.path=photos", "run.name=run", "encoder.projection=512", "decoder.gate=true", "decoder.dropout=0.5"]
    first = load_stages("configs/flickr8k.yaml", alike)[0].to_dict()
    frozen = load_recipe("configs/flickr8k_frozen.yaml", alike).to_dict()
    assert first["run"].pop("name") == "run-words"
    assert frozen["run"].pop("name") == "run"
    assert first == frozen


def test_an_override_may_be_for_one_stage(tmp_path: Path) -> None:
    path = _write(tmp_path, RECIPE)
    overrides = ["training.epochs=1", "stages.look.training.epochs=5", "stages.reward.scst.samples=7"]
    for stages in (load_stages(path, overrides), load_stages(path, overrides[::-1])):
        assert [s.training.epochs for s in stages] == [1, 5, 1]
        assert [s.scst.samples for s in stages] == [5, 5, 7]
    with pytest.raises(UsageError, match=r"command line: stages\.rewad: no such stage; did you mean 'reward'"):
        load_stages(path, ["stages.rewad.scst.samples=7"])


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("stages.look", "changes nothing"),
        ("stages.look=3", "changes nothing"),
        ("stages.", "no such stage"),
        ("stages.look.training=3", "is not an override"),
        ("stages.look.training.start_from=old/model", "a stage starts from the one before"),
        ("stages.look.training.epohs=2", "stages.look: training.epohs: unknown key; did you mean 'training.epochs'"),
    ],
)
def test_an_override_for_one_stage_that_cannot_take_effect_is_refused(
    tmp_path: Path, override: str, found: str
) -> None:
    (mistake,) = _mistakes(tmp_path, RECIPE, override)
    assert mistake.startswith("command line: ")
    assert found in mistake


@pytest.mark.parametrize("stages", ["{1: {}, 2: {}}", "{1: {}, a: {}}", "{a: {}, 1: {}}"])
@pytest.mark.parametrize("name", ["1", "3"])
def test_an_override_for_a_stage_whose_name_is_no_text_is_told_of_the_name(
    tmp_path: Path, stages: str, name: str
) -> None:
    mistakes = _mistakes(tmp_path, f"stages: {stages}\n", f"stages.{name}.training.epochs=2")
    assert any("stages.1: must be a name of letters" in mistake for mistake in mistakes)
    assert any("no such stage" in mistake for mistake in mistakes) == (name == "3")


def test_the_first_stage_may_say_what_it_starts_from(tmp_path: Path) -> None:
    (first, *_) = load_stages(_write(tmp_path, RECIPE), ["stages.words.training.start_from=old/model"])
    assert first.training.start_from == "old/model"


@pytest.mark.parametrize("run", ["photos-words", "photos-look", "photos"])
def test_no_stage_starts_from_what_the_recipe_writes(tmp_path: Path, run: str) -> None:
    (mistake,) = _mistakes(tmp_path, RECIPE, f"training.start_from=there/{run}/model")
    assert f": training.start_from: there/{run}/model is in the folder of this run" in mistake


def test_a_recipe_without_stages_says_so(tmp_path: Path) -> None:
    (mistake,) = _mistakes(tmp_path, "training: {epochs: 2}", "stages.look.training.epochs=2")
    assert mistake.startswith("command line: 'stages.look.training.epochs=2': ")
    assert "recipe.yaml has no stages" in mistake


def test_an_override_for_one_stage_cannot_change_what_a_model_is_made_of(tmp_path: Path) -> None:
    (mistake,) = _mistakes(tmp_path, RECIPE, "stages.look.run.seed=3")
    assert mistake == "command line: stages.look: run.seed: must be the same in all stages; set it outside them"


def test_only_the_first_stage_says_what_it_starts_from(tmp_path: Path) -> None:
    text = "stages:\n  a:\n    training: {start_from: old}\n  b:\n    training: {start_from: other}\n"
    (mistake,) = _mistakes(tmp_path, text)
    assert mistake.startswith(f"{tmp_path}/recipe.yaml:5: training.start_from: a stage starts from the one before")


def test_a_run_does_not_start_from_its_own_folder_at_home(tmp_path: Path) -> None:
    text = "run: {name: a, output_dir: ~/runs}\ntraining: {start_from: ~/runs/a/model}\n"
    (mistake,) = _mistakes(tmp_path, text)
    assert mistake.startswith(f"{tmp_path}/recipe.yaml:2: training.start_from: ~/runs/a/model is in the folder of this")


def test_a_run_does_not_start_from_its_own_folder(tmp_path: Path) -> None:
    text = "run: {name: a, output_dir: runs}\ntraining: {start_from: ./runs/a/model}\n"
    (mistake,) = _mistakes(tmp_path, text)
    assert mistake.startswith(f"{tmp_path}/recipe.yaml:2: training.start_from: ./runs/a/model is in the folder of this")
    load_stages(_write(tmp_path, text.replace("a/model", "a-words/model")))


def test_a_recipe_without_stages_is_one_stage_and_programs_that_do_not_train_see_the_first(tmp_path: Path) -> None:
    (stage,) = load_stages(_write(tmp_path, "run: {name: one}"))
    assert (stage.run.name, stage.training.start_from) == ("one", None)
    assert load_recipe(_write(tmp_path, RECIPE)) == load_stages(tmp_path / "recipe.yaml")[0]


def test_the_resolved_recipe_of_a_stage_is_a_recipe(tmp_path: Path) -> None:
    for stage in load_stages(_write(tmp_path, RECIPE)):
        save_recipe(stage, tmp_path / "config.yaml")
        assert load_stages(tmp_path / "config.yaml") == [stage]


def test_mistakes_in_stages_say_where_and_a_mistake_of_all_stages_is_told_once(tmp_path: Path) -> None:
    text = RECIPE.replace("samples: 4", "sampels: 4").replace("epochs: 9", "epochs: 0")
    mistakes = _mistakes(tmp_path, text)
    line = 1 + text.splitlines().index("      sampels: 4")
    assert f"{tmp_path}/recipe.yaml:{line}: scst.sampels: unknown key; did you mean 'scst.samples'?" in mistakes
    assert len(mistakes) == 2
    assert sum("training.epochs" in mistake for mistake in mistakes) == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("run: {seed: 3}", "run.seed"),
        ("text: {min_frequency: 9}", "text.min_frequency"),
        ("decoder: {hidden_size: 64}", "decoder.hidden_size"),
        ("encoder: {name: resnet18}", "encoder.name"),
        ("data: {path: elsewhere}", "data.path"),
        ("training: {mixed_precision: bf16}", "training.mixed_precision"),
        ("evaluation: {halve_validation: true}", "evaluation.halve_validation"),
    ],
)
@pytest.mark.parametrize("stage", ["words", "reward"])
def test_what_a_model_is_made_of_cannot_change_between_stages(
    tmp_path: Path, change: str, key: str, stage: str
) -> None:
    other = "reward" if stage == "words" else "words"
    text = f"stages:\n  {stage}:\n    {change}\n  {other}:\n" if stage == "words" else ""
    text = text or f"stages:\n  {other}:\n  {stage}:\n    {change}\n"
    (mistake,) = _mistakes(tmp_path, text)
    line = 1 + text.splitlines().index(f"    {change}")
    assert mistake == f"{tmp_path}/recipe.yaml:{line}: {key}: must be the same in all stages; set it outside them"


@pytest.mark.parametrize("stages", ["[]", "3", "{}", "[words]"])
def test_stages_are_named(tmp_path: Path, stages: str) -> None:
    (mistake,) = _mistakes(tmp_path, f"stages: {stages}")
    assert mistake.startswith(f"{tmp_path}/recipe.yaml:1: stages: names stages")


@pytest.mark.parametrize(
    "stage", ["words: 3", "words: [a]", "words: {training: 3}", "words: {training: [a]}", "'../x': {}", "3: {}"]
)
def test_a_stage_is_a_name_and_sections(tmp_path: Path, stage: str) -> None:
    (mistake,) = _mistakes(tmp_path, f"stages:\n  {stage}\n")
    assert mistake.startswith(f"{tmp_path}/recipe.yaml:2: stages.")


def test_a_block_that_the_encoder_has_not_is_told_with_the_run_that_wants_it() -> None:
    overrides = ["data.path=photos", "encoder.name=resnet18", "stages.look.encoder.trainable_from=blocks.4"]
    with pytest.raises(UsageError, match=r"^run flickr8k-look: encoder\.trainable_from: .*'blocks\.4'[^\n]*$"):
        check_networks(load_stages("configs/flickr8k.yaml", overrides))
    with pytest.raises(UsageError, match=r"^run flickr8k-look: [^\n]*\nrun flickr8k: [^\n]*$"):
        check_networks(
            load_stages("configs/flickr8k.yaml", [*overrides, "stages.reward.encoder.trainable_from=blocks.5"])
        )
