"""Which values the settings may have: one row a rule. rules.py has what cannot be asked for together."""

import errno
import math
import os
import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from vlm.config.defaults import (
    AUTO,
)
from vlm.config.durations import seconds_of

MOST = 10**9  # of anything that is counted; a larger number is a slip, and overflows somewhere later
MOST_AT_ONCE = 1024  # threads and processes
MOST_FOLDS = 1000
LONGEST_PATTERN = 200


class Values(NamedTuple):
    """What a value has to be, if it was given. fits: whether a value is right; wanted: the same in words."""

    names: tuple[str, ...]
    fits: Callable[[Any], bool]
    wanted: str


def can_be_a_path(text: str) -> bool:
    """Whether the system can have a file or folder of this name, whether it is there or not."""
    try:
        os.lstat(text)
    except ValueError:  # it has a character NUL
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def is_object_text(text: str) -> bool:
    """Whether a text is a JSON object, as a dict of Python becomes, and not the name of a file that has one."""
    return text.startswith("{") and text.endswith("}")


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression that is not too long."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return 0 < len(text) <= LONGEST_PATTERN


def _has_control_characters(text: str) -> bool:
    """Whether a text has line ends, other control characters, or halves of characters (surrogates)."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


VALUES = (
    Values(
        (
            *("batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_steps", "max_samples", "shots"),
            *("lora_rank", "min_pixels", "max_pixels", "num_crops", "augment_views", "max_steps", "shuffle_buffer"),
            *("fold", "patience"),
        ),
        lambda value: 1 <= value <= MOST,
        f"a whole number of at least 1, and at most {MOST:,}",
    ),
    Values(
        ("threads",),
        lambda value: 1 <= value <= MOST_AT_ONCE,
        f"a whole number of at least 1, and at most {MOST_AT_ONCE:,}",
    ),
    Values(
        ("workers",),
        lambda value: 0 <= value <= MOST_AT_ONCE,
        f"a whole number of at least 0, and at most {MOST_AT_ONCE:,}",
    ),
    Values(
        ("folds",),
        lambda value: 2 <= value <= MOST_FOLDS,
        f"a whole number of at least 2, and at most {MOST_FOLDS:,}",
    ),
    Values(("epochs",), lambda value: 0 <= value <= MOST, f"a whole number of at least 0, and at most {MOST:,}"),
    Values(("seed",), lambda value: 0 <= value < 2**63, "a whole number of at least 0, and below 2 to the power of 63"),
    Values(
        ("image_size",),
        lambda value: value == AUTO or (value.isdecimal() and len(value) <= 9 and int(value) > 0),
        "a number of pixels, or auto",
    ),
    Values(
        ("model", "dataset", "output_dir", "image_folder", "exclude"),
        lambda value: bool(value.strip()) and can_be_a_path(value),
        "a name that is not empty and not too long for a file or folder",
    ),
    Values(  # safetensors and tokenizers cannot write elsewhere
        ("output_dir",),
        lambda value: not any("\ud800" <= character <= "\udfff" for character in value),
        "a name that is valid UTF-8",
    ),
    Values(
        ("class_descriptions", "class_map"),
        lambda value: is_object_text(value) or (bool(value.strip()) and can_be_a_path(value)),
        "a name that is not empty and not too long for a file",
    ),
    Values(
        (
            *(
                "model_revision",
                "dataset_config",
                "dataset_split",
                "image_column",
                "label_column",
                "reasoning_column",
                "group_column",
                "image_suffix",
            ),
            *("task_description", "system_instructions", "prompt_template", "wandb_project"),
        ),
        lambda value: bool(value.strip()),
        "a text that is not empty (leave out the flag for its default)",
    ),
    Values(
        ("time_limit",),
        lambda value: (seconds_of(value) or 0) > 0,
        "hours, minutes and seconds with their units, such as 2h, 90m, 1h30m or 45s",
    ),
    Values(
        ("group_pattern",),
        is_pattern,
        f"a regular expression of at most {LONGEST_PATTERN} characters",
    ),
    Values(
        ("learning_rate", "connector_learning_rate", "lora_alpha", "save_minutes", "cache_size"),
        lambda value: 0 < value < math.inf,
        "a number above 0",
    ),
    Values(("weight_decay", "max_grad_norm"), lambda value: 0 <= value < math.inf, "a number of at least 0"),
    Values(("validation_ratio", "test_ratio"), lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.15"),
    Values(
        ("warmup_ratio", "label_smoothing", "lora_dropout"),
        lambda value: 0 <= value < 1,
        "a share of at least 0 and below 1",
    ),
    Values(("abstain_below", "target_precision"), lambda value: 0 <= value <= 1, "a probability, 0 to 1"),
    Values(("class_names",), lambda value: len(value) >= 2, "at least two names"),
    Values(("class_names",), lambda value: all(name.strip() for name in value), "names that are not empty"),
    Values(
        ("class_names",),
        lambda value: not any(map(_has_control_characters, value)),
        "names of one line, without control characters",
    ),
)
