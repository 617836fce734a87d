"""tests/crash in its short form: real runs that are killed, damaged and without room lose nothing, and real inferences
neither."""

import pytest
from commands import run

pytestmark = pytest.mark.slow


def test_nothing_is_lost_and_nothing_differs():
    done = run("tests/crash/run.py", "--short", "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {line[:14].strip(): sum(map(int, line[14:].split())) for line in done.stdout.splitlines()[1:12]}
    assert len(table) == 11 and all(table.values()), f"a kind of kill never happened:\n{done.stdout}"
    assert done.stdout.splitlines()[-1].endswith(" 0 differences, 0 losses")


def test_a_killed_inference_goes_on_to_the_same_bytes(demo_run):
    done = run("tests/crash/jobs.py", "--rounds", 3, "--seed", 3, "--model-dir", demo_run / "best_model")
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("killed at ")]
    assert len(kills) == 6 and sum(kills) >= 4, f"too few kills:\n{done.stdout}"
