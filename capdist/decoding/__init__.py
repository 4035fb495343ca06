"""Caption search: pure functions over a small protocol (`init_state`, `step`, `reorder`, `select`)."""

from capdist.decoding.hypotheses import SearchResult
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State
from capdist.decoding.search import beam_search, greedy_search, sample, search

__all__ = ["Decoder", "SearchOptions", "SearchResult", "State", "beam_search", "greedy_search", "sample", "search"]
