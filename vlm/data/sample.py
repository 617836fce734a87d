"""A labeled image."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from vlm.data.images import image_key


@dataclass
class Sample:
    """One labeled image, read and decoded only when `image` is asked for.

    source: an RGB image that is loaded, or a function that opens it; label: index into the class names;
    name: what messages call it; reasoning: a text about it; known_key: its `key`, if known.
    """

    source: Image.Image | Callable[[], Image.Image]
    label: int
    name: str
    reasoning: str | None = None
    known_key: str | None = None

    @property
    def image(self) -> Image.Image:
        """RGB, loaded. Raises UnreadableImage if it cannot be decoded."""
        # Not a cached_property: in Python 3.11 it has one lock for all samples, and threads would decode in turn.
        if callable(self.source):
            self.source = self.source()
        return self.source

    @property
    def key(self) -> str:
        """The `image_key`; the image is opened only if its key is not known."""
        if self.known_key is None:
            self.known_key = image_key(self.image)
        return self.known_key
