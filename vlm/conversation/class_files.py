"""The JSON files of users about their classes: descriptions, and readable names in the place of codes."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlm.common import UsageError, did_you_mean, listed, reason, shorten
from vlm.config import is_object_text
from vlm.data import problem_of_name, tidy

MAP, DESCRIPTIONS = "--class-map", "--class-descriptions"
LONGEST_SHOWN = 200  # characters of a file's name, or of an object in its place


def read_descriptions(path: str, class_names: Sequence[str], shown_names: Sequence[str]) -> dict[str, str]:
    """Read `--class-descriptions`: class name -> description; classes may be left out.

    Args:
        shown_names: the name of each class that the model is shown; a key of the file may be this name or the class
            name.

    Returns:
        Shown name -> description.

    Raises:
        UsageError: the file is not readable, names a class that is not there, or describes a class twice.
    """
    known = dict(zip(shown_names, shown_names, strict=True)) | dict(zip(class_names, shown_names, strict=True))
    found: dict[str, str] = {}
    for key, text in _read_texts(DESCRIPTIONS, path, class_names):
        if key not in known:
            raise _unknown(DESCRIPTIONS, path, key, class_names)
        if known[key] in found:
            raise UsageError(f"{_called(DESCRIPTIONS, path)} describes {listed([key])} twice. Remove one of the two.")
        found[known[key]] = text
    return found


def read_class_map(path: str, class_names: Sequence[str]) -> list[str]:
    """Read `--class-map`: class name -> readable name. Class names that it leaves out stay as they are.

    Returns:
        The readable name of each class.

    Raises:
        UsageError: the file is not readable, names a class that is not there, or gives a name that cannot be the answer
            of one class.
    """
    names: dict[str, str] = {}
    for key, text in _read_texts(MAP, path, class_names):
        code, name = tidy(key), tidy(text)
        if code not in class_names:
            raise _unknown(MAP, path, key, class_names)
        if problem := problem_of_name(name):
            raise UsageError(f"{_called(MAP, path)}, {listed([code])}: {problem}, but an answer is one line of text.")
        if code in names:
            raise UsageError(f"{_called(MAP, path)} names {listed([code])} twice. Remove one of the two.")
        names[code] = name
    if not names:
        raise UsageError(
            f'{_called(MAP, path)} is empty. Expected names of classes, such as {{"{class_names[0]}": "..."}}.'
        )
    shown = [names.get(code, code) for code in class_names]
    for name, count in Counter(shown).items():
        if count > 1:
            codes = [code for code, other in zip(class_names, shown, strict=True) if other == name]
            raise UsageError(
                f"{_called(MAP, path)} gives {listed(codes)} the same name, {listed([name])}: the model could not tell "
                "them apart. Give each class a name of its own."
            )
    return shown


def read_renames(path: str, names: Sequence[str]) -> dict[str, str]:
    """Read `--class-map` for a dataset whose classes have other names than a model's.

    Args:
        names: the class names of the dataset; the file may name others, too, as the dataset need not have all classes.

    Returns:
        Class name of the dataset -> class name of the model.

    Raises:
        UsageError: the file is not readable, names a class twice, or none that is there.
    """
    found: dict[str, str] = {}
    for key, text in _read_texts(MAP, path, names):
        if tidy(key) in found:
            raise UsageError(f"{_called(MAP, path)} names {listed([tidy(key)])} twice. Remove one of the two.")
        found[tidy(key)] = tidy(text)
    if not found.keys() & set(names):
        raise UsageError(f"{_called(MAP, path)} names no class of the dataset. Its classes: {listed(names)}.")
    return found


def renamed_classes(path: str, class_names: Sequence[str]) -> list[str]:
    """The classes that `--class-map` gives a name, whether a dataset has them or not.

    Args:
        class_names: examples for a message.

    Raises:
        UsageError: the file is not readable.
    """
    return [tidy(key) for key, _ in _read_texts("--class-map", path, class_names)]


def _read_texts(flag: str, path: str, class_names: Sequence[str]) -> list[tuple[str, str]]:
    """The entries of a JSON object of texts, in order; a key that is there twice is two entries.

    Args:
        path: the file, or the object itself.
    """
    try:
        text = path if is_object_text(path) else Path(path).read_text(encoding="utf-8-sig")
        pairs = json.loads(text, object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{_called(flag, path)}: not a readable JSON file ({reason(error)}).") from error
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not is_object or not all(isinstance(text, str) for _, text in pairs):
        raise UsageError(
            f'{_called(flag, path)}: expected a JSON object of texts, such as {{"{class_names[0]}": "..."}}.'
        )
    return pairs


def _called(flag: str, path: str) -> str:
    """A flag with what was given, which may be a long object."""
    return f"{flag} {shorten(path, LONGEST_SHOWN)}"


def _unknown(flag: str, path: str, key: str, class_names: Sequence[str]) -> UsageError:
    hint = did_you_mean(key, class_names)
    return UsageError(
        f"{_called(flag, path)} names {listed([key])}, which is no class.{hint} The classes: {listed(class_names)}."
    )
