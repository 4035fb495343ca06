"""Prose is measured as a reader would count it: the expected numbers here were counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import REPOSITORY, run


@pytest.fixture(scope="module")
def prose() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "experiments"))
        import prose

        yield prose


@pytest.fixture(scope="module")
def parameters(prose: ModuleType) -> ModuleType:
    import prose_parameters

    return prose_parameters


def _measure(prose: ModuleType, path: Path, text: str) -> list[tuple[int, int, int, str]]:
    path.write_text(text, encoding="utf-8")
    found = [sentence for block in prose.blocks_of(path) for sentence in prose.sentences_of(block)]
    return [(sentence.line, sentence.words, sentence.commas, sentence.text) for sentence in found]


MARKDOWN = """\
# A heading. With two sentences.

Two words. The second one, with a comma, has
nine words. See [the long guide](https://example.org/a,b.md) now.

| a table | is not prose. |
| --- | --- |

- An item
- Another item; it goes on: still one sentence
  on two lines

```bash
capdist check   # Not prose. At all.
```

    indented code. Is none.

![A picture. Of a dog.](dog.png)
Run `capdist train --config x` twice! `capdist` (1, 2, 3) waits.
"""


def test_sentences_of_markdown_are_those_counted_by_hand(prose: ModuleType, tmp_path: Path) -> None:
    assert _measure(prose, tmp_path / "page.md", MARKDOWN) == [
        (3, 2, 0, "Two words."),
        (3, 9, 2, "The second one, with a comma, has nine words."),
        (4, 5, 0, "See [the long guide](https://example.org/a,b.md) now."),
        (9, 2, 0, "An item"),
        (10, 11, 0, "Another item; it goes on: still one sentence on two lines"),
        (19, 3, 0, "![A picture. Of a dog.](dog.png) Run `capdist train --config x` twice!"),
        (20, 5, 2, "`capdist` (1, 2, 3) waits."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("BLEU-1 is .683 here. CIDEr is 0.616.", [4, 3]),  # ".683" and "0.616" end nothing
        ("Xu et al. Show what e.g. Bahdanau did.", [8]),
        ("It ends (here). Then it goes on.", [3, 4]),
        ("Is it? Yes! 3 seeds say so.", [2, 1, 4]),
        ("one. two is no new sentence, as it begins small.", [10]),
        ("A ± B / C.", [3]),  # signs are no words
        ("**Set-up.** One core. **Two.** Three.", [2, 1, 1]),  # the first is a heading
        ("- **Verdict.**", []),
        ("**Bold** begins this.", [3]),
    ],
)
def test_where_sentences_end(prose: ModuleType, tmp_path: Path, text: str, words: list[int]) -> None:
    assert [found[1] for found in _measure(prose, tmp_path / "page.md", text)] == words


PYTHON = '''\
"""Do one thing. Do another.

    code = "Not prose."
"""

WIDTH = 3
"""Width of it."""
MESSAGE = "Not a docstring. Of anything."


class Net:
    """A net.

    Args:
        rate: Of the
            step.
        size (int): Holds (B, N), three words.

    More prose here.
    """

    def run(self) -> int:
        """Run it.

        Returns:
            The number of steps. It may be 0.

        Raises:
            ValueError: if it
                breaks.

        Example:
            Not prose. At all.
        """
        return 0
'''


def test_docstrings_are_prose_and_descriptions_are_kept_apart(prose: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    assert [found[::3] for found in _measure(prose, path, PYTHON)] == [
        (1, "Do one thing."), (1, "Do another."), (7, "Width of it."), (12, "A net."),
        (15, "Of the step."), (17, "Holds (B, N), three words."), (19, "More prose here."), (23, "Run it."),
        (26, "The number of steps."), (26, "It may be 0."), (29, "if it breaks."),
    ]  # fmt: skip
    described = [(block.parameter, block.line) for block in prose.blocks_of(path) if block.is_description]
    assert described == [("rate", 15), ("size", 17), (None, 26), (None, 29)]
    texts, descriptions = prose.figures("module", prose.blocks_of(path))
    assert (len(texts.sentences), texts.faults) == (6, None)
    assert (len(descriptions.sentences), descriptions.faults) == (5, 1)  # "Of the step."


def test_the_row_of_a_file(prose: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    lengths = [2, 3, 4, 5, 6, 7, 8, 26, 31, 41]
    path.write_text("\n\n".join("A" + " word," * (n - 1) + "." for n in lengths))
    (row,) = prose.figures("page", prose.blocks_of(path))
    # Median (6 + 7) / 2; 9 of 10 have at most 31 words; 3, 2 and 1 of 10 are over the limits; 123 commas.
    assert row.cells() == ["page", "10", "6.5 / 31", "30%", "20%", "10%", "12.30", "0", ""]


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("features", "Encoder grid, (B, N, C)."),
        ("bias", "(out,) or None."),
        ("rows", "(…, 4H), four gates a row."),
        ("timeout", "Longest wait in seconds."),
        ("dropout", "Share of the state."),
        ("count", "Number of captions of one image."),
        ("random_crop", "Smallest part of the area, 0…1."),
        ("beam_size", "Beams of the search; 1 means greedy search."),
        ("source", "One of `scenes` and `folder`."),
        ("folder", "Where the store lies."),
        ("stop", "Whether any process was told to stop."),
        ("encoder", "Turns photos into features."),
        ("names", "Name the models in errors."),
        ("recipe", "Features stored in the cache."),
        ("options", "What to write."),
        ("title", "What the first column shows: a file."),
    ],
)
def test_descriptions_with_a_verb_a_unit_or_a_shape_pass(parameters: ModuleType, name: str, description: str) -> None:
    assert parameters.fault_of(name, description) is None


@pytest.mark.parametrize(
    ("name", "description", "fault"),
    [
        ("accelerator", "Of the launch.", "begins with a preposition"),
        ("preprocessing", "Of photos, or\nNone.", "begins with a preposition"),
        ("pairs", "Of `find_pairs`.", "begins with a preposition"),
        ("seed", "Of the run.", "begins with a preposition"),
        ("folder", "For the feature store.", "begins with a preposition"),
        ("optimizer", "Likewise.", "says nothing"),
        ("num_processes", "Processes.", "repeats the name"),
        ("model_name", "The name of\nmodels", "no verb, unit or shape"),
        ("image_id", "The image's ids.", "no verb, unit or shape"),
        ("feature_size", "C.", "no verb, unit or shape"),
        ("features", "Stored features.", "no verb, unit or shape"),
        ("state", "Runs, names and steps.", "no verb, unit or shape"),
        ("choice", "The user's choice (a name).", "no verb, unit or shape"),
        ("metrics", "Which metrics.", "no verb, unit or shape"),
    ],
)
def test_empty_descriptions_are_found(parameters: ModuleType, name: str, description: str, fault: str | None) -> None:
    assert parameters.fault_of(name, description) == fault


def test_words_to_avoid_are_listed_with_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It stands here.\nAs it\nis, nobody heeded\n`whatever` it cost. Instead of amending, wait.\n")
    result = run(["experiments/prose.py", str(page), "--avoid"])
    assert result.stdout.splitlines() == [f"{page}:1: stands", f"{page}:2: As it is", f"{page}:3: heeded"]


def test_table_and_lists_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("One two three. Four, five.\n")
    (tmp_path / "docs" / "code.py").write_text('"""Six seven.\n\nArgs:\n    seed: Of the run.\n"""\n')
    (tmp_path / "docs" / ".hidden").mkdir()
    (tmp_path / "docs" / ".hidden" / "page.md").write_text("Nobody reads this.\n")
    folder = str(tmp_path / "docs")
    table = [line.split("|") for line in run(["experiments/prose.py", folder]).stdout.splitlines()]
    assert [[cell.strip() for cell in row[1:-1]] for row in table[2:]] == [
        [folder, "1", "2 / 2", "0%", "0%", "0%", "0.00", "0", ""],
        [f"{folder}, descriptions", "1", "3 / 3", "0%", "0%", "0%", "0.00", "0", "1"],
        [f"{folder}/page.md", "2", "2.5 / 3", "0%", "0%", "0%", "0.50", "0", ""],
    ]
    listed = run(["experiments/prose.py", folder, "--over", "2", "--parameters"]).stdout.splitlines()
    assert listed == [
        f"{folder}/code.py:4: 3 words: Of the run.",
        f"{folder}/page.md:1: 3 words: One two three.",
        f"{folder}/code.py:4: seed: Of the run. (begins with a preposition)",
    ]


def test_random_sentences_depend_on_the_seed_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"Sentence number {n}." for n in range(100)))
    drawn = [run(["experiments/prose.py", str(page), "--sentences", "5", "--seed", seed]).stdout for seed in "001"]
    assert drawn[0] == drawn[1] != drawn[2]
    lines = drawn[0].splitlines()
    assert len(set(lines)) == 5
    for line in lines:
        number = int(line.removesuffix(".").rsplit(" ")[-1])
        assert line == f"{page}:{number + 1}: Sentence number {number}."


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    result = run(["experiments/prose.py", str(tmp_path / "nothing")])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"prose.py: error: {tmp_path}/nothing: no such file or folder\n"
