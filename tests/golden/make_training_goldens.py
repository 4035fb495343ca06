"""Train the two recipes beside this file and write what came of it: weights, losses, scores and captions.

    python tests/golden/make_training_goldens.py tests/golden/training_bits.json

Read the difference before keeping it: the file says what training computed when it was written, to the bit.
`reproducible_environment` uses only instructions that every x86-64 processor has, so machines agree. Another version of
torch may round differently; the test then compares only the numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RUNS = {"scenes": ("scenes",), "stages": ("stages-words", "stages-look", "stages")}
"""Recipes, and the runs that each leaves."""


def reproducible_environment() -> dict[str, str]:
    """Return variables under which MKL, oneDNN and torch round alike on every x86-64 processor."""
    return os.environ | {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def train_and_describe(folder: Path) -> dict[str, Any]:
    """Train both recipes in processes of their own and return what they left."""
    environment = reproducible_environment()
    sys.path.insert(0, str(REPOSITORY))
    from tests.conftest import draw_photos

    photos = draw_photos(folder / "photos", {"train": 14, "validation": 8, "test": 6})
    for recipe in RUNS:
        subprocess.run(
            [
                sys.executable, "capdist/train.py", "--config", str(HERE / f"training_{recipe}.yaml"),
                f"data.path={photos}", f"run.output_dir={folder}",
            ],
            env=environment, cwd=REPOSITORY, check=True, capture_output=True, text=True,
        )  # fmt: skip
    command = [sys.executable, __file__, "--describe", str(folder)]
    described = subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(described.stdout)
    return result


def describe(folder: Path) -> dict[str, Any]:
    """Return version of torch, and by run its lines, the tensors of its last checkpoint and its captions."""
    import torch

    runs = {run: describe_run(folder / run, folder / "photos") for runs in RUNS.values() for run in runs}
    return {"torch": torch.__version__.partition("+")[0], "runs": runs}


def describe_run(run: Path, photos: Path) -> dict[str, Any]:
    """Return what `describe` says of one run."""
    from capdist import Captioner

    last = max((run / "checkpoints").glob("step_*"))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("captions_per_second", "data_wait", "seconds", "meteor", "meteor_reason")
    kept = [{key: value for key, value in line.items() if key not in timed} for line in lines if "versions" not in line]
    captions = Captioner.from_pretrained(run / "model", "cpu").caption(sorted(photos.glob("test_*.png")))
    return {
        "lines": kept,
        "weights": describe_tensors(last / "model.safetensors"),
        "optimizer": describe_tensors(last / "optimizer.safetensors"),
        "captions": [[caption.text, caption.log_probability] for caption in captions],
    }


def describe_tensors(path: Path) -> dict[str, list[Any]]:
    """Return SHA-256 and Euclidean norm of each tensor of a file by its name."""
    from safetensors.torch import load_file

    # Adding zero makes every zero positive: its sign says nothing, and is all that some harmless changes move.
    tensors = {name: (tensor + 0).contiguous() for name, tensor in load_file(path).items()}
    return {
        name: [hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16], float(tensor.double().norm())]
        for name, tensor in sorted(tensors.items())
    }


if __name__ == "__main__":
    if sys.argv[1] == "--describe":
        sys.path.insert(0, str(REPOSITORY))
        print(json.dumps(describe(Path(sys.argv[2]))))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            Path(sys.argv[1]).write_text(json.dumps(train_and_describe(Path(scratch)), indent=1) + "\n")
