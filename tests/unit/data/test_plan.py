"""The plan of training: every part once, all processes in step, the same order whatever the number of processes."""

from __future__ import annotations

import errno
import io
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from capdist.data.batches import CaptionBatch, CaptionDataset, PhotoDataset, SampleKey
from capdist.data.captions import CaptionTable
from capdist.data.images import Preprocessing
from capdist.data.loaders import Plan, photo_batches, training_batches
from capdist.errors import DataError, ProcessError
from capdist.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary([f"w{i}" for i in range(40)])


def _captions(counts: Sequence[int]) -> CaptionTable:
    images = [[[f"w{(7 * i + j) % 40}"] * (1 + (i + j) % 4) for j in range(count)] for i, count in enumerate(counts)]
    return CaptionTable.build(images, VOCABULARY, max_length=10)


def _plan(
    counts: Sequence[int],
    *,
    batch_size: int = 4,
    num_processes: int = 1,
    accumulation: int = 1,
    captions_per_image: int = 5,
    seed: int = 0,
) -> Plan:
    return Plan.build(
        _captions(counts),
        captions_per_image=captions_per_image,
        batch_size=batch_size,
        num_processes=num_processes,
        accumulation=accumulation,
        seed=seed,
    )


def _expected_parts(counts: Sequence[int], captions_per_image: int) -> list[tuple[int, int]]:
    return [(i, part) for i, n in enumerate(counts) for part in range(math.ceil(n / captions_per_image))]


def _real(keys: list[list[SampleKey]]) -> list[tuple[int, int]]:
    return [(key.image, key.part) for micro in keys for key in micro if not key.is_filler]


# Images, batch size, processes, accumulation.
SIZES = [
    (7, 4, 2, 1),
    (7, 4, 2, 3),
    (1, 4, 3, 1),
    (1, 1, 1, 1),
    (2, 1, 3, 2),
    (8, 4, 2, 1),
    (9, 4, 2, 1),
    (24, 2, 3, 4),
    (25, 2, 3, 4),
    (23, 2, 3, 4),
    (100, 7, 5, 2),
    (13, 3, 4, 1),
    (5, 8, 8, 2),
    *itertools.product((3, 10, 31), (1, 4), (1, 2, 4), (1, 2)),
]


@pytest.mark.parametrize("captions_per_image", [1, 2, 5])
@pytest.mark.parametrize(("num_images", "batch_size", "num_processes", "accumulation"), SIZES)
def test_an_epoch_of_all_processes(
    num_images: int, batch_size: int, num_processes: int, accumulation: int, captions_per_image: int
) -> None:
    counts = [1 + (3 * image) % 5 for image in range(num_images)]
    plan = _plan(
        counts,
        batch_size=batch_size,
        num_processes=num_processes,
        accumulation=accumulation,
        captions_per_image=captions_per_image,
    )
    expected = _expected_parts(counts, captions_per_image)
    assert plan.parts_per_step == batch_size * num_processes * accumulation
    assert plan.steps_per_epoch == math.ceil(len(expected) / plan.parts_per_step)
    for epoch in (0, 2):
        seen: Counter[tuple[int, int]] = Counter()
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            of_ranks = [plan.keys(step, rank) for rank in range(num_processes)]
            assert {len(keys) for keys in of_ranks} == {plan.micro_batches(step)}
            assert 1 <= plan.micro_batches(step) <= accumulation
            for micro in zip(*of_ranks, strict=True):
                keys = [key for mine in micro for key in mine]
                real = [key for key in keys if not key.is_filler]
                assert all(1 <= len(mine) <= batch_size for mine in micro)
                assert {key.epoch for key in keys} == {epoch}
                # A process has a filler, alone, only if there is not one part for each process.
                sizes = [sum(not key.is_filler for key in mine) for mine in micro]
                assert max(sizes) - min(sizes) <= 1, "uneven shares"
                assert len(keys) - len(real) == max(0, num_processes - len(real))
                assert all(len(mine) == 1 for mine in micro if mine[0].is_filler)
                assert all(0 <= key.image < num_images for key in keys)
                seen.update((key.image, key.part) for key in real)
        assert seen == Counter(expected)


def test_only_the_last_step_of_an_epoch_is_short() -> None:
    plan = _plan([5] * 25, batch_size=2, num_processes=3, accumulation=2)  # 12 a step
    sizes = [sum(len(_real(plan.keys(step, rank))) for rank in range(3)) for step in range(6)]
    assert sizes == [12, 12, 1, 12, 12, 1]
    assert [plan.micro_batches(step) for step in range(6)] == [2, 2, 1, 2, 2, 1]
    assert [plan.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]


