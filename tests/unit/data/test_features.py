"""The feature store: what goes in comes out, and another run never gets features that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capdist.data.features import FeatureStore, create_store, store_key, writable
from capdist.errors import DataError

SHAPE = (7, 9, 5)


def _features() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "absent" / "folder" / "store.npy"


def _fill(path: Path, features: torch.Tensor) -> None:
    create_store(path, *features.shape)
    store = writable(path)
    store[:] = features.half().numpy()
    store.flush()  # type: ignore[attr-defined]


def test_round_trip_in_half_precision(path: Path) -> None:
    features = _features()
    _fill(path, features)
    store = FeatureStore.open(path)
    assert len(store) == 7
    rows = torch.tensor([3, 0, 6, 3])
    found = store.features(rows)
    assert found.dtype == torch.float32
    assert found.shape == (4, 9, 5)
    # float16 has 11 significant bits: half a unit in the last place is 2**-11 of the value.
    assert (found - features[rows]).abs().max() <= features.abs().max() * 2**-11
    assert ((found - features[rows]).abs() <= features[rows].abs() * 2**-11 + 2**-25).all()


def test_no_rows(path: Path) -> None:
    _fill(path, _features())
    assert FeatureStore.open(path).features(torch.tensor([], dtype=torch.long)).shape == (0, 9, 5)


def test_features_are_a_copy_and_the_store_is_read_only(path: Path) -> None:
    _fill(path, _features())
    store = FeatureStore.open(path)
    before = store.features(torch.tensor([1]))
    store.features(torch.tensor([1])).zero_()
    assert torch.equal(store.features(torch.tensor([1])), before)
    with pytest.raises(ValueError, match="read-only"):
        store.array[0] = 0


def test_the_store_is_mapped_not_read(path: Path) -> None:
    _fill(path, _features())
    assert isinstance(FeatureStore.open(path).array, np.memmap)


def test_processes_fill_their_own_rows(path: Path) -> None:
    features = _features()
    create_store(path, *SHAPE)
    maps = [writable(path) for _ in range(3)]
    for rank, array in enumerate(maps):
        rows = np.arange(rank, 7, 3)
        array[rows] = features.half().numpy()[rows]
    for array in maps:
        array.flush()  # type: ignore[attr-defined]
    assert torch.equal(FeatureStore.open(path).features(torch.arange(7)), features.half().float())


def test_a_new_store_is_empty_even_over_an_old_one(path: Path) -> None:
    _fill(path, _features())
    create_store(path, 2, 3, 4)
    store = FeatureStore.open(path)
    assert store.array.shape == (2, 3, 4)
    assert not store.array.any()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY"])
def test_half_a_file_is_no_store(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.npy"
    path.write_bytes(content)
    with pytest.raises((ValueError, EOFError, OSError)):
        FeatureStore.open(path)


# --- the key --------------------------------------------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    return {"encoder": {"name": "resnet18", "grid": None}, "preprocessing": {"image_size": 64, "mean": (0.1, 0.2, 0.3)}}


def _weights() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.arange(12.0).view(3, 4),
        "norm.count": torch.tensor(3),
        "norm.bias": torch.zeros(2, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
    }


def _photos() -> list[dict[str, Any]]:
    return [{"path": f"{i}.jpg", "bytes": bytes([i] * 40)} for i in range(3)]


def _key(
    settings: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    photos: list[dict[str, Any]] | None = None,
) -> str:
    return store_key(
        _settings() if settings is None else settings,
        _weights() if weights is None else weights,
        _photos() if photos is None else photos,
    )


def test_the_same_inputs_give_the_same_name_that_any_file_system_takes() -> None:
    assert _key() == _key()
    assert _key().isalnum()
    assert 16 <= len(_key()) <= 64


def test_spelling_of_the_inputs_does_not_matter(tmp_path: Path) -> None:
    backwards = {name: dict(reversed(value.items())) for name, value in reversed(_settings().items())}
    assert _key(settings=backwards) == _key()
    as_lists = {**_settings(), "preprocessing": {"image_size": 64, "mean": [0.1, 0.2, 0.3]}}
    assert _key(settings=as_lists) == _key(), "settings that were saved as JSON"
    transposed = {**_weights(), "conv.weight": _weights()["conv.weight"].T.contiguous().T.requires_grad_()}
    assert not transposed["conv.weight"].is_contiguous()
    assert _key(weights=transposed) == _key()


def test_a_photo_in_a_file_is_the_photo_in_memory(tmp_path: Path) -> None:
    photos = []
    for photo in _photos():
        file = tmp_path / f"renamed_{photo['path']}"
        file.write_bytes(photo["bytes"])
        photos.append({"path": str(file), "bytes": None})
    assert _key(photos=photos) == _key()
    Path(photos[1]["path"]).write_bytes(b"other")
    assert _key(photos=photos) != _key()


def test_every_setting_changes_the_key() -> None:
    keys = {_key()}
    for section, values in _settings().items():
        for name in values:
            changed = _settings()
            changed[section][name] = "other"
            keys.add(_key(settings=changed))
    keys.add(_key(settings={**_settings(), "mixed_precision": "bf16"}))
    assert len(keys) == 6


def test_every_weight_changes_the_key() -> None:
    keys = {_key()}
    for name in _weights():
        changed = _weights()
        flat = changed[name].view(-1)
        flat[-1] = ~flat[-1] if flat.dtype == torch.bool else flat[-1] + 1
        keys.add(_key(weights=changed))
        keys.add(_key(weights={(f"{n}x" if n == name else n): t for n, t in _weights().items()}))
        keys.add(_key(weights={n: t for n, t in _weights().items() if n != name}))
    assert len(keys) == 1 + 3 * 4
    tiny = _weights()
    tiny["conv.weight"].view(-1)[0] = torch.finfo(torch.float32).tiny
    assert _key(weights=tiny) not in keys, "even the last bit of a weight counts"


def test_every_byte_of_every_photo_changes_the_key() -> None:
    keys = {_key()}
    for photo in range(3):
        for at in (0, 17, 39):
            photos = _photos()
            content = bytearray(photos[photo]["bytes"])
            content[at] ^= 1
            photos[photo]["bytes"] = bytes(content)
            keys.add(_key(photos=photos))
    assert len(keys) == 10


@pytest.mark.parametrize(
    "change",
    [
        lambda photos: photos[::-1],
        lambda photos: [photos[1], photos[0], photos[2]],
        lambda photos: photos[:2],
        lambda photos: [*photos, photos[0]],
        lambda photos: [],
        lambda photos: [{"path": "x", "bytes": photos[0]["bytes"] + photos[1]["bytes"]}, photos[2]],
        lambda photos: [{"path": "x", "bytes": b""}, *photos],
    ],
    ids=["reversed", "swapped", "fewer", "more", "none", "joined", "empty"],
)
def test_order_and_number_of_photos_change_the_key(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> None:
    assert _key(photos=change(_photos())) != _key()


@pytest.mark.parametrize("kind", ["absent", "folder"])
def test_a_photo_that_cannot_be_read_is_an_error_of_the_data(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "absent.jpg"
    with pytest.raises(DataError) as caught:
        _key(photos=[{"path": str(path), "bytes": None}])
    (mistake,) = caught.value.mistakes
    assert mistake.startswith(f"{path}: ")
