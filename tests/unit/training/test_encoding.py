"""The encoder pass: every photo once, whatever stops it, and never another run's features."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from capdist import cli
from capdist.data.batches import PhotoDataset, build_views
from capdist.data.images import Preprocessing
from capdist.data.splits import get_split, read_source
from capdist.distributed.launch import build_accelerator
from capdist.errors import DataError, Stopped, StorageError
from capdist.evaluation import report
from capdist.features import filling as encoding
from capdist.features.filling import Encoded, encode_splits
from capdist.features.source import StoredFeatures
from capdist.features.store import FeatureStore, StoreWriter, missing_rows
from capdist.files import try_lock
from capdist.models.caption_model import CaptionModel, build_model
from capdist.models.encoder import build_backbone
from capdist.recipe.reading import load_recipe
from capdist.recipe.sections import Recipe
from capdist.train import train
from capdist.training.step import TrainStep
from tests.conftest import draw_photos, reset_accelerate
from tests.processes import SMALL

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

VIEWS = ("data.random_crop=0.5", "data.horizontal_flip=true", "encoder.cache_views=3")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("drawn") / "data", {"train": 10, "validation": 5})


@pytest.fixture
def arguments(drawn: Path, tmp_path: Path) -> list[str]:
    """Overrides of a recipe that caches 10 training and 5 validation photos in float32, encoded four at a time."""
    cached = (
        "encoder.trainable_from=null",
        "training.encoder_learning_rate=null",
        "encoder.batch_norm=frozen",
        "encoder.precision=no",
        "encoder.batch_size=4",
    )
    return [*SMALL, *cached, f"data.path={drawn}", f"run.output_dir={tmp_path / 'runs'}"]


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that were encoded, in their order."""
    rows: list[int] = []
    put = StoreWriter.put

    def count(writer: StoreWriter, batch: torch.Tensor, features: torch.Tensor) -> None:
        rows.extend(batch.tolist())
        put(writer, batch, features)

    monkeypatch.setattr(StoreWriter, "put", count)
    return rows


def _recipe(arguments: list[str], *more: str) -> Recipe:
    return load_recipe("configs/scenes.yaml", [*arguments, *more])


def _model(recipe: Recipe) -> tuple[CaptionModel, Preprocessing]:
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe.encoder, recipe.decoder, vocab_size=5, pad_id=0)
    return model, Preprocessing(recipe.data.image_size, model.encoder.mean, model.encoder.std)


def _encode(recipe: Recipe, *names: str) -> list[Encoded]:
    reset_accelerate()
    accelerator = build_accelerator(recipe)
    loaded = read_source(recipe.data)
    splits = {name: get_split(loaded, name) for name in names or ("train",)}
    return encode_splits(accelerator, *_model(recipe), splits, recipe)


def _expected(recipe: Recipe, name: str) -> torch.Tensor:
    """Encode a split's photos, or their views, one by one."""
    model, preprocessing = _model(recipe)
    photos = PhotoDataset(
        get_split(read_source(recipe.data), name).photos,
        preprocessing,
        build_views(recipe) if name == "train" else None,
    )
    features = []
    for row in range(len(photos)):
        item = photos[row]
        assert not isinstance(item, DataError)
        features.append(model.eval().encode(preprocessing.normalize(item[1][None])))
    return torch.cat(features)


def _all(store: FeatureStore) -> torch.Tensor:
    return store.features(torch.arange(len(store)))


def _stores(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "runs" / ".features").iterdir() if path.is_dir())


def _signal_at_batch(monkeypatch: pytest.MonkeyPatch, number: int, batch: int) -> None:
    """Send this process a signal just before it encodes a batch, counted from 1."""
    encode_next = encoding._SplitEncoder._encode_next
    batches = iter(range(1, 1000))

    def interrupted(self: Any, *rest: Any) -> int:
        if next(batches) == batch:
            signal.raise_signal(number)
        return encode_next(self, *rest)

    monkeypatch.setattr(encoding._SplitEncoder, "_encode_next", interrupted)


# --- once -----------------------------------------------------------------------------------------------------------


