"""What earlier runs found out about the images of a large dataset, so that they are not decoded again.

One file for each dataset, in the folder of the caches. An image is known by a stamp: path, size and times of its file,
or its bytes. A file that was changed has another stamp, and is decoded again. Two files that change places often have
one size and one time of the last change, so number and time of the last renaming belong to the stamp. Images that
cannot be read are not kept.
"""

import hashlib
import os
import struct
import sys
import time
import zlib
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm.common import UsageError, WriteError, cache_folder, note, reason, replacing
from vlm.data.images import UnreadableImage, image_key
from vlm.data.looks import HASH_BYTES, perceptual_hash

WORD = np.uint64
STAMP_BYTES, KEY_BYTES, WORDS = 16, 32, 9  # of a record, which is a stamp and a `Found`
SECONDS_AT_RISK = 60.0  # of decoding that a killed run loses at most
FORMAT = "2"  # to be raised if `image_key` changes, or what an image is decoded to
RECORDS, CHECKSUM = "records", "checksum"


def stamp_of(images: Any, row: int) -> bytes | None:
    """What tells whether the image of a row is the one that was decoded before, in 16 bytes; None if nothing does.

    Args:
        images: what gives the image of a row, see `Images`.
    """
    try:
        source = images[row]
        if isinstance(source, str | Path):
            status = os.stat(source)
            about = (os.path.abspath(source), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            source = os.fsencode("\0".join(map(str, about)))
    except (OSError, ValueError, UsageError, UnreadableImage):
        return None
    if not isinstance(source, bytes | bytearray | memoryview):
        return None
    return hashlib.blake2b(source, digest_size=STAMP_BYTES).digest()


class Found(NamedTuple):
    """What decoding an image tells: its `image_key`, width and height in pixels, and its `perceptual_hash`."""

    key: str
    size: tuple[int, int]
    look: bytes | None

    @classmethod
    def of(cls, image: Image.Image) -> "Found":
        """What an RGB image tells."""
        return cls(image_key(image), image.size, perceptual_hash(image))

    def as_bytes(self) -> bytes:
        """48 + 8 bytes; a hash of zeros stands for none."""
        size = struct.pack("=II", *self.size)
        return bytes.fromhex(self.key) + size + (self.look or bytes(HASH_BYTES))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Found":
        """The opposite of `as_bytes`."""
        width, height = struct.unpack("=II", content[KEY_BYTES : KEY_BYTES + 8])
        look = content[KEY_BYTES + 8 :]
        return cls(content[:KEY_BYTES].hex(), (width, height), look if any(look) else None)


class KnownImages:
    """What was found about images, by their stamps.

    Args:
        dataset: a name that no other dataset on this machine has.
    """

    def __init__(self, dataset: str) -> None:
        name = hashlib.sha256(f"{FORMAT} {dataset}".encode()).hexdigest()[:32]
        self.file = cache_folder() / "images" / f"{name}.safetensors"
        self._new: dict[bytes, Found] = {}
        self._saved = time.monotonic()
        self._take(self._read())

    def _take(self, records: np.ndarray) -> None:
        self._records = records
        self._firsts = np.ascontiguousarray(records[:, 0]).data  # in a memoryview a search is fast

    def find(self, stamp: bytes) -> Found | None:
        """What was found about the image with this stamp, None if it was never decoded."""
        if found := self._new.get(stamp):
            return found
        place = bisect_left(self._firsts, int.from_bytes(stamp[:8], sys.byteorder))
        record = self._records[place].tobytes() if place < len(self._records) else b""
        return Found.from_bytes(record[STAMP_BYTES:]) if record.startswith(stamp) else None

    def add(self, stamp: bytes, found: Found) -> None:
        """Remember what was found about an image. `save` writes it."""
        self._new[stamp] = found

    def save_sometimes(self) -> None:
        """`save`, if that was long ago."""
        if time.monotonic() - self._saved > SECONDS_AT_RISK:
            self.save()

    def save(self) -> None:
        """Write what is new, next to what other runs have written meanwhile. If that is impossible, a note says so."""
        if not self._new:
            return
        content = b"".join(stamp + found.as_bytes() for stamp, found in self._new.items())
        new = np.frombuffer(content, dtype=WORD).reshape(-1, WORDS)
        records = np.concatenate([self._read(), self._records, new])
        self._take(records[np.unique(records[:, 0], return_index=True)[1]])  # sorted by the first word
        self._new.clear()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file, durable=False) as temporary:
                save_file({RECORDS: self._records}, temporary, {CHECKSUM: _checksum(self._records)})
        except (OSError, WriteError) as error:
            note(f"{self.file} cannot be written ({reason(error)}), so the next run decodes the images again.")
        self._saved = time.monotonic()

    def _read(self) -> np.ndarray:
        """(N, 9) words: two of a stamp, by the first of which they are sorted, and seven of what was found.

        A damaged file is as good as none: the images are decoded again.
        """
        with suppress(OSError, SafetensorError), safe_open(self.file, "np") as content:
            records = content.get_tensor(RECORDS)
            if (content.metadata() or {}).get(CHECKSUM) == _checksum(records):
                return records
        return np.empty((0, WORDS), dtype=WORD)


def _checksum(records: np.ndarray) -> str:
    return f"{zlib.crc32(records.tobytes()):08x}"
