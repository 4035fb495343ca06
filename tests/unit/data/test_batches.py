"""Captions as ids, samples and batches: nothing lost, nothing twice, nothing random that is not the seed's."""

from __future__ import annotations

import io
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from capdist.data.batches import (
    CaptionBatch,
    CaptionDataset,
    Collator,
    PhotoDataset,
    Sample,
    SampleKey,
    Views,
    collate_photos,
)
from capdist.data.captions import CaptionTable, seed_of, tokenize_images
from capdist.data.images import Augmentation, Preprocessing
from capdist.errors import DataError
from capdist.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary(["a", "dog", "runs", "fast", "cat"])
A, DOG, RUNS, FAST, CAT = range(4, 9)
PAD, BOS, EOS, UNK = range(4)
SIZE = 8
PREPROCESSING = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)


# --- the table of captions ------------------------------------------------------------------------------------------


def _table(*images: Sequence[str], max_length: int = 3) -> CaptionTable:
    return CaptionTable.build([[caption.split() for caption in image] for image in images], VOCABULARY, max_length)


def _ids(table: CaptionTable) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in table.captions(image)] for image in range(table.num_images)]


def test_captions_end_with_eos_unless_cut_and_empty_ones_go() -> None:
    table = _table(
        ["a dog", "", "a dog runs"],
        [],
        ["a dog runs fast", "a giraffe"],
        ["", ""],
        ["cat", "", "a cat runs fast fast"],
    )
    assert _ids(table) == [
        [[A, DOG, EOS], [A, DOG, RUNS, EOS]],
        [],
        [[A, DOG, RUNS], [A, UNK, EOS]],
        [],
        [[CAT, EOS], [A, CAT, RUNS]],
    ]
    assert (table.num_cut, table.num_empty) == (2, 4)
    assert table.num_images == 5
    assert table.captions_of_images.tolist() == [2, 0, 2, 0, 2]


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 20])
def test_no_caption_is_longer_than_allowed(max_length: int) -> None:
    words = [["a", "dog", "runs", "fast"][:n] for n in range(1, 5)]
    table = CaptionTable.build([words], VOCABULARY, max_length)
    whole = [[A, DOG, RUNS, FAST][:n] for n in range(1, 5)]
    assert _ids(table) == [[ids[:max_length] + [EOS] * (len(ids) <= max_length) for ids in whole]]
    assert table.num_cut == max(0, 4 - max_length)


@pytest.mark.parametrize("images", [[], [[]], [[], [""]]])
def test_tables_without_captions(images: list[list[str]]) -> None:
    table = _table(*images)
    assert table.num_images == len(images)
    assert _ids(table) == [[] for _ in images]


def test_raw_captions_stay_with_their_images() -> None:
    images = [["A dog.", "It's fast!"], [], ["..."], ["cat"]]
    assert tokenize_images(iter(images)) == [[["a", "dog"], ["it", "'s", "fast"]], [], [[]], [["cat"]]]


def test_seeds_differ_with_every_part_and_fit_a_generator() -> None:
    parts = [(), (0,), (0, 0), (1, 11), (11, 1), ("a", 1), ("a1",), (1, "a"), ("a", -1), ("", "a"), ("a", "")]
    seeds = [seed_of(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed_of(0, "x", i) % 1000 for i in range(1000)}) > 500, "seeds of neighbours must not be neighbours"
    torch.Generator().manual_seed(max(seeds))


# --- the collator ---------------------------------------------------------------------------------------------------


def _sample(image: int, *captions: Sequence[int], pixels: torch.Tensor | None = None) -> Sample:
    return Sample(image, image, pixels, [torch.tensor(caption) for caption in captions])


def _collate(captions_per_image: int, *samples: Sample) -> CaptionBatch:
    batch = Collator(captions_per_image)(samples)
    assert isinstance(batch, CaptionBatch)
    return batch


