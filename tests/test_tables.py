"""Tables of the terminal are aligned."""

from vlm.common import format_table


def test_tables_align_numbers_right_and_text_left():
    table = format_table([("cat", 1, 0.5), ("catfish", 1000, None)], ("class", "n", "share"))
    assert table.splitlines() == [
        "class       n  share",
        "-------  ----  -----",
        "cat         1  0.500",
        "catfish  1000",
    ]


def test_tables_without_headers_or_rows_and_with_wide_or_control_characters():
    assert format_table([("dataset", "digits"), ("images", 1797)]) == "dataset  digits\nimages   1797"
    assert format_table([], ("a", "b")) == "a  b\n-  -"
    assert format_table([]) == ""
    assert format_table([("金魚", "x"), ("goldfish", "a\nb\x1b[31m")]) == "金魚      x\ngoldfish  a b [31m"
