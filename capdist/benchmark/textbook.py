"""The common implementation of Show, Attend and Tell, written simply: all ratios compare with it.

It works like the captioners that are read and copied most. Photos are decoded and normalised to float one by one. Each
comes with one caption, so a photo with five captions is encoded five times. Its feature map is pooled up to 14x14.
Attention keys are computed again for every word, and the vocabulary head runs at every step. The search takes one image
at a time, in Python lists.

The implementation is correct and honest (free-running search, unique images), and equality tests compare with it.

Shapes: B captions, each with its own photo, T words, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from capdist.decoding import SearchOptions
from capdist.models.decoder import Decoder as CapdistDecoder
from capdist.models.lstm import SoftAttentionDecoder

GRID = 14


class Attention(nn.Module):
    """Additive attention that computes its keys at every step."""

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(feature_size, attention_size)
        self.decoder_att = nn.Linear(hidden_size, attention_size)
        self.full_att = nn.Linear(attention_size, 1)

    def forward(self, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return context (B, C) and weights (B, N) for features (B, N, C) and states (B, H)."""
        att1 = self.encoder_att(features)
        att2 = self.decoder_att(hidden)
        att = self.full_att(torch.tanh(att1 + att2.unsqueeze(1))).squeeze(2)
        alpha = att.softmax(dim=1)
        return (features * alpha.unsqueeze(2)).sum(dim=1), alpha


