"""The cache of vision features: if the vision encoder is frozen, each distinct image goes through it only once.

One folder for each way of computing features (fingerprint.py), in it files with many images each, or views of them if
they are augmented (shards.py). If the connector is frozen too, the features are those after it, which are fewer; else
those before it. filling.py computes them before a run, as many as fit; room.py keeps all folders within a size;
cache.py looks them up and adds some; encoding.py makes a batch of them, with pixels of the images that have none.
"""

from vlm.families.features.cache import FeatureCache, cache_root, open_cache
from vlm.families.features.encoding import encode
from vlm.families.features.filling import fill_cache

__all__ = ["FeatureCache", "cache_root", "encode", "fill_cache", "open_cache"]
