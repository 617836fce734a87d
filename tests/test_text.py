"""What of a text reaches a terminal, a message and a spreadsheet."""

import pytest

from vlm.common import csv_cell, listed, message_text, printable, printable_lines, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Straße 猫 🦊", "Straße 猫 🦊"),
        ("a\x1b[31mb\x07\x9b2J", "a [31mb  2J"),
        ("a\nb\rc\td\x0be\u2028f\x85g", "a b c d e f g"),
        ("invoice\u202egpj.exe\u2066x\u200by", "invoice gpj.exe x y"),
        ("caf\udce9 \ud800", "caf\\udce9 \\ud800"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_left_out(text, shown):
    assert printable(text) == shown


def test_a_text_of_several_lines_keeps_them():
    assert printable_lines("a\x1b[2J\n\nb\r") == "a [2J\n\nb "


def test_a_name_cannot_add_lines_to_a_message_and_the_message_may():
    assert message_text("error: x\nerror: all is well\r is a folder.\n       Make a file.\n") == (
        "error: x error: all is well  is a folder.\n       Make a file."
    )
    long = message_text(f"error: {'x' * 5000} does not exist.\n       Choose another.")
    assert len(long) < 1600 and long.startswith("error: xxx") and "does not exist.\n       Choose another." in long


@pytest.mark.parametrize("text", ["=1+1", "+1", "-rf.png", "@SUM(A1)", "\tx", "\rx"])
def test_a_text_that_a_spreadsheet_would_run_gets_an_apostrophe(text):
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["a=1", "'=1", "", None, -1.5, True, 0])
def test_other_cells_stay_as_they_are(value):
    assert csv_cell(value) is value


def test_long_names_are_cut_in_the_middle():
    assert shorten("x" * 24, 24) == "x" * 24
    assert shorten("abcdefghijkl", 9) == "abcde…jkl"


def test_names_with_commas_are_told_apart_in_a_list():
    assert listed(["a", "b"]) == "a, b" and listed("abc", most=2) == "a, b, ..."
    assert listed(["tench, Tinca tinca", "goldfish", "x"], most=2) == "tench, Tinca tinca; goldfish; ..."
