"""Train, evaluate and use image captioners.

>>> from capdist import Captioner
>>> Captioner.from_pretrained("runs/scenes/model").caption(["photo.jpg"], beam_size=3)
"""

from typing import TYPE_CHECKING, Any

from capdist.version import __version__

if TYPE_CHECKING:
    from capdist.inference.captioner import Captioner
    from capdist.inference.writing import Caption

__all__ = ["Caption", "Captioner", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import capdist` and `capdist --help` do not load torch.
    if name == "Captioner":
        from capdist.inference.captioner import Captioner

        return Captioner
    if name == "Caption":
        from capdist.inference.writing import Caption

        return Caption
    raise AttributeError(f"module 'capdist' has no attribute {name!r}")