def test_a_batch_by_hand() -> None:
    batch = _collate(2, _sample(7, [A, DOG, EOS], [CAT, EOS]), _sample(3, [A, DOG, RUNS, FAST]))
    assert batch.feature_rows.tolist() == [7, 3]
    assert batch.images is None
    assert batch.input_ids.tolist() == [
        [BOS, A, DOG, PAD],
        [BOS, CAT, PAD, PAD],
        [BOS, A, DOG, RUNS],
        [PAD, PAD, PAD, PAD],
    ]
    assert batch.labels.tolist() == [
        [A, DOG, EOS, -100],
        [CAT, EOS, -100, -100],
        [A, DOG, RUNS, FAST],
        [-100, -100, -100, -100],
    ]
    assert (batch.num_tokens, batch.num_captions) == (9, 3)
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.feature_rows)} == {torch.int64}


@pytest.mark.parametrize("captions_per_image", [1, 2, 5])
def test_batches_against_a_naive_count(captions_per_image: int) -> None:
    generator = np.random.default_rng(captions_per_image)
    samples = []
    for image in range(13):
        count = int(generator.integers(0, captions_per_image + 1))
        lengths = generator.integers(1, 12, size=count)
        samples.append(_sample(image, *(generator.integers(4, 9, size=n).tolist() for n in lengths)))
    batch = _collate(captions_per_image, *samples)
    assert batch.labels.shape == batch.input_ids.shape
    assert len(batch.labels) == 13 * captions_per_image
    assert batch.num_captions == sum(len(sample.captions) for sample in samples)
    assert batch.num_tokens == sum(len(caption) for sample in samples for caption in sample.captions)
    assert batch.labels.shape[1] == max(len(caption) for sample in samples for caption in sample.captions)
    for index, sample in enumerate(samples):
        for place in range(captions_per_image):
            row = index * captions_per_image + place
            caption = sample.captions[place].tolist() if place < len(sample.captions) else []
            real = batch.labels[row] != -100
            assert batch.labels[row][real].tolist() == caption
            assert batch.input_ids[row][real].tolist() == ([BOS, *caption])[: len(caption)]
            assert set(batch.labels[row][~real].tolist()) <= {-100}
            assert set(batch.input_ids[row][~real].tolist()) <= {PAD}


def test_a_batch_of_fillers_has_no_weight() -> None:
    pixels = torch.full((3, SIZE, SIZE), 9, dtype=torch.uint8)
    batch = _collate(3, _sample(2, pixels=pixels), _sample(5, pixels=pixels))
    assert (batch.num_tokens, batch.num_captions) == (0, 0)
    assert batch.input_ids.shape == (6, 1)
    assert (batch.labels == -100).all()
    assert batch.images is not None
    assert batch.images.shape == (2, 3, SIZE, SIZE)


def test_the_first_error_is_handed_on() -> None:
    first, second = DataError("a.jpg: broken"), DataError("b.jpg: broken")
    assert Collator(1)([_sample(0, [A]), first, second]) is first
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    assert collate_photos([(0, pixels), first, second]) is first


def test_moving_a_batch_moves_every_tensor_and_keeps_the_counts() -> None:
    batch = _collate(1, _sample(0, [A, EOS], pixels=torch.zeros(3, 2, 2, dtype=torch.uint8)))
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_tokens, moved.num_captions) == (2, 1)


# --- samples --------------------------------------------------------------------------------------------------------


def _photo(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"path": f"photo_{seed}.png", "bytes": file.getvalue()}


def _captions(counts: Sequence[int]) -> CaptionTable:
    """Captions that are all different: image i, caption j is `i` x DOG, then `j + 1` x CAT."""
    images = [[["dog"] * image + ["cat"] * (j + 1) for j in range(count)] for image, count in enumerate(counts)]
    return CaptionTable.build(images, VOCABULARY, max_length=100)


COUNTS = [5, 1, 0, 3, 7, 2, 5, 4]


