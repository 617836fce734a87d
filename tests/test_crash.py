"""tests/crash in its short form: real runs that are killed, damaged and without room lose nothing."""

import pytest
from commands import run

pytestmark = pytest.mark.slow


def test_nothing_is_lost_and_nothing_differs():
    done = run("tests/crash/run.py", "--short", "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {line[:14].strip(): sum(map(int, line[14:].split())) for line in done.stdout.splitlines()[1:12]}
    assert len(table) == 11 and all(table.values()), f"a kind of kill never happened:\n{done.stdout}"
    assert done.stdout.splitlines()[-1].endswith(" 0 differences, 0 losses")
