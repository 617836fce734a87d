"""What README.md and the other pages say is true: commands run; flags, defaults, messages, links, files exist."""

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
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from vlm.config import LAYOUTS, TUNING_DEFAULTS, parse_arguments, resolve
from vlm.conversation.prompts import QUESTION, REASONING, SYSTEM
from vlm.evaluation.metrics import load_metric
from vlm.training.output import check_output

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# README.md first: the blocks of the other pages use what its blocks made.
READ = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES = {path: path.read_text(encoding="utf-8") for path in READ}
ALL = "\n".join(PAGES.values())
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
MARK = "(needs the hub)"
# What is added to a command so that it takes seconds.
ADDITIONS = {
    "./run_vlm_training.sh --demo": "--max-samples 10 --epochs 1",
    "./run_tests.sh": "tests/test_config.py",
    "python test_vlm_setup.py": "--quick",
}
RECORDER = "import json, sys\nwith open('calls.jsonl', 'a') as file:\n    print(json.dumps(sys.argv[1:]), file=file)\n"
SCRIPTS = "train_vlm.py", "inference_vlm.py", "test_vlm_setup.py"
PROGRAM_FILES = [*ROOT.glob("*.py"), *ROOT.glob("vlm/**/*.py")]
# Words that docs/ does without, outside of code: see the words that replace them in the message of the test.
OLD_WORDS = {"picture": "image", "data set": "dataset", "tower": "vision encoder", "anew": "again"}


class Block(NamedTuple):
    """A code block. before: the line before it."""

    language: str
    text: str
    before: str


BLOCK = re.compile(r"^([^\n]*)\n+```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [Block(found[2], found[3], found[1]) for text in PAGES.values() for found in BLOCK.finditer(text)]


def make_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_bash(text: str, folder: Path, vlm_python: Path) -> subprocess.CompletedProcess:
    """Run a block as a user in `folder`, with packages that are there already."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "CONDA", "VLM_"))}
    environment = kept | {"VLM_PYTHON": str(vlm_python), "PATH": f"{vlm_python.parent}{os.pathsep}{kept['PATH']}"}
    command = ["bash", "-euc", text]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
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
    for name in ("vlm", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / ".venv" / "bin" / "python", folder.parent / "bin" / "python"):
        make_program(path, f'exec {shlex.quote(sys.executable)} "$@"')
    return folder


@pytest.fixture(scope="module")
def printed(clone):
    """What the blocks without the mark printed, by their text; in order, as later ones use what earlier ones made."""
    printed = {}
    for block in BLOCKS:
        if MARK in block.before or block.text.strip() in printed:
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


@pytest.mark.slow
def test_every_command_runs(printed, clone):
    assert set(ADDITIONS) <= set(printed)
    table = next(
        text for command, text in printed.items() if "inference_vlm.py" in command and "--output" not in command
    )
    assert all(f"demo_images/digit_{i}.png" in table for i in range(10))
    assert len((clone / "predictions.csv").read_text().splitlines()) == 11
    batch = next(text for block, text in printed.items() if "predict_batch" in block)
    assert re.search(r"demo_images/digit_4\.png \w+ 0\.\d+ None", batch)
    assert "no_such_file.png None None no_such_file.png: no such file" in batch


@pytest.mark.slow
def test_everything_that_a_run_writes_is_named(printed, clone):
    page = PAGES[ROOT / "docs" / "results.md"]
    written = {path.name for path in (clone / "vlm_results").iterdir()}
    results = json.loads((clone / "vlm_results" / "results.json").read_text())
    assert {name for name in {*written, *results, *results["test"]} if not re.search(rf"`{name}/?`", page)} == set()


@pytest.mark.slow
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


# Commands and flags that are not run

TRAINING = re.compile(r"(?:python train_vlm\.py|\./run_vlm_training\.sh|vlm-train)((?: [^\n`]*)?)")


def training_commands() -> list[str]:
    """The arguments of each training command in blocks and sentences, but of those with a text over several lines."""
    joined = re.sub(r" \\\n\s*", " ", ALL)
    found = [match[1].strip().replace("SEED", "0") for match in TRAINING.finditer(joined)]
    return [arguments for arguments in found if arguments.startswith("-") and arguments.count('"') % 2 == 0]


def test_every_training_command_has_flags_that_the_program_takes():
    commands = training_commands()
    assert len(commands) > 5
    for arguments in commands:
        words = shlex.split(arguments.removesuffix(" ..."))
        if words != ["--help"]:
            resolve(parse_arguments(words))


@cache
def known_flags() -> set[str]:
    """The flags of the scripts, of the shell scripts and of the benchmarks."""
    helps = [
        subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        for script in SCRIPTS
    ]
    others = [
        path.read_text(encoding="utf-8")
        for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("*.sh")]
    ]
    # hf download, tensorboard, trackio, mlflow
    of_others = {"--local-dir", "--logdir", "--project", "--backend-store-uri"}
    return of_others | {
        flag for text in [*(done.stdout for done in helps), *others] for flag in re.findall(r"--[a-z][a-z0-9-]*", text)
    }


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_flag_exists(path):
    used = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", PAGES[path])}
    assert used - known_flags() == set()


def test_the_option_tables_are_those_of_the_program(clone):
    page = clone / "docs" / "options.md"

    def generate(*flags):
        return subprocess.run(
            [sys.executable, clone / "docs" / "generate_options.py", *flags], capture_output=True
        ).returncode

    assert generate("--check") == 0, "renew the page: python docs/generate_options.py"
    committed = page.read_text()
    assert all(f"`--{name}" in committed for name in ("epochs N", "resume", "explain"))
    page.write_text(committed + "stale")
    assert generate("--check") == 1
    assert generate() == 0 and page.read_text() == committed


def test_the_defaults_are_those_of_the_program():
    layouts = [layout.format(reasoning=REASONING, answer="{class}") for layout in LAYOUTS.values()]
    page = PAGES[ROOT / "docs" / "prompts.md"]
    for text in (SYSTEM, QUESTION, REASONING, *layouts):
        assert all(line in page for line in text.splitlines()), text
    page = PAGES[ROOT / "docs" / "tuning.md"]
    for tune, values in TUNING_DEFAULTS.items():
        row = rf"^\| `{tune}`.*\| {values['learning_rate']:g} \| {values['epochs']} \|"
        assert re.search(row, page, re.MULTILINE), tune


def test_the_models_that_work_are_those_that_the_program_knows():
    from vlm.families import FAMILIES

    rows = re.findall(r"^\| .* \| (\w+) \| .* \| (tested small|next) \|$", README, re.MULTILINE)
    known = {name for family in FAMILIES for name in family.model_types}
    assert {name for name, status in rows if status == "tested small"} - {"any"} == known
    assert not {name for name, status in rows if status == "next"} & known


# Links, files, modules


def without_code(text: str) -> str:
    """A page without code blocks and comments."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[path])):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not link.startswith("http") and not (
            target.exists() and (not anchor or anchor in anchors(target.read_text("utf-8")))
        ):
            broken.append(link)
    assert broken == []


