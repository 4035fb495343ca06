"""Photos: whatever a camera, a phone or a web shop writes is read upright and RGB; what is broken is named."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import random
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from capdist.data.images import FORMATS, Augmentation, Preprocessing, open_photo, to_tensor
from capdist.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(64, MEAN, STD)


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def _open(content: bytes, smallest_side: int | None = None, name: str = "photo.jpg") -> Image.Image:
    return open_photo({"path": name, "bytes": content}, smallest_side)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


def _refusal(action: Callable[[], object], name: str = "photo.jpg") -> str:
    with pytest.raises(DataError) as caught:
        action()
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"{name}: ")
    assert "\n" not in mistake
    return mistake


def _open_or_refuse(content: bytes, smallest_side: int | None = None) -> Image.Image | None:
    """Open a damaged photo; None if it is refused as it should be. Any other error is the test's failure."""
    try:
        return _open(content, smallest_side)
    except DataError as error:
        refusal = error
    (mistake,) = refusal.lines
    assert mistake.startswith("photo.jpg: ")
    assert "\n" not in mistake
    return None


def _smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width] / (width + height)
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(5 * x * y + x)]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8))


# --- formats and modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo", "photo.txt"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_formats_are_told_by_content_not_by_name(image_format: str, name: str, tmp_path: Path) -> None:
    photo = _smooth(40, 30)
    content = _encode(photo, image_format)
    path = tmp_path / name
    path.write_bytes(content)
    from_bytes = _open(content, name=name)
    from_file = open_photo({"path": str(path), "bytes": None})
    assert from_bytes.size == (40, 30)
    assert np.abs(_pixels(from_bytes).astype(int) - np.asarray(photo)).mean() < 4
    assert np.array_equal(_pixels(from_bytes), _pixels(from_file))


def test_the_bytes_win_over_the_path() -> None:
    assert _open(_encode(_smooth(5, 4), "PNG"), name="/nowhere/at/all.png").size == (5, 4)


def _grey16(values: list[int]) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.uint16))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    image = _chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + image + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (1, 1), (10, 20, 30)), [(10, 20, 30)]),
        (Image.new("L", (1, 1), 77), [(77, 77, 77)]),
        (Image.new("1", (1, 1), 1), [(255, 255, 255)]),
        (Image.new("1", (1, 1), 0), [(0, 0, 0)]),
        (Image.new("RGB", (1, 1), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), [(10, 20, 30)]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 255)), [(10, 20, 30)]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 0)), [(255, 255, 255)]),
        (Image.new("RGBA", (1, 1), (0, 100, 255, 51)), [(204, 224, 255)]),  # a fifth colour, four fifths white
        (Image.new("LA", (1, 1), (0, 0)), [(255, 255, 255)]),
        (Image.new("LA", (1, 1), (100, 51)), [(224, 224, 224)]),
        (Image.new("LA", (1, 1), (100, 255)), [(100, 100, 100)]),
        (_grey16([0, 257, 25700, 65535]), [(0,) * 3, (1,) * 3, (100,) * 3, (255,) * 3]),
    ],
    ids=lambda value: f"{value.mode} {value.getpixel((0, 0))}" if isinstance(value, Image.Image) else "",
)
def test_modes(image: Image.Image, expected: list[tuple[int, int, int]]) -> None:
    found = _pixels(_open(_encode(image, "PNG"))).reshape(-1, 3).astype(int)
    assert np.abs(found - np.array(expected)).max() <= 1


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_what_shows_through_is_white(image_format: str) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 8, 16))
    found = _pixels(_open(_encode(image, image_format, **({"lossless": True} if image_format == "WEBP" else {}))))
    assert (found[:, :8] == (200, 0, 0)).all()
    assert (found[:, 8:] == 255).all()


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.putdata([0, 1])
    assert _pixels(_open(_encode(image, "PNG", transparency=0))).tolist() == [[[255] * 3, [9, 8, 7]]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "expected"),
    [
        (8, 0, bytes([0, 80, 160, 255]), struct.pack(">H", 80), [0, 255, 160, 255]),
        (16, 0, struct.pack(">4H", 0, 257 * 80, 257 * 160, 65535), struct.pack(">H", 257 * 80), [0, 255, 160, 255]),
        (16, 0, struct.pack(">4H", 0, 257 * 80, 257 * 160, 65535), b"", [0, 80, 160, 255]),
        (16, 4, struct.pack(">4H", 257 * 80, 65535, 257 * 80, 0), b"", [80, 255]),
    ],
    ids=["8-bit with a transparent grey", "16-bit with a transparent grey", "16-bit", "16-bit with alpha"],
)
def test_grey_png(depth: int, colour: int, row: bytes, transparent: bytes, expected: list[int]) -> None:
    extra = _chunk(b"tRNS", transparent) if transparent else b""
    content = _png(len(expected), 1, depth, colour, b"\0" + row, extra)
    assert _pixels(_open(content))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # full cyan: no red
    red, green, blue = _pixels(_open(_encode(image, "JPEG", quality=95)))[8, 8].tolist()
    assert red < 60
    assert min(green, blue) > 120


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_modes_decoded_small(mode: str, progressive: bool) -> None:
    photo = _smooth(400, 300).convert(mode)
    content = _encode(photo, "JPEG", quality=95, progressive=progressive)
    small, full = PREPROCESSING.load({"path": "x", "bytes": content}), PREPROCESSING.resize(_open(content))
    assert (small.float() - full.float()).abs().mean() < 2


