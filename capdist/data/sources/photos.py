"""Photos that caption files name: only regular files inside the image folder are ever opened."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path

from capdist.data.sources.findings import MISSING_PHOTO, Findings
from capdist.errors import DataError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""File endings of the formats that `capdist.data.images` opens; other files in a folder are ignored."""

_DRIVE = re.compile(r"[A-Za-z]:")


def existing_folder(path: str, layout: str) -> Path:
    """Return `path` as an absolute folder.

    Raises:
        DataError: There is no such folder; `layout` says what it should hold.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: the folder {state}; expected {layout}")
    return folder.absolute()


class PhotoFolder:
    """The files below an image folder. Each folder is listed only once, which saves time.

    Args:
        root: Folder that must contain every photo.
        findings: Takes names that are unsafe (a mistake) or lead to no file (an oddity).
    """

    def __init__(self, root: Path, findings: Findings) -> None:
        self.root = root
        self._findings = findings
        self._folders: dict[str, dict[str, os.DirEntry[str]]] = {}

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def find(self, name: str, place: str) -> str | None:
        """Return the path of the photo `name` (relative to the folder, with `/`), None if it cannot be used."""
        if not is_plain(name):
            kind = "is no plain file name inside the image folder; no absolute paths, '..' or backslashes"
            self._findings.mistake(kind, f"{place}: {name[:100]!r}")
            return None
        folder, _, file = name.rpartition("/")
        entry = self._listing(folder).get(file)
        if entry is None:
            self._findings.oddity(MISSING_PHOTO, name)
        elif not self._is_inside(entry):
            kind = f"leads out of {self.root} or is no regular file; put the photo itself there"
            self._findings.mistake(kind, f"{place}: {name!r}")
        else:
            return entry.path
        return None

    def names(self) -> list[str]:
        """Return the names of the photos that lie directly in the folder, sorted."""
        return sorted(name for name in self._listing("") if name.lower().endswith(PHOTO_SUFFIXES))

    def _listing(self, folder: str) -> dict[str, os.DirEntry[str]]:
        if folder not in self._folders:
            path = self.root / folder
            entries: dict[str, os.DirEntry[str]] = {}
            if path.is_dir():
                with os.scandir(path) as scan:
                    entries = {entry.name: entry for entry in scan}
            self._folders[folder] = entries
        return self._folders[folder]

    def _is_inside(self, entry: os.DirEntry[str]) -> bool:
        if entry.is_file(follow_symlinks=False) and Path(entry.path).parent == self.root:
            return True  # the usual case costs no system call
        real = os.path.realpath(entry.path)
        return real.startswith(self._real_root + os.sep) and os.path.isfile(real)


def is_plain(name: str) -> bool:
    """Return whether a name from an untrusted file is a relative path without `..` and other tricks."""
    if not name or "\0" in name or "\\" in name or name.startswith("/") or _DRIVE.match(name):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))
