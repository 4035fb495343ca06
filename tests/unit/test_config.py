"""The recipe: what a number is, what is refused, and that each refusal says where and what would be right."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from capdist.errors import Mistake, UsageError
from capdist.recipe.decoders import DECODER_SECTIONS
from capdist.recipe.reading import load_recipe, load_stages, recipe_from_dict, save_recipe
from capdist.recipe.rules import Section, keys_of
from capdist.recipe.sections import Recipe, recipe_keys, section_classes

ROOT = Path(__file__).parents[2]
KEYS = sorted(recipe_keys())
KEY_NAMES = [f"{section}.{key}" for section, key in KEYS]
PROMISED_KEYS = """
run.name run.output_dir run.seed data.source data.path data.image_size data.batch_size data.captions_per_image
data.num_workers data.limit text.min_frequency text.max_length encoder.name encoder.weights encoder.grid
encoder.trainable_from encoder.cache decoder.name decoder.embed_size decoder.hidden_size decoder.attention_size
decoder.dropout training.epochs training.max_steps training.learning_rate training.optimizer training.schedule
training.warmup_steps training.accumulation training.clip_norm training.label_smoothing training.mixed_precision
evaluation.every_epochs evaluation.beam_size evaluation.select_by checkpoint.every_steps checkpoint.keep
tracking.with tracking.project
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def _load(path: Path, text: str | bytes, *overrides: str) -> Recipe:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path, overrides)


def _mistakes(path: Path, text: str | bytes, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        _load(path, text, *overrides)
    assert caught.value.lines, "an error must say something"
    for mistake in caught.value.lines:
        assert "\n" not in mistake, f"not one line: {mistake!r}"
    return caught.value.lines


def _set(key: str, value: str) -> str:
    section, name = key.split(".")
    return f"{section}:\n  {name}: {value}\n{_choose(key)}"


def _choose(key: str) -> str:
    """Return the line that chooses the decoder which has a key, if the default has it not."""
    owner = next((name for name, section in DECODER_SECTIONS.items() if key in _names("decoder", section)), None)
    return "" if owner in (None, "soft_attention") else f"  name: {owner}\n"


def _names(section: str, section_class: type[Section]) -> set[str]:
    return {f"{section}.{key}" for key in keys_of(section_class)}


def _get(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return recipe.to_dict()[section][name]


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("training.learning_rate", "3e-4", 0.0003),
        ("training.learning_rate", "3.0e-4", 0.0003),
        ("training.learning_rate", "1E-5", 0.00001),
        ("training.learning_rate", "1e0", 1.0),
        ("training.learning_rate", "+2e-3", 0.002),
        ("training.learning_rate", ".5", 0.5),
        ("training.learning_rate", "1.", 1.0),
        ("training.learning_rate", "2", 2.0),
        ("training.clip_norm", "1E5", 100000.0),
        ("training.clip_norm", "null", None),
        ("training.clip_norm", "~", None),
        ("training.clip_norm", "", None),
        ("run.seed", "0", 0),
        ("run.seed", "+7", 7),
        ("run.seed", "1_000", 1000),
        ("run.seed", "18446744073709551616", 2**64),
        ("data.path", "010", "010"),
        ("data.path", "0x1F", "0x1F"),
        ("data.path", "0o17", "0o17"),
        ("data.path", "12:30", "12:30"),
        ("data.path", "1:02:03.5", "1:02:03.5"),
        ("data.path", "2024-01-31", "2024-01-31"),
        ("data.path", "on", "on"),
        ("data.path", "off", "off"),
        ("data.path", "yes", "yes"),
        ("data.path", "No", "No"),
        ("data.path", "y", "y"),
        ("data.path", "'3'", "3"),
        ("data.path", "1e", "1e"),
        ("data.path", "photos/größe", "photos/größe"),
        ("encoder.cache", "off", "off"),
        ("data.horizontal_flip", "true", True),
        ("data.horizontal_flip", "False", False),
        ("tracking.with", "[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("tracking.with", "[]", []),
    ],
)
def test_values_are_read_as_people_write_them(recipe_file: Path, key: str, text: str, expected: Any) -> None:
    for recipe in (_load(recipe_file, _set(key, text)), _load(recipe_file, "", f"{key}={text}")):
        value = _get(recipe, key)
        assert value == expected
        assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("run.seed", "010"),
        ("run.seed", "0x10"),
        ("run.seed", "12:30"),
        ("run.seed", "1e3"),
        ("run.seed", "1.0"),
        ("run.seed", "true"),
        ("run.seed", "-1"),
        ("run.seed", "null"),
        ("run.seed", "'1'"),
        ("run.name", "null"),
        ("data.horizontal_flip", "on"),
        ("data.horizontal_flip", "yes"),
        ("data.horizontal_flip", "1"),
        ("data.horizontal_flip", "'true'"),
        ("data.source", "''"),
        ("data.captions_per_image", "6"),
        ("data.captions_per_image", "0"),
        ("data.image_size", "31"),
        ("data.image_size", "2049"),
        ("decoder.dropout", "1"),
        ("training.learning_rate", "0"),
        ("training.learning_rate", "1e-3x"),
        ("training.clip_norm", "0"),
        ("training.optimizer", "Adam"),
        ("training.mixed_precision", "no_"),
        ("evaluation.beam_size", "101"),
        ("checkpoint.keep", "1"),
        ("tracking.with", "wandb"),
        ("tracking.with", "[wandb, mlflow]"),
    ],
)
def test_impossible_values_are_refused_by_key_and_line(recipe_file: Path, key: str, text: str) -> None:
    (mistake,) = _mistakes(recipe_file, "# a comment\n" + _set(key, text))
    assert mistake.startswith(f"{recipe_file}:3: {key}: must be ")
    (mistake,) = _mistakes(recipe_file, "", f"{key}={text}")
    assert mistake.startswith(f"command line: {key}: must be ")


