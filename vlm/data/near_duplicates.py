"""Images that look almost like one in another split, such as a photograph that was saved again or cut at its edges.

Two images are near-duplicates if at most `FARTHEST` bits of their hashes differ (looks.py). They are pointed out;
nothing is removed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vlm.common import with_bar
from vlm.data.splits import LEAKS, NearPair, Split

FARTHEST = 12  # bits: half of the least distance of two different tiles of planets, see docs/data.md


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