def test_seven_images_over_two_processes_of_four() -> None:
    plan = _plan([5] * 7, batch_size=4, num_processes=2)
    assert plan.steps_per_epoch == 1
    assert sorted(len(_real(plan.keys(0, rank))) for rank in range(2)) == [3, 4]
    assert not any(key.is_filler for rank in range(2) for micro in plan.keys(0, rank) for key in micro)


def test_one_image_over_three_processes() -> None:
    plan = _plan([5], batch_size=4, num_processes=3)
    of_ranks = [plan.keys(0, rank) for rank in range(3)]
    assert sum(len(_real(keys)) for keys in of_ranks) == 1
    assert sum(key.is_filler for keys in of_ranks for micro in keys for key in micro) == 2


@pytest.mark.parametrize(("num_images", "batch_size", "num_processes", "accumulation"), SIZES)
def test_more_processes_take_the_same_steps_as_one(
    num_images: int, batch_size: int, num_processes: int, accumulation: int
) -> None:
    counts = [1 + (2 * image) % 5 for image in range(num_images)]
    many = _plan(
        counts, batch_size=batch_size, num_processes=num_processes, accumulation=accumulation, captions_per_image=2
    )
    one = _plan(counts, batch_size=batch_size * num_processes, accumulation=accumulation, captions_per_image=2)
    accumulated = _plan(counts, batch_size=batch_size, accumulation=accumulation * num_processes, captions_per_image=2)
    assert many.steps_per_epoch == one.steps_per_epoch == accumulated.steps_per_epoch
    for step in range(2 * one.steps_per_epoch):
        union = [part for rank in range(num_processes) for part in _real(many.keys(step, rank))]
        assert sorted(union) == sorted(_real(one.keys(step, 0))) == sorted(_real(accumulated.keys(step, 0)))
        for micro in range(many.micro_batches(step)):
            shared = [part for rank in range(num_processes) for part in _real([many.keys(step, rank)[micro]])]
            assert sorted(shared) == sorted(_real([one.keys(step, 0)[micro]]))


def test_the_order_depends_on_epoch_and_seed_and_on_nothing_else() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        plan = _plan([3] * 40, seed=seed)
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        return [part for step in steps for part in _real(plan.keys(step, 0))]

    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in range(3) for epoch in range(4)}
    assert len(set(orders.values())) == 12
    assert list(range(40)) not in [[image for image, _ in parts] for parts in orders.values()], "not shuffled"
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert tuple(order(1, 2)) == orders[1, 2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_any_step_can_be_asked_for_at_any_time() -> None:
    plan = _plan([4] * 17, batch_size=2, num_processes=2, captions_per_image=2, accumulation=2)
    steps = range(4 * plan.steps_per_epoch)
    forward = {step: plan.keys(step, 1) for step in steps}
    assert {step: plan.keys(step, 1) for step in reversed(steps)} == forward
    fresh = _plan([4] * 17, batch_size=2, num_processes=2, captions_per_image=2, accumulation=2)
    assert fresh.keys(steps[-2], 1) == forward[steps[-2]]


def test_images_without_captions_are_not_trained_on() -> None:
    counts = [0, 3, 0, 0, 6, 1, 0]
    plan = _plan(counts, captions_per_image=3, batch_size=100)
    assert sorted(_real(plan.keys(0, 0))) == [(1, 0), (4, 0), (4, 1), (5, 0)]


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_nothing_to_train_on(counts: list[int]) -> None:
    with pytest.raises(DataError, match="no caption"):
        _plan(counts)


# --- loaders --------------------------------------------------------------------------------------------------------


def _photo(value: int) -> dict[str, object]:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 2 * value, 255 - value)).save(file, "PNG")
    return {"path": f"photo_{value}.png", "bytes": file.getvalue()}


def _dataset(counts: Sequence[int]) -> CaptionDataset:
    photos = [_photo(image) for image in range(len(counts))]
    preprocessing = Preprocessing(4, (0.5,) * 3, (0.5,) * 3)
    return CaptionDataset(photos, _captions(counts), preprocessing, None, captions_per_image=2, seed=3)


def _batches(plan: Plan, steps: range, *, rank: int = 0, num_workers: int = 0) -> list[CaptionBatch]:
    batches = training_batches(_dataset(COUNTS), plan, rank, steps, num_workers=num_workers, pin_memory=False)
    return list(batches)


def _assert_equal(some: list[CaptionBatch], others: list[CaptionBatch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, name)), name
            else:
                assert value == getattr(other, name), name


