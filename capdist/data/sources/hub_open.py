"""Opens a data set of the Hugging Face hub or a local folder; an error says in one line why that failed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from capdist.errors import DataError, StorageError, reason_of

if TYPE_CHECKING:
    from datasets import DatasetDict

_LAYOUT = "what `save_to_disk` wrote, or parquet files named by split, such as data/train-00000.parquet"


def open_splits(path: str) -> DatasetDict:
    """Return the splits of a hub id (`owner/name`, or `owner/name@revision`) or a local folder.

    Raises:
        DataError: The folder does not exist, or what is there cannot be read.
        StorageError: The hub cannot be reached, or has no such data set.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _open_folder(folder)
    if folder.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise DataError(f"{path}: the folder does not exist; expected {_LAYOUT}, or the id of a hub data set")
    return _open_hub(path)


def _open_folder(folder: Path) -> DatasetDict:
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        data = load_from_disk(str(folder)) if saved else load_dataset(str(folder))
    # The library has no root exception: scripts give RuntimeError, damaged files ArrowInvalid (a ValueError).
    except (FileNotFoundError, ValueError, RuntimeError, KeyError, TypeError, DatasetsError) as error:
        raise DataError(f"{folder}: cannot be read: {reason_of(error)}; expected {_LAYOUT}") from error
    return data if isinstance(data, DatasetDict) else DatasetDict(train=data)


def _open_hub(name: str) -> DatasetDict:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    try:
        return load_dataset(repository, revision=revision or None)
    except DatasetNotFoundError as error:
        raise StorageError(
            f"{name}: the hub has no such data set, or it is private: correct data.path, log in with "
            "`hf auth login`, or give a local folder"
        ) from error
    except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
        raise StorageError(
            f"{name}: the hub cannot be reached ({reason_of(error)}): give a local folder (save_to_disk or parquet) "
            "in data.path; with the data set in the cache, HF_HUB_OFFLINE=1 uses it without asking"
        ) from error
    except (FileNotFoundError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{name}: cannot be read: {reason_of(error)}") from error
