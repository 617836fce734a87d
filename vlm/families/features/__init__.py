"""The cache of vision features: if the vision encoder is frozen, each distinct image goes through it only once.

One folder for each way of computing features (fingerprint.py), one file for each image (cache.py), or for each
view of it if it is augmented. If the connector is frozen too, the features are those after it, which are fewer; else
those before it. filling.py computes them before a run; room.py keeps all folders within a size.
"""

from vlm.families.features.cache import FeatureCache, cache_root, encode, open_cache
from vlm.families.features.filling import fill_cache

__all__ = ["FeatureCache", "cache_root", "encode", "fill_cache", "open_cache"]
