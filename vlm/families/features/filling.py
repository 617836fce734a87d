"""Filling the cache before a run: the images of its splits that have no features yet."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vlm.common import Bar, evaluation_mode
from vlm.data import Sample, Split
from vlm.families.base import Family
from vlm.families.encoded import EncodedImages
from vlm.families.features.cache import FeatureCache, open_cache

# A batch for the vision encoder: 32 small images, or eight of 512 x 512.
IMAGES_AT_ONCE, VALUES_AT_ONCE = 32, 8 * 3 * 512 * 512


def fill_cache(
    family: Family, splits: Iterable[Split], limit_gb: float, cache_dtype: str = "float32", workers: int = 0
) -> FeatureCache | None:
    """Compute the features that are missing for the images of some splits, in batches, with a progress bar.

    Afterwards the splits know the key of each of their images. If all features are there, no image is opened again.

    Args:
        limit_gb, cache_dtype: see `open_cache`.
        workers: processes that prepare the images.

    Returns:
        the cache with the features of every image; None if they cannot be kept, because the vision encoder is trained,
        the family cannot cache, or the features are too large.
    """
    if _is_trained(family.vision):
        return None
    cache = open_cache(family, not _is_trained(family.connector), cache_dtype, limit_gb)
    if cache is None:
        return None
    missing = _missing(splits, cache)
    left = len(missing)
    with evaluation_mode(family.model), Bar(left, "vision features") as bar:
        for images in _batches(family, missing, workers):
            left -= len(images)
            if not cache.add(family, images, left):
                return None
            bar.update(len(images))
    return cache


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
