"""Files and folders appear whole or not at all, whatever fails and whenever the power goes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from capdist import files
from capdist.files import set_aside, staged_folder, write_atomically


def _fill(folder: Path, text: str) -> None:
    with staged_folder(folder, folder.with_name(".part")) as staging:
        for name in ("a", "b"):
            (staging / name).write_text(text + name)


def _found(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", ["", "old "])
def test_a_folder_appears_with_all_its_files_and_nothing_beside_it(tmp_path: Path, before: str) -> None:
    folder = tmp_path / "deep" / "folder"
    if before:
        _fill(folder, before)
    (folder.parent / ".part").mkdir(parents=True)
    (folder.parent / ".part" / "of_a_killed_process").write_text("half")
    _fill(folder, "new ")
    assert _found(tmp_path / "deep") == {"folder/a": "new a", "folder/b": "new b"}
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("before", [{}, {"folder/a": "old a", "folder/b": "old b"}], ids=["new", "replaced"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_it_is_filled_leaves_what_there_was(
    tmp_path: Path, before: dict[str, str], error: type[BaseException]
) -> None:
    if before:
        _fill(tmp_path / "folder", "old ")

    def fail() -> None:
        with staged_folder(tmp_path / "folder", tmp_path / ".part") as staging:
            (staging / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert _found(tmp_path) == before
    assert not (tmp_path / ".part").exists()


@pytest.mark.parametrize("failing", ["folder", ".part"])
def test_a_rename_that_fails_leaves_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    _fill(tmp_path / "folder", "old ")
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        _fill(tmp_path / "folder", "new ")
    assert _found(tmp_path) == {"folder/a": "old a", "folder/b": "old b"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_power_cut_finds_the_old_folder_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not flushed may be lost, so files come before the name, and the name before the old folder goes."""
    _fill(tmp_path / "folder", "old ")
    flushed: list[Path] = []
    flush, rename = files.flush_to_disk, os.replace

    def watch(path: Path) -> None:
        flush(path)
        flushed.append(path)
        if path == tmp_path:
            assert (tmp_path / "folder" / "a").read_text() == "new a", "flushed before it had its name"
            assert (set_aside(tmp_path / "folder") / "a").read_text() == "old a", "the old one went too early"

    def check(source: Path, target: Path) -> None:
        if target == tmp_path / "folder":
            staging = tmp_path / ".part"
            assert set(flushed) >= {staging, staging / "a", staging / "b"}, "has its name before it is on the disk"
        rename(source, target)

    monkeypatch.setattr(files, "flush_to_disk", watch)
    monkeypatch.setattr(os, "replace", check)
    _fill(tmp_path / "folder", "new ")
    assert flushed[-1] == tmp_path
    assert not set_aside(tmp_path / "folder").exists()


def test_a_file_that_cannot_be_flushed_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "new")
    assert _found(tmp_path) == {"file": "old"}