def _dataset(
    *, captions_per_image: int = 2, augmented: bool = False, photos: bool = True, seed: int = 1
) -> CaptionDataset:
    augmentation = Augmentation(SIZE, random_crop=0.3, horizontal_flip=True, color_jitter=0.5) if augmented else None
    images = [_photo(i) for i in range(len(COUNTS))] if photos else None
    return CaptionDataset(images, _captions(COUNTS), PREPROCESSING, augmentation, captions_per_image, seed)


def _get(dataset: CaptionDataset, key: SampleKey) -> Sample:
    sample = dataset[key]
    assert isinstance(sample, Sample), sample
    return sample


def _assert_same(some: Sample, other: Sample) -> None:
    assert some.feature_row == other.feature_row
    assert [c.tolist() for c in some.captions] == [c.tolist() for c in other.captions]
    if some.pixels is None or other.pixels is None:
        assert some.pixels is other.pixels
    else:
        assert torch.equal(some.pixels, other.pixels)


@pytest.mark.parametrize("captions_per_image", [1, 2, 3, 5])
def test_an_epoch_shows_every_caption_once(captions_per_image: int) -> None:
    dataset = _dataset(captions_per_image=captions_per_image, photos=False)
    for epoch in range(3):
        seen: Counter[tuple[int, ...]] = Counter()
        for image, count in enumerate(COUNTS):
            parts = math.ceil(count / captions_per_image)
            for part in range(parts):
                captions = _get(dataset, SampleKey(epoch, image, part)).captions
                assert len(captions) == min(captions_per_image, count - part * captions_per_image)
                seen.update(tuple(caption.tolist()) for caption in captions)
        expected = {(*[DOG] * i, *[CAT] * (j + 1), EOS) for i, count in enumerate(COUNTS) for j in range(count)}
        assert seen == Counter(expected)


