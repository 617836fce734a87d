"""Shards: safetensors files with the features of many images each, and the index of what is in them.

A shard is written whole or not at all and never changed, so runs that share a folder need no lock. All values of a name
are one after the other in one tensor, and a shard's own tensors say whose they are and what shape they have. So a shard
with thousands of images has a handful of tensors and is opened in less than a millisecond.

N = images of a shard.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.common import replacing

Entry = dict[str, Tensor]

SHARD_BYTES, SHARD_IMAGES = 64e6, 4096  # a shard is written when it has one of them
OPEN_SHARDS = 16  # mapped into memory at a time
HOUR = 3600.0
# Of an image in the index: both halves of its digest, the number of its file, and its position in there.
_ROW = np.dtype([("first", np.uint64), ("second", np.uint64), ("file", np.uint32), ("position", np.uint32)])
KEYS, CHECKSUMS, VALUES, SHAPES = "keys", "checksums", "values.", "shapes."


class DamagedShard(Exception):
    """A shard, or an entry of it, is not as it was written."""


def write_shards(folder: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[Path, list[str]]]:
    """Write the entries of some images, by their keys: in one file if all have the same names and number formats.

    Yields:
        each new file, and the keys in it, in their order.

    Raises:
        OSError, WriteError: the folder cannot be written, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for _, group in groupby(sorted(entries, key=lambda key: _kind(entries[key])), lambda key: _kind(entries[key])):
        keys = list(group)
        file = folder / f"{uuid4().hex}.safetensors"
        with replacing(file, durable=False) as new:
            save_file(_packed(keys, [entries[key] for key in keys]), new)
        yield file, keys


def _kind(entry: Entry) -> str:
    """What the entries of a shard have in common."""
    return str([(name, tensor.dtype, tensor.dim()) for name, tensor in sorted(entry.items())])


def _packed(keys: list[str], entries: list[Entry]) -> dict[str, Tensor]:
    """The tensors of a shard."""
    digests = [_digest(key) for key in keys]
    packed = {
        KEYS: torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16).copy()),  # (N, 16)
        CHECKSUMS: torch.tensor([_checksum(*both) for both in zip(digests, entries, strict=True)]),  # (N,)
    }
    for name in entries[0]:
        packed[VALUES + name] = torch.cat([entry[name].flatten() for entry in entries])  # (values of all N,)
        packed[SHAPES + name] = torch.tensor([entry[name].shape for entry in entries], dtype=torch.int64)  # (N, axes)
    return packed


def _digest(key: str) -> bytes:
    """16 bytes for a key of any length."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _checksum(digest: bytes, entry: Entry) -> int:
    """The CRC-32 of whose entry it is, and of names, number formats, shapes and values."""
    value = zlib.crc32(digest)
    for name, tensor in sorted(entry.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return value


class Shard:
    """A shard that is mapped into memory: nothing is copied, and no file stays open.

    Raises:
        DamagedShard: it is cut short, or its parts do not fit together.
    """

    def __init__(self, file: Path) -> None:
        tensors = _read(file)
        try:
            self.keys, self.checksums = tensors.pop(KEYS).numpy(), tensors.pop(CHECKSUMS).numpy()
            self.values = {name[len(VALUES) :]: tensors[name] for name in tensors if name.startswith(VALUES)}
            self.shapes = {name: tensors[SHAPES + name].numpy() for name in self.values}
            # of each image: where its values end
            self.ends = {name: shapes.prod(1).cumsum() for name, shapes in self.shapes.items()}
            counts = [len(self.checksums), *map(len, self.ends.values())]
            whole = self.keys.shape[1:] == (16,) and {*counts} == {len(self.keys)} != {0} and self.values
            if not whole or any(len(self.values[name]) != ends[-1] for name, ends in self.ends.items()):
                raise DamagedShard(file)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DamagedShard(file) from error

    def entry(self, position: int) -> Entry:
        """The entry of an image, as views of the file."""
        entry = {}
        try:
            for name, values in self.values.items():
                ends = self.ends[name]
                start = ends[position - 1] if position else 0
                entry[name] = values[start : ends[position]].view(self.shapes[name][position].tolist())
        except RuntimeError as error:  # a shape that does not fit the values
            raise DamagedShard from error
        if _checksum(self.keys[position].tobytes(), entry) != int(self.checksums[position]):
            raise DamagedShard
        return entry


def _read(file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file, mapped into memory; all of them if no names are given.

    Raises:
        FileNotFoundError, PermissionError: there is none, or it may not be read.
        DamagedShard: it is cut short, is a folder, or lacks one of the names.
    """
    try:
        with safe_open(file, "pt") as content:
            present = content.keys()
            return {name: content.get_tensor(name) for name in (present if names is None else names)}
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, SafetensorError) as error:
        raise DamagedShard(file) from error


