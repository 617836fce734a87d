"""Keyword arguments of Python become what flags give: the same names, types and choices."""

import argparse
import dataclasses
import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

from vlm.common import RunError, UsageError, did_you_mean, shorten
from vlm.config.flags import TYPES, split_names, value_type
from vlm.config.rules import RENAMED
from vlm.config.settings import CLASS_FILES, Settings
from vlm.config.values import VALUES

LONGEST_SHOWN = 80  # characters of a value in a message


class UnknownKeyword(UsageError, TypeError):
    """A keyword argument that no function has: Python's error for it, shown as one of ours."""


class WrongValue(UsageError, ValueError):
    """A keyword argument whose value cannot be: Python's error for it, shown as one of ours."""


def from_keywords(function: str, given: Mapping[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """The values of keyword arguments as the command line gives them, by field name of `Settings`.

    Args:
        function: its name, for messages.
        given: values by name; None counts as not given. Paths and numbers of NumPy are taken as well.
        names: the flags that it takes; None: all.

    Raises:
        UnknownKeyword: there is no such flag.
        WrongValue: a value has the wrong type, or is none of the choices.
    """
    taken = [item for item in dataclasses.fields(Settings) if names is None or item.name in names]
    known = {name: item for item in taken for name in (item.name, RENAMED.get(item.name, item.name))}
    for name in given:
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), list(known))
            raise UnknownKeyword(f"{function}() has no setting {name}.{hint} docs/options.md has all flags.")
    return {known[name].name: _value(known[name], value) for name, value in given.items() if value is not None}


def checked_keywords(function: str, **given: Any) -> dict[str, Any]:
    """The values of keyword arguments that are no settings of a run, see `from_keywords`. None stays None.

    Raises:
        WrongValue: also if a value is outside its limits.
    """
    found = from_keywords(function, given)
    for rule in VALUES:
        for name in found.keys() & set(rule.names):
            if not rule.fits(found[name]):
                raise WrongValue(f"{name}={shorten(repr(given[name]), LONGEST_SHOWN)}: expected {rule.wanted}.")
    return dict.fromkeys(given) | found


def with_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes all flags as **settings, with them in its signature, so that notebooks complete them."""
    own = inspect.signature(function)
    parameters = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {item.name for item in parameters}
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=item.type)
        for item in dataclasses.fields(Settings)
        if (name := RENAMED.get(item.name, item.name)) not in names
    ]
    vars(function)["__signature__"] = own.replace(parameters=[*parameters, *flags])
    return function


@contextmanager
def said_in_python() -> Iterator[None]:
    """Add to the errors of a block what the flags that they name are in Python."""
    try:
        yield
    except (UsageError, RunError) as error:
        say_in_python(error)
        raise


def say_in_python(error: BaseException) -> None:
    """Add to an error what the flags that it names are in Python."""
    flags = dict.fromkeys(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])", str(error)))
    switches = {item.name for item in dataclasses.fields(Settings) if value_type(item) is bool}
    names = [flag.replace("-", "_") for flag in flags]
    if names:
        error.add_note(
            "In Python, flags are keywords: "
            + ", ".join(f"{name}={'True' if name in switches else '...'}" for name in names)
        )


def _default(item: dataclasses.Field) -> Any:
    """What a flag is without being given; None if other flags, the data or the memory decide."""
    return None if item.default is dataclasses.MISSING else item.default


def _value(item: dataclasses.Field, value: Any) -> Any:
    kind = value_type(item)
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong(item, value, "expected True or False")
        return value
    if "nargs" not in item.metadata:
        return _one(item, kind, value)
    if isinstance(value, str):
        return split_names([value]) if item.name == "class_names" else [value]
    if not isinstance(value, Iterable):
        raise _wrong(item, value, "expected a list of texts")
    return [_one(item, kind, word) for word in value]


def _one(item: dataclasses.Field, kind: type, value: Any) -> Any:
    """One value of a setting, read from its text as on the command line."""
    if item.name in CLASS_FILES and isinstance(value, Mapping):
        return json.dumps(dict(value), ensure_ascii=False)
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike | Number):
        wanted = {int: "a whole number", float: "a number"}
        raise _wrong(item, value, f"expected {wanted.get(kind, 'a text')}")
    try:
        found = TYPES.get(kind, kind)(os.fspath(value) if isinstance(value, os.PathLike) else str(value))
    except argparse.ArgumentTypeError as error:
        raise _wrong(item, value, str(error).partition(",")[0]) from None
    choices = item.metadata.get("choices")
    if choices and found not in choices:
        raise _wrong(item, value, f"expected one of {', '.join(choices)}", did_you_mean(found, choices))
    return found


def _wrong(item: dataclasses.Field, value: Any, wanted: str, hint: str = "") -> WrongValue:
    return WrongValue(f"{item.name}={shorten(repr(value), LONGEST_SHOWN)}: {wanted}.{hint}")
