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
    IN_MEMORY,
    POSTERIOR,
    RESPONSE,
    TUNING_DEFAULTS,
)
from vlm.config.flags import Parser, build_parser, number, parse_arguments, split_names, whole_number
from vlm.config.formats import DEFAULT_FORMAT, LAYOUTS, lay_out, reasoning_of, stated_format
from vlm.config.names import (
    BEST_MODEL,
    DATA_PAGE,
    DEMO_IMAGES,
    DEMO_MODEL,
    FINAL_MODEL,
    FOLDERS,
    LOCK,
    LOG,
    MANIFEST,
    METADATA,
    PAGE,
    PREVIOUS_RUN,
    PREVIOUS_STATE,
    RESULTS,
    STATE,
    WRITTEN,
)
from vlm.config.resolve import different_settings, flags_to_train_further, read_settings, resolve, user_path
from vlm.config.rules import MOST, MOST_AT_ONCE, can_be_a_path
from vlm.config.saved import read_run
from vlm.config.settings import ImageSize, RunSettings, Settings

__all__ = [
    "AUTO",
    "BEST_MODEL",
    "BOTH",
    "DATA_PAGE",
    "DEFAULT_DATASET",
    "DEFAULT_FORMAT",
    "DEFAULT_MODEL",
    "DEMO_IMAGES",
    "DEMO_MODEL",
    "FEW_NODES",
    "FINAL_MODEL",
    "FOLDERS",
    "IMAGES_PER_STEP",
    "IN_MEMORY",
    "LAYOUTS",
    "LOCK",
    "LOG",
    "MANIFEST",
    "METADATA",
    "MOST",
    "MOST_AT_ONCE",
    "PAGE",
    "POSTERIOR",
    "PREVIOUS_RUN",
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
    "can_be_a_path",
    "different_settings",
    "flags_to_train_further",
    "lay_out",
    "number",
    "parse_arguments",
    "read_run",
    "read_settings",
    "reasoning_of",
    "resolve",
    "split_names",
    "stated_format",
    "whole_number",
    "user_path",
]
