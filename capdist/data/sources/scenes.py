"""The source `scenes`: it draws its images and needs no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdist.data.scenes import build_scenes
from capdist.data.sources.findings import Findings
from capdist.data.sources.records import Record, Request, to_splits

if TYPE_CHECKING:
    from datasets import DatasetDict


def load(request: Request, findings: Findings) -> DatasetDict:
    """Draw the scenes; see `load_source`."""
    records = {
        split: [Record(row["image_id"], row["captions"], content=row["image"]["bytes"]) for row in rows]
        for split, rows in build_scenes(request.limit).items()
    }
    return to_splits(records, None)
