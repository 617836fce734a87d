"""What an image looks like, as a hash of 90 bits: the signs of its lowest frequencies (DCT of 32x32 gray pixels)."""

import numpy as np
from PIL import Image

SIDE = 32  # pixels; an image with a shorter edge has no hash
ENOUGH = 256  # pixels of an edge that are looked at
FREQUENCIES = 13
FAINT = 1.0  # gray levels; a smaller coefficient may come from rounding the pixels to 8 bits
HASH_BYTES = 16

_waves = np.arange(FREQUENCIES)
# (F, SIDE) rows of the DCT-II, scaled so that noise in the pixels is as strong in each coefficient
_DCT = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * _waves[:, None] / (2 * SIDE)).astype(np.float32) / (SIDE / 2) ** 0.5
_DCT[0] /= 2**0.5
_KEPT = np.add.outer(_waves, _waves) < FREQUENCIES  # (F, F) the lowest ones in any direction
_KEPT[0, 0] = False  # the mean, which is the brightness


def perceptual_hash(image: Image.Image) -> bytes | None:
    """What an image looks like, in 16 bytes: images that look alike differ in few bits.

    Args:
        image: RGB, loaded.

    Returns:
        None if the image is too small, or has too little structure: all flat ones would look alike.
    """
    shortest = min(image.size)
    if shortest < SIDE:
        return None
    if shortest >= 2 * ENOUGH:  # every k-th pixel is enough of a large image, and much faster
        image = image.resize((ENOUGH, ENOUGH), Image.Resampling.NEAREST)
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    pixels = np.frombuffer(small.tobytes(), dtype=np.uint8).reshape(SIDE, SIDE).astype(np.float32)
    # (SIDE, SIDE) -> (F, F) -> (90,)
    found = (_DCT @ pixels @ _DCT.T)[_KEPT]
    if np.count_nonzero(np.abs(found) >= FAINT) < found.size / 2:
        return None
    return np.packbits(found > 0).tobytes().ljust(HASH_BYTES, b"\0")
