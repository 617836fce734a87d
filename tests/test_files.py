"""vlm/common/files.py: files that are read although they may be damaged."""

import pytest

from vlm.common.errors import UsageError
from vlm.common.files import read_json


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "it is not JSON"),
        (b"", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[" * 100_000, "it is nested too deep"),
        (b"1" * 10_000, "it is not JSON"),
    ],
)
def test_a_damaged_file_is_named_with_a_cure(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_json(tmp_path / "a.json", "Copy it again.")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'a.json'} cannot be read ({said}") and message.endswith("). Copy it again.")
    assert len(message.splitlines()) == 1


def test_a_missing_file_a_folder_and_a_byte_order_mark(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_json(tmp_path / "a.json", "")
    with pytest.raises(UsageError, match="is a directory"):
        read_json(tmp_path, "")
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "") == {"a": 1}
