"""vlm/common/checksums.py: a bit that flipped is noticed."""

import pytest
from damage import cut_short, delete, empty, flip_bit, make_folder, nested, other_type

from vlm.common import UsageError, write_folder
from vlm.common.checksums import CHECKSUMS, check_checksums, read_checksums


@pytest.fixture
def folder(tmp_path):
    def write(new):
        (new / "weights").write_bytes(bytes(range(256)) * 8192)  # more than one chunk
        (new / "empty").write_bytes(b"")

    write_folder(tmp_path / "a", write)
    return tmp_path / "a"


def test_what_was_written_is_whole(folder):
    check_checksums(folder, "")
    assert read_checksums(folder) == {"empty": "crc32:00000000", "weights": "crc32:f2a904a4"}
    (folder / "README").write_text("added by somebody")
    check_checksums(folder, "")
    (folder / CHECKSUMS).unlink()
    (folder / "weights").write_bytes(b"another")
    check_checksums(folder, "")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_bit, "is damaged: its checksum is crc32:"),
        (cut_short, "is damaged: its checksum is"),
        (empty, "is damaged: its checksum is crc32:00000000, and checksums.json says crc32:"),
        (delete, "is missing: checksums.json next to it names it"),
        (make_folder, "is missing"),
    ],
)
def test_a_damaged_file_is_named_with_its_cure(folder, damage, said):
    damage(folder / "weights")
    with pytest.raises(UsageError) as error:
        check_checksums(folder, "Copy it again.")
    message = str(error.value)
    assert message.startswith(f"{folder / 'weights'} {said}") and message.endswith(". Copy it again.")
    assert "\n" not in message
    if damage is delete:
        check_checksums(folder, "", movable="weights")


@pytest.mark.parametrize("damage", [cut_short, empty, other_type, nested, make_folder])
def test_checksums_that_are_damaged_themselves(folder, damage):
    damage(folder / CHECKSUMS)
    with pytest.raises(UsageError, match=r"checksums.json .*delete this file to use the folder without a check"):
        check_checksums(folder, "")


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "b/../weights", "."])
def test_checksums_are_only_of_files_in_the_folder(folder, name):
    (folder / CHECKSUMS).write_text(f'{{"{name}": "crc32:00000000"}}')
    with pytest.raises(UsageError, match="does not name files"):
        check_checksums(folder, "")