def test_every_photo_is_encoded_once_for_all_runs(
    arguments: list[str], encoded_rows: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = _recipe(arguments)
    with caplog.at_level(logging.INFO):
        train_split, validation = _encode(recipe, "train", "validation")
    assert Counter(encoded_rows) == Counter([*range(10), *range(5)])
    for encoded, rows in ((train_split, 10), (validation, 5)):
        assert (encoded.num_present, len(encoded.store)) == (0, rows)
        torch.testing.assert_close(_all(encoded.store), _expected(recipe, encoded.split), rtol=2e-3, atol=2e-3)
    assert "features of train: 0 of 10 are in" in caplog.text
    again = _encode(_recipe(arguments, "run.name=other", "run.seed=0"), "validation", "train")
    assert [one.num_present for one in again] == [5, 10]
    assert again[1].folder == train_split.folder
    assert len(encoded_rows) == 15
    assert "features of train: 10 of 10 are in" in caplog.text


def test_what_features_depend_on_gives_a_store_of_its_own(
    arguments: list[str], drawn: Path, tmp_path: Path, encoded_rows: list[int]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(drawn, moved)
    state = build_backbone("resnet18").network.state_dict()
    for name in ("one", "two"):
        state["conv1.weight"] = torch.randn(64, 3, 7, 7)
        save_file(state, tmp_path / f"{name}.safetensors")
    variants = [
        [], ["run.seed=1"], ["encoder.grid=4"], ["data.image_size=48"], ["data.limit=9"],
        [f"encoder.weights={tmp_path / 'one.safetensors'}"],
        [*VIEWS], [*VIEWS, "data.color_jitter=0.1"], [*VIEWS, "encoder.cache_views=2"],
        [*VIEWS, "data.random_crop=0.6"],
        [*VIEWS, f"encoder.weights={tmp_path / 'one.safetensors'}"],
        [*VIEWS, f"encoder.weights={tmp_path / 'one.safetensors'}", "run.seed=1"],
    ]  # fmt: skip
    folders = [_encode(_recipe(arguments, *more))[0].folder for more in variants]
    assert len(set(folders)) == len(variants)
    # The same name for another file, and other bytes in the same photo.
    (tmp_path / "two.safetensors").replace(tmp_path / "one.safetensors")
    folders.append(_encode(_recipe(arguments, *variants[5]))[0].folder)
    here = [*arguments, f"data.path={moved}"]
    assert _encode(_recipe(here))[0].folder == folders[0], "the same photos in another place"
    Image.new("RGB", (40, 40), "pink").save(moved / "train_0004.png")
    folders.append(_encode(_recipe(here))[0].folder)
    assert len(set(folders)) == len(variants) + 2
    num_rows = 10 + 10 + 10 + 10 + 9 + 10 + 30 + 30 + 20 + 30 + 30 + 30 + 10 + 10
    assert len(encoded_rows) == num_rows


@pytest.mark.parametrize("name", ["features.npy", "done.npy"])
def test_a_damaged_store_is_encoded_again(
    arguments: list[str], caplog: pytest.LogCaptureFixture, encoded_rows: list[int], name: str
) -> None:
    (encoded,) = _encode(_recipe(arguments))
    before = _all(encoded.store)
    os.truncate(encoded.folder / name, 130)
    (again,) = _encode(_recipe(arguments))
    assert f"{encoded.folder / name}: " in caplog.text
    assert torch.equal(_all(again.store), before)
    assert len(encoded_rows) == 20


def test_a_full_disk_leaves_nothing_half_made(arguments: list[str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _encode(_recipe(arguments))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _stores(tmp_path) == []
    assert len(_encode(_recipe(arguments))[0].store) == 10


# --- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_pass_goes_on_where_it_was(
    arguments: list[str], tmp_path: Path, encoded_rows: list[int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        _signal_at_batch(patch, number, batch=2)
        with pytest.raises(
            Stopped, match=rf"signal {int(number)}\) .*are kept, and the same command goes on"
        ) as caught:
            _encode(_recipe(arguments), "train", "validation")
    assert caught.value.exit_code == 128 + number
    (folder,) = _stores(tmp_path)
    assert missing_rows(folder).tolist() == [8, 9]
    train_split, validation = _encode(_recipe(arguments), "train", "validation")
    assert (train_split.num_present, validation.num_present) == (8, 0)
    assert encoded_rows == [*range(10), *range(5)]
    straight = _encode(_recipe(arguments, f"run.output_dir={tmp_path / 'straight'}"))[0]
    assert torch.equal(_all(train_split.store), _all(straight.store))
    assert signal.getsignal(number) is before


def test_stores_lie_beside_runs_in_the_home_of_the_user(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (validation,) = _encode(_recipe(arguments, "run.output_dir=~/runs"), "validation")
    assert _stores(tmp_path) == [validation.folder]


@pytest.mark.parametrize("batch", [4, 5])
def test_a_signal_is_heard_in_the_last_split(arguments: list[str], monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Also with its last batch, after which nothing is missing."""
    _signal_at_batch(monkeypatch, signal.SIGTERM, batch)
    with pytest.raises(Stopped):
        _encode(_recipe(arguments), "validation", "train")


def test_a_signal_is_heard_while_photos_are_read_for_the_first_time(arguments: list[str], tmp_path: Path) -> None:
    recipe = _recipe(arguments)
    split = get_split(read_source(recipe.data), "train")

    class Photos(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for index, photo in enumerate(super().__iter__()):
                assert index <= 4, "nobody heard the signal"
                if index == 3:
                    signal.raise_signal(signal.SIGTERM)
                yield photo

    object.__setattr__(split, "photos", Photos(split.photos))
    with pytest.raises(Stopped):
        encode_splits(build_accelerator(recipe), *_model(recipe), {"train": split}, recipe)
    assert not any((tmp_path / "runs").glob(".features/*/features.npy"))


def test_rows_that_never_came_are_noticed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a machine that wrote them to a disk of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "put", lambda *_: None)
        with pytest.raises(StorageError, match="lacks 10 rows .* one shared disk"):
            _encode(_recipe(arguments))
    assert _encode(_recipe(arguments))[0].num_present == 0


def test_a_broken_photo_costs_no_other(arguments: list[str], drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(drawn, folder)
    broken = folder / "train_0009.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(DataError, match=r"train_0009\.png"):
            _encode(_recipe(arguments, f"data.path={folder}"))
        assert missing_rows(_stores(tmp_path)[0]).tolist() == [8, 9]


def _at_claim(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], None]) -> None:
    """Let something happen just before a store is claimed, counted from 1."""
    claim = encoding.claim_store
    claims = iter(range(1, 100))

    def watched(*rest: Any) -> Any:
        if next(claims) == number:
            happens()
        return claim(*rest)

    monkeypatch.setattr(encoding, "claim_store", watched)
    monkeypatch.setattr(encoding, "_POLL_S", 0.01)


def test_a_pass_waits_for_another_one_of_the_same_photos(
    arguments: list[str], encoded_rows: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _encode(_recipe(arguments))[0].folder
    done = np.lib.format.open_memmap(folder / "done.npy", mode="r+")
    done[:] = 0
    other = try_lock(folder / ".lock")
    assert other is not None

    def finish() -> None:
        done[4:7] = 1
        other.close()

    _at_claim(monkeypatch, 4, finish)
    encoded_rows.clear()
    with caplog.at_level(logging.INFO):
        (encoded,) = _encode(_recipe(arguments))
    assert caplog.text.count("another run is making them") == 1
    assert encoded.num_present == 7 - 4
    assert encoded_rows == [0, 1, 2, 3, 7, 8, 9]


def test_a_signal_ends_the_waiting(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _encode(_recipe(arguments))[0].folder
    other = try_lock(folder / ".lock")
    _at_claim(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        _encode(_recipe(arguments))
    assert other is not None


# --- views ----------------------------------------------------------------------------------------------------------


def test_views_of_training_photos_are_encoded_once(arguments: list[str], encoded_rows: list[int]) -> None:
    recipe = _recipe(arguments, *VIEWS)
    train_split, validation = _encode(recipe, "train", "validation")
    assert len(encoded_rows) == 30 + 5
    assert (len(train_split.store), train_split.unit) == (30, "view")
    assert (len(validation.store), validation.unit) == (5, "photo")
    for encoded in (train_split, validation):
        torch.testing.assert_close(_all(encoded.store), _expected(recipe, encoded.split), rtol=2e-3, atol=2e-3)
    plain = _encode(_recipe(arguments), "validation")[0]
    assert plain.folder == validation.folder, "what is not augmented has the features of a run without augmentation"


# --- from the programs ----------------------------------------------------------------------------------------------


def _command(arguments: list[str]) -> int:
    reset_accelerate()
    with pytest.raises(SystemExit) as caught:
        cli.main(["features", "--config", "configs/scenes.yaml", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.usefixtures("no_report")
def test_the_command_says_what_it_did_and_training_finds_it(
    arguments: list[str], encoded_rows: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _signal_at_batch(patch, signal.SIGTERM, batch=2)
        assert _command(arguments) == 143
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "the same command goes on from there" in stderr.splitlines()[-1]
    assert _command(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, words in zip(lines, ("train: 10 photos, 8 were", "validation: 5 photos, 0 were"), strict=True):
        assert re.match(rf"{words} there already, [\d.,]+ photos/s, 0\.\d MB in (\S+)$", line), line
        assert Path(line.split()[-1], "features.npy").is_file()
    assert _command(arguments) == 0
    assert "train: 10 photos, 10 were there already, nothing to do, " in capsys.readouterr().out
    reset_accelerate()
    train([_recipe(arguments, "training.max_steps=1", "training.warmup_steps=0")])
    assert len(encoded_rows) == 15


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["encoder.trainable_from=layer1"], "encoder.trainable_from"),
        (["encoder.cache=off"], "encoder.cache"),
        (["data.horizontal_flip=true"], "encoder.cache_views"),
    ],
)
def test_the_command_refuses_recipes_that_use_no_cache(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], key: str
) -> None:
    assert _command([*arguments, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"capdist: error: {key}: ")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the final scores, which take longer than all the rest."""
    monkeypatch.setattr(report, "final_report", lambda *rest: ("none", {}))


def _train(recipe: Recipe, *, resume: bool = False) -> dict[str, torch.Tensor]:
    reset_accelerate()
    result = train([recipe], resume=resume)
    return load_file(result.folder / "checkpoints" / f"step_{result.steps:08d}" / "model.safetensors")


@pytest.mark.usefixtures("no_report")
def test_training_on_views_stops_and_goes_on_to_the_same_bits(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded_rows: list[int]
) -> None:
    # Ten photos, two steps an epoch.
    more = [*VIEWS, "training.epochs=3", "training.warmup_steps=0", "data.batch_size=5", "evaluation.every_epochs=3"]
    straight = _train(_recipe(arguments, *more, f"run.output_dir={tmp_path / 'straight'}"))
    assert len(encoded_rows) == 35

    encoded_rows.clear()
    with monkeypatch.context() as patch:
        _signal_at_batch(patch, signal.SIGTERM, batch=3)
        with pytest.raises(Stopped) as caught:
            _train(_recipe(arguments, *more))
    assert caught.value.exit_code == 143
    assert len(encoded_rows) == 12

    step = TrainStep.__call__
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", lambda self, i, window, *_: step(self, i, window, i == 2))
        with pytest.raises(Stopped):
            _train(_recipe(arguments, *more))  # the same command: there is no run yet that --resume could continue
    resumed = _train(_recipe(arguments, *more), resume=True)
    assert len(encoded_rows) == 35, "what was encoded is not encoded again"
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.usefixtures("no_report")
def test_epochs_of_a_run_see_all_views(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the model is the view that `Views` says."""
    seen: list[list[int]] = []
    inputs: Callable[..., Any] = StoredFeatures.inputs

    def watch(self: StoredFeatures, batch: Any) -> Any:
        result = inputs(self, batch)
        assert torch.equal(result["features"], self.store.features(batch.feature_rows))
        assert "pixel_values" not in result
        seen.append(batch.feature_rows.tolist())
        return result

    monkeypatch.setattr(StoredFeatures, "inputs", watch)
    recipe = _recipe(arguments, *VIEWS, "training.epochs=3", "training.warmup_steps=0", "data.batch_size=10")
    _train(recipe)
    views = build_views(recipe)
    assert views is not None
    assert [sorted(rows) for rows in seen] == [[views.row(image, epoch) for image in range(10)] for epoch in range(3)]
    assert sorted(row for rows in seen for row in rows) == list(range(30))
