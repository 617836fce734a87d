"""How a setting is declared: one dataclass field with what `argparse` needs for its flag."""

from dataclasses import field
from typing import Any


def flag(default: Any, group: str, help: str, **more: Any) -> Any:
    """A dataclass field with what argparse needs.

    Args:
        default: the value without the flag; MISSING if `resolve` computes it from other flags.
        more: choices, metavar, nargs; aliases: other names of the flag.
    """
    return field(default=default, metadata={"group": group, "help": help, **more})
