"""Command lines that nobody thought of: the programs answer each in a few lines, and write nothing.

Each example stops before anything heavy, because its model, dataset or folder does not exist. In CI 200 examples a
program are always the same; `FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics`
draws so many new ones and prints the counts.
"""

import os
import sys
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from commands import TRACEBACK, classify, in_process, train
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import inference_vlm
import test_vlm_setup
from vlm.config import build_parser

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
fuzz = settings(
    max_examples=EXAMPLES or 200, derandomize=not EXAMPLES, deadline=None, database=None, report_multiple_bugs=False
)

LEFT_OUT = {"--demo", "--debug"}  # the first trains, the second shows tracebacks
# What a shell can hand over: anything but NUL, also bytes that are not UTF-8 (surrogates).
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udce9\udcff"))
odd = st.sampled_from(
    [
        *("", " ", "-", "--", "@", "@.", "@empty.txt", "@binary", "@fifo", "@folder", "nan", "inf", "-inf"),
        *("1e400", "-1e400", "0x10", "1_0", "\u0661", "1" * 27, "9" * 5000, "x" * 5000, "é" * 200, "0", "-1", "1.5"),
        *("\x1b[2J", "a\nb", "\u202e", "=cmd|x", "*", "%s", "{s.model}", "{classes}", "a,,b", ",", "<script>", "none"),
        *("deep.json", "bom.json", "binary", "folder", "fifo", "a/b", "a/b/c", "https://x.invalid/y", "C:\\x\\y"),
        *("noise.py:f", "fails.py:f", ":f", "x.py:", "folder/x.csv", "x.csv", "x.jsonl", "image.png", "true.csv"),
    ]
)
usual = st.integers(-5, 100).map(str) | st.floats().map(str)


def with_values(action):
    """A flag with as many values as it takes, which are often right."""
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return st.just([flag])
    if action.choices:
        values = st.sampled_from(sorted(action.choices))
    else:
        values = odd | texts if action.type in (None, str) else usual | odd
    return st.lists(values, min_size=1, max_size=3 if action.nargs == "+" else 1).map(lambda given: [flag, *given])


def command_lines(parser):
    """Flags with their values, and flags and values that have nothing to do with each other."""
    flags = [action for action in parser._actions if not LEFT_OUT & {*action.option_strings}]
    sensible = st.one_of([with_values(action) for action in flags if action.option_strings])
    names = st.sampled_from([option for action in flags for option in action.option_strings])
    wild = st.tuples(names, odd | usual | texts) | texts.map(lambda text: [f"--{text}"]) | odd.map(lambda text: [text])
    joined = st.tuples(names, odd | usual | texts).map("=".join).map(lambda word: [word])
    lines = st.lists(sensible, max_size=5) | st.lists(sensible | joined | wild, max_size=5)
    return lines.map(lambda parts: [word for part in parts for word in part])


@pytest.fixture(autouse=True, scope="module")
def no_accelerator_of_other_tests():
    """In one process, tests that call `fit` leave accelerate's state, which another number format may not change."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with odd files, in which the programs run; and a home that they find."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "folder").mkdir()
    (folder / "empty.txt").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 4)
    (folder / "image.png").write_bytes(b"no image")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    (folder / "true.csv").write_text("image,label\n")
    (folder / "fails.py").write_text("raise ValueError('\\n' * 50 + 'x')")
    (folder / "noise.py").write_text("def f(*_): return 1")
    os.mkfifo(folder / "fifo")
    before = Path.cwd()
    threads = torch.get_num_threads()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


def content_of(folder):
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def check(program, arguments, here):
    """Run a program, and check how it answers and what it leaves."""
    before = content_of(here)
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = program(*arguments)
    said = err.getvalue()
    event(f"exit code {code}")
    event("by argparse" if "--help lists all flags" in said else "after argparse")
    assert code in (0, 1, 2), said
    assert TRACEBACK not in said and "mistake of the program" not in said and len(said.splitlines()) <= 3, said
    assert not [c for c in said if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")], ascii(said)
    assert code == 0 or said.startswith(("error: ", "note: ")), said
    assert content_of(here) == before


@fuzz
@given(command_lines(build_parser()))
@example(["--seed", "1" * 27])
@example(["--resume"])
@example(["--class-descriptions", "deep.json"])
@example(["--metrics", "fails.py:f"])
def test_training(here, arguments):
    check(train, [*arguments, "--dataset", "missing", "--model", "missing"], here)


@fuzz
@given(command_lines(inference_vlm.build_parser()))
@example(["fifo", "--output", "x.csv"])
@example(["x" * 5000, "image.png"])
def test_inference(here, arguments):
    check(classify, [*arguments, "--model-dir", "missing"], here)


@fuzz
@given(st.lists(odd | texts | st.sampled_from(["--quick", "--help", "--qui", "--quick=1"]), max_size=3))
def test_the_doctor(here, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_vlm_setup, "OWN", Path("missing"))
        patch.setattr("vlm.machine.examine_machine", lambda *_, **__: 0)
        patch.setattr(sys, "argv", ["test_vlm_setup.py", *arguments])
        check(lambda *_: in_process(lambda _: test_vlm_setup.main()), arguments, here)