def test_captions_are_grouped_anew_in_each_epoch_and_by_seed() -> None:
    def grouping(seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
        dataset = _dataset(photos=False, seed=seed)
        samples = (_get(dataset, SampleKey(epoch, 4, part)) for part in range(4))
        return tuple(tuple(len(caption) for caption in sample.captions) for sample in samples)

    groupings = {grouping(seed, epoch) for seed in range(2) for epoch in range(6)}
    assert len(groupings) > 10


@pytest.mark.parametrize("augmented", [False, True])
def test_a_sample_is_a_function_of_key_and_seed(augmented: bool) -> None:
    keys = [SampleKey(e, i, p) for e in range(2) for i, n in enumerate(COUNTS) for p in range(math.ceil(n / 2))]
    first = _dataset(augmented=augmented)
    samples = {key: _get(first, key) for key in keys}
    again = pickle.loads(pickle.dumps(_dataset(augmented=augmented)))
    torch.manual_seed(1234)
    for key in reversed(keys):
        torch.rand(3)
        _assert_same(_get(again, key), samples[key])
    for sample in samples.values():
        assert sample.pixels is not None
        assert sample.pixels.dtype == torch.uint8
        assert sample.pixels.shape == (3, SIZE, SIZE)


def test_augmentation_differs_with_epoch_part_and_seed() -> None:
    def pixels(seed: int, epoch: int, part: int) -> bytes:
        tensor = _get(_dataset(augmented=True, seed=seed), SampleKey(epoch, 0, part)).pixels
        assert tensor is not None
        return tensor.numpy().tobytes()

    views = [pixels(seed, epoch, part) for seed in range(2) for epoch in range(3) for part in range(2)]
    assert len(set(views)) == len(views)


def test_without_augmentation_a_photo_looks_the_same_in_every_epoch() -> None:
    dataset = _dataset()
    views = {_get(dataset, SampleKey(epoch, 0, 0)).pixels.numpy().tobytes() for epoch in range(3)}  # type: ignore[union-attr]
    assert len(views) == 1


@pytest.mark.parametrize("augmented", [False, True])
def test_samples_leave_the_global_generator_alone(augmented: bool) -> None:
    dataset = _dataset(augmented=augmented)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for epoch in range(3):
        _get(dataset, SampleKey(epoch, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_filler_has_a_photo_and_no_captions() -> None:
    sample = _get(_dataset(), SampleKey(0, 3, 0, is_filler=True))
    assert sample.captions == []
    assert sample.pixels is not None


def test_cached_features_need_no_photo() -> None:
    assert _get(_dataset(photos=False), SampleKey(0, 3, 0)).pixels is None


# --- cached views ---------------------------------------------------------------------------------------------------


def _views(count: int = 4, seed: int = 1) -> Views:
    return Views(Augmentation(SIZE, random_crop=0.3, horizontal_flip=True, color_jitter=0.5), count, seed)


def _rows(count: int, epoch: int) -> list[int]:
    photos = _dataset(photos=False)
    dataset = CaptionDataset(None, photos.captions, PREPROCESSING, None, 2, seed=1, views=_views(count))
    return [_get(dataset, SampleKey(epoch, image, 0)).feature_row for image in range(len(COUNTS))]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_image_goes_through_all_its_views_before_one_comes_again(count: int) -> None:
    epochs = [_rows(count, epoch) for epoch in range(2 * count)]
    for image in range(len(COUNTS)):
        own = set(range(image * count, (image + 1) * count))
        assert {rows[image] for rows in epochs[:count]} == own
        assert {rows[image] for rows in epochs[1 : count + 1]} == own
    assert epochs[:count] == epochs[count:]


def test_parts_of_an_image_show_the_same_view_and_images_start_with_different_ones() -> None:
    dataset = CaptionDataset(None, _captions(COUNTS), PREPROCESSING, None, 2, seed=1, views=_views(count=3))
    assert len({_get(dataset, SampleKey(5, 4, part)).feature_row for part in range(4)}) == 1
    assert {row % 3 for row in (_views(3).row(image, epoch=0) for image in range(30))} == {0, 1, 2}


def _is_close(some: torch.Tensor, other: torch.Tensor) -> bool:
    """Pillow and torchvision round differently when they shrink a photo."""
    return bool((some.int() - other.int()).abs().max() <= 2)


def _swapped_captions(dataset: CaptionDataset, key: SampleKey) -> list[list[int]]:
    return [caption.tolist() for caption in _get(dataset, key).captions]


def test_captions_of_mirrored_photos_swap_left_and_right() -> None:
    """Words 1 and 2 of the table stand for left and right."""
    flips = Augmentation(SIZE, random_crop=1.0, horizontal_flip=True, color_jitter=0.0)
    table, swap = _captions(COUNTS), {DOG: CAT, CAT: DOG}
    plain = CaptionDataset(None, table, PREPROCESSING, None, 5, seed=1)
    photos = [_photo(i) for i in range(len(COUNTS))]
    live = CaptionDataset(photos, table, PREPROCESSING, flips, 5, seed=1, mirrored_words=swap)
    cached = CaptionDataset(None, table, PREPROCESSING, flips, 5, seed=1, views=Views(flips, 2, 1), mirrored_words=swap)
    seen = set()
    for epoch in range(4):
        for image in (0, 3, 4):
            key = SampleKey(epoch, image, 0)
            expected = _swapped_captions(plain, key)
            swapped = [[swap.get(word, word) for word in caption] for caption in expected]
            sample = _get(live, key)
            assert sample.pixels is not None
            straight = PREPROCESSING.load(photos[image])
            is_mirrored = _is_close(sample.pixels, straight.flip(-1))
            assert is_mirrored != _is_close(sample.pixels, straight)
            assert [c.tolist() for c in sample.captions] == (swapped if is_mirrored else expected)
            seen.add(is_mirrored)
            view = _get(cached, key).feature_row % 2
            assert _swapped_captions(cached, key) == (swapped if (image + view) % 2 else expected)
            assert _get(cached, key).is_mirrored == bool((image + view) % 2)
            assert sample.is_mirrored == is_mirrored
    assert seen == {True, False}


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_second_cached_view_is_mirrored(count: int) -> None:
    views = Views(Augmentation(SIZE, random_crop=0.3, horizontal_flip=True, color_jitter=0.0), count, 1)
    mirrored = [[views.augmentation.mirrors(views.seed_of_view(i, view)) for view in range(count)] for i in range(6)]
    assert sum(map(sum, mirrored)) == 3 * count
    for of_image in mirrored:
        assert abs(2 * sum(of_image) - count) <= 1


def test_without_views_the_feature_row_is_that_of_the_split() -> None:
    assert [_get(_dataset(), SampleKey(3, image, 0)).feature_row for image in range(8)] == list(range(8))


def _pixels(dataset: PhotoDataset, row: int) -> bytes:
    item = dataset[row]
    assert not isinstance(item, DataError)
    assert item[0] == row
    assert item[1].shape == (3, SIZE, SIZE)
    return item[1].numpy().tobytes()


def test_a_view_is_a_function_of_seed_image_and_number() -> None:
    photos = [_photo(0), _photo(1), _photo(0)]
    dataset = PhotoDataset(photos, PREPROCESSING, _views())
    assert len(dataset) == 12
    views = [_pixels(dataset, row) for row in range(12)]
    assert len(set(views)) == 12, "the same photo in two rows has views of its own, too"
    again = pickle.loads(pickle.dumps(PhotoDataset(photos, PREPROCESSING, _views())))
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    assert [_pixels(again, row) for row in reversed(range(12))] == views[::-1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert _pixels(PhotoDataset(photos, PREPROCESSING, _views(seed=2)), 0) not in views
    # A view keeps its place: with more of them, each image's first ones are the same.
    more = PhotoDataset(photos, PREPROCESSING, _views(count=6))
    assert [_pixels(more, 6 + view) for view in range(4)] == views[4:8]


def test_photos_without_views_are_whole() -> None:
    dataset = PhotoDataset([_photo(0), _photo(1)], PREPROCESSING)
    assert len(dataset) == 2
    assert _pixels(dataset, 1) == PREPROCESSING.load(_photo(1)).numpy().tobytes()


# --- in workers -----------------------------------------------------------------------------------------------------


def _loader(dataset: CaptionDataset, batches: list[list[SampleKey]], context: str, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=Collator(dataset.captions_per_image),
        num_workers=num_workers,
        multiprocessing_context=context,
    )


@pytest.mark.parametrize(("context", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_make_the_same_batches_and_name_the_broken_photo(
    context: str, num_workers: int, tmp_path: Path
) -> None:
    dataset = _dataset(augmented=True)
    assert isinstance(dataset.photos, list)
    broken = tmp_path / "broken photo.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not much of a photo")
    dataset.photos[5] = {"path": str(broken), "bytes": None}
    keys = [SampleKey(epoch, image, 0) for epoch in range(2) for image in (0, 3, 4, 6)]
    batches = [keys[:3], keys[3:6], keys[6:], [keys[0], SampleKey(0, 5, 0)]]
    *good, bad = list(_loader(dataset, batches, context, num_workers))
    for batch, batch_keys in zip(good, batches, strict=False):
        expected = Collator(2)([dataset[key] for key in batch_keys])
        assert isinstance(batch, CaptionBatch)
        for name, value in vars(expected).items():
            same = torch.equal(getattr(batch, name), value) if isinstance(value, torch.Tensor) else None
            assert same if same is not None else getattr(batch, name) == value, name
    assert len(good) == 3
    assert isinstance(bad, DataError)
    (mistake,) = bad.lines
    assert mistake.startswith(f"{broken}: ")
    assert "\n" not in mistake
