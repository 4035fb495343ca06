"""`encode` times the way from JPEG files to features, and `input` the way to tensors alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from capdist.benchmark import textbook
from capdist.benchmark.measure import count_flops, matrix_product, time_in_turns
from capdist.benchmark.report import Row, Table
from capdist.benchmark.workload import DTYPES, PHOTO_SIZE, Workload, made_up_photos
from capdist.data.batches import PhotoDataset
from capdist.data.loaders import photo_batches
from capdist.data.splits import get_split, read_source
from capdist.features.encoder_pass import EncoderPass, encoder_precision
from capdist.models.encoder import build_backbone


def encode(work: Workload, *, num_photos: int, repeats: int, with_textbook: bool) -> Table:
    """Time the encoder pass from files, beside the network alone on tensors in memory, and beside a plain loop.

    A run compiles its encoder only where minutes of encoding remain, so the time of compiling is reported separately.
    """
    recipe, device = work.recipe, work.accelerator.device
    precision = encoder_precision(recipe.encoder, device, work.accelerator.mixed_precision)
    plain_pass, fast_pass = (EncoderPass(work.model.encoder, precision) for _ in range(2))
    with _photos(work, num_photos) as (photos, origin):
        batches = [work.preprocessing.normalize(images.to(device)) for images in _own_input(work, photos)]
        started = time.perf_counter()
        problem = fast_pass.compile(batches[0]) if recipe.encoder.compile != "off" else "encoder.compile=off"
        compile_s = time.perf_counter() - started

        def from_files(encoder_pass: EncoderPass) -> None:
            for images in _own_input(work, photos):
                encoder_pass(work.preprocessing.normalize(images.to(device))).half().cpu()

        def in_memory() -> None:
            for pixel_values in batches:
                fast_pass(pixel_values)

        functions: dict[str, Callable[[], object]] = {
            "matrix product": matrix_product(device, DTYPES[precision]),
            **({"textbook": _plain_loop(work, photos)} if with_textbook else {}),
            "capdist, plain": lambda: from_files(plain_pass),
            "capdist, compiled": lambda: from_files(fast_pass),
            "network alone": in_memory,
        }
        one_photo = count_flops(lambda: plain_pass(batches[0][:1]))
        flops = dict.fromkeys(("capdist, plain", "capdist, compiled", "network alone"), one_photo * len(photos))
        timings = time_in_turns(functions, repeats=repeats, device=device, flops=flops)
    units = {name: float(len(photos)) for name in functions if name != "matrix product"}
    rows = [Row.of(name, timing, units.get(name)) for name, timing in timings.items()]
    facts = {
        "photos": origin,
        "share of the network alone": f"{timings['network alone'].median / timings['capdist, compiled'].median:.1%}",
        "precision": precision,
        "compiling": problem or f"{compile_s:.0f} s",
    }
    return Table("encode", "photos", rows, facts=facts)


def load_input(work: Workload, *, num_photos: int, repeats: int, with_textbook: bool) -> Table:
    """Time only reading, decoding and resizing, as the loaders of capdist and of the textbook do it."""
    with _photos(work, num_photos) as (photos, origin):
        loader = _plain_loader(work, photos)
        functions: dict[str, Callable[[], object]] = {"textbook": lambda: list(loader)} if with_textbook else {}
        functions["capdist"] = lambda: list(_own_input(work, photos))
        timings = time_in_turns(functions, repeats=repeats, device=torch.device("cpu"))
    rows = [Row.of(name, timing, float(len(photos))) for name, timing in timings.items()]
    facts = {"photos": origin, "loader processes": work.recipe.data.num_workers}
    return Table("input", "photos", rows, facts=facts)


@contextmanager
def _photos(work: Workload, count: int) -> Iterator[tuple[Sequence[dict[str, Any]], str]]:
    """Yield training photos of `data.path`, or made-up ones if the recipe names none, and which of the two they are.

    Yields:
        Rows of an image column, and a text that says where the photos come from.

    Raises:
        DataError, UsageError, StorageError: as `load_source`.
    """
    data = work.recipe.data
    with TemporaryDirectory() as folder:
        if data.path is None:
            paths = made_up_photos(Path(folder), count)
            origin = f"{len(paths)} made up, {PHOTO_SIZE[0]}x{PHOTO_SIZE[1]} pixels"
        else:
            split = get_split(read_source(data.model_copy(update={"limit": count})), "train")
            paths = [_as_file(photo, Path(folder, str(number))) for number, photo in enumerate(split.photos)]
            origin = f"{len(paths)} of {data.source}, {data.path}, train split"
        yield [{"path": str(path), "bytes": None} for path in paths], origin


def _as_file(photo: Mapping[str, Any], path: Path) -> Path:
    if photo["bytes"] is None:
        return Path(photo["path"])
    path.write_bytes(photo["bytes"])
    return path


def _own_input(work: Workload, photos: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    batches = photo_batches(
        PhotoDataset(photos, work.preprocessing),
        range(len(photos)),
        batch_size=work.recipe.encoder.batch_size,
        num_workers=work.recipe.data.num_workers,
        pin_memory=work.accelerator.device.type == "cuda",
    )
    return (images for _, images in batches)


def _plain_loader(work: Workload, photos: Sequence[dict[str, Any]]) -> DataLoader[Tensor]:
    made = work.preprocessing
    paths = [photo["path"] for photo in photos]
    dataset = textbook.PhotoDataset(paths, made.image_size, made.mean, made.std)
    return DataLoader(dataset, batch_size=32, num_workers=work.recipe.data.num_workers)


def _plain_loop(work: Workload, photos: Sequence[dict[str, Any]]) -> Callable[[], object]:
    encoder, device = work.recipe.encoder, work.accelerator.device
    network = build_backbone(encoder.name, encoder.last_block, joins_norms=False).network
    plain = textbook.Encoder(network).to(device).eval()
    loader = _plain_loader(work, photos)

    @torch.no_grad()
    def loop() -> None:
        for pixel_values in loader:
            plain(pixel_values.to(device)).cpu()

    return loop
