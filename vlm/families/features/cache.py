"""The cache: one safetensors file for each image, named by the image's content.

Files are mapped into memory, so that reading one copies nothing until a batch is made. A file is written whole or not
at all, so runs that share the cache, or are killed, do it no harm. It carries a checksum, which is compared whenever it
is read; so nothing waits for the disk when it is written.
"""

import os
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.common import WriteError, cache_folder, note, reason, remove, replacing
from vlm.data import Sample
from vlm.families.base import Family
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages, besides_pixels
from vlm.families.features.fingerprint import fingerprint
from vlm.families.features.room import make_room

TOKEN_IDS = "token_ids"
CHECKSUM = "checksum"  # in the metadata of a file
HOUR = 3600.0


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
        self.room = 0.0  # bytes that may be written before all files are looked at again
        self.full = False
        self.damaged = 0  # files that were found damaged

    def fits(self, family: Family) -> bool:
        """Whether the features are those of this model too."""
        return fingerprint(family, self.connected, self.halved) == self.folder.name

    # Reading

    def use(self, key: str) -> bool:
        """Whether the features of an image are there and whole. Marks them as used, so that they stay for a day."""
        return self._read(key) is not None

    def encode(self, keys: Sequence[str]) -> EncodedImages | None:
        """What `Family.encode_images` gives, with features instead of pixels; None if an image has no features here."""
        entries = []
        for key in keys:
            entry = self._read(key)
            if entry is None:
                return None
            entries.append(entry)
        token_ids = [entry.pop(TOKEN_IDS).tolist() for entry in entries]
        inputs = {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
        if self.halved:
            inputs[self._name] = inputs[self._name].float()
        return EncodedImages(inputs, token_ids)

    def _read(self, key: str) -> dict[str, Tensor] | None:
        """The content of a file, or None. A damaged one is deleted, so that it is computed again."""
        file = self._file(key)
        try:
            if time.time() - file.stat().st_mtime > HOUR:
                with suppress(PermissionError):  # another user's
                    os.utime(file)
            with safe_open(file, "pt") as content:
                names = content.keys()
                entry = {name: content.get_tensor(name) for name in names}
                whole = {self._name, TOKEN_IDS} <= entry.keys() and (content.metadata() or {}).get(CHECKSUM)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        except (OSError, SafetensorError):  # cut short, or a folder
            entry, whole = {}, None
        if whole is not None and whole == _checksum(entry):
            return entry
        self._drop(file)
        return None

    def _drop(self, file: Path) -> None:
        """Delete a damaged file. Of many, the first is named."""
        if not self.damaged:
            note(f"{file} is damaged: it is deleted, and the vision features of its image are computed again.")
        self.damaged += 1
        with suppress(OSError):
            remove(file)

    # Writing

    @torch.no_grad()
    def add(self, family: Family, images: dict[str, EncodedImages], to_come: int = 0) -> bool:
        """Compute the features of some images together, and write them.

        Args:
            family: in evaluation mode.
            images: each encoded by itself, by its key.
            to_come: how many more images will follow, for which room is made too.

        Returns:
            False if they cannot be kept. A note says why, and nothing is tried from then on.
        """
        if self.full or not images:
            return not self.full
        entries = self._compute(family, images)
        size = sum(tensor.nbytes for entry in entries.values() for tensor in entry.values())
        try:
            if not self._has_room(size, len(images), to_come):
                return False
            for key, entry in entries.items():
                with replacing(self._file(key), durable=False) as new:
                    save_file(entry, new, {CHECKSUM: _checksum(entry)})
        except (OSError, WriteError) as error:
            note(f"vision features cannot be kept in {self.folder} ({reason(error)}).")
            self.full = True
        self.room -= size
        return not self.full

    def _has_room(self, size: int, count: int, to_come: int) -> bool:
        """Make room for `count` images of `size` bytes together and for those to come; if there is none, say so."""
        wanted = size * (1 + to_come / count)
        if size > self.room:
            self.room = make_room(self.folder, wanted, self.limit_gb)
            self.full = self.room < wanted
        if self.full:
            smaller = "--image-size, --cache-dtype float16" + ("" if self.connected else ", --freeze-connector")
            note(
                f"vision features would take {wanted / 1e9:.1f} GB for {count + to_come} images, more than "
                f"--cache-size {self.limit_gb:g}, so they are not kept. Smaller: a smaller {smaller}."
            )
        return not self.full

    def add_missing(self, family: Family, samples: Iterable[Sample]) -> bool:
        """`add` the features that are missing of a few samples."""
        if self.full:
            return False
        missing = {sample.key: sample for sample in samples if not self.use(sample.key)}
        return self.add(family, {key: family.encode_samples([sample]) for key, sample in missing.items()})

    def _compute(self, family: Family, images: dict[str, EncodedImages]) -> dict[str, dict[str, Tensor]]:
        """The content of each image's file: features, inputs other than pixels, and the image's tokens."""
        features = family.features_of_each(list(images.values()), self.connected)
        entries = {}
        for (key, one), tensor in zip(images.items(), features, strict=True):
            half = tensor.half() if self.halved else tensor
            own = {self._name: half if half.isfinite().all() else tensor, TOKEN_IDS: torch.tensor(one.token_ids[0])}
            entry = besides_pixels(one.inputs) | own
            entries[key] = {name: kept.detach().cpu().contiguous() for name, kept in entry.items()}
        return entries

    @property
    def _name(self) -> str:
        return CONNECTED_FEATURES if self.connected else ENCODER_FEATURES

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _checksum(entry: dict[str, Tensor]) -> str:
    """The CRC-32 of names, number formats, shapes and values."""
    value = 0
    for name, tensor in sorted(entry.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def encode(samples: Sequence[Sample], family: Family, cache: FeatureCache | None = None) -> EncodedImages:
    """The images of some samples as the model takes them: features if the cache has all of them, else pixels."""
    known = cache.encode([sample.key for sample in samples]) if cache else None
    return known or family.encode_samples(samples)


def open_cache(family: Family, connected: bool, cache_dtype: str, limit_gb: float) -> FeatureCache | None:
    """The cache for a model; None if its features cannot be told apart by image.

    Args:
        cache_dtype: float32 keeps features as they are computed, float16 halves those of a model in float32.
    """
    if not family.can_cache:
        return None
    computed = next(family.vision.parameters()).dtype
    return FeatureCache(family, connected, cache_dtype == "float16" and computed == torch.float32, limit_gb)
