"""Which splits are read, which part of each, and what they are for: --dataset-split or, to classify, --split."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vlm.common import UsageError, listed, note
from vlm.config import Settings
from vlm.data.sources.roles import SPLIT_NAMES, role_of, sort_splits
from vlm.data.sources.rows import Rows, Source

PART = re.compile(r"\s*(?:(?P<role>train|validation|test)\s*=)?\s*(?P<split>\w[\w.-]*)\s*(?P<part>\[[^\]]*\])?\s*")
EXPECTED = (
    "Expected names of splits with or without a part, separated by commas, such as train[:10%],test or "
    "train=full[:80%],test=full[80%:]."
)
MOST_NAMED = 5


class AskedSplit(NamedTuple):
    """role: train, validation or test; split: its name in the dataset; part: such as [:10%], or nothing."""

    role: str
    split: str
    part: str


def asked_splits(settings: Settings) -> list[AskedSplit]:
    """What `--dataset-split` asks for; nothing without it. A single split is for training, however it is called.

    Raises:
        UsageError: it cannot be understood, or leaves open what is trained on.
    """
    text = settings.dataset_split
    if text is None:
        return []
    found = [PART.fullmatch(part) for part in text.split(",")]
    given = [AskedSplit(match["role"] or "", match["split"], match["part"] or "") for match in found if match]
    if len(given) < len(found):
        raise UsageError(f"{settings.split_flag} {text}: not understood. {EXPECTED}")
    if len(given) > 1 and not settings.labels_needed:
        raise UsageError(f"{settings.split_flag} {text}: expected one split, such as test or test[:100].")
    if len(given) == 1 and not given[0].role:
        return [given[0]._replace(role="train")]
    asked = [one if one.role else one._replace(role=role_of(one.split) or "") for one in given]
    if unclear := [one.split for one in asked if not one.role]:
        raise UsageError(
            f"--dataset-split {text}: what {listed(unclear)} is for is not clear. Write train={unclear[0]}, "
            f"validation={unclear[0]} or test={unclear[0]}."
        )
    roles = [one.role for one in asked]
    if "train" not in roles or len(set(roles)) < len(roles):
        raise UsageError(f"--dataset-split {text}: expected one split for train, and at most one for each other use.")
    return asked


def choose_splits(names: Iterable[str], settings: Settings) -> tuple[dict[str, str], list[str]]:
    """As `sort_splits`, but what `--dataset-split` asks for, if it was given.

    Raises:
        UsageError: the dataset has no such split.
    """
    asked, names = asked_splits(settings), list(names)
    if not asked and not settings.labels_needed:
        chosen = _one_split(*sort_splits(names), settings)
        return {"train": chosen}, sorted(set(names) - {chosen})
    if not asked:
        return sort_splits(names)
    if missing := [one.split for one in asked if one.split not in names]:
        raise _no_split(settings, missing, names)
    roles = {one.role: one.split for one in asked}
    return roles, sorted(set(names) - set(roles.values()))


def take_parts(source: Source, settings: Settings) -> Source:
    """The splits, and the parts of them, that `--dataset-split` asks for. Without it the source as it is.

    Raises:
        UsageError: the dataset has no such split, or a part cannot be understood.
    """
    asked = asked_splits(settings)
    if not asked and not settings.labels_needed:
        return _take_one(source, settings)
    if not asked:
        return source
    named = {name: source.splits[role] for role, name in source.split_names.items() if role in source.splits}
    rows = source.splits | named  # a folder without folders of splits is train, whatever it is called in messages
    if missing := [one.split for one in asked if one.split not in rows]:
        raise _no_split(settings, missing, [*named, *source.others])
    positions = [_positions(one, len(rows[one.split].labels), settings) for one in asked]
    _refuse_common_rows(asked, positions, settings)
    splits, names = {}, {}
    for one, chosen in zip(asked, positions, strict=True):
        splits[one.role] = rows[one.split].take(chosen) if one.part else rows[one.split]
        names[one.role] = one.split + one.part
    for one in asked:
        _note_lost_classes(one, rows[one.split], splits[one.role], source.class_names)
    used = {one.split for one in asked}
    source.others = sorted(
        {*source.others, *(name for role, name in source.split_names.items() if role not in used)} - used
    )
    source.splits = {role: splits[role] for role in SPLIT_NAMES if role in splits}
    source.split_names = names
    return source


def _note_lost_classes(one: AskedSplit, whole: Rows, part: Rows, class_names: Sequence[str] | None) -> None:
    """Say which classes a part has no row of, as happens in a split that is sorted by class."""
    if one.part and (lost := _labels(whole) - _labels(part)):
        names = [class_names[int(label)] if class_names and label.isdecimal() else label for label in sorted(lost)]
        note(f"warning: {one.split}{one.part} has no row of {listed(names, MOST_NAMED)}, which {one.split} has.")


def _labels(rows: Rows) -> set[str]:
    return {str(label) for label in rows.labels if label is not None}


def _one_split(roles: Mapping[str, str], others: Sequence[str], settings: Settings) -> str:
    """The name of the split that a trained model reads if none was asked for: that for the test, else the only one.

    Args:
        roles: the name of each role that is there; others: the names that have no role.

    Raises:
        UsageError: there are several others, or none.
    """
    if "test" in roles:
        return roles["test"]
    found = list(roles.values()) or list(others)
    if len(found) == 1:
        return found[0]
    there = listed([*roles.values(), *others]) or "none"
    raise UsageError(
        f"{settings.of_dataset}: which split to read is not clear, as none is called test. Splits there: "
        f"{there}. Name one with {settings.split_flag}."
    )


def _take_one(source: Source, settings: Settings) -> Source:
    """A source with only the split that a trained model reads, as that of train."""
    roles = {role: source.split_names[role] for role in source.splits}
    chosen = _one_split(roles, [], settings)
    rows = next(source.splits[role] for role, name in roles.items() if name == chosen)
    source.others = sorted({*roles.values(), *source.others} - {chosen})
    source.splits, source.split_names = {"train": rows}, {"train": chosen}
    return source


def _positions(one: AskedSplit, count: int, settings: Settings) -> range:
    """The rows of a part, as the `datasets` library counts them; all rows without a part."""
    import datasets

    if not one.part:
        return range(count)

    try:
        (place,) = datasets.ReadInstruction.from_spec(f"rows{one.part}").to_absolute({"rows": count})
        return range(count)[place.from_ : place.to]
    except (ValueError, AssertionError) as error:
        what = f"{settings.split_flag} {settings.dataset_split}: {one.part} is not understood."
        raise UsageError(f"{what} {EXPECTED}") from error


def _refuse_common_rows(asked: Sequence[AskedSplit], positions: Sequence[range], settings: Settings) -> None:
    """Refuse two parts of a split that have rows in common, as the model would be tested on what it has learned."""
    for i, one in enumerate(asked):
        for other, rows in zip(asked[:i], positions[:i], strict=True):
            common = len(set(rows).intersection(positions[i])) if other.split == one.split else 0
            if common:
                raise UsageError(
                    f"--dataset-split {settings.dataset_split}: {other.role} and {one.role} have {common:,} rows of "
                    f"{one.split} in common. Give parts that do not overlap."
                )


def _no_split(settings: Settings, missing: list[str], names: Iterable[str]) -> UsageError:
    there = listed(sorted(set(names))) or "none"
    return UsageError(f"{settings.split_flag}: the dataset has no split {listed(missing)}. Splits there: {there}.")
