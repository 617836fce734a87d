"""What is classified: anything that can be opened as an image, by name, one after the other."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image


class Item(NamedTuple):
    """An image that is opened when it is its turn.

    name: the path of its row, and what messages call it; open: gives the image, RGB and loaded, or raises
    UnreadableImage, and is called in a thread; more: further keys of its row, such as its label.
    """

    name: str
    open: Callable[[], Image.Image]
    more: Mapping[str, Any] = MappingProxyType({})
