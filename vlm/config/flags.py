"""The command line of `train_vlm.py`: one flag for each field of `Settings`. Nothing heavy is imported here."""

import argparse
import dataclasses
import re
import string
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from vlm.common import CONTINUED, did_you_mean, message_text, shorten
from vlm.config.declare import GROUPS
from vlm.config.rules import flag_of
from vlm.config.settings import Settings

UNRECOGNIZED = "unrecognized arguments: "  # how argparse begins its message about an unknown flag
WITHOUT_EFFECT = ("no_alignment",)  # flags of earlier versions: accepted, not in --help


class Parser(argparse.ArgumentParser):
    """Answers a mistake in two lines: what is wrong with which flag was probably meant, and where all flags are."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith(UNRECOGNIZED):
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            flags = [option for action in shown for option in action.option_strings]
            word = message.removeprefix(UNRECOGNIZED).strip().partition(" ")[0].partition("=")[0].replace("_", "-")
            hint = did_you_mean(f"--{word.lstrip('-')}", flags)
        text = f"error: {message.replace(CONTINUED, ' ')}.{hint}{CONTINUED}{self.prog} --help lists all flags."
        self.exit(2, message_text(text) + "\n")


def whole_number(text: str) -> int:
    """The type of a flag for `argparse`: 3, and neither 3.0 nor 0x3.

    Raises:
        ArgumentTypeError: the text is no whole number.
    """
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, and got {shorten(text, 60)!r}") from error


def number(text: str) -> float:
    """The type of a flag for `argparse`: 0.5, 5e-1.

    Raises:
        ArgumentTypeError: the text is no number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, and got {shorten(text, 60)!r}") from error


TYPES: dict[type, Callable[[str], Any]] = {int: whole_number, float: number}


def build_parser() -> Parser:
    """The parser of `train_vlm.py`, made from the fields of `Settings`."""
    installed = Path(sys.argv[0]).name == "vlm-train"
    parser = Parser(
        prog="vlm-train" if installed else "train_vlm.py",
        description="Train a small vision-language model to classify images.",
        epilog=f"Example: {'vlm-train' if installed else 'python train_vlm.py'} --demo",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"help": parser} | {name: parser.add_argument_group(name) for name in GROUPS}
    for item in dataclasses.fields(Settings):
        add_flag(groups[item.metadata["group"]], item.name)
    for name in WITHOUT_EFFECT:
        parser.add_argument(flag_of(name), action="store_true", help=argparse.SUPPRESS)
    return parser


def add_flag(parser: Any, name: str, *more_names: str, **changes: Any) -> None:
    """Give a parser, or a group of one, the flag of a setting.

    Args:
        name: the field of `Settings`.
        more_names: further names of the flag, which come first in messages and tables.
        changes: what is different in this parser, such as help or default.
    """
    item = next(item for item in dataclasses.fields(Settings) if item.name == name)
    details = {key: value for key, value in item.metadata.items() if key != "group"}
    kind = value_type(item)
    if kind is bool:
        details["action"] = "store_true"
    else:
        details["type"] = TYPES.get(kind, kind)
        if "choices" not in details:
            details.setdefault("metavar", {int: "N", float: "X"}.get(kind, "TEXT"))
    names = (*more_names, flag_of(name), *details.pop("aliases", ()))
    parser.add_argument(*names, dest=changes.pop("dest", name), **details | changes)


def value_type(item: dataclasses.Field) -> type:
    """The type of one value of a field: `list[str] | None` -> `str`."""
    kind: Any = item.type
    if isinstance(kind, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    return get_args(kind)[0] if get_origin(kind) is list else kind


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, by field name; `--image_column` is accepted for `--image-column`.

    Raises:
        SystemExit: wrong usage, with exit code 2, or `--help`.
    """
    parser = build_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    spelled = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        hyphenated = flag.replace("_", "-")
        spelled.append(hyphenated + equals + value if hyphenated in known else argument)
    given = {name: value for name, value in vars(parser.parse_args(spelled)).items() if name not in WITHOUT_EFFECT}
    if "class_names" in given:
        given["class_names"] = split_names(given["class_names"])
    return given


def split_names(words: list[str]) -> list[str]:
    """Class names as typed: several words are taken as they are; one string is split at semicolons, else at commas,
    else at spaces. A name in double quotes may have any of them.

    White space and commas around a word do not belong to it.
    """
    if len(words) > 1:
        return [word.strip("," + string.whitespace) for word in words]
    outside = re.sub(r'(?<![^;,\s])"[^"]*"', "", words[0])  # of names in quotes
    separator = next((mark for mark in ";," if mark in outside), r"\s")
    names = re.findall(rf'\s*"[^"]*"\s*(?=[{separator}]|$)|[^{separator}]+', words[0])
    return [re.sub(r'^"(.*)"$', r"\1", name.strip()) for name in names if name.strip()]
