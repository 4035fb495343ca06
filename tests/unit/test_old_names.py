"""Keys under the names that older versions gave them: understood everywhere, and told once where a user wrote them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from capdist.errors import CheckpointError, UsageError
from capdist.features.filling import _named_as_ever
from capdist.model_folder import _read_config
from capdist.recipe.old_names import rename_old_keys
from capdist.recipe.reading import load_recipe, load_stages, recipe_from_dict, save_recipe
from capdist.recipe.sections import EncoderSection, Recipe
from capdist.training.checkpoints import Identity, TrainState, check_identity, read_state
from capdist.training.run import refuse_to_skip
from tests.conftest import reset_accelerate

OLD = """\
encoder:
  name: resnet18
  stage: layer2
stages:
  words:
    training: {stage: cross_entropy, epochs: 2}
  reward:
    training:
      stage: scst
"""


@pytest.fixture(autouse=True)
def _first_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("RANK", "CAPDIST_EXIT_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("capdist"), "level", logging.NOTSET)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def _mistakes(path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_stages(path, overrides)
    return caught.value.lines


def test_only_old_names_are_renamed_and_the_order_is_kept() -> None:
    recipe = {"training": {"epochs": 1, "stage": "scst", "seed": 2}, "encoder": {"name": "a"}, "data": {"stage": 3}}
    before = json.dumps(recipe)
    values, renamed = rename_old_keys(recipe)
    assert json.dumps(recipe) == before
    assert renamed == [("training", "stage", "objective")]
    assert list(values["training"].items()) == [("epochs", 1), ("objective", "scst"), ("seed", 2)]
    assert values["data"] == {"stage": 3}
    both = {"encoder": {"stage": "layer1", "last_block": "layer2"}}
    assert rename_old_keys(both) == (both, [])
    for unsound in ({"encoder": None}, {"encoder": ["stage"]}, {"encoder": "stage"}, {}):
        assert rename_old_keys(unsound) == (unsound, [])


def test_a_recipe_with_old_names_is_told_once_a_key(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(OLD)
    words, reward = load_stages(path)
    assert (words.encoder.last_block, reward.encoder.last_block) == ("layer2", "layer2")
    assert (words.training.objective, reward.training.objective) == ("cross_entropy", "scst")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:3: encoder.stage is now called encoder.last_block",
        f"{path}:6: training.stage is now called training.objective",
    ]
    path.write_text(OLD.replace("encoder:\n  name: resnet18\n  stage:", "encoder:\n  name: resnet18\n  last_block:"))
    assert load_stages(path)[0] == words


def test_overrides_take_old_names_in_all_stages_or_one(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("stages:\n  words:\n  reward:\n")
    words, reward = load_stages(path, ["encoder.stage=layer3", "stages.reward.training.stage=scst"])
    assert (words.encoder.last_block, words.training.objective) == ("layer3", "cross_entropy")
    assert (reward.encoder.last_block, reward.training.objective) == ("layer3", "scst")
    assert [record.getMessage() for record in caplog.records] == [
        "command line: encoder.stage is now called encoder.last_block",
        "command line: training.stage is now called training.objective",
    ]


@pytest.mark.parametrize("override", ["encoder.stage=layer4", "encoder.last_block=layer4"])
@pytest.mark.parametrize("key", ["stage", "last_block"])
def test_an_override_wins_whichever_name_it_has(path: Path, key: str, override: str) -> None:
    path.write_text(f"encoder: {{{key}: layer1}}\n")
    assert load_recipe(path, [override]).encoder.last_block == "layer4"


@pytest.mark.parametrize("key", ["stage", "objective"])
def test_a_stage_wins_over_the_recipe_whichever_name_it_has(path: Path, key: str) -> None:
    other = {"stage": "objective", "objective": "stage"}[key]
    path.write_text(f"training: {{{other}: scst}}\nstages:\n  a:\n    training: {{{key}: cross_entropy}}\n  b:\n")
    assert [stage.training.objective for stage in load_stages(path)] == ["cross_entropy", "scst"]


BOTH = "encoder.stage: is the old name of encoder.last_block, which is given too; keep one"


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        ("encoder:\n  last_block: layer1\n  stage: layer2\n", [], "{path}:3"),
        ("stages:\n  a:\n    encoder: {last_block: layer1, stage: layer2}\n", [], "{path}:3"),
        ("", ["encoder.stage=layer1", "encoder.last_block=layer2"], "command line"),
        ("stages:\n  a:\n", ["encoder.last_block=x", "encoder.stage=y"], "command line"),
    ],
)
def test_both_names_of_a_key_are_refused(path: Path, text: str, overrides: list[str], place: str) -> None:
    assert _mistakes(path, text, *overrides) == (f"{place.format(path=path)}: {BOTH}",)


def test_a_wrong_value_is_told_by_the_new_name_at_the_old_place(path: Path) -> None:
    (mistake,) = _mistakes(path, "training:\n  epochs: 1\n  stage: sct\n")
    assert mistake == f"{path}:3: training.objective: must be 'cross_entropy' or 'scst', found 'sct' (str)"


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"CAPDIST_EXIT_FOLDER": "/tmp"}])
def test_other_processes_tell_nothing(
    path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path.write_text(OLD)
    assert load_stages(path, ["encoder.stage=layer3"])[0].encoder.last_block == "layer3"
    assert not caplog.records


def test_values_that_are_from_no_file_may_have_old_names(caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_from_dict({"encoder": {"stage": "layer1"}}, "sizes", ["training.stage=scst"])
    assert (recipe.encoder.last_block, recipe.training.objective) == ("layer1", "scst")
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == ["sizes", "command line"]


# --- what runs of older versions left -------------------------------------------------------------------------------


def _as_it_was(recipe: Recipe) -> dict[str, dict[str, object]]:
    """Return a resolved recipe as versions before the new names saved it."""
    values = recipe.to_dict()
    del values["encoder"]["batch_size"]
    values["encoder"]["stage"] = values["encoder"].pop("last_block")
    values["training"]["stage"] = values["training"].pop("objective")
    return values


RECIPE = Recipe(encoder={"name": "resnet18", "last_block": "layer2"}, training={"objective": "scst"})


def test_the_saved_recipe_of_a_run_is_read_in_silence(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(yaml.safe_dump(_as_it_was(RECIPE)))
    assert load_recipe(path, is_saved=True) == RECIPE
    assert not caplog.records


def test_a_checkpoint_of_an_older_version_is_of_the_same_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = Identity(RECIPE.to_dict(), "words", "data", "", 1, "no", 1, {})
    then = asdict(now) | {"recipe": _as_it_was(RECIPE)}
    (tmp_path / "state.json").write_text(json.dumps({"state": asdict(TrainState(3)), "identity": then}))
    state, saved = read_state(tmp_path)
    assert state == TrainState(3)
    check_identity(tmp_path, saved, now, pytest.fail)
    other = Identity(Recipe(encoder={"name": "resnet18"}).to_dict(), "words", "data", "", 1, "no", 1, {})
    with pytest.raises(CheckpointError, match=r"encoder\.last_block was 'layer2', now None"):
        check_identity(tmp_path, saved, other, pytest.fail)
    assert not caplog.records


def test_a_finished_stage_of_an_older_version_is_as_it_was_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reset_accelerate()
    recipe = RECIPE.model_copy(update={"run": RECIPE.run.model_copy(update={"output_dir": str(tmp_path)})})
    (recipe.run_folder / "model").mkdir(parents=True)
    (recipe.run_folder / "config.yaml").write_text(yaml.safe_dump(_as_it_was(recipe)))
    refuse_to_skip([recipe], Accelerator(cpu=True))
    reset_accelerate()
    assert not caplog.records


def test_a_model_folder_of_an_older_version_names_its_last_block(tmp_path: Path) -> None:
    config = {
        "format": 1,
        "encoder": _as_it_was(RECIPE)["encoder"],
        "decoder": RECIPE.decoder.model_dump(mode="json"),
        "preprocessing": {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        "max_length": 9,
        "search": {"beam_size": 3, "length_penalty": 0.0, "no_repeat_ngram": 0, "min_length": 0},
        "metrics": {},
        "sha256": {"model.safetensors": "0" * 64, "vocabulary.json": "0" * 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _read_config(tmp_path / "config.json").encoder == RECIPE.encoder


def test_caches_of_older_versions_are_found() -> None:
    """The key of a cache is a digest of this text."""
    encoder = EncoderSection(name="resnet18", last_block="layer2", grid=12, batch_size=3)
    assert json.dumps(_named_as_ever(encoder)) == '{"name": "resnet18", "stage": "layer2", "grid": 12}'


def test_new_runs_save_new_names(tmp_path: Path) -> None:
    save_recipe(RECIPE, tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["training"]["objective"] == "scst"
    assert saved["encoder"]["last_block"] == "layer2"
    assert "stage" not in saved["training"].keys() | saved["encoder"].keys()
