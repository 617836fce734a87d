"""Samples -> images as the model takes them: cached features where there are some, else pixels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlm.data import Sample
from vlm.families.base import Family
from vlm.families.encoded import CONNECTED_FEATURES, FEATURE_ORDER, UNCACHED, EncodedImages, besides_pixels
from vlm.families.features.cache import TOKEN_IDS, VECTORS, FeatureCache
from vlm.families.features.shards import Entry


def encode(
    samples: Sequence[Sample], family: Family, cache: FeatureCache | None = None, layer: int | slice | None = None
) -> EncodedImages:
    """The images of some samples as the model takes them.

    Of images that the cache has, features take the place of pixels, and they are not opened. If it has only some of
    them, the pixels of the others are there too, and the model computes their features (`all_features`).

    Args:
        layer: the block of the vision encoder, or blocks, whose vectors are wanted, too. Of images with pixels the
            model computes them.
    """
    entries = [cache.entry(sample.key) for sample in samples] if cache else []
    if layer is not None:  # an image without vectors counts as one without features
        entries = [entry if entry and VECTORS in entry else None for entry in entries]
    if cache is None or not any(entries):
        return family.encode_samples(samples)
    # each by itself, because it has to be known which rows are whose
    images = [entry or family.encode_samples([sample]) for entry, sample in zip(entries, samples, strict=True)]
    joined = _joined(images, cache.name, family.image_token_id)
    if layer is None:
        return joined
    vectors = torch.stack([entry[VECTORS][layer].float() for entry in entries if entry])
    return replace(joined, vectors=vectors, cached=[entry is not None for entry in entries])


def _joined(images: list[Entry | EncodedImages], name: str, image_token_id: int) -> EncodedImages:
    """Cached and encoded images together.

    Args:
        name: of the features.
    """
    token_ids, rest, cached, others, rows = [], [], [], [], []
    for image in images:
        if isinstance(image, EncodedImages):
            token_ids.append(image.token_ids[0])
            rest.append(besides_pixels(image.inputs))
            others.append(image.inputs)
            connected = name == CONNECTED_FEATURES
            count = token_ids[-1].count(image_token_id) if connected else len(image.inputs["pixel_values"])
            rows.append((False, count))
        else:
            token_ids.append(image[TOKEN_IDS].tolist())
            rest.append({key: value for key, value in image.items() if key not in (TOKEN_IDS, VECTORS, name)})
            cached.append(image[name])
            rows.append((True, len(image[name])))
    inputs = _concatenated(rest) | {name: torch.cat(cached)}
    if others:
        inputs |= {UNCACHED + key: value for key, value in _concatenated(others).items()}
        inputs[FEATURE_ORDER] = _order(rows)
    return EncodedImages(inputs, token_ids)


def _concatenated(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


def _order(rows: list[tuple[bool, int]]) -> Tensor:
    """(rows of all images,) the place of each in a tensor of the cached ones and, after them, the others.

    Args:
        rows: of each image whether it is cached, and how many it has.
    """
    nexts = {True: 0, False: sum(count for cached, count in rows if cached)}
    parts = []
    for cached, count in rows:
        parts.append(torch.arange(nexts[cached], nexts[cached] + count))
        nexts[cached] += count
    return torch.cat(parts)
