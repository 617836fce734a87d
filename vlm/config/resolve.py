"""Flags become settings: defaults filled in, contradictions named. Saved settings are read back.

Nothing heavy is imported here, so that a mistake in the flags is answered at once.
"""

import dataclasses
import itertools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm.common import CONTINUED, UsageError, reason, shorten
from vlm.config.defaults import (
    BOTH,
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    DEMO_DEFAULTS,
    EVALUATIONS,
    IMAGES_PER_STEP,
    NEW_PROMPTS,
    RESPONSE,
    TUNING_DEFAULTS,
)
from vlm.config.formats import choose_format
from vlm.config.names import BEST_MODEL
from vlm.config.rules import flag_of, problems
from vlm.config.saved import check_types
from vlm.config.settings import ClassifySettings, RunSettings, Settings

# Flags that may differ between an interrupted run and the one that resumes it.
NOT_PART_OF_THE_RUN = {
    "calibration",
    "score",
    "evidence",
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
    "patience",
    "time_limit",
    "track",
    "use_wandb",
    "wandb_project",
    "metrics",
    "push_to_hub",
    "public",
    "dry_run",
    "show_data",
}
# Not taken over from the interrupted run. Its folder may have been moved, or be from somebody else: the run goes on in
# the folder that is named now, and code runs (--metrics) and a model is uploaded only if this command says so. A time
# limit is that of one command.
OF_ONE_START = {
    *("resume", "overwrite", "debug", "output_dir", "metrics", "push_to_hub", "public", "time_limit"),
    *("dry_run", "show_data"),
}
SMALL_TEST = 0.01  # share of the images that a run tests which follows a cross-validation
NO_METRICS = ["none"]
ABSTAINING = {"abstain_below", "target_precision"}  # only one of the two at a time
TEXTS = ("system_instructions", "prompt_template")  # may come from a file
LONGEST_TEXT = 1_000_000  # characters
PATHS = ("model", "dataset", "class_descriptions", "class_map", "output_dir", "metrics", "image_folder", "exclude")
# Of a finished run that is not what a run that trains its model further is told: that is where it starts, or decided
# for it anew.
NOT_OF_THE_NEXT = {*OF_ONE_START, "prompts", "model", "model_revision", "output_dir", "epochs", "align_connector"}


def resolve(given: Mapping[str, Any], saved: RunSettings | None = None) -> Settings:
    """Settings from flags or, to resume a run, from its settings and the flags that may differ from them.

    Args:
        given: values by field name; None counts as not given.
        saved: the settings of the interrupted run (see `read_settings`).

    Raises:
        UsageError: settings that cannot work, all of them at once.
    """
    given = {name: _from_file(name, _expanded(name, value)) for name, value in given.items()}
    if saved is not None:
        _check_metrics(given, saved)
    if given.get("streaming") and given.get("epochs") is not None:
        raise UsageError("--streaming and --epochs exclude each other: give --max-steps, the optimizer steps in all.")
    if given.get("metrics") == NO_METRICS:
        given["metrics"] = None
    if saved is not None:
        settings = _fill(_resumed(given, saved))
    else:
        settings = _fill(DEMO_DEFAULTS | given if given.get("demo") else given)
    found = problems(settings)
    if found:
        raise UsageError(CONTINUED.join([*found[:2], *filter(None, [" ".join(found[2:])])]))
    return settings


def classify_settings(given: Mapping[str, Any]) -> ClassifySettings:
    """The settings by which a trained model reads a dataset.

    Args:
        given: as for `resolve`.

    Raises:
        UsageError: settings that cannot work.
    """
    return ClassifySettings(**vars(resolve(given)))


def read_settings(values: Mapping[str, Any]) -> RunSettings:
    """The settings of an earlier run, of this or another version: unknown keys are left out, missing ones filled in.

    Args:
        values: the JSON object `settings` of `training_metadata.json`.

    Raises:
        UsageError: a value of another type.
    """
    check_types(values)
    names = {item.name for item in dataclasses.fields(Settings)}
    # Versions without a choice of the prompts built them from the flags.
    known = {"prompts": NEW_PROMPTS} | dict(values)
    settings = _fill({name: value for name, value in known.items() if name in names})
    # All versions that had a choice of the objective wrote it down; those before learned the response.
    return settings.complete(settings.batch_size or 1, settings.objective or RESPONSE)


def _check_metrics(given: Mapping[str, Any], saved: RunSettings) -> None:
    """Code runs only if it is named on the command line.

    Raises:
        UsageError: the interrupted run had own metrics, and the command says nothing about them.
    """
    if saved.metrics and not given.get("metrics"):
        shown = shorten(" ".join(saved.metrics), 200)
        raise UsageError(
            f"--resume: the interrupted run had --metrics {shown}. This is code, which a folder cannot start: if you "
            f"trust it, add --metrics {shown}; to go on without it, add --metrics none."
        )


