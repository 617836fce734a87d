"""Filling the cache before a run: the images of its splits that have no features yet."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vlm.common import Bar, RunError, evaluation_mode, note, size_text
from vlm.data import Found, KnownImages, Sample, Split, UnreadableImage, note_unreadable
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages
from vlm.families.features.cache import FeatureCache, nbytes, open_cache
from vlm.families.features.room import Room
from vlm.families.features.shards import Entry

# A batch for the vision encoder: 32 small images, or eight of 512 x 512.
IMAGES_AT_ONCE, VALUES_AT_ONCE = 32, 8 * 3 * 512 * 512
MOST_REMEMBERED = 10_000  # images of which is remembered whether they have features, while a table is gone through
TRIED = 4  # images that tell how large the features of all are


def fill_cache(
    family: Family,
    splits: Iterable[Split],
    limit_gb: float,
    cache_dtype: str = "float32",
    workers: int = 0,
    known: KnownImages | None = None,
    check: Callable[[], None] = lambda: None,
) -> FeatureCache | None:
    """Compute the features that are missing for the images of some splits, in batches, with a progress bar.

    Afterwards the splits know the key of each image that has features, and which images cannot be read. If all features
    are there, no image is opened again.

    Args:
        limit_gb, cache_dtype: see `open_cache`.
        workers: processes that prepare the images.
        known: what earlier runs found about images that this one did not decode yet; what is found now is added.
        check: called before each batch; what it raises is raised here, when the features so far are kept.

    Returns:
        the cache with the features that fit; None if there are none, because the vision encoder is trained, the family
        cannot cache, or the disk cannot be written.
    """
    if _is_trained(family.vision):
        return None
    cache = open_cache(family, not _is_trained(family.connector), cache_dtype, limit_gb)
    if cache is None:
        return None
    missing = _missing(splits, cache, known)
    if len(missing):
        with evaluation_mode(family.model):
            try:
                _fill(family, cache, missing, workers, known, check)
            finally:
                if known:
                    known.save()
    return None if cache.is_empty else cache


def _fill(
    family: Family,
    cache: FeatureCache,
    missing: "_Places",
    workers: int,
    known: KnownImages | None,
    check: Callable[[], None],
) -> None:
    """Compute and keep the features of as many images as fit. A few of them tell first how large all are."""
    tried = sorted({i * len(missing) // TRIED for i in range(TRIED)})
    first: dict[str, Entry] = {}
    for images, _ in _batches(family, cache, missing.take(tried), 0, known):
        first |= cache.compute(family, images) if images else {}
    fit = len(missing)
    if first:  # else they cannot be read, or are there already under another name
        each = sum(map(nbytes, first.values())) / len(first)
        room = cache.plan(each * len(missing))
        if room is None:
            return
        fit = min(fit, int(room.free / each))
        _say_size(cache, room, each, len(missing), fit)
    others = missing.take([i for i in range(len(missing)) if i not in tried][: max(0, fit - len(tried))])
    with Bar(fit, "vision features") as bar:
        kept = cache.keep(dict(islice(first.items(), fit)))
        bar.update(min(fit, len(tried)))
        try:
            for images, count in _batches(family, cache, others, workers, known) if kept else ():
                check()
                if images and not cache.add(family, images):
                    break
                bar.update(count)
        finally:
            cache.flush()


def _say_size(cache: FeatureCache, room: Room, each: float, count: int, fit: int) -> None:
    """Say how large the features of `count` images are, and what to do if only `fit` of them fit."""
    size = each * count
    note(f"vision features to compute: {count:,} images, {size_text(size)}.")
    if fit == count:
        return
    if room.disk_gb is not None:
        where = f"on the disk, which has {room.disk_gb:.1f} GB free ({cache.folder.parent})"
        cure = "Make room there, or set VLM_CACHE to a folder on another disk"
    else:
        where, cure = f"into --cache-size {cache.limit_gb:g}", f"--cache-size {room.all_gb} has room for all"
    smaller = "" if cache.halved else "--cache-dtype float16, "
    smaller += "a smaller --image-size" + ("" if cache.connected else ", --freeze-connector")
    note(f"{fit:,} of them fit {where}; the others are computed each time. {cure}. What makes them smaller: {smaller}.")


def _missing(splits: Iterable[Split], cache: FeatureCache, known: KnownImages | None) -> "_Places":
    """Where the images are whose features are missing, or whose keys are not known yet, each different image once.

    Tells the splits the keys that are known. Images are decoded here only if they are in memory already.
    """
    places = _Places(list(splits), [])
    missing: dict[str | bytes, array[int]] = {}
    # A table may name a file many times.
    is_there = lru_cache(MOST_REMEMBERED)(cache.use)
    find = lru_cache(MOST_REMEMBERED)(known.find) if known else lambda stamp: None
    for start, split in zip(places.starts, places.splits, strict=True):
        for i, check in enumerate(split.checks):
            if check and check.fault:
                continue
            name = _key_or_stamp(split, i, find)
            if isinstance(name, str):
                split.keys[i] = name
            if name is not None and (name in missing or isinstance(name, bytes) or not is_there(name)):
                missing.setdefault(name, array("q")).append(start + i)
    places.images = list(missing.values())
    return places


def _key_or_stamp(split: Split, i: int, find: Callable[[bytes], Found | None]) -> str | bytes | None:
    """The key of an image; its stamp, if it was never decoded; None if it cannot be read or kept."""
    if (key := split.keys[i] or (split[i].known_key if split.drawn else None)) or split.drawn:
        return key  # of a view it is None if its image did not fit, and so neither does the view
    stamp = split.stamp(i)
    if stamp is not None:
        found = find(stamp)
        return found.key if found else stamp
    try:
        return split[i].key
    except UnreadableImage as error:
        split.leave_out(i, str(error))
        return None


def _is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


@dataclass
class _Places(Dataset[Sample]):
    """Different images in splits. A sample is made again when it is read, as it keeps its image.

    Attributes:
        images: the places of each image, as numbers that count through all splits.
        unreadable: how many turned out to be.
    """

    splits: list[Split]
    images: "list[array[int]]"
    unreadable: int = 0

    @property
    def starts(self) -> list[int]:
        """The number of the first place of each split."""
        return list(accumulate(map(len, self.splits[:-1]), initial=0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        split, position = next(self._places(i))
        return split[position]

    def _places(self, i: int) -> Iterator[tuple[Split, int]]:
        """The splits with an image, and its positions there."""
        starts = self.starts
        for place in self.images[i]:
            number = bisect_right(starts, place) - 1
            yield self.splits[number], place - starts[number]

    def take(self, chosen: Sequence[int]) -> "_Places":
        """Some of them."""
        return _Places(self.splits, [self.images[i] for i in chosen])

    def tell(self, i: int, looked: "_Looked", known: KnownImages | None) -> None:
        """Tell the splits what was found about an image."""
        first, first_position = next(self._places(i))
        if looked.fault is not None:
            note_unreadable(looked.fault, self.unreadable)
            self.unreadable += 1
            why = looked.fault.removeprefix(f"{first[first_position].name}: ")
            for split, position in self._places(i):
                split.leave_out(position, f"{split[position].name}: {why}")
        if looked.found is not None:
            for split, position in self._places(i):
                split.keys[position] = looked.found.key
            if known and (stamp := first.stamp(first_position)):
                known.add(stamp, looked.found)
                known.save_sometimes()


class _Looked(NamedTuple):
    """What preparing an image came to.

    key: of the image; encoded: the image as the model takes it, None if the cache has its features; found: what it
    told, if it was decoded for the first time; fault: its name and why it cannot be used.
    """

    key: str = ""
    encoded: EncodedImages | None = None
    found: Found | None = None
    fault: str | None = None


class _Encode:
    """Sample -> `_Looked`. Can be pickled."""

    def __init__(self, family: Family, cache: FeatureCache):
        self.family, self.cache = family.without_weights(), cache

    def __call__(self, sample: Sample) -> _Looked:
        if sample.is_checked:
            return _Looked(sample.key, self.family.encode_samples([sample]))
        try:
            found = Found.of(sample.image)
        except UnreadableImage as error:
            return _Looked(fault=str(error))
        if self.cache.use(found.key):
            return _Looked(found.key, found=found)
        try:
            return _Looked(found.key, self.family.encode_samples([sample]), found)
        except RunError:
            why = self.family.refusal(sample.image)
            if why is None:
                raise
            return _Looked(fault=f"{sample.name}: {why}")


def _batches(
    family: Family, cache: FeatureCache, samples: _Places, workers: int, known: KnownImages | None
) -> Iterator[tuple[dict[str, EncodedImages], int]]:
    """Encoded images by key, as many together as the vision encoder takes at once, and how many images that took."""
    encode: Any = _Encode(family, cache)  # of one sample, as there are no batches
    loader = DataLoader(samples, batch_size=None, collate_fn=encode, num_workers=workers, generator=torch.Generator())
    batch: dict[str, EncodedImages] = {}
    values = count = 0
    for i, looked in enumerate(loader):
        samples.tell(i, looked, known)
        encoded = looked.encoded
        size = 0 if encoded is None else encoded.inputs["pixel_values"].numel()
        if batch and (len(batch) == IMAGES_AT_ONCE or values + size > VALUES_AT_ONCE):
            yield batch, count
            batch, values, count = {}, 0, 0
        count += 1
        if encoded is not None and not cache.use(looked.key):  # an equal image may have come before it
            batch[looked.key] = encoded
            values += size
    if count:
        yield batch, count