def test_choices_are_listed(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, _set("training.mixed_precision", "fp8"))
    for choice in ("inherit", "no", "bf16", "fp16"):
        assert f"'{choice}'" in mistake
    assert "found 'fp8'" in mistake


FLOAT_KEYS = [
    f"{section}.{key}" for section, keys in Recipe().to_dict().items() for key, v in keys.items() if type(v) is float
]


@pytest.mark.parametrize("value", [".nan", ".inf", "-1e400"])
@pytest.mark.parametrize("key", [*FLOAT_KEYS, "training.encoder_learning_rate"])
def test_only_finite_numbers(recipe_file: Path, key: str, value: str) -> None:
    (mistake,) = _mistakes(recipe_file, _set(key, value))
    assert mistake.startswith(f"{recipe_file}:2: {key}: ")


@pytest.mark.parametrize("value", ["{a: 1}", "[[1], 2]"])
@pytest.mark.parametrize("key", KEY_NAMES)
def test_wrong_type_is_one_line_a_mistake_that_names_the_key(recipe_file: Path, key: str, value: str) -> None:
    mistakes = _mistakes(recipe_file, "\n" + _set(key, value))
    for mistake in mistakes:
        assert mistake.startswith(f"{recipe_file}:3: {key}: must be ")
        assert ", found " in mistake
    assert len(mistakes) == (2 if (key, value[0]) == ("tracking.with", "[") else 1)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_the_promised_keys_exist() -> None:
    assert set(PROMISED_KEYS.split()) <= set(KEY_NAMES)
    assert len(KEY_NAMES) == len(set(KEY_NAMES))


@pytest.mark.parametrize(
    "section_class", [one for section in Recipe.model_fields for one in section_classes(section)], ids=str
)
def test_every_key_is_documented(section_class: type[Section]) -> None:
    assert section_class.__doc__
    for field in keys_of(section_class).values():
        assert field.description
        assert field.description.strip()[-1] == "."


