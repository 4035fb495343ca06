"""Fixtures: a small data set of drawn photos, and an environment in which nothing reaches for a network."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

# Set before anything is imported, and inherited by every process a test starts.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "OMP_WAIT_POLICY": "passive",  # processes that share two cores must not spin
    "TOKENIZERS_PARALLELISM": "false",
}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts `pytest &`; the processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def draw_photos(folder: Path, sizes: dict[str, int], side: int = 40) -> Path:
    """Write a `folder` source: coloured squares on coloured ground, five captions each, some longer than others."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for split, count in sizes.items():
            for index in range(count):
                ground, square = rng.sample(COLOURS, 2)
                photo = Image.new("RGB", (side, side), ground)
                x, y = rng.randrange(side // 2), rng.randrange(side // 2)
                ImageDraw.Draw(photo).rectangle((x, y, x + side // 3, y + side // 3), fill=square)
                name = f"{split}_{index:04d}.png"
                photo.save(folder / name)
                captions = [
                    f"A {square} square.",
                    f"A {square} square on {ground}.",
                    f"There is a {square} square on {ground} ground.",
                    f"{square} on {ground}",
                    f"a small {square} square in front of a {ground} wall",
                ]
                file.write(json.dumps({"file_name": name, "captions": captions, "split": split}) + "\n")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `folder` source of 30 training, 10 validation and 10 test photos."""
    return draw_photos(tmp_path_factory.mktemp("photos") / "data", {"train": 30, "validation": 10, "test": 10})


def reset_accelerate() -> None:
    """Forget accelerate's singletons, as in a new process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test launch in this process, on the CPU, and undo what a launch sets: singletons, threads, loggers."""
    import torch

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads, level = torch.get_num_threads(), logging.getLogger("capdist").level
    reset_accelerate()
    yield
    reset_accelerate()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    logging.getLogger("capdist").setLevel(level)


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The real Flickr8k, or a visible skip."""
    root = os.environ.get("FLICKR8K_ROOT")
    if not root:
        pytest.skip("FLICKR8K_ROOT is not set: it names the folder of the real Flickr8k")
    return Path(root)
