"""From logits to what may be written next: log-probabilities, minus infinity where a token is forbidden.

Shapes: B images, R rows of an image, V vocabulary, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capdist.decoding.options import SearchOptions
from capdist.errors import UsageError

IMPOSSIBLE = float("-inf")


def allowed_log_probabilities(logits: Tensor, words: Tensor, position: int, options: SearchOptions) -> Tensor:
    """Return log p of every next token, minus infinity for the forbidden ones.

    The distribution is the model's own: forbidding a token does not raise the others. So the sum over a caption is
    minus the cross-entropy that training would compute.

    Args:
        logits: (B, R, V), any float type.
        words: Words written so far, (B, R, T); only the first `position` count.
        position: Words written so far by each row.
        options: What is forbidden.

    Returns:
        (B, R, V) float32, each at most 0, never NaN unless a logit is NaN or plus infinity.

    Raises:
        UsageError: A token id of the options lies outside the vocabulary.
    """
    _check_ids(logits.shape[-1], options)
    # A bfloat16 log-probability near -8 is a multiple of 1/32: sums over a caption need float32.
    log_p = logits.float().log_softmax(dim=-1)
    log_p = log_p.masked_fill(logits == IMPOSSIBLE, IMPOSSIBLE)  # a row without any possible token gave NaN
    for token in options.suppressed_ids:  # a handful; an index tensor would be copied to the device every step
        log_p[..., token] = IMPOSSIBLE
    if position < options.min_length:
        log_p[..., options.eos_id] = IMPOSSIBLE
    return forbid_repeats(log_p, words[..., :position], options.no_repeat_ngram)


def forbid_repeats(log_p: Tensor, words: Tensor, size: int) -> Tensor:
    """Forbid every token that would write the same `size` words in a row a second time.

    Args:
        log_p: (B, R, V), each at most 0.
        words: All words written so far, (B, R, T).
        size: n of the n-gram; 0 forbids nothing.

    Returns:
        (B, R, V), minus infinity where the token completes an n-gram that the row already has.
    """
    if size == 0 or words.shape[-1] < size:
        return log_p
    ngrams = words.unfold(-1, size, 1)  # (B, R, T - n + 1, n)
    start = words[..., words.shape[-1] - size + 1 :].unsqueeze(-2)  # (B, R, 1, n - 1)
    repeats = (ngrams[..., :-1] == start).all(dim=-1)
    # The minimum with 0 changes nothing, as log p <= 0; and where one token follows the same start and
    # another, the minimum keeps the ban.
    ceiling = torch.zeros_like(repeats, dtype=log_p.dtype).masked_fill(repeats, IMPOSSIBLE)
    return log_p.scatter_reduce(-1, ngrams[..., -1], ceiling, "amin")


def _check_ids(vocabulary: int, options: SearchOptions) -> None:
    outside = {token for token in (options.eos_id, *options.suppressed_ids) if token >= vocabulary}
    if outside:
        raise UsageError(
            f"eos_id, suppressed_ids: {sorted(outside)} outside the decoder's vocabulary; "
            f"ids must be below {vocabulary}"
        )
