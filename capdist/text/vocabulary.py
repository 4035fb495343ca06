"""The words a model knows, and their ids."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from capdist.errors import CheckpointError, DataError
from capdist.text.tokenizer import TOKENIZER

PAD, BOS, EOS, UNK = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

IGNORED_LABEL = -100
"""Label of a position that is no word of a caption; torch's default `ignore_index`."""


class Vocabulary:
    """Words and ids; ids 0 to 3 are `<pad> <bos> <eos> <unk>`, then words from frequent to rare.

    Args:
        words: Words with ids from 4 up, in that order; the special tokens are added.
    """

    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self, words: Sequence[str]) -> None:
        self.words = (*SPECIALS, *words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            repeated = [word for word, count in Counter(self.words).items() if count > 1]
            raise ValueError(f"a vocabulary lists each word once; repeated: {', '.join(repeated[:5])}")

    @classmethod
    def count(cls, captions: Iterable[Sequence[str]], min_frequency: int) -> Vocabulary:
        """Count the words of the training captions.

        Args:
            captions: Words of each caption of the training split; words of other splits must not be counted.
            min_frequency: Words that are seen less often become `<unk>`.

        Raises:
            DataError: if no word is frequent enough.
        """
        counts = Counter(word for caption in captions for word in caption)
        words = [word for word, count in counts.items() if count >= min_frequency and word not in SPECIALS]
        if not words:
            raise DataError(
                f"text.min_frequency: none of {len(counts)} training words is seen {min_frequency} times; "
                "lower it, or check the captions"
            )
        return cls(sorted(words, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Return the ids of words; unknown words are `<unk>`."""
        return [self._ids.get(word, self.unk_id) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of ids, without `<pad>`, `<bos>` and `<eos>`."""
        return [self.words[i] for i in ids if i not in (self.pad_id, self.bos_id, self.eos_id)]

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Ids that a caption never holds."""
        return (self.pad_id, self.bos_id, self.unk_id)

    @property
    def mirrored_words(self) -> dict[int, int]:
        """Maps the ids of `left`, `right` and words that begin with them to the ids of their opposites."""
        opposites = {}
        for word in self.words:
            for one, other in (("left", "right"), ("right", "left")):
                opposite = other + word.removeprefix(one)
                if word.startswith(one) and opposite in self._ids:
                    opposites[self._ids[word]] = self._ids[opposite]
        return opposites

    @property
    def digest(self) -> str:
        """SHA-256 of words and their order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the contents of `vocabulary.json`."""
        return json.dumps({"tokenizer": TOKENIZER, "words": self.words}, ensure_ascii=False, indent=0)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read `vocabulary.json`.

        Raises:
            CheckpointError: if it is missing or is not such a file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            words, tokenizer = values["words"], values["tokenizer"]
            if tuple(words[:4]) != SPECIALS:
                raise ValueError(f"the first words are {words[:4]}")
            "".join(words).encode()  # each word is text that can be written
            vocabulary = cls(words[4:])
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; the vocabulary belongs beside the weights") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a capdist vocabulary ({error})") from None
        if tokenizer != TOKENIZER:
            raise CheckpointError(f"{path}: made with tokeniser {tokenizer!r}, this version has {TOKENIZER!r}")
        return vocabulary
