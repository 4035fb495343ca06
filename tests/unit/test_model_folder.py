"""Model folders: what is written is what captions later, and a folder that is not whole says so."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors import safe_open

from capdist.commands.evaluate import evaluate_folder, evaluation_data
from capdist.data.images import Preprocessing
from capdist.errors import CapdistError, CheckpointError, StorageError, UsageError
from capdist.inference.captioner import Captioner
from capdist.model_folder import (
    TrainedModel,
    load_pretrained,
    save_pretrained,
    search_options,
    update_metrics,
)
from capdist.models.caption_model import build_model
from capdist.recipe.decoders import SoftAttentionSection
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import EncoderSection, EvaluationSection
from capdist.text.vocabulary import Vocabulary
from tests.conftest import draw_photos

FILES = {"config.json", "model.safetensors", "vocabulary.json", "README.md"}
WORDS = ["a", "red", "blue", "dog", "ball", "é", "runs", "<odd>"]
SEARCH = SearchSettings(beam_size=2, length_penalty=0.5, min_length=2)
METRICS = {"split": "validation", "bleu_1": 0.5123, "cider": 0.75, "meteor": None}


def _trained(seed: int = 0, words: list[str] = WORDS, **decoder: Any) -> TrainedModel:
    vocabulary = Vocabulary(words)
    encoder = EncoderSection(name="resnet18", last_block="layer1", weights="none", grid=2, projection=6)
    section = SoftAttentionSection(embed_size=8, hidden_size=8, attention_size=8, **decoder)
    torch.manual_seed(seed)
    model = build_model(encoder, section, vocab_size=len(vocabulary), pad_id=vocabulary.pad_id)
    with torch.no_grad():  # so that captions differ from photo to photo
        for parameter in (*model.decoder.parameters(), *model.projection.parameters()):
            parameter.mul_(4)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    encoder = encoder.model_copy(update={"weights": "/home/somebody/weights.pth"})
    preprocessing = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    return TrainedModel(model.eval(), vocabulary, preprocessing, encoder, section, 7, SEARCH, METRICS)


def _photos() -> list[Image.Image]:
    photos = []
    for index, colour in enumerate(("red", "green", "blue", "white")):
        photo = Image.new("RGB", (40 + 8 * index, 30), colour)
        ImageDraw.Draw(photo).ellipse((5, 5, 20 + 4 * index, 25), fill="yellow")
        photos.append(photo)
    return photos


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "model"
    save_pretrained(_trained(), folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def _refused(folder: Path, name: str) -> str:
    """Load a folder that must be refused in one line naming the file, and return the line."""
    with pytest.raises(CapdistError) as caught:
        load_pretrained(folder)
    assert isinstance(caught.value, CheckpointError)
    (mistake,) = caught.value.lines
    assert "\n" not in mistake
    assert str(folder / name) in mistake
    return mistake


@pytest.mark.parametrize("decoder", [{}, {"gate": False}, {"tie_weights": True}], ids=str)
def test_round_trip_is_bit_equal_and_captions_alike(tmp_path: Path, decoder: dict[str, Any]) -> None:
    trained = _trained(**decoder)
    save_pretrained(trained, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    before, after = trained.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.vocabulary.words == trained.vocabulary.words
    assert loaded.preprocessing == trained.preprocessing
    assert loaded.decoder == trained.decoder
    assert (loaded.max_length, loaded.search, loaded.metrics) == (7, SEARCH, METRICS)
    if decoder.get("tie_weights"):
        assert loaded.model.decoder.head.weight is loaded.model.decoder.embedding.weight

    ours, theirs = (Captioner(each, "cpu").caption(_photos(), return_attention=True) for each in (trained, loaded))
    assert len({caption.log_probability for caption in ours}) == len(ours)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.text, one.words, one.log_probability) == (other.text, other.words, other.log_probability)
        assert one.attention is not None
        assert other.attention is not None
        assert torch.equal(one.attention, other.attention)


def test_a_saved_folder_saves_again_the_same(pristine: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(pristine), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (pristine / name).read_bytes(), name


def test_a_folder_as_a_run_writes_it_saves_again_the_same(tmp_path: Path) -> None:
    search = EvaluationSection(consensus=4.0, beam_size=10).search
    save_pretrained(replace(_trained(), search=search), tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.search == search
    save_pretrained(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()


def test_exactly_the_promised_files_and_nothing_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er" / "model"
    save_pretrained(_trained(), folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"model"}


def test_config_holds_digests_and_no_path_of_this_machine(pristine: Path) -> None:
    text = (pristine / "config.json").read_text()
    config = json.loads(text)
    assert "somebody" not in text
    assert str(pristine.parent) not in text
    assert config["encoder"]["weights"] == "none"
    for name in ("model.safetensors", "vocabulary.json"):
        assert config["sha256"][name] == hashlib.sha256((pristine / name).read_bytes()).hexdigest()
    assert load_pretrained(pristine).digest == config["sha256"]["model.safetensors"]
    with safe_open(pristine / "model.safetensors", "pt") as file:
        assert "somebody" not in json.dumps(file.metadata())


def test_overwriting_swaps_the_whole_folder(folder: Path) -> None:
    (folder / "stray.txt").write_text("left by somebody")
    other = _trained(seed=5, words=WORDS[:-1])
    save_pretrained(other, folder)
    loaded = load_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"model"}
    assert loaded.vocabulary.words == other.vocabulary.words
    assert torch.equal(loaded.model.decoder.head.weight, other.model.decoder.head.weight)


def test_leftovers_of_a_killed_save_do_not_matter(folder: Path) -> None:
    for name in (".tmp_model", ".old_model"):
        shutil.copytree(folder, folder.with_name(name))
        (folder.with_name(name) / "config.json").write_text("{")
    save_pretrained(_trained(seed=5), folder)
    assert {path.name for path in folder.parent.iterdir()} == {"model"}
    assert torch.equal(load_pretrained(folder).model.decoder.head.weight, _trained(seed=5).model.decoder.head.weight)


def test_full_disk_leaves_the_old_folder_and_no_rubbish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (folder / name).read_bytes() for name in FILES}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_model", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(_trained(seed=5), folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert {path.name for path in folder.parent.iterdir()} == {"model"}


def test_a_swap_that_fails_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()
    replace_file = os.replace

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name == ".tmp_model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(OSError, match="Input/output"):
        save_pretrained(_trained(seed=5), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_name_of_a_saved_folder_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []

    def watch(path: Path) -> None:
        if path == tmp_path:
            assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
        flushed.append(path)

    monkeypatch.setattr("capdist.files.flush_to_disk", watch)
    save_pretrained(_trained(), tmp_path / "model")
    assert {path.name for path in flushed} >= FILES
    assert flushed[-1] == tmp_path


def test_metrics_that_cannot_be_flushed_leave_the_old_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that a power cut may empty must not take the place of a good one."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            update_metrics(replace(_trained(), metrics={"cider": 0.9}), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    update_metrics(replace(_trained(), metrics={"cider": 0.9}), folder)
    assert load_pretrained(folder).metrics == {"cider": 0.9}
    assert "0.9000" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name) as caught:
        load_pretrained(folder)
    (mistake,) = caught.value.lines
    assert str(folder) in mistake


def test_card_is_not_needed(folder: Path) -> None:
    (folder / "README.md").unlink()
    assert len(load_pretrained(folder).vocabulary) == len(WORDS) + 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_flipped_byte_of_the_weights_is_noticed(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 0xFF
    path.write_bytes(content)
    assert "sha256" in _refused(folder, "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.json", "config.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file_is_named(folder: Path, name: str, keep: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content))])
    _refused(folder, name)


def test_vocabulary_with_two_words_changed_about_is_noticed(folder: Path) -> None:
    words = [*WORDS]
    words[1], words[2] = words[2], words[1]
    other = Vocabulary(words)
    assert len(other.to_json()) == len((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(other.to_json(), encoding="utf-8")
    _refused(folder, "vocabulary.json")


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.json"])
def test_file_of_another_model_is_noticed(folder: Path, tmp_path: Path, name: str) -> None:
    save_pretrained(_trained(seed=1, words=WORDS[::-1]), tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, folder / name)
    _refused(folder, name)


def test_config_of_another_network_is_noticed(folder: Path) -> None:
    """Digests cover the other two files, so only the shapes can tell."""
    _edit_config(folder, lambda config: config["decoder"].update(hidden_size=9))
    _refused(folder, "config.json")


FOREIGN = {
    "empty object": {},
    "list": [],
    "number": 3,
    "null": None,
    "transformers": {"architectures": ["VisionEncoderDecoderModel"], "model_type": "vision-encoder-decoder"},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_config_is_refused(folder: Path, content: Any) -> None:
    (folder / "config.json").write_text(json.dumps(content))
    assert "config" in _refused(folder, "config.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"\x00" * 100], ids=["empty", "brace", "not UTF-8", "zeros"]
)
def test_config_that_is_no_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    _refused(folder, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", None),
        ("encoder", None),
        ("encoder", {"name": "resnet18", "weight": "none"}),
        ("decoder", {"name": "transformer"}),
        ("decoder", []),
        ("preprocessing", {"image_size": 32}),
        ("preprocessing", []),
        ("preprocessing", None),
        ("sha256", {}),
        ("sha256", []),
        ("sha256", None),
    ],
    ids=str,
)
def test_config_with_a_damaged_key_is_refused(folder: Path, key: str, value: Any) -> None:
    _edit_config(folder, lambda config: config.update({key: value}))
    _refused(folder, "config.json")


def test_the_search_travels_with_the_model_and_can_be_overruled(folder: Path) -> None:
    """Folders of older versions, as this one, do not have `consensus`."""
    _edit_config(folder, lambda config: config["search"].pop("consensus"))
    captioner = Captioner.from_pretrained(folder, "cpu")
    assert captioner.options().consensus is None
    assert captioner.options(beam_size=10, consensus=3.0).consensus == 3.0
    _edit_config(folder, lambda config: config["search"].update(consensus=4.0, beam_size=10))
    captioner = Captioner.from_pretrained(folder, "cpu")
    assert captioner.options().consensus == 4.0
    validated = EvaluationSection(**dict(captioner.trained.search))
    assert search_options(validated, captioner.trained.vocabulary, 7) == captioner.options()
    assert captioner.options(consensus=0).consensus is None
    assert captioner.options(beam_size=2).consensus is None
    _edit_config(folder, lambda config: config["search"].update(no_repeat_ngram=2))
    captioner = Captioner.from_pretrained(folder, "cpu")
    assert [captioner.options(no_repeat_ngram=n).no_repeat_ngram for n in (None, 0, 3)] == [2, 0, 3]
    with pytest.raises(UsageError, match=r"^consensus: 4 does nothing with fewer than 3 beams; take more$"):
        captioner.options(beam_size=2, consensus=4)
    with pytest.raises(UsageError, match="^beams: is no search setting; known: beam_size, "):
        captioner.caption(_photos(), beams=2)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_half_on_which_a_model_was_chosen_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = str(draw_photos(tmp_path / "photos", {"validation": 4}))

    def warnings(chosen_on: str) -> list[str]:
        _edit_config(folder, lambda config: config["metrics"].update(chosen_on=chosen_on))
        caplog.clear()
        result = evaluate_folder(
            [str(folder)], evaluation_data("folder", photos), "dev-report", search={"no_repeat_ngram": 1}
        )
        assert result["settings"]["search"]["no_repeat_ngram"] == 1
        said = [row["caption"].rstrip(".").lower().split() for row in result["captions"]]
        assert said
        assert all(len(set(words)) == len(words) for words in said)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert any("was chosen on the whole validation split" in warning for warning in warnings("validation"))
    assert not any("was chosen" in warning for warning in warnings("validation-choose"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_length", "seven"), ("max_length", None), ("search", None), ("search", {**dict(SEARCH), "consensus": "4"})],
    ids=str,
)
def test_config_with_damaged_settings_is_refused(folder: Path, key: str, value: Any) -> None:
    _edit_config(folder, lambda config: config.update({key: value}))
    _refused(folder, "config.json")


BEYOND_BOUNDS = [
    ("preprocessing.mean", [0.5], "missing"),
    ("preprocessing.mean", [0.5, 0.5, 0.5, 0.5], "3 items"),
    ("preprocessing.std", [0.2, 0, 0.2], "greater than 0"),
    ("preprocessing.std", [0.2, float("nan"), 0.2], "finite"),
    ("preprocessing.image_size", "64", "integer"),
    ("preprocessing.image_size", 0, "32"),
    ("preprocessing.image_size", 64.5, "integer"),
    ("preprocessing.crop", 0.9, "unknown key 'crop'"),
    ("search.beam_size", "3", "integer"),
    ("search.beam_size", 0, "1"),
    ("search.beam_size", True, "integer"),
    ("search.length_penalty", float("inf"), "finite"),
    ("search.consensus", -3, "greater than 0"),
    ("search.min_length", 8, "max_length = 7"),
    ("search.two\nlines", 3, "unknown key 'two\\nlines'"),
    ("max_length", 0, "1"),
    ("max_length", True, "integer"),
    ("encoder.grid", 0, "1"),
    ("encoder.weight", "none", "unknown key 'weight'"),
    ("metrics", [], "object"),
    ("sha256.vocabulary.json", "f" * 63, "pattern"),
]


@pytest.mark.parametrize(("place", "value", "complaint"), BEYOND_BOUNDS, ids=[f"{p}={v}" for p, v, _ in BEYOND_BOUNDS])
def test_config_is_foreign_input(folder: Path, place: str, value: Any, complaint: str) -> None:
    section, _, key = place.partition(".")
    _edit_config(folder, lambda c: c[section].update({key: value}) if key else c.update({section: value}))
    mistake = _refused(folder, "config.json")
    assert f"config.json: {section if complaint.startswith('unknown') else place}" in mistake
    assert complaint in mistake


def test_config_without_a_key_of_the_search_names_it(folder: Path) -> None:
    _edit_config(folder, lambda config: config["search"].pop("beam_size"))
    assert "search.beam_size: missing" in _refused(folder, "config.json")


def test_config_of_another_version_names_both_formats(folder: Path) -> None:
    _edit_config(folder, lambda config: config.update(format=2, max_length="seven"))
    mistake = _refused(folder, "config.json")
    assert "has format 2" in mistake
    assert "reads 1" in mistake


def test_what_else_a_config_says_survives_new_metrics(folder: Path) -> None:
    _edit_config(folder, lambda config: config.update(trained_by="somebody"))
    update_metrics(replace(load_pretrained(folder), metrics={"cider": 0.9}), folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["trained_by"], config["metrics"]) == ("somebody", {"cider": 0.9})


def test_config_with_an_unknown_encoder_is_refused(folder: Path) -> None:
    _edit_config(folder, lambda config: config["encoder"].update(name="resnet81"))
    assert "resnet81" in _refused(folder, "config.json")


def test_digest_that_is_no_text_is_refused(folder: Path) -> None:
    _edit_config(folder, lambda config: config["sha256"].update({"model.safetensors": 5}))
    with pytest.raises(CheckpointError):
        load_pretrained(folder)


def test_card_has_front_matter_and_metrics(pristine: Path) -> None:
    card = (pristine / "README.md").read_text(encoding="utf-8")
    start, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert start == ""
    assert values["library_name"] == "capdist"
    assert values["pipeline_tag"] == "image-to-text"
    assert "image-captioning" in values["tags"]
    assert "validation" in body
    rows = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in body.splitlines() if "|" in line}
    assert {("bleu_1", "0.5123"), ("cider", "0.7500")} <= rows


def test_card_of_a_model_that_nobody_measured(tmp_path: Path) -> None:
    save_pretrained(replace(_trained(), metrics={}), tmp_path / "model")
    assert "not measured" in (tmp_path / "model" / "README.md").read_text()
    assert load_pretrained(tmp_path / "model").metrics == {}


def test_loading_leaves_torch_as_it_was(pristine: Path) -> None:
    torch.manual_seed(7)
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    load_pretrained(pristine)
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == before


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    trained = _trained(tie_weights=True)
    trained.model.train()
    before = {name: (t.data_ptr(), t.stride(), t.clone()) for name, t in trained.model.state_dict().items()}
    save_pretrained(trained, tmp_path / "model")
    for name, tensor in trained.model.state_dict().items():
        address, stride, values = before[name]
        assert (tensor.data_ptr(), tensor.stride()) == (address, stride)
        assert torch.equal(tensor, values)
    assert trained.model.training
    assert trained.model.decoder.head.weight is trained.model.decoder.embedding.weight


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "no/where/"])
def test_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such model folder") as caught:
        load_pretrained(name)
    assert name in str(caught.value)


def test_folder_that_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_file_in_place_of_a_folder(pristine: Path) -> None:
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_pretrained(pristine / "model.safetensors")


def test_hub_id_without_a_network_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    with pytest.raises(StorageError, match="somebody/captioner-that-is-not-there") as caught:
        load_pretrained("somebody/captioner-that-is-not-there")
    (mistake,) = caught.value.lines
    assert "Hub" in mistake
    assert "\n" not in mistake
    assert time.perf_counter() - started < 15
