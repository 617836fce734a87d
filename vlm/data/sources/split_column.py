"""A column that names the split of each row, and unused columns that look as if they grouped the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm.common import UsageError, brief, listed, note
from vlm.data.sources.roles import SPLIT_NAMES, SPLIT_WORDS, names_splits, role_of, words_of
from vlm.data.sources.rows import Rows, Source

GROUP_WORDS = {"folds", "kfold", "group", "groups", "patient", "subject", "participant", "individual", "study", "site"}
GROUP_WORDS |= {"hospital", "video", "clip", "sequence", "scene", "session", "place", "location", "camera", "lesion"}
GROUP_WORDS |= {"slide", "specimen", "cluster"}

Unused = Mapping[str, Sequence[object]]


def use_split_column(source: Source, unused: Mapping[str, Unused]) -> Source:
    """Divide the rows of a source by its column of split names, if it has one.

    If the source has splits of its own, they stay, and a note says where the column contradicts them. Another note
    names the unused columns that look as if they grouped the rows.

    Args:
        unused: by role, the columns without a use and their values; no values, if they are not text.

    Raises:
        UsageError: a row has no split or an unknown one, or two columns contradict each other.
    """
    names = list(dict.fromkeys(name for columns in unused.values() for name in columns))
    found = [name for name in names if names_splits(name, [columns.get(name, ()) for columns in unused.values()])]
    if found and list(source.splits) == ["train"]:
        source = _divide(source, found, unused["train"])
    else:
        for name in found:
            _note_contradictions(source, name, unused)
    if alike := [name for name in names if name not in found and _looks_like_groups(name)]:
        hint = " --group-column keeps the rows of a group in one split."
        if not found:
            hint += " A column called split, with train, val or test in each row, would be used."
        note(f"note: columns that look like groups or splits, but are not used: {listed(alike)}.{hint}")
    return source


def _divide(source: Source, found: Sequence[str], columns: Unused) -> Source:
    rows, name = source.splits["train"], found[0]
    values = columns[name][:]
    roles = list(map(role_of, values))

    def place(row: int) -> str:
        return f"{source.split_names['train']}: row {row + 1} ({rows.names[row]})"

    for i, (value, role) in enumerate(zip(values, roles, strict=True)):
        if role is None:
            blank = value is None or value != value or (isinstance(value, str) and not value.strip())
            raise UsageError(
                f"{place(i)} has {'no value' if blank else brief(value)} in the column {name}, which names splits. "
                "Expected train, val or test. Correct the row, or rename the column if it is about something else."
            )
    for other in found[1:]:
        for i, value in enumerate(columns[other][:]):
            if role_of(value) != roles[i]:
                raise UsageError(
                    f"{place(i)} has {brief(values[i])} in the column {name} and {brief(value)} in the column {other}, "
                    "and both name splits. Rename or remove one of the columns."
                )
    splits: dict[str, Rows] = {}
    names: dict[str, str] = {}
    for role in [role for role in SPLIT_NAMES if role in roles]:
        chosen = [i for i, value in enumerate(roles) if value == role]
        splits[role] = rows.take(chosen)
        names[role] = f"{name} = {listed(dict.fromkeys(str(values[i]).strip() for i in chosen))}"
    used = source.columns and replace(source.columns, split=name)
    return replace(source, splits=splits, split_names=names, columns=used)


def _note_contradictions(source: Source, name: str, unused: Mapping[str, Unused]) -> None:
    """Say if rows are in another split than a column says, because the dataset has splits of its own."""
    wrong = [
        (source.split_names[role], source.splits[role].names[i], value)
        for role, columns in unused.items()
        for i, value in enumerate(columns.get(name, ())[:])
        if role_of(value) not in (None, role)
    ]
    if wrong:
        split, image, value = wrong[0]
        note(
            f"warning: {len(wrong):,} rows are in another split than the column {name} says, first {image} of {split}: "
            f"{brief(value)}. The dataset's own splits are used, not the column."
        )


def _looks_like_groups(name: str) -> bool:
    words = words_of(name)
    return bool(words & (SPLIT_WORDS | GROUP_WORDS)) or ("is" in words and any(map(role_of, words)))
