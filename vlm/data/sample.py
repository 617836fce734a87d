"""A labeled image."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from vlm.data.images import UnreadableImage, image_key

GRAY, STAND_IN_SIZE = (128, 128, 128), (64, 64)


@dataclass
class Sample:
    """One labeled image, read and decoded only when `image` is asked for.

    source: an RGB image that is loaded, or a function that opens it; label: index into the class names;
    name: what messages call it; reasoning: a text about it; known_key: its `key`, if known;
    fault: its name and why it cannot be read, if that was found before.
    """

    source: Image.Image | Callable[[], Image.Image]
    label: int
    name: str
    reasoning: str | None = None
    known_key: str | None = None
    fault: str | None = None

    @property
    def image(self) -> Image.Image:
        """RGB, loaded. Raises UnreadableImage if it cannot be decoded, or could not before."""
        if self.fault is not None:
            raise UnreadableImage(self.fault)
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

    @property
    def is_checked(self) -> bool:
        """Whether the image is known to be readable: it is loaded, or was decoded before."""
        return self.fault is None and (self.known_key is not None or not callable(self.source))

    def stand_in(self) -> "Sample":
        """A gray image in the place of one that cannot be read. What is computed of it counts nowhere."""
        return replace(self, source=Image.new("RGB", STAND_IN_SIZE, GRAY), known_key=None, fault=None)
