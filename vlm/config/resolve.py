"""Flags become settings: defaults filled in, contradictions named. Saved settings are read back.

Nothing heavy is imported here, so that a mistake in the flags is answered at once.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.common import UsageError, reason
from vlm.config.defaults import (
    BOTH,
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    DEMO_DEFAULTS,
    IMAGES_PER_STEP,
    RESPONSE,
    TUNING_DEFAULTS,
)
from vlm.config.formats import choose_format
from vlm.config.rules import flag_of, problems
from vlm.config.saved import check_types
from vlm.config.settings import RunSettings, Settings

# Flags that may differ between an interrupted run and the one that resumes it.
NOT_PART_OF_THE_RUN = {
    "calibration",
    "score",
    "abstain_below",
    "target_precision",
    "probe",
    "no_feature_cache",
    "cache_size",
    "resume",
    "overwrite",
    "debug",
    "output_dir",
    "device",
    "workers",
    "threads",
    "compile",
    "save_minutes",
    "track",
    "use_wandb",
    "wandb_project",
}
OF_ONE_START = {"resume", "overwrite", "debug"}  # not taken over from the interrupted run
ABSTAINING = {"abstain_below", "target_precision"}  # only one of the two at a time
TEXTS = ("system_instructions", "prompt_template")  # may come from a file


def resolve(given: Mapping[str, Any], saved: RunSettings | None = None) -> Settings:
    """Settings from flags or, to resume a run, from its settings and the flags that may differ from them.

    Args:
        given: values by field name; None counts as not given.
        saved: the settings of the interrupted run (see `read_settings`).

    Raises:
        UsageError: settings that cannot work, all of them at once.
    """
    given = {name: _from_file(name, value) for name, value in given.items()}
    if saved is not None:
        settings = _fill(_resumed(given, saved))
    else:
        settings = _fill(DEMO_DEFAULTS | given if given.get("demo") else given)
    found = problems(settings)
    if found:
        raise UsageError("\n       ".join(found))
    return settings


def read_settings(values: Mapping[str, Any]) -> RunSettings:
    """The settings of an earlier run, of this or another version: unknown keys are left out, missing ones filled in.

    Args:
        values: the JSON object `settings` of `training_metadata.json`.

    Raises:
        UsageError: a value of another type.
    """
    check_types(values)
    names = {item.name for item in dataclasses.fields(Settings)}
    settings = _fill({name: value for name, value in values.items() if name in names})
    # All versions that had a choice of the objective wrote it down; those before learned the response.
    return settings.complete(settings.batch_size or 1, settings.objective or RESPONSE)


def different_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a run as two files of it have them, each in words.

    Args:
        saved, now: JSON objects as for `read_settings`.
    """
    before, after = read_settings(saved).to_json(), read_settings(now).to_json()
    return [
        f"{flag_of(name)} {after[name]} instead of {before[name]}"
        for name in after
        if name not in NOT_PART_OF_THE_RUN and after[name] != before[name]
    ]


def _resumed(given: dict[str, Any], saved: RunSettings) -> dict[str, Any]:
    """The values of the interrupted run, except those that are given again.

    Raises:
        UsageError: a flag that would make it another run.
    """
    different = [
        f"{flag_of(name)} {value} (the interrupted run has {getattr(saved, name)})"
        for name, value in given.items()
        if name not in NOT_PART_OF_THE_RUN and getattr(saved, name) != value
    ]
    if different:
        raise UsageError(
            f"--resume continues the interrupted run with its settings, but was given {', '.join(different)}. "
            "Leave these out, or start again with --overwrite."
        )
    forgotten = OF_ONE_START | (ABSTAINING if ABSTAINING & given.keys() else set())
    return {name: value for name, value in saved.to_json().items() if name not in forgotten} | given


def _fill(given: Mapping[str, Any]) -> Settings:
    """Settings with the defaults that follow from the flags themselves."""
    said = {name: value for name, value in given.items() if value is not None}
    values = TUNING_DEFAULTS[said.get("tune", Settings.tune)] | said
    values.setdefault("connector_learning_rate", values["learning_rate"])
    values.setdefault("eval_batch_size", max(IMAGES_PER_STEP, said.get("batch_size", 1)))
    values["response_format"] = choose_format(said.get("response_format"), said.get("prompt_template"))
    if said.get("label_smoothing"):
        values.setdefault("objective", BOTH)
    if not said.get("demo"):
        values["model"] = said.get("model") or DEFAULT_MODEL
        values["dataset"] = said.get("dataset") or DEFAULT_DATASET
    return Settings(**values)


def _from_file(name: str, value: Any) -> Any:
    """The text of `@FILE` for the settings that may come from a file; else the value itself."""
    if name not in TEXTS or value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag_of(name)} {value}: not a readable text file ({reason(error)}).") from error