def _one_edit(word: str) -> Iterator[str]:
    for at in {0, len(word) // 2, len(word) - 1}:
        yield word[:at] + word[at + 1 :]
        yield word[:at] + word[at] + word[at:]
        yield word[:at] + "x" + word[at + 1 :]
        yield word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


@pytest.mark.parametrize(("section", "key"), KEYS, ids=KEY_NAMES)
def test_a_misspelt_key_is_refused_with_the_right_spelling(recipe_file: Path, section: str, key: str) -> None:
    known = {name for other, name in KEYS if other == section}
    for wrong in set(_one_edit(key)) - known - {""}:
        text = f"# comment\n\n{section}:\n  {wrong}: 1\n{_choose(f'{section}.{key}')}"
        (mistake,) = _mistakes(recipe_file, text)
        assert mistake.startswith(f"{recipe_file}:4: {section}.{wrong}: unknown key"), mistake
        assert "did you mean" in mistake, mistake
        if len(key) > 4:
            assert f"did you mean '{section}.{key}'?" in mistake, mistake


@pytest.mark.parametrize("section", sorted(Recipe.model_fields))
def test_a_misspelt_section_is_refused_with_the_right_spelling(recipe_file: Path, section: str) -> None:
    wrong = section[:-2] + section[-1] + section[-2]
    (mistake,) = _mistakes(recipe_file, f"# comment\n{wrong}:\n  seed: 1\n")
    assert mistake == f"{recipe_file}:2: {wrong}: unknown key; did you mean '{section}'?"


def test_a_key_of_another_section_is_sent_there(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, _set("data.learning_rate", "1e-3"))
    assert mistake == f"{recipe_file}:2: data.learning_rate: unknown key; did you mean 'training.learning_rate'?"


def test_a_key_like_no_other_gets_the_list(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, _set("checkpoint.zzzzzzzz", "1"))
    assert mistake.endswith("unknown key; known: every_steps, keep")


def test_the_name_inside_python_is_no_key(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, _set("tracking.with_", "[wandb]"))
    assert "did you mean 'tracking.with'?" in mistake


@pytest.mark.parametrize("text", ["1: 2\n", "1.5: 2\n", "~: 2\n", "run:\n  1: 2\n", "run:\n  ~: 1\n"])
def test_keys_that_are_no_text_are_refused(recipe_file: Path, text: str) -> None:
    (mistake,) = _mistakes(recipe_file, text)
    assert mistake.startswith(str(recipe_file))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n", "{}", "run:\ndata:\n", "\ufeff"])
def test_an_empty_recipe_is_all_defaults(recipe_file: Path, text: str) -> None:
    assert _load(recipe_file, text) == Recipe()


def test_byte_order_mark_and_windows_lines(recipe_file: Path) -> None:
    assert _load(recipe_file, "\ufeffrun:\r\n  seed: 5\r\n").run.seed == 5
    (mistake,) = _mistakes(recipe_file, "\ufeffrun:\r\n  sead: 5\r\n")
    assert mistake.startswith(f"{recipe_file}:2: run.sead: ")


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ("run:\n  name: größe\n".encode("latin-1"), "", "UTF-8"),
        ("run:\n  seed: 1\n".encode("utf-16"), "", "UTF-8"),
        (b"- a\n- b\n", "", "sections of keys"),
        (b"text", "", "sections of keys"),
        (b"3", "", "sections of keys"),
        (b"run:\n\tseed: 1\n", ":2", "not YAML"),
        (b"run:\n  seed: 1\n name: a\n", ":3", "not YAML"),
        (b"run: {seed: 1\n", ":2", "not YAML"),
        (b"run: 'a\n", ":2", "not YAML"),
        (b"run:\n  seed: 1\n---\nrun:\n  seed: 2\n", ":3", "not YAML"),
        (b"? [a]\n: b\n", ":1", "not YAML"),
        (b"run:\n  seed: !!python/object/apply:os.getpid []\n", ":2", "not YAML"),
        (b"run: *there\n", ":1", "not YAML"),
        (b"run:\n  seed: &a 1\ndata:\n  limit: *a\n", ":2", "aliases"),
        (b"run: 3\n", ":1", "run: expected a section of keys, found 3"),
        (b"run: [seed]\n", ":1", "run: expected a section of keys"),
    ],
)
def test_files_that_are_no_recipe(recipe_file: Path, content: bytes, where: str, what: str) -> None:
    (mistake,) = _mistakes(recipe_file, content)
    assert mistake.startswith(f"{recipe_file}{where}: ")
    assert what in mistake


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("run:\n  name: a\x00b\n", id="NUL"),
        pytest.param("run:\n  name: \x1b[31m\n", id="escape"),
        pytest.param("[" * 600, id="deep"),
        pytest.param("run: {name: " + "[" * 600 + "]" * 600 + "}", id="deep value"),
        pytest.param("run:\n  seed: !!int abc\n", id="int tag"),
        pytest.param("run:\n  seed: !!float abc\n", id="float tag"),
        pytest.param("data:\n  horizontal_flip: !!bool abc\n", id="bool tag"),
        pytest.param("run:\n  name: !!timestamp abc\n", id="timestamp tag"),
        pytest.param("run:\n  seed: " + "9" * 5000 + "\n", id="huge number"),
    ],
)
def test_broken_yaml_is_a_mistake_of_the_recipe_not_of_ours(recipe_file: Path, content: str) -> None:
    (mistake,) = _mistakes(recipe_file, content)
    assert mistake.startswith(f"{recipe_file}")


