"""Filling the cache before a run: the images of its splits that have no features yet."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vlm.common import Bar, evaluation_mode, note
from vlm.data import Sample, Split
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages
from vlm.families.features.cache import FeatureCache, nbytes, open_cache
from vlm.families.features.room import Room
from vlm.families.features.shards import Entry

# A batch for the vision encoder: 32 small images, or eight of 512 x 512.
IMAGES_AT_ONCE, VALUES_AT_ONCE = 32, 8 * 3 * 512 * 512
TRIED = 4  # images that tell how large the features of all are


def fill_cache(
    family: Family, splits: Iterable[Split], limit_gb: float, cache_dtype: str = "float32", workers: int = 0
) -> FeatureCache | None:
    """Compute the features that are missing for the images of some splits, in batches, with a progress bar.

    Afterwards the splits know the key of each of their images. If all features are there, no image is opened again.

    Args:
        limit_gb, cache_dtype: see `open_cache`.
        workers: processes that prepare the images.

    Returns:
        the cache with the features that fit; None if there are none, because the vision encoder is trained, the family
        cannot cache, or the disk cannot be written.
    """
    if _is_trained(family.vision):
        return None
    cache = open_cache(family, not _is_trained(family.connector), cache_dtype, limit_gb)
    if cache is None:
        return None
    missing = _missing(splits, cache)
    if len(missing):
        with evaluation_mode(family.model):
            _fill(family, cache, missing, workers)
    return None if cache.is_empty else cache


def _fill(family: Family, cache: FeatureCache, missing: "_Places", workers: int) -> None:
    """Compute and keep the features of as many images as fit. A few of them tell first how large all are."""
    tried = sorted({i * len(missing) // TRIED for i in range(TRIED)})
    first: dict[str, Entry] = {}
    for images in _batches(family, missing.take(tried), workers=0):
        first |= cache.compute(family, images)
    each = sum(map(nbytes, first.values())) / len(first)
    room = cache.plan(each * len(missing))
    if room is None:
        return
    fit = min(len(missing), int(room.free / each))
    _say_size(cache, room, each, len(missing), fit)
    others = missing.take([i for i in range(len(missing)) if i not in tried][: max(0, fit - len(tried))])
    with Bar(fit, "vision features") as bar:
        kept = cache.keep(dict(islice(first.items(), fit)))
        bar.update(min(fit, len(first)))
        for images in _batches(family, others, workers) if kept else ():
            if not cache.add(family, images):
                break
            bar.update(len(images))
        cache.flush()


def _say_size(cache: FeatureCache, room: Room, each: float, count: int, fit: int) -> None:
    """Say how large the features of `count` images are, and what to do if only `fit` of them fit."""
    size = each * count
    note(f"vision features to compute: {count:,} images, {_size_text(size)}.")
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


def _size_text(size: float) -> str:
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"


def _missing(splits: Iterable[Split], cache: FeatureCache) -> "_Places":
    """Where the images are whose features are missing, each different image once. Tells the splits all keys."""
    missing: dict[str, tuple[Split, int]] = {}
    for split in splits:
        for i in range(len(split)):
            split.keys[i] = key = split[i].key
            if key not in missing and not cache.use(key):
                missing[key] = split, i
    return _Places(list(missing.values()))


def _is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


@dataclass
class _Places(Dataset[Sample]):
    """Samples by their places in splits. Each is made again when it is read, because a sample keeps its image."""

    places: list[tuple[Split, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Sample:
        split, position = self.places[i]
        return split[position]

    def take(self, chosen: Sequence[int]) -> "_Places":
        """Some of them."""
        return _Places([self.places[i] for i in chosen])


class _Encode:
    """Sample -> key and encoded image. Can be pickled."""

    def __init__(self, family: Family):
        self.family = family.without_weights()

    def __call__(self, sample: Sample) -> tuple[str, EncodedImages]:
        return sample.key, self.family.encode_samples([sample])


def _batches(family: Family, samples: _Places, workers: int) -> Iterator[dict[str, EncodedImages]]:
    """Encoded images by key, as many together as the vision encoder takes at once."""
    encode: Any = _Encode(family)  # of one sample, as there are no batches
    loader = DataLoader(samples, batch_size=None, collate_fn=encode, num_workers=workers, generator=torch.Generator())
    batch: dict[str, EncodedImages] = {}
    values = 0
    for key, encoded in loader:
        size = encoded.inputs["pixel_values"].numel()
        if batch and (len(batch) == IMAGES_AT_ONCE or values + size > VALUES_AT_ONCE):
            yield batch
            batch, values = {}, 0
        batch[key] = encoded
        values += size
    if batch:
        yield batch
