"""Class names that list synonyms, as those of ImageNet, become short and stay different."""

import pytest
from published import IMAGENET

from vlm.data.synonyms import without_synonyms


def test_the_first_synonym_or_one_that_no_other_class_has():
    short, longer = without_synonyms(IMAGENET)
    assert short[:6] == ["tench", "goldfish", "hen", "hen-of-the-woods", "Cardigan Welsh corgi", "cardigan"]
    assert len({name.lower() for name in short}) == len(IMAGENET)
    assert longer == {
        "Cardigan, Cardigan Welsh corgi": "Cardigan Welsh corgi",
        "maillot, tank suit": "tank suit",
    }


@pytest.mark.parametrize(
    "names",
    [
        ["chest, left", "chest, right", "hand"],
        [f"{bone}, {side}" for bone in map(str, range(20)) for side in ("left", "right")],
    ],
)
def test_other_commas_stay(names):
    assert without_synonyms(names) == (names, {})