def test_an_alias_bomb_is_refused_before_it_unfolds(recipe_file: Path) -> None:
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (mistake,) = _mistakes(recipe_file, "\n".join(lines))
    assert "aliases" in mistake


def test_an_anchor_that_holds_itself_is_refused(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, "run: &a\n  name: *a\n")
    assert "aliases" in mistake


@pytest.mark.parametrize("kind", ["absent", "folder", "below a file", "too long"])
def test_paths_that_are_no_file(recipe_file: Path, kind: str) -> None:
    recipe_file.write_text("")
    path = {
        "absent": recipe_file.with_name("absent.yaml"),
        "folder": recipe_file.parent,
        "below a file": recipe_file / "recipe.yaml",
        "too long": recipe_file.with_name("x" * 400),
    }[kind]
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"{path}: ")


def test_mistakes_of_a_recipe_are_data(recipe_file: Path) -> None:
    recipe_file.write_text("run:\n  sead: 1\n  name: a b\nscst: {samples: 1}\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, ["data.limit=0"])
    name, unknown, limit, together = caught.value.mistakes
    assert unknown == Mistake("run.sead", "unknown key", "did you mean 'run.seed'?", f"{recipe_file}:2")
    assert (name.key, name.place, name.hint) == ("run.name", f"{recipe_file}:3", "")
    assert (limit.key, limit.place) == ("data.limit", "command line")
    assert (together.key, together.place) == ("scst.samples", f"{recipe_file}:4")


def test_keys_given_twice_are_all_named_with_both_places(recipe_file: Path) -> None:
    first, second = _mistakes(recipe_file, "run:\n  seed: 1\n  seed: 2\ndata:\n  limit: 1\nrun:\n  name: a\n")
    assert first.startswith(f"{recipe_file}:3: run.seed: given twice, first at {recipe_file}:2")
    assert second.startswith(f"{recipe_file}:6: run: given twice, first at {recipe_file}:1")


def test_many_mistakes_are_reported_at_once(recipe_file: Path) -> None:
    text = "run:\n  seed: -1\n  naem: x\ndata:\n  batch_size: many\n  batch_size: 0\ntrainign: {}\ntracking: 5\n"
    mistakes = _mistakes(recipe_file, text, "nonsense", "decoder.dropout=2", "text.max_lenght=4")
    for start in (
        f"{recipe_file}:2: run.seed: ",
        f"{recipe_file}:3: run.naem: ",
        f"{recipe_file}:6: data.batch_size: given twice",
        f"{recipe_file}:6: data.batch_size: must be ",
        f"{recipe_file}:7: trainign: ",
        f"{recipe_file}:8: tracking: ",
        "command line: 'nonsense' ",
        "command line: decoder.dropout: ",
        "command line: text.max_lenght: ",
    ):
        assert sum(mistake.startswith(start) for mistake in mistakes) == 1, (start, mistakes)
    assert len(mistakes) == 9


def test_long_values_are_shortened(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, _set("run.seed", "x" * 100_000))
    assert len(mistake) < 300 + len(str(recipe_file))


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("run.seed=4", "run.seed", 4),
        (" run.seed =4", "run.seed", 4),
        ("data.path=/a=b", "data.path", "/a=b"),
        ("data.path=/with space", "data.path", "/with space"),
        ("data.path=C:\\photos", "data.path", "C:\\photos"),
        ("data.path=", "data.path", None),
        ("data.path=@at", "data.path", "@at"),
        ("data.path=[open", "data.path", "[open"),
        ("data.captions_column=caption_*", "data.captions_column", "caption_*"),
        ("data.captions_column=*", "data.captions_column", "*"),
        ("tracking.with=[]", "tracking.with", []),
        ("training.max_steps=null", "training.max_steps", None),
    ],
)
def test_overrides(recipe_file: Path, override: str, key: str, expected: Any) -> None:
    recipe = _load(recipe_file, "run:\n  seed: 1\ndata:\n  path: old\ntraining:\n  max_steps: 9\n", override)
    assert _get(recipe, key) == expected


