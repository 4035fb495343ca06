"""A captioner small enough to enumerate, and searches over it written the slow, plain way.

Shapes: B images, R rows, V vocabulary, N cells.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from capdist.decoding import SearchOptions

PAD, BOS, EOS, A, B, C = range(6)
VOCABULARY, CELLS, CHANNELS = 6, 4, 5
SUPPRESSED = (PAD, BOS)


class ToyState(NamedTuple):
    features: Tensor  # (B, N, channels), per image
    tables: Tensor  # (B, V, V, V) logits by (word before last, last word), per image
    previous: Tensor  # (B, R): the last word before the one that `step` reads, per row


@dataclass
class ToyDecoder:
    """A Markov chain of order 2, its random logits made from the image; the older word lives in the state."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    sharpness: float = 2.0
    eos_bias: float = 0.0
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.mix = torch.randn(CHANNELS, VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
        self.gaze = torch.randn(VOCABULARY, VOCABULARY, CHANNELS, generator=generator)

    def init_state(self, features: Tensor) -> ToyState:
        tables = torch.einsum("bc,cijk->bijk", features.mean(dim=1), self.mix) * self.sharpness
        tables[..., EOS] += self.eos_bias
        start = torch.full((len(features), 1), PAD)
        return ToyState(features, tables.to(self.dtype), start)

    def step(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, Tensor, ToyState]:
        self.steps += 1
        images = len(state.features)
        assert state.tables.shape == (images, VOCABULARY, VOCABULARY, VOCABULARY), "tables were repeated"
        assert state.features.shape == (images, CELLS, CHANNELS), "features were repeated"
        assert tokens.shape == state.previous.shape
        assert tokens.dtype == torch.long
        image = torch.arange(images)[:, None]
        logits = state.tables[image, state.previous, tokens]
        attention = torch.einsum("bnc,brc->brn", state.features, self.gaze[state.previous, tokens]).softmax(-1)
        return logits, attention, state._replace(previous=tokens)

    def reorder(self, state: ToyState, parents: Tensor) -> ToyState:
        return state._replace(previous=state.previous.gather(1, parents))

    def select(self, state: ToyState, images: Tensor) -> ToyState:
        return ToyState(*(values[images] for values in state))


def make_features(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1000 + seed))


def make_options(**changes: object) -> SearchOptions:
    defaults = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "suppressed_ids": SUPPRESSED, "max_length": 5}
    return SearchOptions(**{**defaults, **changes})


class PlainModel:
    """The same chain for one image, in Python floats (float64)."""

    def __init__(self, decoder: ToyDecoder, features: Tensor) -> None:
        tables = decoder.init_state(features[None]).tables[0].double()
        self.table = tables.log_softmax(-1).tolist()

    def next(self, words: list[int]) -> list[float]:
        before, last = ([PAD, BOS] + words)[-2:] if words else (PAD, BOS)
        return self.table[before][last]

    def log_probability(self, words: list[int], ended: bool) -> float:
        tokens = words + [EOS] if ended else words
        return sum(self.next(tokens[:i])[token] for i, token in enumerate(tokens))


class Candidate(NamedTuple):
    words: list[int]
    log_probability: float
    score: float
    ended: bool


def score(log_probability: float, length: int, alpha: float) -> float:
    return log_probability / max(length, 1) ** alpha


def is_allowed(words: list[int], token: int, options: SearchOptions) -> bool:
    if token in options.suppressed_ids or (token == options.eos_id and len(words) < options.min_length):
        return False
    size = options.no_repeat_ngram
    return not (size and has_repeat([*words, token], size))


def has_repeat(words: list[int], size: int) -> bool:
    ngrams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


def enumerate_captions(model: PlainModel, options: SearchOptions) -> list[Candidate]:
    """Return every allowed caption that ends, best first."""
    found = []
    for length in range(options.min_length, options.max_length + 1):
        for words in itertools.product((A, B, C), repeat=length):
            log_p = model.log_probability(list(words), ended=True)
            found.append(Candidate(list(words), log_p, score(log_p, length + 1, options.length_penalty), True))
    return sorted(found, key=lambda c: -c.score)


def plain_beam_search(model: PlainModel, options: SearchOptions) -> list[Candidate]:
    """Search one image with lists and sorts, and without stopping early (but for a beam of one)."""
    width, alpha = options.beam_size, options.length_penalty
    live: list[tuple[list[int], float]] = [([], 0.0)]
    pool: list[Candidate] = []
    for position in range(options.max_length + 1):
        continuations = [
            (words, token, total + log_p)
            for words, total in live
            for token, log_p in enumerate(model.next(words))
            if is_allowed(words, token, options) and log_p > -math.inf
        ]
        continuations = sorted(continuations, key=lambda c: -c[2])[: 2 * width]
        ends = [(words, total) for words, token, total in continuations[:width] if token == EOS]
        pool += [Candidate(w, total, score(total, len(w) + 1, alpha), True) for w, total in ends]
        pool = sorted(pool, key=lambda c: -c.score)[:width]
        left = [beam for beam in live if beam[0] not in [words for words, _ in ends]]
        grown = [(words + [token], total) for words, token, total in continuations if token != EOS][:width]
        if position == options.max_length or not grown or (width == 1 and pool):
            live = left
            break
        live = grown
    cut = [Candidate(words, total, score(total, len(words), alpha), False) for words, total in live]
    return (pool + sorted(cut, key=lambda c: -c.score))[:width]
