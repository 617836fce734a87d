"""The surroundings of every test: nothing reaches the network, nothing is left in the user's folders."""

import os
import tempfile

# Set before any library reads them. Kept in a variable, since the folder goes away with it when the tests end.
_CACHES = tempfile.TemporaryDirectory(prefix="vlm_tests_")
os.environ.update(
    HF_HOME=os.path.join(_CACHES.name, "huggingface"),
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=os.path.join(_CACHES.name, "matplotlib"),
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_CACHE_DIR=os.path.join(_CACHES.name, "wandb"),
    WANDB_CONFIG_DIR=os.path.join(_CACHES.name, "wandb"),
    WANDB_DATA_DIR=os.path.join(_CACHES.name, "wandb"),
)
# Tiny models are quickest on one thread, and threads that wait for each other crawl when anything else runs.
os.environ["OMP_NUM_THREADS"] = "1"
