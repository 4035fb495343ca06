"""Checkpoints: exact, whole or absent, damage found in any file, and refused by any other run."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from capdist.errors import CheckpointError
from capdist.recipe.sections import Recipe
from capdist.training.checkpoints import (
    Identity,
    TrainState,
    check_identity,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json")
VOCABULARY = '{"words": ["<pad>", "é"]}'


class _Network(nn.Module):
    """Everything a captioner has that is awkward to save: tied, frozen, channels-last, buffers."""

    def __init__(self, seed: int = 0, tied: bool = True, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.embedding = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7)
        if tied:
            self.head.weight = self.embedding.weight
        self.to(memory_format=torch.channels_last)

    def forward(self, photos: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        seen = self.frozen(self.norm(self.convolution(photos)).mean(dim=(2, 3)))
        return self.head(seen + self.embedding(words))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        photos, words = torch.randn(2, 3, 5, 5, generator=generator), torch.randint(7, (2,), generator=generator)
        model(photos, words).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(model: nn.Module, kind: type = torch.optim.AdamW) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters[:2], "weight_decay": 0.0}, {"params": parameters[2:], "weight_decay": 0.1}]
    return kind(groups, lr=0.01)


def _identity(**recipe: Any) -> Identity:
    return Identity(
        Recipe(**recipe).to_dict(), "vocabulary", "data", "encoder", 2, "no", 4, {"torch": "2.10", "machine": "x86_64"}
    )


def _save(folder: Path, step: int = 10, seed: int = 0) -> Path:
    model = _Network(seed)
    optimizer = _optimizer(model)
    _train(model, optimizer, 2, seed)
    return save_checkpoint(folder, model, optimizer, VOCABULARY, TrainState(step), _identity())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints" / pristine.name))


@pytest.fixture
def three(pristine: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        shutil.copytree(pristine, tmp_path / "checkpoints" / f"step_{step:08d}")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("tied", [False, True])
def test_continued_run_is_bit_equal_to_one_that_never_stopped(tmp_path: Path, kind: type, tied: bool) -> None:
    model = _Network(tied=tied)
    optimizer = _optimizer(model, kind)
    _train(model, optimizer, 3)
    path = save_checkpoint(tmp_path, model, optimizer, VOCABULARY, TrainState(3), _identity())

    other = _Network(seed=9, tied=tied)
    resumed = _optimizer(other, kind)
    _train(other, resumed, 1, seed=5)  # state that must not survive
    load_checkpoint(path, other, resumed)
    for _ in range(2):
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
        saved, loaded = optimizer.state_dict(), resumed.state_dict()
        assert saved["param_groups"] == loaded["param_groups"]
        assert saved["state"].keys() == loaded["state"].keys() == set(range(len(saved["state"])))
        for index, tensors in saved["state"].items():
            assert tensors.keys() == loaded["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(loaded["state"][index][name], tensor) for name, tensor in tensors.items())
        _train(model, optimizer, 3, seed=1)
        _train(other, resumed, 3, seed=1)
    assert (other.head.weight is other.embedding.weight) == tied


def test_checkpoint_before_the_first_step_has_no_optimizer_state(tmp_path: Path) -> None:
    model = _Network()
    path = save_checkpoint(tmp_path, model, _optimizer(model), VOCABULARY, TrainState(0), _identity())
    other = _Network(seed=3)
    optimizer = _optimizer(other)
    load_checkpoint(path, other, optimizer)
    assert find_damage(path) is None
    assert torch.equal(other.head.weight, model.head.weight)
    assert optimizer.state_dict()["state"] == {}


def test_rates_of_the_optimizer_are_those_of_the_run_that_goes_on(checkpoint: Path) -> None:
    model = _Network()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    load_checkpoint(checkpoint, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_folder_holds_exactly_the_promised_files(pristine: Path) -> None:
    assert _names(pristine) == sorted(FILES)
    assert _names(pristine.parent) == ["step_00000010"]
    assert (pristine / "vocabulary.json").read_text(encoding="utf-8") == VOCABULARY
    manifest = json.loads((pristine / "manifest.json").read_text())
    assert sorted(manifest) == sorted(set(FILES) - {"manifest.json"})


def test_state_and_identity_come_back(tmp_path: Path) -> None:
    model = _Network()
    state = TrainState(7, 0.1 + 0.2, 5, 2, {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3})
    identity = _identity(training={"learning_rate": 3e-4, "epochs": 7}, tracking={"with": ["wandb"]})
    path = save_checkpoint(tmp_path, model, _optimizer(model), VOCABULARY, state, identity)
    assert read_state(path) == (state, identity)
    check_identity(path, read_state(path)[1], identity, pytest.fail)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": {}}', '{"state": {"steps": 1}, "identity": {}}'])
def test_foreign_state_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(checkpoint)


@pytest.mark.parametrize("other", [{"width": 5}, {"tied": False}], ids=str)
def test_checkpoint_of_another_network_does_not_fit(checkpoint: Path, other: dict[str, Any]) -> None:
    model = _Network(**other)
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        load_checkpoint(checkpoint, model, _optimizer(model))
    (mistake,) = caught.value.lines
    assert mistake.startswith(str(checkpoint))
    assert "\n" not in mistake


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    first = (_save(tmp_path, seed=0) / "model.safetensors").read_bytes()
    path = _save(tmp_path, seed=1)
    assert (path / "model.safetensors").read_bytes() != first
    assert find_damage(path) is None
    assert _names(tmp_path) == [path.name]


def test_whole_checkpoint_has_no_damage(pristine: Path) -> None:
    assert find_damage(pristine) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_file_is_found(checkpoint: Path, name: str, keep: float) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(keep * len(content))])
    assert name in (find_damage(checkpoint) or "")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_found(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert name in (find_damage(checkpoint) or "")


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(checkpoint: Path, name: str) -> None:
    """Each of 300 bits at random; one in the manifest may show as a file that does not fit it."""
    rng = random.Random(name)
    content = (checkpoint / name).read_bytes()
    for _ in range(300):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        (checkpoint / name).write_bytes(damaged)
        damage = find_damage(checkpoint)
        assert damage is not None, f"bit {bit} of byte {place}"
        assert "\n" not in damage
        assert name in damage or name == "manifest.json"


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_checkpoint_is_found(checkpoint: Path, tmp_path: Path, name: str) -> None:
    other = _Network(seed=4)
    path = save_checkpoint(tmp_path, other, _optimizer(other), '{"words": ["x"]}', TrainState(20), _identity())
    shutil.copy(path / name, checkpoint / name)
    damage = find_damage(checkpoint)
    assert damage is not None
    assert name in damage or name == "manifest.json"


@pytest.mark.parametrize("content", ["null", "[]", "3", "{}", '{"model.safetensors": 3}', '{"model.safetensors": {}}'])
def test_manifest_that_is_no_manifest_is_found(checkpoint: Path, content: str) -> None:
    (checkpoint / "manifest.json").write_text(content)
    assert "manifest.json" in (find_damage(checkpoint) or "")


@pytest.mark.parametrize("name", sorted(set(FILES) - {"manifest.json", "vocabulary.json"}))
def test_manifest_must_list_what_a_run_needs(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest[name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / name).write_bytes(b"anything")
    assert name in (find_damage(checkpoint) or "")


def test_newest_whole_checkpoint_is_taken(three: Path) -> None:
    assert newest_checkpoint(three, pytest.fail) == three / "step_00000030"


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_passed_over_with_a_warning(three: Path, name: str) -> None:
    (three / "step_00000030" / name).write_bytes(b"")
    warnings: list[str] = []
    assert newest_checkpoint(three, warnings.append) == three / "step_00000020"
    (warning,) = warnings
    assert str(three / "step_00000030" / name) in warning


def test_no_whole_checkpoint_is_an_error_with_a_line_for_each(three: Path) -> None:
    for path in three.iterdir():
        (path / "model.safetensors").unlink()
    warnings: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(three, warnings.append)
    assert len(warnings) == 3
    lines = "\n".join(caught.value.lines)
    for step in (10, 20, 30):
        assert str(three / f"step_{step:08d}" / "model.safetensors") in lines


@pytest.mark.parametrize(
    "name",
    [".tmp_step_00000040", "step_00000040.bak", "step_40", "step_000000040", "old_step_00000040", "step_0000004x"],
)
def test_other_names_are_ignored(three: Path, name: str) -> None:
    shutil.copytree(three / "step_00000030", three / name)
    (three / "step_00000050").write_text("a file, not a folder")
    assert newest_checkpoint(three, pytest.fail) == three / "step_00000030"
    prune_checkpoints(three, 1)
    kept = {"step_00000030", "step_00000050"} | (set() if name.startswith(".tmp_") else {name})
    assert set(_names(three)) == kept


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()], ids=["no folder", "empty"])
def test_run_without_checkpoints_has_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "checkpoints")
    assert newest_checkpoint(tmp_path / "checkpoints", pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_newest(three: Path, keep: int) -> None:
    for name in (".tmp_step_00000040", ".old_step_00000040"):  # what a killed run leaves
        (three / name).mkdir()
        (three / name / "model.safetensors").write_bytes(b"half")
    prune_checkpoints(three, keep)
    assert _names(three) == ["step_00000010", "step_00000020", "step_00000030"][-keep:]


def test_checkpoint_just_written_survives_damaged_ones_of_later_steps(three: Path) -> None:
    """A run that went back past two damaged checkpoints, told to keep two: one must be whole at any moment."""
    for step in (20, 30):
        (three / f"step_{step:08d}" / "model.safetensors").unlink()
    assert newest_checkpoint(three, lambda _: None) == three / "step_00000010"
    written = _save(three, step=15)
    prune_checkpoints(three, 2)
    assert newest_checkpoint(three, lambda _: None) == written


@pytest.mark.parametrize(
    "writer",
    [*(f"training.checkpoints.{name}" for name in ("save_model", "save_file", "sha256")), "files.flush_to_disk"],
)
@pytest.mark.parametrize("step", [20, 40])
def test_full_disk_leaves_the_old_checkpoints_and_no_rubbish(
    three: Path, monkeypatch: pytest.MonkeyPatch, writer: str, step: int
) -> None:
    before = {path: path.read_bytes() for path in three.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"capdist.{writer}", full)
    with pytest.raises(OSError, match="No space"):
        _save(three, step=step, seed=1)
    assert {path: path.read_bytes() for path in three.rglob("*") if path.is_file()} == before
    assert _names(three) == ["step_00000010", "step_00000020", "step_00000030"]


def test_run_killed_while_writing_goes_on_from_the_checkpoint_before(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cleaned up by a killed process: the half-written folder is not taken for a checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            _save(three, step=40)
    assert (three / ".tmp_step_00000040" / "manifest.json").exists()
    assert newest_checkpoint(three, pytest.fail) == three / "step_00000030"
    assert find_damage(_save(three, step=40)) is None
    assert not (three / ".tmp_step_00000040").exists()


SECTIONS = Recipe().to_dict()
FREE_SECTIONS = {"checkpoint", "tracking"}
FREE = {
    "run.name", "run.output_dir", "run.threads", "data.path", "data.num_workers", "encoder.weights", "encoder.cache",
    "encoder.batch_size", "encoder.compile", "encoder.gradient_checkpointing", "training.epochs", "training.max_steps",
    "training.patience", "training.log_every", "training.start_from",
}  # fmt: skip
KEYS = [(section, key) for section, values in SECTIONS.items() for key in values]


def test_a_checkpoint_from_before_a_key_had_its_default() -> None:
    now = _identity()
    older = copy.deepcopy(now.recipe)
    del older["encoder"]["precision"]
    check_identity(Path("step"), replace(now, recipe=older), now, print)
    changed = copy.deepcopy(now.recipe)
    changed["encoder"]["precision"] = "bf16"
    with pytest.raises(CheckpointError, match="encoder.precision"):
        check_identity(Path("step"), replace(now, recipe=older), replace(now, recipe=changed), print)


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda value: value)
def test_recipe_keys_are_free_or_refused(section: str, key: str) -> None:
    saved = _identity()
    recipe = copy.deepcopy(saved.recipe)
    recipe[section][key] = "something else"
    now = replace(saved, recipe=recipe)
    # A best score means nothing under another metric, on other photos, or of captions found in another way.
    is_free_evaluation = section == "evaluation" and key in ("every_epochs", "batch_size")
    if section in FREE_SECTIONS or is_free_evaluation or f"{section}.{key}" in FREE:
        check_identity(Path("c"), saved, now, pytest.fail)
        return
    with pytest.raises(CheckpointError) as caught:
        check_identity(Path("c"), saved, now, pytest.fail)
    (mistake,) = caught.value.lines
    assert f"{section}.{key}" in mistake
    assert repr(SECTIONS[section][key]) in mistake
    assert "'something else'" in mistake


@pytest.mark.parametrize(
    ("field", "value", "fragment"),
    [
        ("num_processes", 3, "2 processes, now 3"),
        ("vocabulary", "other", "vocabulary"),
        ("data", "other", "images or captions"),
        ("encoder", "other", "encoder.weights"),
        ("mixed_precision", "bf16", "was made in precision no, now bf16"),
    ],
)
def test_other_differences_are_refused(field: str, value: Any, fragment: str) -> None:
    saved = _identity()
    with pytest.raises(CheckpointError, match=fragment) as caught:
        check_identity(Path("c"), saved, replace(saved, **{field: value}), pytest.fail)
    assert len(caught.value.lines) == 1


def test_all_differences_are_listed_at_once() -> None:
    saved = _identity()
    now = replace(
        _identity(run={"seed": 5}, decoder={"gate": True}, training={"epochs": 3, "clip_norm": None}),
        num_processes=1, vocabulary="other", data="other", threads=1, versions={},
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        check_identity(Path("c"), saved, now, pytest.fail)
    lines = caught.value.lines
    assert len(lines) == 5  # other captions give both another vocabulary and other data: one line
    for fragment in ("run.seed was 0, now 5", "decoder.gate", "training.clip_norm", "processes", "vocabulary"):
        assert sum(fragment in line for line in lines) == 1
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"threads": 1}, ("1 threads, was 4",)),
        ({"versions": {"torch": "2.11", "machine": "x86_64"}}, ("torch 2.11, was 2.10",)),
        ({"versions": {"torch": "2.10", "machine": "arm64"}}, ("machine arm64, was x86_64",)),
        ({"versions": {}, "threads": 2}, ("2 threads, was 4", "torch None", "machine None")),
        ({}, ()),
    ],
    ids=str,
)
def test_threads_and_versions_only_warn(change: dict[str, Any], fragments: tuple[str, ...]) -> None:
    warnings: list[str] = []
    check_identity(Path("c"), _identity(), replace(_identity(), **change), warnings.append)
    assert len(warnings) == len(fragments)
    for fragment, warning in zip(fragments, warnings, strict=True):
        assert fragment in warning


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_pickled(pristine: Path, name: str) -> None:
    with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError)):
        pickle.loads((pristine / name).read_bytes())
    if name.endswith(".safetensors"):
        assert load_file(pristine / name)
    else:
        assert json.loads((pristine / name).read_text(encoding="utf-8"))