def test_the_last_override_wins_and_mends_the_file(recipe_file: Path) -> None:
    assert _load(recipe_file, "run:\n  seed: wrong\n", "run.seed=1", "run.seed=2").run.seed == 2
    assert _load(recipe_file, "run:\n", "run.seed=3").run.seed == 3


@pytest.mark.parametrize(
    "override", ["run=3", "run", "", "=", "run.=3", ".seed=3", "run.seed", "run.seed.x=3", "a.b.c=1", "--seed=1"]
)
def test_malformed_overrides(recipe_file: Path, override: str) -> None:
    (mistake,) = _mistakes(recipe_file, "", override)
    assert mistake == f"command line: {override!r} is not an override; write section.key=value"


@pytest.mark.parametrize(("override", "suggestion"), [("run.nmae=x", "run.name"), ("runn.name=x", "run")])
def test_unknown_overrides_are_placed_on_the_command_line(recipe_file: Path, override: str, suggestion: str) -> None:
    (mistake,) = _mistakes(recipe_file, "data:\n  limit: 3\n", override)
    assert mistake.startswith(f"command line: {override.partition('.')[0]}")
    assert f"did you mean '{suggestion}'?" in mistake


def test_an_override_with_a_bad_tag_is_a_mistake(recipe_file: Path) -> None:
    (mistake,) = _mistakes(recipe_file, "", "run.seed=!!int abc")
    assert mistake.startswith("command line: run.seed: ")


# --- across sections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["decoder.tie_weights=true", "decoder.embed_size=3"], "decoder.tie_weights"),
        (["evaluation.min_length=21"], "evaluation.min_length"),
        (["data.source=folder"], "data.path"),
        (["training.encoder_learning_rate=1e-4"], "training.encoder_learning_rate"),
        (["encoder.cache_views=4"], "encoder.cache_views"),
        (["encoder.cache_views=4", "data.random_crop=0.5", "encoder.cache=off"], "encoder.cache_views"),
        (["encoder.cache_views=4", "data.random_crop=0.5", "encoder.trainable_from=all"], "encoder.cache_views"),
        (["encoder.cache_views=4", "encoder.trainable_from=all", "encoder.cache=off"], "encoder.cache_views"),
    ],
)
def test_combinations_that_cannot_be(recipe_file: Path, overrides: list[str], key: str) -> None:
    (mistake,) = _mistakes(recipe_file, "", *overrides)
    assert re.match(rf"(command line|{re.escape(str(recipe_file))}): {re.escape(key)}: ", mistake)


@pytest.mark.parametrize(
    "overrides",
    [
        ["decoder.tie_weights=true", "decoder.embed_size=3", "decoder.hidden_size=3"],
        ["evaluation.min_length=20"],
        ["data.source=folder", "data.path=/x"],
        ["encoder.name=timm/resnet18", "encoder.weights=none"],
        ["training.encoder_learning_rate=1e-4", "encoder.trainable_from=layer3"],
        ["training.max_steps=5", "training.warmup_steps=60"],
    ],
)
def test_combinations_that_can_be(recipe_file: Path, overrides: list[str]) -> None:
    recipe = _load(recipe_file, "", *overrides)
    for override in overrides:
        key, _, value = override.partition("=")
        assert str(_get(recipe, key)).lower() in (value, str(float(value)) if "e-" in value else value)


def test_combinations_are_all_named_at_their_lines(recipe_file: Path) -> None:
    text = (
        "decoder:\n  tie_weights: true\n  embed_size: 3\nevaluation:\n  min_length: 50\n"
        "training:\n  encoder_learning_rate: 0.1\n"
    )
    mistakes = _mistakes(recipe_file, text)
    assert [mistake.split(": ")[0].rpartition(":")[2] for mistake in mistakes] == ["2", "5", "7"]


