"""Captions to words and back.

Text is put into Unicode NFC and lower case, and split by spaCy's English rules: `don't` is `do n't`, `dog's` is
`dog 's`. Hyphenated words stay whole (`t-shirt`). Tokens without a letter or digit are dropped, so the model neither
learns nor writes punctuation. The reference metrics split captions in the same way, so a caption loses nothing when it
is scored.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

TOKENIZER = "spacy.blank(en), NFC, lower case, hyphens kept, tokens without letter or digit dropped"

_MOST_CHARACTERS = 2_000  # far beyond any caption; spaCy refuses a million, and a stray book must not take minutes


@cache
def _spacy_tokenizer() -> Any:
    import spacy  # 2 s to import, so only where text is tokenised
    from spacy.lang.char_classes import HYPHENS
    from spacy.util import compile_infix_regex

    nlp: Any = spacy.blank("en")
    infixes = [infix for infix in nlp.Defaults.infixes if HYPHENS not in infix]
    nlp.tokenizer.infix_finditer = compile_infix_regex(infixes).finditer
    return nlp.tokenizer


def tokenize(captions: Iterable[str]) -> list[list[str]]:
    """Split captions into words.

    Args:
        captions: Texts that people wrote, one caption each.

    Returns:
        One list of lower-case words a caption, empty for a caption without any word.
    """
    tokenizer = _spacy_tokenizer()
    texts = (unicodedata.normalize("NFC", caption.lower())[:_MOST_CHARACTERS] for caption in captions)
    return [[t.text for t in tokenizer(text) if any(map(str.isalnum, t.text))] for text in texts]


def detokenize(words: Sequence[str]) -> str:
    """Join words into a caption: `the dog 's ball` is `the dog's ball`."""
    text = ""
    for word in words:
        clings = word in ("n't", "n’t") or word.startswith(("'", "’"))
        text += word if clings or not text else f" {word}"
    return text
