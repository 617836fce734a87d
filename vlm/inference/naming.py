"""What the results of images are called: files by their path, and images without one by their place in the list."""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from vlm.data import ImageSource


def named_images(images: Iterable[ImageSource]) -> Iterator[tuple[str, ImageSource]]:
    """Name images of any kind: a path by its text, everything else by its place from 0, such as `image 3`.

    A path that is named twice comes once. Other objects are never compared, so the same one twice comes twice.

    Args:
        images: paths, PIL images, arrays and bytes in any mixture, also a (N, H, W) or (N, H, W, channels) array.

    Yields:
        Name and image, in the order given.

    Raises:
        TypeError: it is one image and not several.
        ValueError: a path has the name of an image without a path.
    """
    if (kind := _kind_of_one(images)) is not None:
        raise TypeError(f"this is {kind}: pass a list of images, or use predict_single_image.")
    return _named(images)


def _named(images: Iterable[ImageSource]) -> Iterator[tuple[str, ImageSource]]:
    paths: set[str] = set()
    others: set[str] = set()
    for place, image in enumerate(images):
        is_path = isinstance(image, str | os.PathLike)
        name = str(image) if is_path else f"image {place}"
        if name in (others if is_path else paths):
            raise ValueError(f"there is a file called {name}, and an image without a path of this name: write ./{name}")
        if name not in paths:
            (paths if is_path else others).add(name)
            yield name, image


def _kind_of_one(images: object) -> str | None:
    """What is given instead of several images; None if it is several."""
    if isinstance(images, str | os.PathLike):
        return f"one path ({images})"
    if isinstance(images, bytes | bytearray | memoryview | Image.Image):
        return f"one image ({type(images).__name__})"
    if isinstance(images, np.ndarray) and (images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))):
        return f"one image (an array of shape {images.shape})"
    return None
