"""Images that look almost like one in another split, such as a photograph that was saved again or cut at its edges.

An image becomes a hash of 90 bits: the signs of its lowest frequencies (DCT of 32x32 gray pixels). Two images are
near-duplicates if at most `FARTHEST` of their bits differ. They are pointed out; nothing is removed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from vlm.common import with_bar
from vlm.data.splits import LEAKS, NearPair, Split

FARTHEST = 12  # bits: half of the least distance of two different tiles of planets, see docs/data.md
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


def find_near(splits: Mapping[str, Split]) -> list[NearPair]:
    """The images of test and validation that look almost like one in another split, the nearest first of each kind.

    Equal images are not among them. Every pair is compared, so none is missed: some 400 million pairs a second.
    """
    return [pair for role, other in LEAKS for pair in _near(splits, role, other)]


def _near(splits: Mapping[str, Split], role: str, other: str) -> list[NearPair]:
    known = set(splits[other].keys) - {None}
    asked = _positions_by_hash(splits[role], [key not in known for key in splits[role].keys])
    there = _positions_by_hash(splits[other], [True] * len(splits[other]))
    if not asked or not there:
        return []
    first = [positions[0] for positions in there.values()]
    # (N, 2) -> (N,), (N,): a hash is two numbers; most pairs are too far apart in the first one already
    lows, highs = np.frombuffer(b"".join(there), dtype=np.uint64).reshape(-1, 2).T.copy()
    found = []
    for look, positions in with_bar(asked.items(), len(asked), f"looking for images of {role} in {other}"):
        low, high = np.frombuffer(look, dtype=np.uint64)
        close = np.flatnonzero(np.bitwise_count(lows ^ low) <= FARTHEST)
        distances = np.bitwise_count(lows[close] ^ low) + np.bitwise_count(highs[close] ^ high)
        if close.size and (distance := int(distances.min())) <= FARTHEST:
            nearest = first[close[distances.argmin()]]
            found += [NearPair(role, i, other, nearest, distance) for i in positions]
    return sorted(found, key=lambda pair: (pair.distance, pair.position))


def _positions_by_hash(split: Split, counts: Sequence[bool]) -> dict[bytes, list[int]]:
    """The images of a split that count and have a hash; equal hashes are compared once."""
    found: dict[bytes, list[int]] = {}
    for i, check in enumerate(split.checks):
        if counts[i] and check and check.look:
            found.setdefault(check.look, []).append(i)
    return found
