"""The cache of one model's features: what is in its shards (shards.py), and what waits to be written into one.

What does not fit is not kept: `encode` (encoding.py) gives features of the images that have some, and pixels of the
others.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from vlm.common import WriteError, cache_folder, note, reason, remove
from vlm.data import Sample
from vlm.families.base import Family
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages, besides_pixels
from vlm.families.features.fingerprint import fingerprint
from vlm.families.features.room import Room, make_room
from vlm.families.features.shards import SHARD_BYTES, SHARD_IMAGES, Entry, Index, write_shards
from vlm.families.pooling import Listening, NoVectors

TOKEN_IDS, VECTORS = "token_ids", "vectors"
SECONDS_AT_RISK = 60.0  # of computing that a killed run loses at most, if a shard takes longer to become full


def cache_root() -> Path:
    """The folder of all features."""
    return cache_folder() / "features"


class FeatureCache:
    """Features of one model's images. Can be pickled, for the processes of a loader.

    Args:
        connected: features after the connector, else before it.
        halved: float32 features are kept as float16, half the size. They come back as float32, with a relative
            difference of at most 2^-11. An image with a feature that float16 cannot hold is kept as it is.
        limit_gb: the largest size of all that is kept, in 10^9 bytes.
    """

    def __init__(self, family: Family, connected: bool, halved: bool, limit_gb: float):
        self.connected = connected
        self.halved = halved
        self.folder = cache_root() / fingerprint(family, connected, halved)
        self.limit_gb = limit_gb
        self.room = 0.0  # bytes that may be kept before all files are looked at again
        self.full = False  # nothing more is kept
        self._index = Index(self.folder)
        self._waiting: dict[str, Entry] = {}  # computed, and not yet in a shard
        self._waiting_bytes = 0
        self._since = 0.0  # when the first of them came
        self._said_damaged = False
        self._delete_damaged()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept yet."""
        return not self._waiting and not len(self._index)

    def fits(self, family: Family) -> bool:
        """Whether the features are those of this model too."""
        return fingerprint(family, self.connected, self.halved) == self.folder.name

    # Reading

    def use(self, key: str) -> bool:
        """Whether the features of an image are there. Marks them as used, so that they stay for a day."""
        return key in self._waiting or key in self._index

    def entry(self, key: str) -> Entry | None:
        """Features, vectors, inputs other than pixels and token ids of an image; None if it has no whole ones."""
        entry = self._waiting.get(key) or self._index.entry(key)
        self._delete_damaged()
        if entry is None or not self.halved:
            return entry
        return entry | {self.name: entry[self.name].float()}

    def _delete_damaged(self) -> None:
        """Delete damaged shards, so that their features are computed again. Of many, the first is named."""
        for file in self._index.damaged:
            if not self._said_damaged:
                note(f"{file} is damaged: it is deleted, and the vision features in it are computed again.")
            self._said_damaged = True
            with suppress(OSError):
                remove(file)
        self._index.damaged.clear()

    # Writing

    def add(self, family: Family, images: dict[str, EncodedImages]) -> bool:
        """Compute the features of some images together, and keep those that fit. `flush` writes the last of them.

        Args:
            family: in evaluation mode.
            images: each encoded by itself, by its key.

        Returns:
            False if one of them does not fit, or cannot be written. Nothing more is kept from then on.
        """
        return self.keep(self.compute(family, images)) if images and not self.full else not self.full

    @torch.no_grad()
    def compute(self, family: Family, images: dict[str, EncodedImages]) -> dict[str, Entry]:
        """The entry of each image: features, vectors (pooling.py), inputs other than pixels, and the image's tokens."""
        features, vectors = _features_and_vectors(family, list(images.values()), self.connected)
        entries = {}
        for (key, one), tensor, vector in zip(images.items(), features, vectors, strict=True):
            half = tensor.half() if self.halved else tensor
            own = {self.name: half if half.isfinite().all() else tensor}
            ids = {TOKEN_IDS: torch.tensor(one.token_ids[0], dtype=torch.int32)}
            entry = besides_pixels(one.inputs) | own | ids | ({} if vector is None else {VECTORS: vector.half()})
            # a copy of its own, because features of one pass share their memory
            entries[key] = {name: kept.detach().cpu().contiguous().clone() for name, kept in entry.items()}
        return entries

    def keep(self, entries: dict[str, Entry]) -> bool:
        """Keep computed features; see `add`."""
        for key, entry in entries.items():
            size = nbytes(entry)
            if size > self.room and not self.full and self.plan(size) and size > self.room:
                note(f"--cache-size {self.limit_gb:g} is reached: other vision features are computed each time.")
                self.full = True
            if self.full:
                break
            self.room -= size
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting[key] = entry
            self._waiting_bytes += size
            enough = self._waiting_bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_IMAGES
            if enough or time.monotonic() - self._since >= SECONDS_AT_RISK:
                self.flush()
        return not self.full

    def plan(self, wanted: float) -> Room | None:
        """Make room for so many more bytes, as far as that is possible; None if the folder cannot be used."""
        try:
            room = make_room(self.folder, wanted + self._waiting_bytes, self.limit_gb)
        except OSError as error:
            self._give_up(error)
            return None
        self.room = room.free - self._waiting_bytes
        return room

    def flush(self) -> None:
        """Write what waits. If that fails, a note says so, and nothing more is kept."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        try:
            for file, keys in write_shards(self.folder, waiting):
                self._index.add(file, keys)
        except (OSError, WriteError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        note(f"vision features cannot be kept in {self.folder} ({reason(error)}): others are computed each time.")
        self.full = True

    def add_missing(self, family: Family, samples: Iterable[Sample]) -> bool:
        """`add` the features that are missing of a few samples."""
        if self.full:
            return False
        missing = {sample.key: sample for sample in samples if not self.use(sample.key)}
        return self.add(family, {key: family.encode_samples([sample]) for key, sample in missing.items()})

    @property
    def name(self) -> str:
        """What the features are called among the inputs of images."""
        return CONNECTED_FEATURES if self.connected else ENCODER_FEATURES


def _features_and_vectors(
    family: Family, images: list[EncodedImages], connected: bool
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """The features of each image and, from the same pass, its vectors, (L, S, W); None where there are none."""
    none = [None] * len(images)
    try:
        listening = Listening(family)
    except NoVectors:
        return family.features_of_each(images, connected), none
    with listening:
        features = family.features_of_each(images, connected)
    try:
        return features, list(listening.vectors([len(one.inputs["pixel_values"]) for one in images]))
    except NoVectors:
        return features, none


def nbytes(entry: Entry) -> int:
    """The size of an entry in bytes."""
    return sum(tensor.nbytes for tensor in entry.values())


def open_cache(family: Family, connected: bool, cache_dtype: str, limit_gb: float) -> FeatureCache | None:
    """The cache for a model; None if its features cannot be told apart by image.

    Args:
        cache_dtype: float32 keeps features as they are computed, float16 halves those of a model in float32.
    """
    if not family.can_cache:
        return None
    computed = next(family.vision.parameters()).dtype
    return FeatureCache(family, connected, cache_dtype == "float16" and computed == torch.float32, limit_gb)
