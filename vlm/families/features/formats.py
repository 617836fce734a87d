"""The number formats in which features are kept (`--cache-dtype`): as they were computed, in 2 bytes, or in one."""

import torch
from torch import Tensor

from vlm.families.features.shards import Entry

SCALES = "scales"  # in an entry with int8 features: what each vector is multiplied by, float32


def shrink(name: str, features: Tensor, cache_dtype: str) -> Entry:
    """Features as they are kept, under their name.

    Args:
        cache_dtype: float32 keeps them as they are; float16, with a relative difference of at most 2^-11; int8, each
            vector (the last axis) in 255 steps up to its largest value. Features that a format cannot hold are kept as
            they are.
    """
    if cache_dtype == "int8":
        scales = features.float().abs().amax(-1, keepdim=True) / 127  # (..., values) -> (..., 1)
        if scales.isfinite().all():
            # a vector of zeros stays one
            steps = (features.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)).round()
            return {name: steps.to(torch.int8), SCALES: scales}
    elif cache_dtype == "float16" and (half := features.half()).isfinite().all():
        return {name: half}
    return {name: features}


def restored(name: str, entry: Entry, dtype: torch.dtype) -> Entry:
    """An entry with its features in the number format in which they were computed."""
    others = {key: value for key, value in entry.items() if key not in (name, SCALES)}
    features = entry[name] * entry[SCALES] if SCALES in entry else entry[name]
    return others | {name: features.to(dtype)}
