"""Which images a model was trained on: short digests kept with it, by which a later test knows them again."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from vlm.data.images import image_key

DIGITS = 12  # hexadecimal digits of an image's key that are kept; those of two images are equal by 1 in 10**14
MOST_KEPT = 20_000  # images; of more, nothing is kept


def pack_keys(keys: Sequence[str | None]) -> str | None:
    """The keys of the training images, cut short, as one text; None if they are too many or not all are known."""
    if not 0 < len(keys) <= MOST_KEPT or None in keys:
        return None
    short = sorted({str(key)[:DIGITS] for key in keys})
    return base64.b64encode(bytes.fromhex("".join(short))).decode()


def unpack_keys(text: Any) -> frozenset[str]:
    """The opposite of `pack_keys`; nothing if there is no such text, or if it is damaged."""
    try:
        digits = base64.b64decode(text, validate=True).hex()
    except (TypeError, ValueError, binascii.Error):
        return frozenset()
    return frozenset(digits[i : i + DIGITS] for i in range(0, len(digits), DIGITS))


def short_key(image: Any) -> str:
    """The key of a PIL image as `unpack_keys` has it."""
    return image_key(image)[:DIGITS]
