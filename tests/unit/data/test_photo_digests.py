"""Digests of photos: remembered while a file is as it was, and never trusted a moment longer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capdist.errors import DataError
from capdist.features.digests import digest_photos

HOUR_NS = 3600 * 10**9


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "features" / "photo_digests.json"


def _write(path: Path, content: bytes, *, age_ns: int = HOUR_NS) -> dict[str, Any]:
    path.write_bytes(content)
    changed_ns = time.time_ns() - age_ns
    os.utime(path, ns=(changed_ns, changed_ns))
    return {"path": str(path), "bytes": None}


def _replace_unseen(path: Path, content: bytes) -> None:
    """Write other content of the same size and leave the time of change as it was."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_photo_that_did_not_change_is_not_read_again(tmp_path: Path, memory: Path) -> None:
    photos = [_write(tmp_path / f"{i}.jpg", b"photo %d" % i) for i in range(3)]
    assert digest_photos(photos, memory) == [_digest(b"photo %d" % i) for i in range(3)]
    saved = json.loads(memory.read_text())
    status = (tmp_path / "1.jpg").stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    assert saved[str(tmp_path / "1.jpg")] == [status.st_size, *times, _digest(b"photo 1")]
    memory.write_text(json.dumps(saved | {str(tmp_path / "1.jpg"): [status.st_size, *times, "remembered"]}))
    assert digest_photos(photos, memory)[1] == "remembered", "the file was read again"


def test_a_file_of_the_same_size_and_time_that_was_written_again_is_read_again(tmp_path: Path, memory: Path) -> None:
    photo = _write(tmp_path / "a.jpg", b"photo")
    digest_photos([photo], memory)
    _replace_unseen(tmp_path / "a.jpg", b"other")
    assert digest_photos([photo], memory) == [_digest(b"other")]


@pytest.mark.parametrize("content", [b"photo", b"other", b"longer photo", b""])
def test_a_file_that_was_written_again_is_read_again(tmp_path: Path, memory: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    digest_photos([_write(path, b"photo")], memory)
    assert digest_photos([_write(path, content, age_ns=HOUR_NS // 2)], memory) == [_digest(content)]
    assert json.loads(memory.read_text())[str(path)][3] == _digest(content)


def test_a_shorter_file_of_the_same_time_is_read_again(tmp_path: Path, memory: Path) -> None:
    path = tmp_path / "a.jpg"
    digest_photos([_write(path, b"photo")], memory)
    changed_ns = path.stat().st_mtime_ns
    path.write_bytes(b"short")
    path.write_bytes(b"s")
    os.utime(path, ns=(changed_ns, changed_ns))
    assert digest_photos([{"path": str(path), "bytes": None}], memory) == [_digest(b"s")]


@pytest.mark.parametrize("age_ns", [0, 10**9, -HOUR_NS], ids=["now", "a second ago", "in an hour"])
def test_a_file_that_has_just_changed_may_change_again_unseen(tmp_path: Path, memory: Path, age_ns: int) -> None:
    path = tmp_path / "a.jpg"
    photo = _write(path, b"photo", age_ns=age_ns)
    assert digest_photos([photo], memory) == [_digest(b"photo")]
    _replace_unseen(path, b"other")
    assert digest_photos([photo], memory) == [_digest(b"other")]


def test_bytes_are_always_digested(tmp_path: Path, memory: Path) -> None:
    path = str(tmp_path / "a.jpg")
    for content in (b"photo", b"other"):
        assert digest_photos([{"path": path, "bytes": content}], memory) == [_digest(content)]
    assert not memory.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"/a.jpg": 1}', b'{"/a.jpg": [1, 2]}', b'{"/a.jpg": ["1", 2, "x"]}', b"\xff\x00"],
)
def test_a_damaged_memory_is_forgotten(tmp_path: Path, memory: Path, content: bytes) -> None:
    photo = _write(tmp_path / "a.jpg", b"photo")
    memory.parent.mkdir()
    memory.write_bytes(content)
    assert digest_photos([photo], memory) == [_digest(b"photo")]
    assert list(json.loads(memory.read_text())) == [photo["path"]]


def test_what_another_run_remembers_meanwhile_is_kept(tmp_path: Path, memory: Path) -> None:
    first, second = (_write(tmp_path / f"{i}.jpg", b"photo %d" % i) for i in range(2))

    def photos() -> Iterator[dict[str, Any]]:
        yield first
        digest_photos([second], memory)

    digest_photos(photos(), memory)
    assert sorted(json.loads(memory.read_text())) == [first["path"], second["path"]]
    assert [path.name for path in memory.parent.iterdir()] == [memory.name]


def test_photos_before_a_broken_one_are_remembered(tmp_path: Path, memory: Path) -> None:
    photo = _write(tmp_path / "a.jpg", b"photo")
    with pytest.raises(DataError, match="gone.jpg: No such file"):
        digest_photos([photo, {"path": str(tmp_path / "gone.jpg"), "bytes": None}], memory)
    assert list(json.loads(memory.read_text())) == [photo["path"]]


def test_paths_are_remembered_whole(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "a.jpg", name.encode())
        monkeypatch.chdir(tmp_path / name)
        assert digest_photos([{"path": "a.jpg", "bytes": None}], memory) == [_digest(name.encode())]
    assert len(json.loads(memory.read_text())) == 2