class Decoder(nn.Module):
    """LSTM decoder that takes one step after the other, with the head in each."""

    def __init__(
        self,
        feature_size: int,
        vocab_size: int,
        embed_size: int,
        hidden_size: int,
        attention_size: int,
        dropout: float,
        gate: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=0)
        self.attention = Attention(feature_size, hidden_size, attention_size)
        self.init_h = nn.Linear(feature_size, hidden_size)
        self.init_c = nn.Linear(feature_size, hidden_size)
        self.f_beta = nn.Linear(hidden_size, feature_size) if gate else None
        self.decode_step = nn.LSTMCell(embed_size + feature_size, hidden_size)
        self.fc = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def init_state(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden and cell (B, H) for features (B, N, C)."""
        mean = features.mean(dim=1)
        return torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))

    def step(self, words: Tensor, features: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, V) and the next hidden and cell for words (B,)."""
        context, _ = self.attention(features, hidden)
        if self.f_beta is not None:
            context = torch.sigmoid(self.f_beta(hidden)) * context
        hidden, cell = self.decode_step(
            torch.cat([self.dropout(self.embedding(words)), context], dim=1), (hidden, cell)
        )
        return self.fc(self.dropout(hidden)), hidden, cell

    def forward(self, features: Tensor, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, T, V), zero behind the end of a caption, and the order of its rows: longest first.

        Args:
            features: (B, N, C), one photo for each caption.
            input_ids: (B, T), starting with `<bos>`.
            lengths: (B,) words to read of each caption, at least one.
        """
        lengths, order = lengths.sort(descending=True)
        features, input_ids = features[order], input_ids[order]
        hidden, cell = self.init_state(features)
        logits = features.new_zeros(len(lengths), int(lengths.max()), self.fc.out_features)
        for t in range(int(lengths.max())):
            batch = sum(length > t for length in lengths.tolist())
            preds, hidden, cell = self.step(input_ids[:batch, t], features[:batch], hidden[:batch], cell[:batch])
            logits[:batch, t] = preds
        return logits, order


def caption_loss(decoder: Decoder, features: Tensor, input_ids: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of all words.

    Args:
        decoder: Network that reads the captions.
        features: (B, N, C), one photo for each caption.
        input_ids: (B, T).
        labels: (B, T).
        lengths: (B,) words of each caption.
    """
    logits, order = decoder(features, input_ids, lengths)
    sizes = lengths[order].cpu()
    packed = nn.utils.rnn.pack_padded_sequence(logits, sizes, batch_first=True).data
    targets = nn.utils.rnn.pack_padded_sequence(labels[order], sizes, batch_first=True).data
    return F.cross_entropy(packed, targets, reduction="sum")


class Captioner(nn.Module):
    """A 1x1 convolution over the features, if the recipe has one, and the decoder."""

    def __init__(self, projection: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.projection = copy.deepcopy(projection)
        self.decoder = decoder


def train_step(
    network: Captioner,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    lengths: Tensor,
) -> None:
    """Forward, backward, clipping and update; arguments as those of `caption_loss`."""
    optimizer.zero_grad()
    loss = caption_loss(network.decoder, network.projection(features), input_ids, labels, lengths)
    (loss / lengths.sum()).backward()
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()


class Encoder(nn.Module):
    """A backbone whose feature map is pooled to 14x14 from any size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pool = nn.AdaptiveAvgPool2d(GRID)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, 196, C) of photos (B, 3, S, S)."""
        return self.pool(self.network(pixel_values)).permute(0, 2, 3, 1).flatten(1, 2)


class PhotoDataset(Dataset[Tensor]):
    """Photos decoded by Pillow, resized and normalised to float in the worker, one item a caption."""

    def __init__(self, paths: Sequence[Path], image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.Resize((image_size, image_size)),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return pixel_values (3, S, S)."""
        pixel_values: Tensor = self.transform(Image.open(self.paths[index]).convert("RGB"))
        return pixel_values


class Beam(NamedTuple):
    """A caption under way: its words, the sum of their log-probabilities, and where its state lies."""

    words: list[int]
    log_probability: float
    row: int


@torch.no_grad()
def beam_search(decoder: Decoder, features: Tensor, options: SearchOptions) -> tuple[list[int], float]:
    """Caption one image by the rule of `capdist.decoding.beam_search`.

    At each step the first K of the ranked continuations may end, and the best K that do not end go on. The search stops
    once K captions have ended and no beam is more probable than the worst of them.

    Args:
        decoder: Network that writes the caption; it must be in evaluation mode.
        features: (1, N, C).
        options: Settings of the search. The length penalty is ignored (it counts as 0), and words may repeat.

    Returns:
        Words, without `<bos>` and `<eos>`, and log-probability of the best caption.
    """
    beam_size, eos_id = options.beam_size, options.eos_id
    hidden, cell = decoder.init_state(features)
    live, done = [Beam([options.bos_id], 0.0, 0)], list[Beam]()
    for position in range(options.max_length + 1):
        rows = [beam.row for beam in live]
        words = torch.tensor([beam.words[-1] for beam in live], device=features.device)
        logits, hidden, cell = decoder.step(words, features.expand(len(live), -1, -1), hidden[rows], cell[rows])
        log_p = logits.log_softmax(dim=1)
        log_p[:, list(options.suppressed_ids)] = float("-inf")
        if position < options.min_length:
            log_p[:, eos_id] = float("-inf")
        totals = log_p + torch.tensor([beam.log_probability for beam in live], device=log_p.device).unsqueeze(1)
        best, index = totals.flatten().sort(descending=True)
        ranked = [
            Beam([*live[i // log_p.shape[1]].words, i % log_p.shape[1]], total, i // log_p.shape[1])
            for total, i in zip(best[: 2 * beam_size].tolist(), index[: 2 * beam_size].tolist(), strict=True)
        ]
        done += [beam for beam in ranked[:beam_size] if beam.words[-1] == eos_id]
        done = sorted(done, key=lambda beam: -beam.log_probability)[:beam_size]
        if position == options.max_length:
            break
        live = [beam for beam in ranked if beam.words[-1] != eos_id][:beam_size]
        if len(done) == beam_size and live[0].log_probability <= done[-1].log_probability:
            break
    best_beam = max(done or live, key=lambda beam: beam.log_probability)
    return [word for word in best_beam.words[1:] if word != eos_id], best_beam.log_probability


@torch.no_grad()
def decoder_like(fast: CapdistDecoder[Any], dropout: float = 0.0) -> Decoder:
    """Return the textbook decoder with the weights of capdist's, which must be a `SoftAttentionDecoder`."""
    assert isinstance(fast, SoftAttentionDecoder)
    plain = Decoder(
        feature_size=fast.initial_hidden.in_features,
        vocab_size=fast.head.out_features,
        embed_size=fast.embedding.embedding_dim,
        hidden_size=fast.lstm.hidden_size,
        attention_size=fast.attention.query.out_features,
        dropout=dropout,
        gate=fast.gate is not None,
    )
    state = {name: fast.state_dict()[own] for name, own in parameter_names(plain).items()}
    # capdist has no bias here: adding the same number to the score of every cell changes nothing.
    state["attention.full_att.bias"] = torch.zeros(1)
    plain.load_state_dict(state)
    if fast.head.weight is fast.embedding.weight:
        plain.fc.weight = plain.embedding.weight
    return plain.to(fast.head.weight)


def parameter_names(decoder: Decoder) -> dict[str, str]:
    """Return what capdist calls each parameter of a textbook decoder; `full_att.bias` has no counterpart."""
    modules = {
        "attention.encoder_att": "attention.key",
        "attention.decoder_att": "attention.query",
        "init_h": "initial_hidden",
        "init_c": "initial_cell",
        "fc": "head",
    }
    if decoder.f_beta is not None:
        modules["f_beta"] = "gate"
    names = {f"{plain}.{part}": f"{own}.{part}" for plain, own in modules.items() for part in ("weight", "bias")}
    names |= {f"decode_step.{part}": f"lstm.{part}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    return names | {"attention.full_att.weight": "attention.score.weight", "embedding.weight": "embedding.weight"}
