"""stdout and stderr take any text, whatever their encoding is and whoever reads them."""

import io
import subprocess
import sys

import pytest
from commands import ROOT

from vlm.common import any_text


def test_what_the_encoding_lacks_is_escaped_and_afterwards_all_is_as_before(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with any_text():
        print("Straße 猫 \udce9")
    assert stream.errors == "strict"
    with pytest.raises(UnicodeEncodeError):
        print("ß", flush=True)
    stream.seek(0)
    assert stream.buffer.getvalue() == b"Stra\\xdfe \\u732b \\udce9\n"


def test_streams_that_have_no_encoding_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with any_text():
        print("猫")
    assert sys.stdout.getvalue() == "猫\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_went_away_is_no_error_of_pythons_end(stream):
    program = (
        "import os, sys\n"
        "from vlm.common import exit_code\n"
        "reader, writer = os.pipe(); os.close(reader)\n"
        f"os.dup2(writer, sys.{stream}.fileno())\n"
        f"sys.exit(exit_code(lambda: print('x' * 100_000, file=sys.{stream}, flush=True)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