COUNTS = [1, 5, 3, 2, 4, 5, 1, 2, 3]


@pytest.fixture
def plan() -> Plan:
    return _plan(COUNTS, batch_size=2, num_processes=2, accumulation=2, captions_per_image=2)


def test_training_batches_follow_the_plan_across_epochs(plan: Plan) -> None:
    steps = range(3 * plan.steps_per_epoch)
    for rank in range(2):
        micro_batches = [keys for step in steps for keys in plan.keys(step, rank)]
        batches = _batches(plan, steps, rank=rank)
        assert [batch.feature_rows.tolist() for batch in batches] == [[k.image for k in keys] for keys in micro_batches]
        for batch, keys in zip(batches, micro_batches, strict=True):
            shown = [min(2, COUNTS[key.image] - 2 * key.part) * (not key.is_filler) for key in keys]
            assert batch.num_captions == sum(shown)
            assert batch.images is not None
            assert batch.images[:, 0, 0, 0].tolist() == [key.image for key in keys]


def test_starting_in_the_middle_gives_the_same_tail(plan: Plan) -> None:
    end = 3 * plan.steps_per_epoch
    for middle in (1, plan.steps_per_epoch, end - 1):
        skipped = sum(plan.micro_batches(step) for step in range(middle))
        _assert_equal(_batches(plan, range(middle, end)), _batches(plan, range(end))[skipped:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(plan: Plan, num_workers: int) -> None:
    steps = range(1, 2 * plan.steps_per_epoch)
    _assert_equal(_batches(plan, steps, rank=1, num_workers=num_workers), _batches(plan, steps, rank=1))


def test_loading_draws_nothing_from_the_global_generator(plan: Plan) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    _batches(plan, range(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index,union-attr]


class _DeadlyPhotos(list[dict[str, object]]):
    """Photos whose reader is killed, as the system does when memory runs out."""

    def __getitem__(self, index: object) -> dict[str, object]:  # type: ignore[override]
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_worker_is_explained() -> None:
    dataset = PhotoDataset(_DeadlyPhotos([{}] * 4), Preprocessing(4, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ProcessError, match=r"data\.num_workers"):
        list(photo_batches(dataset, range(4), batch_size=1, num_workers=1, pin_memory=False))


class _PhotosOnABadDisk(list[dict[str, object]]):
    def __getitem__(self, index: object) -> dict[str, object]:  # type: ignore[override]
        raise OSError(errno.EIO, "Input/output error", "/photos/a.jpg")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_disk_keeps_its_number_and_its_file(num_workers: int) -> None:
    dataset = PhotoDataset(_PhotosOnABadDisk([{}]), Preprocessing(4, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(OSError, match="/photos/a.jpg") as caught:
        list(photo_batches(dataset, [0], batch_size=1, num_workers=num_workers, pin_memory=False))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("num_workers", [0, 2])
def test_photo_batches_are_in_order_and_whole(num_workers: int) -> None:
    dataset = PhotoDataset([_photo(value) for value in range(9)], Preprocessing(4, (0.5,) * 3, (0.5,) * 3))
    rows = [8, 1, 5, 2, 7]
    batches = list(photo_batches(dataset, rows, batch_size=2, num_workers=num_workers, pin_memory=False))
    assert [found.tolist() for found, _ in batches] == [[8, 1], [5, 2], [7]]
    for found, photos in batches:
        assert photos.dtype == torch.uint8
        assert photos.shape == (len(found), 3, 4, 4)
        expected = torch.stack([found, 2 * found, 255 - found], dim=1)
        assert torch.equal(photos.long(), expected[:, :, None, None].expand_as(photos))
    assert not list(photo_batches(dataset, [], batch_size=2, num_workers=0, pin_memory=False))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_photo_stops_the_loader_with_its_name(plan: Plan, num_workers: int) -> None:
    dataset = _dataset(COUNTS)
    assert isinstance(dataset.photos, list)
    dataset.photos[4] = {"path": "holiday.jpg", "bytes": b"nothing"}
    with pytest.raises(DataError, match=r"^holiday\.jpg: ") as caught:
        list(training_batches(dataset, plan, 0, range(3), num_workers=num_workers, pin_memory=False))
    assert len(caught.value.lines) == 1
    photos = PhotoDataset(dataset.photos, dataset.preprocessing)
    with pytest.raises(DataError, match=r"^holiday\.jpg: "):
        list(photo_batches(photos, range(9), batch_size=3, num_workers=num_workers, pin_memory=False))
