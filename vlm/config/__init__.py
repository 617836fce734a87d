"""The settings: what can be asked for, by which flag, and what a run makes of it.

Needs nothing but Python, so that `--help` and a mistake in the flags are answered before anything heavy is imported.
`parse_arguments` reads flags, `resolve` makes `Settings` of them, and `Settings.complete` those of a run.
"""

from vlm.config.defaults import (
    AUTO,
    BOTH,
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    FEW_NODES,
    IMAGES_PER_STEP,
    POSTERIOR,
    RESPONSE,
    TUNING_DEFAULTS,
)
from vlm.config.flags import Parser, build_parser, parse_arguments
from vlm.config.formats import DEFAULT_FORMAT, LAYOUTS, lay_out, reasoning_of, stated_format
from vlm.config.names import (
    BEST_MODEL,
    DEMO_IMAGES,
    DEMO_MODEL,
    FINAL_MODEL,
    LOG,
    METADATA,
    PAGE,
    PREVIOUS_STATE,
    RESULTS,
    STATE,
    WRITTEN,
)
from vlm.config.resolve import different_settings, read_settings, resolve
from vlm.config.saved import read_run
from vlm.config.settings import ImageSize, RunSettings, Settings

__all__ = [
    "AUTO",
    "BEST_MODEL",
    "BOTH",
    "DEFAULT_DATASET",
    "DEFAULT_FORMAT",
    "DEFAULT_MODEL",
    "DEMO_IMAGES",
    "DEMO_MODEL",
    "FEW_NODES",
    "FINAL_MODEL",
    "IMAGES_PER_STEP",
    "LAYOUTS",
    "LOG",
    "METADATA",
    "PAGE",
    "POSTERIOR",
    "PREVIOUS_STATE",
    "RESPONSE",
    "RESULTS",
    "STATE",
    "TUNING_DEFAULTS",
    "WRITTEN",
    "ImageSize",
    "Parser",
    "RunSettings",
    "Settings",
    "build_parser",
    "different_settings",
    "lay_out",
    "parse_arguments",
    "read_run",
    "read_settings",
    "reasoning_of",
    "resolve",
    "stated_format",
]
