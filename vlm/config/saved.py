"""What an earlier run has written about itself, read although the file may be damaged."""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vlm.common import UsageError, read_json, resume_command
from vlm.config.defaults import IN_MEMORY
from vlm.config.names import BEST_MODEL, METADATA
from vlm.config.rules import flag_of
from vlm.config.settings import RunSettings


def read_run(output: Path) -> dict[str, Any]:
    """The metadata of the run in an output folder; `settings` in it is a JSON object.

    Raises:
        UsageError: it cannot be read, or is not what a run writes.
    """
    path = output / METADATA
    copy = output / BEST_MODEL / METADATA
    cure = f"Copy {copy} there, or start" if copy.is_file() else "Start"
    cure += " again with --overwrite."
    values = read_json(path, cure)
    if not isinstance(values, dict) or not isinstance(values.get("settings"), dict):
        raise UsageError(f"{path} is damaged: it names no settings of a run. {cure}")
    return values


def how_to_resume(output: Path, dataset: str | None) -> str:
    """How to continue the run in an output folder, for messages: with a command or, if a program has made its dataset,
    with a call."""
    if dataset == IN_MEMORY:
        return f"train(dataset, resume=True, output_dir={str(output)!r})"
    return resume_command(output)


def check_types(values: Mapping[str, Any]) -> None:
    """Check the types of saved settings.

    Args:
        values: by field name; None counts as not given.

    Raises:
        UsageError: a value of another type.
    """
    hints = get_type_hints(RunSettings)
    for name in (item.name for item in dataclasses.fields(RunSettings)):
        value = values.get(name)
        if value is not None and not _fits(value, hints[name]):
            raise UsageError(
                f"{METADATA} is damaged: its {flag_of(name)} is {value!r:.80}. Copy its folder again, or train again."
            )


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)