open_shard = lru_cache(OPEN_SHARDS)(Shard)


class Index:
    """Which image is where in the shards of a folder. 32 bytes an image; can be pickled.

    Args:
        folder: need not exist.

    Attributes:
        damaged: shards that were found damaged. Nothing is found in them.
    """

    def __init__(self, folder: Path) -> None:
        self.damaged: list[Path] = []
        self._files: list[Path] = []
        self._gone: set[int] = set()  # numbers of files that are damaged or deleted
        self._touched: dict[int, float] = {}
        self._new: list[np.ndarray] = []  # rows that are not sorted in yet
        self._rows = np.empty(0, _ROW)  # of all images, sorted by the first half of their digests
        self._firsts = self._rows["first"]
        for file in sorted(folder.glob("*.safetensors")):
            with suppress(FileNotFoundError, PermissionError):  # another run's, or another user's
                try:
                    self._add(file, _read(file, [KEYS])[KEYS].numpy())
                except (DamagedShard, ValueError):
                    self.damaged.append(file)

    def add(self, file: Path, keys: Iterable[str]) -> None:
        """Take in a shard with the images of these keys, in this order."""
        self._add(file, np.frombuffer(b"".join(map(_digest, keys)), np.uint8).reshape(-1, 16))

    def _add(self, file: Path, digests: np.ndarray) -> None:
        """Take in a shard by the digests of its keys, (N, 16) uint8."""
        halves = np.ascontiguousarray(digests).view(np.uint64)  # (N, 16) bytes -> (N, 2)
        rows = np.empty(len(halves), _ROW)
        rows["first"], rows["second"] = halves[:, 0], halves[:, 1]
        rows["file"], rows["position"] = len(self._files), np.arange(len(halves))
        self._files.append(file)
        self._new.append(rows)

    def __len__(self) -> int:
        """Entries of all shards; one image has two if two runs computed it at the same time."""
        return len(self._rows) + sum(map(len, self._new))

    def __contains__(self, key: str) -> bool:
        """Whether an image has an entry. Its shard is marked as used, so that it stays for a day."""
        return self._find(key) is not None

    def entry(self, key: str) -> Entry | None:
        """The entry of an image, None if it has none that is whole."""
        while place := self._find(key):
            number, position = place
            try:
                return open_shard(self._files[number]).entry(position)
            except (FileNotFoundError, PermissionError):
                self._gone.add(number)
            except DamagedShard:
                self._gone.add(number)
                self.damaged.append(self._files[number])
        return None

    def _find(self, key: str) -> tuple[int, int] | None:
        """The number of the file and the position in it."""
        if self._new:
            rows = np.concatenate([self._rows, *self._new])
            self._rows, self._new = rows[rows["first"].argsort(kind="stable")], []
            self._firsts = self._rows["first"].copy()  # without gaps, or each search would copy it
        first, second = np.frombuffer(_digest(key), np.uint64)
        for i in range(int(self._firsts.searchsorted(first)), len(self._rows)):
            found, other_half, number, position = self._rows[i].item()
            if found != first:
                break
            if other_half == second and number not in self._gone:
                self._touch(number)
                return number, position
        return None

    def _touch(self, number: int) -> None:
        """Mark a shard as used, at most once an hour."""
        now = time.time()
        if now - self._touched.get(number, 0) > HOUR:
            self._touched[number] = now
            with suppress(FileNotFoundError, PermissionError):  # gone, or another user's
                os.utime(self._files[number])