# Of the EXIF standard: what must be done to the stored rows to see the photo upright.
UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_photos_are_upright(orientation: int, image_format: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    found = _pixels(_open(_encode(Image.fromarray(stored), image_format, exif=exif, **options)))
    assert np.array_equal(found, UPRIGHT[orientation](stored))


def test_a_phone_photo_is_upright_when_decoded_small() -> None:
    photo = Image.new("RGB", (800, 400), "black")
    photo.paste("white", (0, 0, 400, 400))  # the left half as stored is the top half after a turn to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    found = PREPROCESSING.load({"path": "x", "bytes": _encode(photo, "JPEG", exif=exif)})
    assert found[:, :30].min() > 240
    assert found[:, 34:].max() < 15


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with entries of tag, type, count and four bytes of value."""
    body = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + b"\0\0\0\0"


ORIENTATION = (0x0112, 3, 1, b"\0\6\0\0")


@pytest.mark.parametrize(
    "exif",
    [
        _exif(ORIENTATION, (0x0100, 2, 4, b"abc\0")),
        _exif(ORIENTATION, (0x011A, 2, 4, b"abc\0")),
        _exif(ORIENTATION, (0x011A, 5, 1, b"\xff\xff\xff\xf0")),
        _exif(ORIENTATION, (0x8769, 4, 1, b"\x7f\xff\xff\xff")),
        _exif(ORIENTATION, (0x010E, 99, 9, b"abc\0")),
        _exif((0x0112, 2, 4, b"six\0")),
        _exif((0x0112, 3, 1, b"\0\x63\0\0")),
        _exif((0x0112, 5, 1, b"\0\0\0\0")),
        _exif(ORIENTATION)[:-9],
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0 rubbish",
    ],
    ids=[
        "width is text",
        "resolution is text",
        "resolution elsewhere",
        "folder elsewhere",
        "unknown type",
        "orientation is text",
        "orientation is 99",
        "orientation is a fraction",
        "cut",
        "empty",
        "nowhere",
        "rubbish",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_no_bug_of_ours(exif: bytes) -> None:
    content = _encode(_smooth(20, 10), "JPEG", exif=exif)
    found = _open_or_refuse(content)
    assert found is None or found.size in ((20, 10), (10, 20))


def test_a_turned_photo_with_odd_exif_is_still_read() -> None:
    content = _encode(_smooth(20, 10), "JPEG", exif=_exif((0x0100, 2, 4, b"abc\0"), ORIENTATION))
    assert _open(content).size == (10, 20)


def _png_with(before_pixels: bytes = b"", behind_pixels: bytes = b"") -> bytes:
    content = _encode(_smooth(20, 10), "PNG")
    end = content.rindex(b"IEND") - 4
    return content[:33] + before_pixels + content[33:end] + behind_pixels + content[end:]


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("behind", [False, True])
def test_a_photo_with_a_cut_exif_chunk_is_read_as_it_is_stored(behind: bool) -> None:
    chunk = _chunk(b"eXIf", b"MM\0*")
    content = _png_with(behind_pixels=chunk) if behind else _png_with(before_pixels=chunk)
    assert np.array_equal(_pixels(_open(content)), np.asarray(_smooth(20, 10)))


# --- what is refused ------------------------------------------------------------------------------------------------


JPEG = _encode(_smooth(64, 64), "JPEG")
PNG = _encode(_smooth(64, 64), "PNG")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        random.Random(0).randbytes(5000),
        JPEG[:3],
        JPEG[: len(JPEG) // 2],
        PNG[:8],
        PNG[:30],
        PNG[: len(PNG) // 2],
        b"\xff\xd8\xff" + bytes(500),
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"BM" + bytes(100),
    ],
    ids=[
        "empty",
        "one byte",
        "html",
        "random",
        "3 bytes",
        "half JPEG",
        "8 bytes",
        "30 bytes",
        "half PNG",
        "JPEG of zeros",
    ]
    + ["empty WEBP", "empty BMP"],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_broken_photos_are_named_in_one_line(content: bytes, from_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "größe 1.jpg"
    path.write_bytes(content)
    image = {"path": str(path), "bytes": None if from_file else content}
    for load in (lambda: open_photo(image), lambda: PREPROCESSING.load(image)):
        assert "capdist check" in _refusal(load, str(path))


def test_what_pillow_trips_over_is_damage_too() -> None:
    """An `IndexError` of its parser of colour profiles."""
    content = _png_with(behind_pixels=_chunk(b"iCCP", b"icc\0"))
    assert "capdist check" in _refusal(lambda: _open(content))


@pytest.mark.parametrize(
    "error",
    [OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)]
    + [MemoryError()],
    ids=str,
)
def test_what_fails_in_the_machine_is_not_blamed_on_the_photo(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "photo.png").write_bytes(PNG)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)) as caught:
        open_photo({"path": str(tmp_path / "photo.png"), "bytes": None})
    assert caught.value is error


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "EPS"])
def test_formats_that_nobody_needs_are_refused_whatever_they_are_called(image_format: str) -> None:
    mistake = _refusal(lambda: _open(_encode(_smooth(32, 32), image_format)))
    assert "not a photo" in mistake
    for readable in ("JPEG", "PNG", "WEBP", "BMP"):
        assert readable in mistake
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "BMP"}


@pytest.mark.parametrize("length", [None, *range(0, 60, 7)])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_truncated_photo_is_refused(image_format: str, length: int | None) -> None:
    content = _encode(_smooth(64, 64), image_format)
    _refusal(lambda: _open(content[: len(content) * 2 // 3 if length is None else length]))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_a_photo_or_a_refusal(image_format: str) -> None:
    content = _encode(_smooth(24, 24), image_format)
    chance = random.Random(image_format)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(chance.choice((60, len(content))))] = chance.randrange(256)
        photo = _open_or_refuse(bytes(damaged), chance.choice((None, 8)))
        assert photo is None or photo.mode == "RGB"


@pytest.mark.parametrize("path", ["absent.jpg", "absent/absent.jpg", "photo.jpg/absent.jpg", "", "x" * 300, "a\0b"])
def test_paths_without_a_photo(path: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    name = str(tmp_path / path)
    _refusal(lambda: open_photo({"path": name, "bytes": None}), name)


def test_neither_path_nor_bytes() -> None:
    _refusal(lambda: open_photo({"path": None, "bytes": None}), "image")
    _refusal(lambda: open_photo({"path": None, "bytes": b"x"}), "image")


def test_a_pipe_that_nobody_writes_to_does_not_hang(tmp_path: Path) -> None:
    pipe = tmp_path / "photo.jpg"
    os.mkfifo(pipe)
    outcome: list[object] = []

    def read() -> None:
        try:
            outcome.append(open_photo({"path": str(pipe), "bytes": None}))
        except Exception as error:
            outcome.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=2)
    hung = reader.is_alive()
    if hung:  # Let the thread go before the verdict.
        os.close(os.open(pipe, os.O_WRONLY))
        reader.join(timeout=10)
    assert not hung
    assert isinstance(outcome[0], DataError)
    assert str(outcome[0]).startswith(f"{pipe}: ")


def _peak_growth(action: Callable[[], object]) -> int:
    """Return by how many bytes this process was larger during the action than before it."""

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        match = re.search(rf"{name}:\s+(\d+) kB", text)
        assert match
        return int(match[1]) * 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # a launch of an earlier test in this process may have kept what was freed
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        pytest.skip("this system does not tell the peak of memory")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_001), (13_000, 13_000), (30_000, 30_000), (1, 200_000_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header(width: int, height: int) -> None:
    rows = b"\0" * ((1 + (width + 7) // 8) * min(height, 30_000))
    content = _png(width, height, 1, 0, rows)
    assert len(content) < 200_000
    if width == 10_000:
        assert _peak_growth(lambda: np.ones(50_000_000, dtype=np.uint8)) > 40_000_000, "the measure does not measure"
    start = time.perf_counter()
    growth = _peak_growth(lambda: _refusal(lambda: _open(content)))
    assert time.perf_counter() - start < 1
    assert growth < 20_000_000


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (1, 1), (1, 500), (500, 1), (3000, 20), (200, 100)])
def test_the_whole_photo_is_squashed(size: tuple[int, int]) -> None:
    found = PREPROCESSING.load({"path": "x", "bytes": _encode(Image.new("RGB", size, (9, 99, 199)), "PNG")})
    assert found.dtype == torch.uint8
    assert found.shape == (3, 64, 64)
    assert found.is_contiguous()
    assert found.flatten(1).unique(dim=1).squeeze().tolist() == [9, 99, 199]


def test_nothing_is_cut_off() -> None:
    photo = Image.new("RGB", (640, 160), "black")
    photo.paste((255, 0, 0), (0, 0, 20, 160))
    photo.paste((0, 255, 0), (620, 0, 640, 160))
    photo.paste((0, 0, 255), (300, 0, 340, 5))
    found = PREPROCESSING.resize(photo)
    assert found[:, 32, 0].tolist() == [255, 0, 0]
    assert found[:, 32, 63].tolist() == [0, 255, 0]
    assert found[2, 0, 32] > 200
    assert found[2, 4:].max() == 0


def test_a_photo_of_the_right_size_is_left_as_it_is() -> None:
    photo = _smooth(64, 64)
    expected = torch.from_numpy(np.asarray(photo).transpose(2, 0, 1).copy())
    assert torch.equal(PREPROCESSING.load({"path": "x", "bytes": _encode(photo, "PNG")}), expected)
    assert torch.equal(to_tensor(photo), expected)


@pytest.mark.parametrize("size", [(2000, 1500), (1001, 777), (130, 2000), (127, 127)])
def test_a_jpeg_decoded_small_looks_like_itself(size: tuple[int, int]) -> None:
    content = _encode(_smooth(*size), "JPEG", quality=92)
    full, small = _open(content), _open(content, 64)
    assert full.size == size
    assert all(side >= min(128, whole) for side, whole in zip(small.size, size, strict=True))
    assert (small.size == size) == (min(size) < 256), "a large photo is decoded small, a small one is not"
    loaded = PREPROCESSING.load({"path": "x", "bytes": content}).float()
    assert (loaded - PREPROCESSING.resize(full).float()).abs().mean() < 1.5


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 1, 1)])
def test_normalize_against_a_naive_computation(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images.reshape(-1)[:2] = (0, 255)
    expected = np.empty(shape, dtype=np.float64)
    for index in np.ndindex(*shape):
        channel = index[-3]
        expected[index] = (int(images[index]) / 255 - MEAN[channel]) / STD[channel]
    found = PREPROCESSING.normalize(torch.from_numpy(images.copy()))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_normalize_leaves_its_input_alone() -> None:
    images = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    PREPROCESSING.normalize(images)
    assert (images == 200).all()


# --- augmentation ---------------------------------------------------------------------------------------------------


def _augment(seed: int, image: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"random_crop": 1.0, "horizontal_flip": False, "color_jitter": 0.0, **options}
    return Augmentation(16, **settings)(image, seed)


@pytest.mark.parametrize("options", [{}, {"random_crop": 0.2}, {"horizontal_flip": True}, {"color_jitter": 1.0}])
def test_augmented_photos_have_the_shape_of_others(options: dict[str, Any]) -> None:
    image = to_tensor(_smooth(50, 20))
    for seed in range(5):
        found = _augment(seed, image, **options)
        assert (found.dtype, found.shape) == (torch.uint8, (3, 16, 16))
        assert torch.equal(found, _augment(seed, image, **options))


def test_half_of_the_photos_are_mirrored_as_announced_and_none_otherwise() -> None:
    image = to_tensor(_smooth(16, 16))
    augmentation = Augmentation(16, random_crop=1.0, horizontal_flip=True, color_jitter=0.0)
    mirrored = [torch.equal(augmentation(image, seed), image.flip(-1)) for seed in range(20)]
    assert mirrored == [augmentation.mirrors(seed) for seed in range(20)]
    assert [torch.equal(augmentation(image, seed), image) for seed in range(20)] == [not m for m in mirrored]
    assert sum(mirrored) == 10
    assert all(torch.equal(_augment(seed, image), image) for seed in range(20))
    assert not any(
        Augmentation(16, random_crop=0.5, horizontal_flip=False, color_jitter=0.0).mirrors(s) for s in range(9)
    )


@pytest.mark.parametrize("option", [{"random_crop": 0.5}, {"color_jitter": 0.5}])
def test_augmentation_changes_photos(option: dict[str, float]) -> None:
    image = to_tensor(_smooth(40, 40))
    assert len({_augment(seed, image, **option).numpy().tobytes() for seed in range(10)}) == 10
