"""Pictures of samples and of attention: everything is shown, in its place, and no text runs into another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from capdist.inference.pictures import STRIP_WORDS, Looks, Sample, light_of_words, save_attention, save_samples

LONG = "a very long caption of a person who sees " + "many small and large things and " * 5 + "describes them"
COLUMN = 261  # pixels from one photo to the next
RED, WHITE = (255, 0, 0), (255, 255, 255)


def _sample(size: tuple[int, int] = (60, 60), caption: str = "a dog", reference: str = "A dog runs.") -> Sample:
    return Sample(Image.new("RGB", size, RED), caption, reference, "BLEU-4 0.50")


def _pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def _red(pixels: NDArray[np.int64]) -> NDArray[np.bool_]:
    red: NDArray[np.bool_] = (abs(pixels - RED) < 3).all(axis=2)
    return red


def test_photos_stand_in_rows_of_four(tmp_path: Path) -> None:
    save_samples([_sample() for _ in range(6)], tmp_path / "six.png", "title")
    red = _red(_pixels(tmp_path / "six.png"))
    assert red.shape[1] == 4 * COLUMN
    by_column = red.reshape(len(red), 4, COLUMN).sum(axis=(0, 2))
    side = COLUMN - 12
    assert by_column[:2] == pytest.approx(2 * side**2, rel=0.03)
    assert by_column[2:] == pytest.approx(side**2, rel=0.03)


@pytest.mark.parametrize(("size", "share"), [((500, 250), 0.5), ((30, 90), 1 / 3), ((1, 1), 1)])
def test_a_photo_keeps_its_proportions(tmp_path: Path, size: tuple[int, int], share: float) -> None:
    save_samples([_sample(size)], tmp_path / "one.png", "title")
    assert _red(_pixels(tmp_path / "one.png")).sum() == pytest.approx(share * (COLUMN - 12) ** 2, rel=0.05)


def test_long_captions_wrap_and_stay_in_their_column(tmp_path: Path) -> None:
    samples = [_sample(caption=LONG, reference=LONG.upper()) for _ in range(8)]
    save_samples(samples, tmp_path / "long.png", "")
    save_samples([_sample() for _ in range(8)], tmp_path / "short.png", "")
    pixels, short = _pixels(tmp_path / "long.png"), _pixels(tmp_path / "short.png")
    for boundary in range(COLUMN, 4 * COLUMN, COLUMN):
        assert (pixels[:, boundary - 1 : boundary + 1] == WHITE).all()
    assert len(pixels) > len(short) + 200
    # The second row of photos starts below the texts of the first, and nothing is cut off at the lower edge.
    assert (pixels[-5:] == WHITE).all()
    rows_of_photos = np.flatnonzero(np.diff(_red(pixels)[:, COLUMN // 2].astype(int)) == 1)
    assert len(rows_of_photos) == 2
    above = pixels[rows_of_photos[1] - 5 : rows_of_photos[1]]
    assert (above == WHITE).all()


def test_dollar_signs_are_no_mathematics(tmp_path: Path) -> None:
    save_samples([_sample(caption="$5 and {$6_", reference=r"\frac$ and $\no")], tmp_path / "dollars.png", "a $ and $")
    assert _red(_pixels(tmp_path / "dollars.png")).any()


def test_drawings_of_few_pixels_are_smooth(tmp_path: Path) -> None:
    photo = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("RGB")
    save_samples([Sample(photo, "", "", "")], tmp_path / "smooth.png", "")
    assert len(np.unique(_pixels(tmp_path / "smooth.png")[:, COLUMN // 4])) > 50


def _looks(words: int, cells: int = 4) -> Looks:
    attention = torch.eye(max(words, cells))[:words, :cells]
    return Looks(Image.new("RGB", (50, 50), RED), [f"word{number}" for number in range(words)], attention)


def test_attention_is_shown_below_samples_in_rows_of_equal_length(tmp_path: Path) -> None:
    heights = []
    for words in (None, STRIP_WORDS, STRIP_WORDS + 1, 2 * STRIP_WORDS):
        save_samples([_sample()] * 4, tmp_path / "s.png", "", None if words is None else _looks(words))
        heights.append(len(_pixels(tmp_path / "s.png")))
    without, one_row, two_rows, two_full_rows = heights
    assert one_row > without + 4 * COLUMN / (STRIP_WORDS + 1)
    assert two_rows > one_row + 4 * COLUMN / (STRIP_WORDS + 1)
    assert two_full_rows < two_rows  # more words share the width, so each tile is smaller


def test_a_word_is_bright_where_it_looked(tmp_path: Path) -> None:
    attention = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    save_attention(Image.new("RGB", (80, 80), WHITE), ("upper", "lower"), attention, tmp_path / "a.png")
    side, margin = 180, 8
    _, upper, lower = (
        _pixels(tmp_path / "a.png")[margin : side - margin, at + margin : at + side - margin].mean(axis=2)
        for at in range(0, 3 * side, side)
    )
    assert upper[:40, :40].mean() > upper[-40:, -40:].mean() + 100
    assert lower[-40:, -40:].mean() > lower[:40, :40].mean() + 100
    assert upper[:40, -40:].mean() == pytest.approx(lower[:40, -40:].mean(), abs=3)


def test_light_is_the_difference_to_the_mean_on_one_scale() -> None:
    # Means 0.5, 0.3, 0.2; the largest surplus is 0.3, of the first word at the first cell.
    attention = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.45, 0.35], [0.5, 0.35, 0.15]])
    expected = [[1.0, 0.0, 0.2], [0.0, 0.7, 0.7], [0.4, 0.5, 0.3]]
    np.testing.assert_allclose(light_of_words(attention), expected, atol=1e-6)


def test_words_that_all_look_alike_are_equally_bright() -> None:
    np.testing.assert_allclose(light_of_words(torch.tensor([[0.9, 0.1]] * 3)), 0.4, atol=1e-6)


def test_a_caption_without_words_is_no_mistake(tmp_path: Path) -> None:
    save_attention(Image.new("RGB", (80, 80), RED), (), torch.zeros(0, 4), tmp_path / "none.png")
    assert _red(_pixels(tmp_path / "none.png")).any()
