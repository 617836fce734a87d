"""Class names that list synonyms, as ImageNet's do ("tench, Tinca tinca") -> one name for each class."""

from collections import Counter
from collections.abc import Sequence

SEPARATOR = ", "
FEWEST = 20  # classes with synonyms; in a few names a comma may stand for anything
MOST_ALIKE = 0.1  # share of those whose first synonym another class has too; commas mean something else if it is larger


def without_synonyms(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Short and unambiguous names: the first synonym, or a later one if another class has the first one too.

    Args:
        names: of all classes.

    Returns:
        The names in the same order; as they are, if commas do not seem to separate synonyms.
        Those that are not the first synonym, by their whole names.
    """
    lists = [name.split(SEPARATOR) for name in names]
    several = [words for words in lists if len(words) > 1]
    owners = Counter(word for words in lists for word in {_key(word) for word in words})
    alike = sum(owners[_key(words[0])] > 1 for words in several)
    if len(several) < FEWEST or alike > MOST_ALIKE * len(several):
        return list(names), {}
    short, longer = [], {}
    for name, words in zip(names, lists, strict=True):
        found = next((word for word in words if owners[_key(word)] == 1), name)
        short.append(found)
        if found != words[0]:
            longer[name] = found
    return short, longer


def _key(word: str) -> str:
    return " ".join(word.split()).lower()
