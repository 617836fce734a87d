"""The config.json of a model: read, freed of what would run other code, and made into a configuration.

Nothing that it says is believed before it is built: `build_config` names the file if transformers refuses it.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from vlm.common import UsageError
from vlm.data import COPY_AGAIN, read_object
from vlm.families.pretrained import blaming

# Code of the folder or of the hub, and attention kernels, which are code too. This program chooses them itself.
NEVER_TAKEN = ("auto_map", "_attn_implementation", "attn_implementation", "_experts_implementation", "fusion_config")
COUNTS = re.compile("layers|depth|blocks|experts")  # of modules, in the names of settings
LAYERS = "num_hidden_layers"
MOST_MODULES = 10_000  # transformers would build as many as it is told, one by one, for hours


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the config.json in a folder, without what names code.

    Raises:
        UsageError: it cannot be read, names no type of model, or asks for an absurd number of layers.
    """
    path = folder / "config.json"
    config = _checked(read_object(path), path)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{path} names no model_type. {COPY_AGAIN}")
    return config


def build_config(config: Mapping[str, Any], source: str | Path) -> PreTrainedConfig:
    """The configuration that a config.json describes.

    Args:
        config: its content, of a type that transformers knows.
        source: what messages call it.

    Raises:
        UsageError: transformers refuses it.
    """
    with blaming(f"{source} does not describe a model of the type {config['model_type']}", COPY_AGAIN):
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))


def _checked(value: Any, path: Path, name: str = "") -> Any:
    """A part of a configuration without `NEVER_TAKEN`. Raises UsageError for an absurd number."""
    if isinstance(value, dict):
        return {key: _checked(part, path, key) for key, part in value.items() if key not in NEVER_TAKEN}
    if isinstance(value, list):
        return [_checked(part, path) for part in value]
    if isinstance(value, int) and (value > MOST_MODULES and COUNTS.search(name) or value < 0 and name == LAYERS):
        raise UsageError(f"{path} says {name}: {value}, expected 0 to {MOST_MODULES:,}. {COPY_AGAIN}")
    return value
