"""A model folder, its preprocessing and a search: photos in, captions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from capdist.data.images import open_photo, upright_rgb
from capdist.data.sources.photos import PHOTO_SUFFIXES
from capdist.decoding import SearchOptions
from capdist.errors import CheckpointError, DataError, Mistake, UsageError
from capdist.inference.writing import Caption, write_captions
from capdist.model_folder import TrainedModel, load_pretrained, search_options
from capdist.models.ensemble import Ensemble


class Captioner:
    """Captions photos with a trained model, or with an ensemble of several.

    Args:
        trained: The model and what it needs, or several models whose probabilities are averaged. The first one gives
            the search settings and the maximum length.
        device: Where it runs; None = a GPU if there is one.
        names: Name several models in errors; if empty, they are numbered.

    Attributes:
        members: The models and what they need.
        trained: The model that gives vocabulary, preprocessing and search settings: the first.
        model: Encodes photos and writes captions: the network, or the ensemble.

    Raises:
        UsageError: if there is no model.
        CheckpointError: if several differ in vocabulary or preprocessing.

    Example:
        >>> Captioner.from_pretrained("runs/scenes/model").caption("photo.jpg")  # doctest: +SKIP
        [Caption(text='a red ball left of a blue box', ...)]
    """

    def __init__(
        self,
        trained: TrainedModel | Sequence[TrainedModel],
        device: str | torch.device | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.members = (trained,) if isinstance(trained, TrainedModel) else tuple(trained)
        if not self.members:
            raise UsageError("model: none given; give one model folder or more")
        names = names or [f"model {number}" for number in range(1, len(self.members) + 1)]
        _check_alike(self.members, names)
        self.trained = self.members[0]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        networks = [member.model for member in self.members]
        # Code that encodes and searches with it need not know which of the two it is.
        model: Any = networks[0] if len(networks) == 1 else Ensemble(networks, names)
        self.model = model.to(self.device).eval()

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path | Sequence[str | Path],
        device: str | torch.device | None = None,
        image_size: int | None = None,
    ) -> Captioner:
        """Load a model folder, or a model of the Hugging Face Hub, or several of them as an ensemble.

        Args:
            folder_or_hub_id: What to load.
            device: Where the model runs; None = a GPU if there is one.
            image_size: Squash photos to this many pixels a side; None = as the model says. Things look larger in random
                crops than in whole photos. So a model that was trained on crops captions larger photos better (Touvron
                et al. 2019, Fixing the train-test resolution discrepancy).

        Raises:
            CheckpointError, StorageError: as `load_pretrained`.
            UsageError: as `Captioner`, or `image_size` is not a number of pixels from 32 to 2048.
            CheckpointError: as `Captioner`.
        """
        if image_size is not None and not 32 <= image_size <= 2048:
            raise UsageError(f"image_size: {image_size} pixels a side; can be 32 to 2048")
        folders = [folder_or_hub_id] if isinstance(folder_or_hub_id, str | Path) else folder_or_hub_id
        members = [load_pretrained(folder) for folder in folders]
        if image_size is not None:
            members = [replace(m, preprocessing=replace(m.preprocessing, image_size=image_size)) for m in members]
        return cls(members, device, [str(folder) for folder in folders])

    def options(self, **changes: Any) -> SearchOptions:
        """Return how the model searches, with some of its own settings replaced.

        A setting of the model that has no effect with this number of beams is left out.

        Args:
            changes: Replace settings of the same name, see `SearchSettings.changed`.

        Raises:
            UsageError: as `SearchSettings.changed` and `SearchOptions`, or if a change does nothing.
        """
        search = self.trained.search.changed(**changes)
        idle = search.idle()
        if mistakes := [
            Mistake(name, f"{changes[name]:g} does nothing with fewer than {beams} beams", "take more")
            for name, beams in idle.items()
            if changes.get(name)
        ]:
            raise UsageError(*mistakes)
        search = search.changed(**dict.fromkeys(idle, 0))
        return search_options(search, self.trained.vocabulary, self.trained.max_length)

    def caption(
        self, images: Any, *, batch_size: int = 32, return_attention: bool = False, **search: Any
    ) -> list[Caption]:
        """Caption photos.

        Args:
            images: One photo or a sequence: paths, PIL images, or arrays or tensors, uint8, (height, width, 3).
            batch_size: How many photos are captioned at once; more take more memory.
            return_attention: Also return what each word looked at.
            search: Settings of `SearchSettings` by name, such as `beam_size=3`; others keep the values that the model
                was validated with.

        Returns:
            One caption a photo, in their order.

        Raises:
            DataError: naming a photo that cannot be read.
            UsageError: if an image is of none of these types, and as `options`.
        """
        single = isinstance(images, str | Path | Image.Image | Tensor) or hasattr(images, "__array_interface__")
        photos = [images] if single else list(images)
        options = self.options(**search)
        captions: list[Caption] = []
        for start in range(0, len(photos), batch_size):
            captions += self._caption_batch(photos[start : start + batch_size], options, return_attention)
        return captions

    @torch.inference_mode()
    def _caption_batch(self, photos: Sequence[Any], options: SearchOptions, attention: bool) -> list[Caption]:
        preprocessing = self.trained.preprocessing
        pixels = torch.stack([preprocessing.resize(_open(photo, preprocessing.image_size)) for photo in photos])
        features = self.model.encode(preprocessing.normalize(pixels.to(self.device)))
        return write_captions(self.model, features, self.trained.vocabulary, options, return_attention=attention)


def _check_alike(members: Sequence[TrainedModel], names: Sequence[str]) -> None:
    """Refuse members with another vocabulary or preprocessing than the first, with a line for each difference."""
    first, mistakes = members[0], []
    for name, member in zip(names, members, strict=True):
        if member.vocabulary.words != first.vocabulary.words:
            mistakes.append(
                f"{name}: its vocabulary ({len(member.vocabulary)} words) is not that of {names[0]} "
                f"({len(first.vocabulary)}); probabilities are averaged word by word: train both on the same captions"
            )
        keys = [field.name for field in fields(first.preprocessing)]
        of_both = [(key, getattr(member.preprocessing, key), getattr(first.preprocessing, key)) for key in keys]
        mistakes += [
            f"{name}: its photos have {key} {own}, those of {names[0]} {firsts}; an ensemble prepares a photo once"
            for key, own, firsts in of_both
            if own != firsts
        ]
    if mistakes:
        raise CheckpointError(*mistakes)


def _open(photo: Any, smallest_side: int) -> Image.Image:
    if isinstance(photo, str | Path):
        return open_photo({"path": str(photo), "bytes": None}, smallest_side)
    if isinstance(photo, Tensor):
        photo = photo.cpu().numpy()
    if isinstance(photo, Image.Image):
        return upright_rgb(photo)
    try:
        return upright_rgb(Image.fromarray(photo))
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise UsageError(
            f"image: {type(photo).__name__} is no photo ({error}); give a path, a PIL image or uint8 (height, width, 3)"
        ) from None


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Replace folders by the photos in them, sorted by name.

    Raises:
        DataError: for a path that does not exist or a folder without photos.
    """
    photos: list[Path] = []
    mistakes = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
            photos += found
            if not found:
                mistakes.append(f"{path}: no photos in this folder ({', '.join(PHOTO_SUFFIXES)})")
        elif path.exists():
            photos.append(path)
        else:
            mistakes.append(f"{path}: no such photo")
    if mistakes:
        raise DataError(*mistakes)
    return photos
