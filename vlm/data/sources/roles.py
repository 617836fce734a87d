"""The names of splits: which of them means train, validation or test."""

import re
from collections.abc import Iterable, Sequence

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLIT_WORDS = {"split", "splits", "set", "subset", "partition", "fold", "phase", "usage"}
ROWS_LOOKED_AT = 1000  # a column without a split name in them is none


def role_of(name: object) -> str | None:
    """What a split of this name is for: train, validation or test, in any spelling; None for all other values."""
    word = name.strip().lower() if isinstance(name, str) else None
    return next((role for role, spellings in SPLIT_NAMES.items() if word in spellings), None)


def sort_splits(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Sort the names of splits by what they are for.

    Returns:
        The name of each role that is there.
        The names that have no role, such as few-shot partitions, sorted.
    """
    names = list(names)
    roles = {}
    for role, spellings in SPLIT_NAMES.items():
        found = [name for spelling in spellings for name in names if name.lower() == spelling]
        if found:
            roles[role] = found[0]
    return roles, sorted(set(names) - set(roles.values()))


def names_splits(name: str, columns: Sequence[Sequence[object]]) -> bool:
    """Whether a column has train and, if its name does not say that it is about splits, only names of splits."""
    if not any(role_of(value) for column in columns for value in column[:ROWS_LOOKED_AT]):
        return False
    values = {value for column in columns for value in column[:] if isinstance(value, str) and value.strip()}
    roles = {role_of(value) for value in values}
    return "train" in roles and (bool(words_of(name) & SPLIT_WORDS) or (None not in roles and len(roles) > 1))


def words_of(name: str) -> set[str]:
    """The words of a column's name in small letters, without "id": patient_id, PatientID and patientId have one."""
    parts = re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name)
    return {part.lower().removesuffix("id") for part in parts}