def flags_to_train_further(saved: RunSettings, output: Path, epochs: int | None) -> list[str]:
    """The flags of a new run that trains the best model of a finished one further, on the same data.

    The demo's model is always a new one, so a new demo trains from the beginning.

    Args:
        saved: the settings of the finished run in the folder `output`.
        epochs: that were asked for in all; None: as many again.
    """
    more = epochs if epochs is not None else saved.epochs
    given: dict[str, Any] = {"output_dir": _next_to(output), "epochs": more}
    if saved.demo:
        given["demo"] = True
    else:
        given |= {"model": str(output / BEST_MODEL), "epochs": more - saved.epochs if more > saved.epochs else more}
    return _flags_of(given, saved, NOT_OF_THE_NEXT)


def flags_to_train_once(saved: RunSettings, output: Path) -> list[str]:
    """The flags of the run that trains one model after a cross-validation: on all images but few for validation.

    Args:
        saved: the settings of the cross-validation in the folder `output`.
    """
    given: dict[str, Any] = {"output_dir": _next_to(output), "test_ratio": SMALL_TEST}
    given |= {"demo": True} if saved.demo else {}
    return _flags_of(given, saved, {*OF_ONE_START, "folds", "fold", "output_dir", "test_ratio"})


def _next_to(output: Path) -> str:
    """The name of a folder next to the output folder that is not there yet."""
    return next(f"{output}_{n}" for n in itertools.count(2) if not Path(f"{output}_{n}").exists())


def _flags_of(given: dict[str, Any], saved: RunSettings, left_out: Collection[str]) -> list[str]:
    """What was given, and the settings of a run that differ from the defaults, as words of a command line."""
    return [word for name, value in _given(given, saved, left_out).items() for word in _as_flag(name, value)]


def other_settings(settings: RunSettings) -> dict[str, Any]:
    """The settings of a run that differ from the defaults, by name, without those of one start."""
    return _given({"demo": True} if settings.demo else {}, settings, OF_ONE_START)


def _given(given: dict[str, Any], saved: RunSettings, left_out: Collection[str]) -> dict[str, Any]:
    """What was given, and the settings of a run that differ from the defaults, by name."""
    given = dict(given)
    decided = {"batch_size", "gradient_accumulation_steps"}
    usual = saved.batch_size * saved.gradient_accumulation_steps == IMAGES_PER_STEP
    for name, value in saved.to_json().items():
        if name in left_out or value in (None, False) or (usual and name in decided):
            continue
        if value != getattr(_fill(DEMO_DEFAULTS | given if saved.demo else given), name):
            given[name] = value
    return given


def _as_flag(name: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    if value is True:
        return [flag_of(name)]
    return [flag_of(name), *map(str, value if isinstance(value, list) else [value])]


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
        if name not in NOT_PART_OF_THE_RUN and _expanded(name, getattr(saved, name)) != value
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
    values = TUNING_DEFAULTS.get(said.get("tune", ""), TUNING_DEFAULTS[Settings.tune]) | said
    values.setdefault("connector_learning_rate", values["learning_rate"])
    values.setdefault("eval_batch_size", max(IMAGES_PER_STEP, said.get("batch_size", 1)))
    if said.get("streaming"):  # the end is that of --max-steps
        values["epochs"] = 1
        values.setdefault("eval_steps", max(1, said.get("max_steps", 1) // EVALUATIONS))
    values["response_format"] = choose_format(said.get("response_format"), said.get("prompt_template"))
    if said.get("label_smoothing"):
        values.setdefault("objective", BOTH)
    if not said.get("demo"):
        values = {"model": DEFAULT_MODEL, "dataset": DEFAULT_DATASET} | values
    return Settings(**values)


def user_path(text: str) -> str:
    """A path as users write it: a ~ at its beginning stands for the home folder."""
    return os.path.expanduser(text)


def _expanded(name: str, value: Any) -> Any:
    """A setting whose paths are expanded; other settings as they are."""
    if name not in PATHS or value is None:
        return value
    return [user_path(item) for item in value] if isinstance(value, list) else user_path(value)


def _from_file(name: str, value: Any) -> Any:
    """The text of `@FILE` for the settings that may come from a file; else the value itself.

    Raises:
        UsageError: it is no file with a text.
    """
    if name not in TEXTS or value is None or not value.startswith("@"):
        return value
    path = Path(user_path(value[1:]))
    try:
        text, problem = _read_text(path)
    except (OSError, ValueError) as error:
        text, problem = "", "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else reason(error)
    if problem:
        raise UsageError(
            f"{flag_of(name)} {shorten(value, 200)}: not a readable text file ({problem}). "
            "Expected @FILE with the text, or the text itself."
        )
    return text


def _read_text(path: Path) -> tuple[str, str]:
    """The text of a file, and what is wrong with it or nothing."""
    if path.exists() and not path.is_file():
        return "", "it is a folder" if path.is_dir() else "it is no regular file"
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(LONGEST_TEXT + 1).strip()
    if len(text) > LONGEST_TEXT:
        return text, f"it has more than {LONGEST_TEXT:,} characters"
    return text, "it has a character NUL" if "\0" in text else "" if text else "it is empty"
