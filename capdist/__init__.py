"""Train, evaluate and use image captioners.

>>> from capdist import Captioner
>>> Captioner.from_pretrained("runs/scenes/model").caption(["photo.jpg"], beam_size=3)
"""

from typing import TYPE_CHECKING, Any

from capdist.version import __version__

if TYPE_CHECKING:
    from capdist.inference.captioner import Caption, Captioner

__all__ = ["Caption", "Captioner", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import capdist` and `capdist --help` do not load torch.
    if name in ("Caption", "Captioner"):
        from capdist.inference import captioner

        return getattr(captioner, name)
    raise AttributeError(f"module 'capdist' has no attribute {name!r}")
