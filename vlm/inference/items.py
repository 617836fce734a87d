"""What is classified: anything that can be opened as an image, by name, one after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from PIL import Image

from vlm.data import open_image


class Item(NamedTuple):
    """An image that is opened when it is its turn.

    name: the path of its row, and what messages call it; open: gives the image, RGB and loaded, or raises
    UnreadableImage, and is called in a thread; more: further keys of its row, such as its label; exact: a class whose
    score is to be exact, None if none has to be.
    """

    name: str
    open: Callable[[], Image.Image]
    more: Mapping[str, Any] = MappingProxyType({})
    exact: int | None = None


class Items(Protocol):
    """What is classified, in order; can be gone through again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Files:
    """Image files by their paths."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Item]:
        return (Item(path, partial(open_image, path)) for path in self.paths)