@pytest.mark.parametrize(
    ("overrides", "caches"),
    [
        ([], True),
        (["encoder.cache=off"], False),
        (["encoder.trainable_from=layer4"], False),
        (["data.random_crop=0.9"], False),
        (["data.horizontal_flip=true"], False),
        (["data.color_jitter=0.1"], False),
        (["data.color_jitter=0.1", "encoder.cache_views=1"], True),
        (["data.horizontal_flip=true", "encoder.cache_views=9"], True),
    ],
)
def test_features_are_cached_only_if_photos_look_the_same_or_in_a_few_views(
    recipe_file: Path, overrides: list[str], caches: bool
) -> None:
    assert _load(recipe_file, "", *overrides).caches_features is caches


# --- the resolved recipe --------------------------------------------------------------------------------------------


UNUSUAL = [
    "run.name=größe.v-1_2",
    "run.seed=12345678901234567890",
    "data.path='/a b/ü: #x'",
    "data.image_column='010'",
    "data.captions_column='null'",
    "data.id_column='2024-01-31'",
    "data.split_column='true'",
    "training.learning_rate=1e-5",
    "training.weight_decay=1e-10",
    "training.clip_norm=null",
    "decoder.dropout=0",
    "tracking.with=[wandb]",
]


def _assert_saved_recipe_is_equal(recipe: Recipe, folder: Path) -> None:
    saved = folder / "config.yaml"
    save_recipe(recipe, saved)
    again = load_recipe(saved)
    assert again == recipe
    save_recipe(again, folder / "again.yaml")
    assert (folder / "again.yaml").read_bytes() == saved.read_bytes()


def test_a_saved_recipe_is_equal_when_loaded(recipe_file: Path) -> None:
    recipe = _load(recipe_file, "", *UNUSUAL)
    assert recipe.data.split_column == "true"
    _assert_saved_recipe_is_equal(recipe, recipe_file.parent)
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), "a checkpoint") == recipe


@pytest.mark.parametrize(
    "text", ["1e5", "3E4", "7e-2", ".5e3", "1.0e5", "08", "0x10", "yes", "~", "=", "1:30", "é", ""]
)
def test_a_saved_text_is_still_a_text(recipe_file: Path, text: str) -> None:
    _assert_saved_recipe_is_equal(recipe_from_dict({"data": {"path": text}}, "test"), recipe_file.parent)


@pytest.mark.parametrize("text", ["2024", "1e5", "true", "0.5"])
def test_on_the_command_line_a_text_needs_no_quotes(recipe_file: Path, text: str) -> None:
    assert _load(recipe_file, "", f"run.name={text}").run.name == text
    assert _load(recipe_file, "", f"training.start_from={text}").training.start_from == text
    (mistake,) = _mistakes(recipe_file, f"run:\n  name: {text}\n")
    assert mistake.startswith(f"{recipe_file}:2: run.name: must be string, found")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/my photos #2", "/data/my photos #2"),
        ("/a: b", "/a: b"),
        ("a:", "a:"),
        ("#2", "#2"),
        ("~ #2", "~ #2"),
        ("[a]", "[a]"),
        ("{a: b}", "{a: b}"),
        ("!!str x", "!!str x"),
        ("'a b' #2", "'a b' #2"),
        ("~/photos", "~/photos"),
        ("'~'", "~"),
        ('"/a: #b"', "/a: #b"),
        ("''", ""),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_on_the_command_line_a_text_stands_as_it_is(recipe_file: Path, text: str, expected: str | None) -> None:
    assert _load(recipe_file, "", f"data.path={text}").data.path == expected


def test_a_run_lies_in_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe_from_dict({"run": {"output_dir": "~/runs"}}, "test").run_folder == tmp_path / "runs" / "run"
    assert recipe_from_dict({"run": {"output_dir": "a~"}}, "test").run_folder == Path("a~/run")
    assert recipe_from_dict({"run": {"output_dir": "~no such user"}}, "test").run_folder == Path("~no such user/run")