def test_the_index_has_every_page():
    index = PAGES[ROOT / "docs" / "README.md"]
    assert [
        path.name
        for path in PAGES
        if path.parent.name == "docs" and path.name != "README.md" and f"]({path.name})" not in index
    ] == []


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_named_file_and_module_exists(path):
    text = re.sub(r"--output \S+", "", PAGES[path])  # a file that a command will write
    names = re.findall(r"(?<![\w/~.-])(?:vlm|tests|benchmarks|docs|notebooks)/[\w./*-]*\w", text)
    names += [name.replace(".", "/") for name in re.findall(r"\bvlm(?:\.[a-z]\w*)+", text)]
    scripts = re.findall(r"`(\w+\.(?:py|sh))\b", text)
    known = {file.name for file in ROOT.glob("**/*.py")} | {file.name for file in ROOT.glob("*.sh")} | {"my_metrics.py"}
    names = [name for name in names if "NAME" not in name]  # of a file that a reader will write
    missing = [name for name in names if not any(file for ending in ("", ".py") for file in ROOT.glob(name + ending))]
    assert missing + [name for name in scripts if name not in known] == []


# Words


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_pages_are_written_in_the_words_of_the_field(path):
    text = re.sub(
        r"<!-- (\w+) -->.*?<!-- end \1 -->", "", PAGES[path], flags=re.DOTALL
    )  # tables that the benchmarks made
    text = re.sub(r"`[^`\n]*`", "", without_code(text))
    found = {
        f"{word}: say {instead}"
        for word, instead in OLD_WORDS.items()
        if re.search(rf"\b{word}s?\b", text, re.IGNORECASE)
    }
    assert found == set()


def texts_of_the_program() -> str:
    """All texts in the program, one a line, with `{}` for each value that is filled in."""
    lines = [path.read_text() for path in ROOT.glob("*.sh")]
    for path in PROGRAM_FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                lines.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_the_messages_under_troubleshooting_are_those_of_the_program():
    page = PAGES[ROOT / "docs" / "troubleshooting.md"]
    messages = [
        text for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for text in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 10
    program = texts_of_the_program()
    for message in messages:
        pattern = re.escape(message).replace(re.escape("..."), "[^\n]*")
        assert re.search(pattern, program), message
