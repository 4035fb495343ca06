"""The feature store: what goes in comes out, half a store is never taken for a whole one, and no run gets another's."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capdist.errors import DataError
from capdist.features import store as module
from capdist.features.digests import digest_photos
from capdist.features.store import (
    FeatureStore,
    StoreWriter,
    claim_store,
    create_store,
    find_damage,
    fits,
    missing_rows,
    store_key,
    weights_digest,
)

SHAPE = (7, 9, 5)
ABOUT = {"encoder": "resnet18", "rows": 7}


def _features() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "absent" / "features" / "store"


def _fill(folder: Path, features: torch.Tensor, rows: range = range(7)) -> None:
    if not folder.exists():
        create_store(folder, SHAPE, ABOUT)
    with StoreWriter(folder) as writer:
        writer.put(torch.tensor(rows), features[rows.start : rows.stop])


def _refuse(warning: str) -> None:
    raise AssertionError(f"nothing is wrong, but: {warning}")


def _claim(folder: Path, warn: Callable[[str], None] = _refuse) -> Any:
    return claim_store(folder, SHAPE, ABOUT, warn)


# --- reading --------------------------------------------------------------------------------------------------------


def test_round_trip_in_half_precision(folder: Path) -> None:
    features = _features()
    _fill(folder, features)
    store = FeatureStore.open(folder)
    assert len(store) == 7
    rows = torch.tensor([3, 0, 6, 3])
    found = store.features(rows)
    assert found.dtype == torch.float32
    assert found.shape == (4, 9, 5)
    # float16 has 11 significant bits: half a unit in the last place is 2**-11 of the value.
    assert (found - features[rows]).abs().max() <= features.abs().max() * 2**-11
    assert ((found - features[rows]).abs() <= features[rows].abs() * 2**-11 + 2**-25).all()


def test_no_rows(folder: Path) -> None:
    _fill(folder, _features())
    assert FeatureStore.open(folder).features(torch.tensor([], dtype=torch.long)).shape == (0, 9, 5)


def test_features_are_a_copy_and_the_store_is_read_only(folder: Path) -> None:
    _fill(folder, _features())
    store = FeatureStore.open(folder)
    before = store.features(torch.tensor([1]))
    store.features(torch.tensor([1])).zero_()
    assert torch.equal(store.features(torch.tensor([1])), before)
    with pytest.raises(ValueError, match="read-only"):
        store.array[0] = 0


def test_the_store_is_mapped_not_read_and_the_processor_holds_no_copy(folder: Path) -> None:
    _fill(folder, _features())
    store = FeatureStore.open(folder)
    assert isinstance(store.array, np.memmap)
    assert not store.hold(torch.device("cpu"))
    # What is changed in the file behind its back is seen: there is no other copy.
    np.lib.format.open_memmap(folder / "features.npy", mode="r+")[2] = 4
    assert (store.features(torch.tensor([2])) == 4).all()


@pytest.mark.parametrize(
    ("num_bytes", "free_bytes", "fit"), [(0, 1, True), (49, 100, True), (50, 100, False), (2**40, 2**36, False)]
)
def test_features_may_take_less_than_half_of_what_is_free(num_bytes: int, free_bytes: int, fit: bool) -> None:
    assert fits(num_bytes, free_bytes) is fit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("free_bytes", [2**40, 0])
def test_a_cuda_device_gives_the_same_features(folder: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    _fill(folder, _features())
    rows = torch.tensor([3, 0, 6, 3])
    expected = FeatureStore.open(folder).features(rows)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 2**40))
    store = FeatureStore.open(folder)
    assert store.hold(torch.device("cuda")) is (free_bytes > 0)
    found = store.features(rows)
    assert found.device.type == "cuda"
    assert torch.equal(found.cpu(), expected)


# --- filling --------------------------------------------------------------------------------------------------------


def test_a_new_store_says_what_it_is_and_has_no_row(folder: Path) -> None:
    create_store(folder, SHAPE, ABOUT)
    assert json.loads((folder / "about.json").read_text()) == ABOUT
    assert missing_rows(folder).tolist() == list(range(7))
    assert find_damage(folder, SHAPE) is None
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


def test_the_space_is_taken_up_front(folder: Path) -> None:
    create_store(folder, (100, 64, 64), ABOUT)
    assert (folder / "features.npy").stat().st_blocks * 512 >= 100 * 64 * 64 * 2


def test_processes_fill_their_own_rows(folder: Path) -> None:
    features = _features()
    create_store(folder, SHAPE, ABOUT)
    writers = [StoreWriter(folder) for _ in range(3)]
    for rank, writer in enumerate(writers):
        rows = torch.arange(rank, 7, 3)
        writer.put(rows, features[rows])
    for rank, writer in enumerate(writers):
        writer.flush()
        assert missing_rows(folder).tolist() == [row for row in range(7) if row % 3 > rank]
    assert torch.equal(FeatureStore.open(folder).features(torch.arange(7)), features.half().float())


@pytest.mark.parametrize(("every_s", "missing"), [(0.0, [3, 4, 5, 6]), (3600.0, list(range(7)))])
def test_rows_are_marked_from_time_to_time_and_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, missing: list[int]
) -> None:
    monkeypatch.setattr(module, "FLUSH_EVERY_S", every_s)
    create_store(folder, SHAPE, ABOUT)
    with StoreWriter(folder) as writer:
        writer.put(torch.arange(2), _features()[:2])
        writer.put(torch.tensor([2]), _features()[2:3])
        assert missing_rows(folder).tolist() == missing
    assert missing_rows(folder).tolist() == [3, 4, 5, 6]


def test_a_failure_keeps_what_was_put_before(folder: Path) -> None:
    create_store(folder, SHAPE, ABOUT)

    def fill() -> None:
        with StoreWriter(folder) as writer:
            writer.put(torch.arange(5), _features()[:5])
            raise RuntimeError("the photo is broken")

    with pytest.raises(RuntimeError, match="the photo is broken"):
        fill()
    assert missing_rows(folder).tolist() == [5, 6]


@pytest.mark.parametrize("fails", ["never", "features.npy", "done.npy"])
def test_no_row_is_marked_before_its_features_are_on_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    create_store(folder, SHAPE, ABOUT)
    flushes = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        flushes.append((name, missing_rows(folder).tolist()))
        if name == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    with nullcontext() if fails == "never" else pytest.raises(OSError, match="Input/output"), StoreWriter(folder) as w:
        w.put(torch.arange(6), _features()[:6])
        w.flush()
    # Leaving the context does not try again: a second fsync would say that all is well.
    expected = [("features.npy", list(range(7))), ("done.npy", [6])]
    assert flushes == expected[: 1 if fails == "features.npy" else 2]


def test_a_full_disk_leaves_nothing(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            claim_store(folder, (100, 64, 64), ABOUT, _refuse)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in folder.parent.iterdir()] == [".lock"]
    assert claim_store(folder, (100, 64, 64), ABOUT, _refuse) is not None


# --- claiming -------------------------------------------------------------------------------------------------------


def test_one_claim_at_a_time(folder: Path) -> None:
    held = _claim(folder)
    assert held is not None
    assert _claim(folder) is None
    held.close()
    again = _claim(folder)
    assert again is not None
    again.close()


def test_the_claim_of_a_dead_process_is_void(folder: Path) -> None:
    process = os.fork()
    if not process:
        held = _claim(folder)
        os._exit(0 if held is not None else 1)  # without closing anything
    assert os.waitpid(process, 0)[1] == 0
    assert _claim(folder) is not None


def test_a_store_is_left_as_it_is_when_claimed_again(folder: Path) -> None:
    _claim(folder).close()
    _fill(folder, _features(), range(3))
    _claim(folder).close()
    assert missing_rows(folder).tolist() == [3, 4, 5, 6]
    assert torch.equal(FeatureStore.open(folder).features(torch.arange(3)), _features()[:3].half().float())


def test_what_killed_creations_left_is_cleared_away(folder: Path) -> None:
    create_store(folder, SHAPE, ABOUT)
    for name in ("store", "other"):
        shutil.copytree(folder, folder.with_name(f".{name}.part"))
    shutil.rmtree(folder)
    (folder.with_name(".store.part") / "features.npy").write_bytes(b"half")
    _claim(folder).close()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "store"]
    assert find_damage(folder, SHAPE) is None


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _shrink(path: Path) -> None:
    array = np.load(path)
    np.save(path, array[:-1])


def _widen(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int32))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate, _shrink, _widen, Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY"),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"{(" * 59),
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["truncated", "fewer rows", "other type", "missing", "empty", "magic only", "header", "zeros", "folder"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["features.npy", "done.npy"])
def test_a_damaged_store_is_made_anew_with_a_warning(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    _fill(folder, _features())
    damage(folder / name)
    warnings: list[str] = []
    held = _claim(folder, warnings.append)
    assert held is not None
    assert _claim(folder) is None, "the new store is held, not the one that is gone"
    (warning,) = warnings
    assert warning.startswith(f"{folder / name}: ")
    assert missing_rows(folder).tolist() == list(range(7))
    assert find_damage(folder, SHAPE) is None
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "store"]


def test_damage_is_left_alone_while_another_run_holds_the_store(folder: Path) -> None:
    held = _claim(folder)
    (folder / "features.npy").write_bytes(b"")
    assert _claim(folder) is None
    held.close()
    assert (folder / "features.npy").stat().st_size == 0


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
        weights_digest(_weights() if weights is None else weights),
        digest_photos(_photos() if photos is None else photos, Path(os.devnull)),
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
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"{path}: ")
