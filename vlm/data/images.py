"""Opens any image as an upright RGB image, or says in one line why it cannot."""

import hashlib
import io
import os
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.common import Worded, printable, reason
from vlm.data.formats import LONGEST_START, readable_formats, what_else

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | Image.Image


# What may have the name of an image. Opening a FIFO would wait for ever.
NO_FILES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableImage(Worded, ValueError):
    """An image that cannot be used. The message is one line: its name and why."""


def open_image(source: ImageSource | None, name: str | None = None) -> Image.Image:
    """Read and decode one image.

    Of an animation the first frame is taken. The EXIF orientation is applied. Transparent parts become white.
    Images with more than 8 bits a channel (16-bit, 32-bit, floating point) have no fixed white point, so they are
    stretched linearly from their own smallest to their own largest value; an image with only one value becomes black.

    Args:
        source: a path, the bytes of a file, a PIL image of any mode (taken at the frame it is at), or an array HxW,
            HxWx1, HxWx3 or HxWx4 (RGBA) of booleans, uint8, floats in 0..1, or wider numbers (stretched as above).
            None, a row without an image, cannot be read.
        name: what to call the image in the error; default: the path.

    Returns:
        An RGB image that is loaded and keeps no file open.

    Raises:
        UnreadableImage: there is no such file, or it is no regular file, not an image in one of the `FORMATS`,
            truncated, damaged, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        return _read(source)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make the decoders raise almost anything
        raise UnreadableImage(printable(f"{name or _name_of(source)}: {reason(error)}")) from error


def image_key(image: Image.Image) -> str:
    """A hash (SHA-256, in hex) of the size and pixels of an RGB image. Equal images have equal keys."""
    content = hashlib.sha256(f"{image.width}x{image.height}".encode())
    content.update(image.tobytes())
    return content.hexdigest()


def _read(source: ImageSource | None) -> Image.Image:
    if source is None:
        raise ValueError("there is no image")
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        _check_size(source.width, source.height)
        return _to_rgb(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source))
    if not isinstance(source, str | os.PathLike):  # a number would be taken for an open file
        raise ValueError(
            f"of the type {type(source).__name__}; expected a path, a PIL image, an array or the bytes of a file"
        )
    if (kind := stat.S_IFMT(os.stat(source).st_mode)) != stat.S_IFREG:
        raise ValueError(f"{NO_FILES.get(kind, 'something else')}, not a file")
    with open(source, "rb") as file:
        return _decode(file)


def _decode(file: BinaryIO) -> Image.Image:
    try:
        opened = Image.open(file, formats=readable_formats())
    except UnidentifiedImageError as error:
        file.seek(0)
        raise ValueError(what_else(file.read(LONGEST_START))) from error
    except Image.DecompressionBombError as error:  # twice as large as what is refused here
        raise ValueError(_too_large("its size")) from error
    with opened as image:
        _check_size(image.width, image.height)
        return _to_rgb(image)


def _check_size(width: int, height: int) -> None:
    """Refuse what decoding or copying would fill the memory with. PIL refuses only what is twice as large."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ValueError(_too_large(f"{width}x{height}"))


def _too_large(size: str) -> str:
    return f"{size} is more than the {Image.MAX_IMAGE_PIXELS:,} pixels that are safe to decode: make it smaller"


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # an image with damaged EXIF data can still be used
        image = image.copy()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_stretch(np.asarray(image)))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    # (H, W, 1) -> (H, W): Pillow has no images of one channel in three dimensions
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"an array of shape {array.shape}; expected HxW, HxWx1, HxWx3 or HxWx4")
    _check_size(array.shape[1], array.shape[0])
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        if array.ndim == 3 and array.shape[2] == 4:
            raise ValueError(f"an array with an alpha channel of {array.dtype}; expected uint8, or floats in 0..1")
        array = _stretch(array)
    return Image.fromarray(np.ascontiguousarray(array))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Numbers of any kind -> uint8, from the smallest finite value (0) to the largest (255)."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("not one of its values is a number")
    low, high = finite.min(), finite.max()
    values = (values - low) * (255 / (high - low) if high > low else 0)
    return np.nan_to_num(values, nan=0, posinf=255, neginf=0).round().astype(np.uint8)


def _name_of(source: ImageSource | None) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"an image given as {type(source).__name__}"
