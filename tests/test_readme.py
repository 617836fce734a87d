"""What README.md says is true: its commands run, its help texts, defaults and messages are those of the program.

`python -m tests.test_readme` writes the help texts into README.md.
"""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from vlm.config.flags import parse_arguments
from vlm.config.formats import LAYOUTS
from vlm.config.resolve import resolve
from vlm.config.settings import TUNING_DEFAULTS
from vlm.conversation.prompts import QUESTION, REASONING, SYSTEM
from vlm.evaluation.metrics import load_metric
from vlm.training.output import check_output

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARK = "(needs the hub)"
COLUMNS = "120"
# What is added to a command so that it takes seconds.
ADDITIONS = {
    "./run_vlm_training.sh --demo": "--max-samples 10 --epochs 1",
    "./run_tests.sh": "tests/test_config.py",
    "python test_vlm_setup.py": "--quick",
}
RECORDER = "import json, sys\nwith open('calls.jsonl', 'a') as file:\n    print(json.dumps(sys.argv[1:]), file=file)\n"


class Block(NamedTuple):
    """A code block. before: the line before it."""

    language: str
    text: str
    before: str


BLOCKS = [
    Block(found[2], found[3], found[1])
    for found in re.finditer(r"^([^\n]*)\n+```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
HELP_BLOCK = re.compile(r"^```text\nusage: (\w+\.py) .*?^```$", re.MULTILINE | re.DOTALL)


def help_block(script: str) -> str:
    environment = os.environ | {"COLUMNS": COLUMNS, "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, ROOT / script, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    return f"```text\n{result.stdout}```"


def make_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_bash(text: str, folder: Path, vlm_python: Path) -> subprocess.CompletedProcess:
    """Run a block as a user in `folder`, with packages that are there already."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "CONDA", "VLM_"))}
    environment = kept | {"VLM_PYTHON": str(vlm_python), "PATH": f"{vlm_python.parent}{os.pathsep}{kept['PATH']}"}
    return subprocess.run(
        ["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def run_python(text: str, folder: Path) -> str:
    """Run a block in this process, which has torch loaded; returns what it prints."""
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    return output.getvalue()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project, as a user has it after the set-up; `.venv/bin/python` and `python` are this Python."""
    folder = tmp_path_factory.mktemp("user") / "clone"
    folder.mkdir()
    for pattern in ("*.py", "*.sh", "*.txt", "*.toml"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    for name in ("vlm", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / ".venv" / "bin" / "python", folder.parent / "bin" / "python"):
        make_program(path, f'exec {shlex.quote(sys.executable)} "$@"')
    return folder


@pytest.fixture(scope="module")
def printed(clone):
    """What the blocks without the mark printed, by their text. They are run in order, since later ones use what earlier
    ones made."""
    printed = {}
    for block in BLOCKS:
        if MARK in block.before:
            continue
        if block.language == "python":
            name = re.match(r"# (\w+\.py)\n", block.text)
            if name:
                (clone / name[1]).write_text(block.text)
            printed[block.text] = run_python(block.text, clone)
        elif block.language == "bash":
            command = block.text.strip()
            result = run_bash(f"{command} {ADDITIONS.get(command, '')}", clone, clone.parent / "bin" / "python")
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            printed[command] = result.stdout
    return printed


def test_every_command_runs(printed, clone):
    assert set(ADDITIONS) <= set(printed)
    table = next(
        text for command, text in printed.items() if "inference_vlm.py" in command and "demo_pictures" in command
    )
    assert all(f"demo_pictures/digit_{i}.png" in table for i in range(10))
    batch = next(text for block, text in printed.items() if "predict_batch" in block)
    assert (
        re.search(r"demo_pictures/digit_4\.png \w+ 0\.\d+ None", batch)
        and "no_such_file.png None None no_such_file.png: no such file" in batch
    )


def test_everything_that_a_run_writes_is_named(printed, clone):
    written = {path.name for path in (clone / "vlm_results").iterdir()}
    results = json.loads((clone / "vlm_results" / "results.json").read_text())
    assert {name for name in {*written, *results, *results["test"]} if not re.search(rf"`{name}/?`", README)} == set()


def test_commands_that_need_the_hub_have_flags_that_work(printed, clone):
    """They get as far as `train_vlm.py`, whose flags are checked; only the training is left out."""
    (clone / "record.py").write_text(RECORDER)
    python = shlex.quote(sys.executable)
    recorder = clone.parent / "recorder" / "python"
    make_program(recorder, f'case "$*" in *train_vlm.py*) exec {python} record.py "$@";; *) exec {python} "$@";; esac')
    marked = [block for block in BLOCKS if MARK in block.before]
    assert marked and {block.language for block in marked} == {"bash"}
    for block in marked:
        result = run_bash(block.text, clone, recorder)
        assert result.returncode == 0, f"{block.text}\n{result.stderr}"
    calls = [json.loads(line) for line in (clone / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == len(marked)
    with contextlib.chdir(clone):
        settings = []
        for call in calls:
            script = next(i for i, word in enumerate(call) if word.endswith("train_vlm.py"))
            settings.append(resolve(parse_arguments(call[script + 1 :])))
            assert not settings[-1].demo, "the demo needs no hub: leave out the mark"
            assert all(callable(load_metric(name)) for name in settings[-1].metrics or ())
            check_output(settings[-1])  # refuses a folder that holds the demo's run
    mars = json.loads((ROOT / "tests" / "data" / "mars.json").read_text())
    ours = next(s for s in settings if s.dataset == "Mirali33/mb-domars16k")
    assert ours.system_instructions == mars["system_instructions"] and ours.class_names == mars["class_names"].split()
    assert any("--num_processes" in call for call in calls)


@pytest.mark.parametrize("script", ["train_vlm.py", "inference_vlm.py"])
def test_the_help_text_is_that_of_the_program(script):
    shown = {found[1]: found[0] for found in HELP_BLOCK.finditer(README)}
    assert shown[script] == help_block(script), "renew it by: python -m tests.test_readme"


def test_every_flag_exists():
    helps = "".join(help_block(script) for script in ("train_vlm.py", "inference_vlm.py", "test_vlm_setup.py"))
    known = set(re.findall(r"--[a-z][a-z-]*", helps))
    assert {flag for flag in re.findall(r"--[a-z][a-z_-]*", README) if flag.replace("_", "-") not in known} == set()


def test_the_defaults_are_those_of_the_program():
    for text in (
        SYSTEM,
        QUESTION,
        REASONING,
        *(layout.format(reasoning=REASONING, answer="{class}") for layout in LAYOUTS.values()),
    ):
        assert all(line in README for line in text.splitlines()), text
    for tune, values in TUNING_DEFAULTS.items():
        assert re.search(
            rf"^\| `{tune}`.*\| {values['learning_rate']:g} \| {values['epochs']} \|", README, re.MULTILINE
        ), tune


def test_the_models_that_work_are_those_that_the_program_knows():
    from vlm.families import FAMILIES

    rows = re.findall(r"^\| .* \| (\w+) \| .* \| (tested small|next) \|$", README, re.MULTILINE)
    known = {name for family in FAMILIES for name in family.model_types}
    assert {name for name, status in rows if status == "tested small"} - {"any"} == known
    assert not {name for name, status in rows if status == "next"} & known


def test_the_files_that_it_links_to_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def texts_of_the_program() -> str:
    """All texts in the program, one a line, with `{}` for each value that is filled in."""
    lines = [path.read_text() for path in ROOT.glob("*.sh")]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("vlm/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                lines.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_the_messages_under_troubleshooting_are_those_of_the_program():
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    messages = [
        text for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for text in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 10
    program = texts_of_the_program()
    for message in messages:
        pattern = re.escape(message).replace(re.escape("..."), "[^\n]*")
        assert re.search(pattern, program), message


if __name__ == "__main__":
    (ROOT / "README.md").write_text(HELP_BLOCK.sub(lambda found: help_block(found[1]), README), encoding="utf-8")