def test_a_full_disk_leaves_the_old_recipe(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_recipe(Recipe(), recipe_file)
    before = recipe_file.read_bytes()
    write_text = Path.write_text

    def fill_disk(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OSError, match="No space"):
        save_recipe(recipe_from_dict({"run": {"seed": 7}}, "test"), recipe_file)
    assert [path.name for path in recipe_file.parent.iterdir()] == [recipe_file.name]
    assert recipe_file.read_bytes() == before


def test_a_run_named_like_a_number_can_be_loaded_again(recipe_file: Path) -> None:
    recipe = _load(recipe_file, "run:\n  name: '1e5'\n")
    assert recipe.run_folder == Path("runs/1e5")
    _assert_saved_recipe_is_equal(recipe, recipe_file.parent)


def test_the_saved_recipe_holds_every_key(recipe_file: Path) -> None:
    save_recipe(_load(recipe_file, ""), recipe_file)
    section, found = "", []
    for line in recipe_file.read_text().splitlines():
        if not line.startswith((" ", "-")):
            section = line.rstrip(":")
        elif match := re.match(r"  (\w+):", line):
            found.append(f"{section}.{match[1]}")
    default = _names("decoder", DECODER_SECTIONS["soft_attention"])
    assert sorted(found) == [name for name in KEY_NAMES if not name.startswith("decoder.") or name in default]


@pytest.mark.parametrize("section", sorted(Recipe.model_fields))
def test_recipes_are_frozen(section: str) -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError):
        setattr(recipe, section, getattr(recipe, section))
    for name, value in getattr(recipe, section):
        with pytest.raises(ValidationError):
            setattr(getattr(recipe, section), name, value)
    with pytest.raises(ValidationError):
        recipe.run.invented = 1  # type: ignore[attr-defined]
    assert recipe == Recipe()


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../x", "a/b", "/abs", "a/../../b", "~", "", " ", "a b", "a\n", "-rf", ".hidden", "a\\b", "a:b", "a\0"],
)
def test_a_run_cannot_leave_its_output_folder(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({"run": {"name": name, "output_dir": "/out"}}, "test")
    (mistake,) = caught.value.lines
    assert mistake.startswith("test: run.name: must be letters, digits, '.', '-' and '_' only, found ")


@pytest.mark.parametrize("name", ["run", "1", "a..b", "a..", "größe", "_x", "2024-01-31.v2"])
def test_a_run_lies_directly_in_its_output_folder(tmp_path: Path, name: str) -> None:
    recipe = recipe_from_dict({"run": {"name": name, "output_dir": str(tmp_path)}}, "test")
    assert recipe.run_folder.resolve().parent == tmp_path.resolve()
    assert recipe.run_folder.name == name


# --- values that are not from a file --------------------------------------------------------------------------------


def test_recipe_from_dict_names_the_origin_and_changes_nothing() -> None:
    values: dict[str, Any] = {"run": {"seed": "x", "nmae": 1}, "daat": {}}
    before = json.dumps(values)
    with pytest.raises(UsageError) as caught:
        recipe_from_dict(values, "checkpoint 7")
    assert sorted(caught.value.lines) == [
        "checkpoint 7: daat: unknown key; did you mean 'data'?",
        "checkpoint 7: run.nmae: unknown key; did you mean 'run.name'?",
        "checkpoint 7: run.seed: must be integer, found 'x' (str)",
    ]
    assert json.dumps(values) == before
    assert recipe_from_dict({}, "x") == Recipe()


@pytest.mark.parametrize("section", ["abc", 3, [1], True])
def test_recipe_from_dict_refuses_sections_that_are_none(section: object) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({"run": section}, "checkpoint 7")
    (mistake,) = caught.value.lines
    assert mistake.startswith("checkpoint 7: run: expected a section of keys, found ")


# --- the shipped recipes --------------------------------------------------------------------------------------------


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_shipped_recipes() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_say_their_command(path: Path) -> None:
    recipe = load_stages(path)[-1]
    assert recipe.run.name == path.stem, "two shipped recipes must not share a run folder"
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]
    text = re.sub(r"\\ *# *", "", " ".join(header))
    command = re.search(
        rf"accelerate launch --config_file accelerate_config.yaml capdist/train.py( .*configs/{path.name}.*)", text
    )
    assert command, text
    overrides = re.findall(r"\b[a-z]+\.[a-z_]+=\S+", command[1].split("configs/", 1)[1].split(" # ")[0])
    load_stages(path, overrides)
