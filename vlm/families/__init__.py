"""One file per architecture: how it reads images and text, and what its parts are called.

Every question about an architecture is answered in this room and nowhere else. A new one is a subclass of `Family` and
an entry in loading.py. The cache of vision features lives here too.
"""

from vlm.families.base import Family
from vlm.families.blocks import checkpoint_blocks, compile_blocks
from vlm.families.configuration import read_config
from vlm.families.demo import DEMO_NAME, build_demo_model, build_model, build_processor
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES, EncodedImages, uncached_inputs
from vlm.families.features import FeatureCache, cache_root, encode, fill_cache, open_cache
from vlm.families.loading import FAMILIES, load_family, outline
from vlm.families.pooling import STATISTICS, Listening, NoVectors, vectors_of
from vlm.families.quantization import check_quantization

__all__ = [
    "CONNECTED_FEATURES",
    "ENCODER_FEATURES",
    "FAMILIES",
    "DEMO_NAME",
    "EncodedImages",
    "Family",
    "FeatureCache",
    "Listening",
    "NoVectors",
    "STATISTICS",
    "build_demo_model",
    "build_model",
    "build_processor",
    "cache_root",
    "check_quantization",
    "checkpoint_blocks",
    "compile_blocks",
    "encode",
    "fill_cache",
    "load_family",
    "open_cache",
    "outline",
    "read_config",
    "uncached_inputs",
    "vectors_of",
]
