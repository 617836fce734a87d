"""Running the programs as a user does: as processes, or in this one, where torch is imported already."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds for a whole process; only a broken one takes as long
# The last lines of a run's error output are for people who made a mistake; this is what they must never see.
TRACEBACK = "Traceback (most recent call last)"
MODEL_FOLDER = {
    "README.md",
    "chat_template.jinja",
    "checksums.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_metadata.json",
}


def command(script: str, *arguments: Any) -> list[str]:
    """The command line of a script of the project; Python's scripts are run by this Python."""
    path = str(ROOT / script)
    return [*([sys.executable] if path.endswith(".py") else []), path, *map(str, arguments)]


def surroundings(**variables: Any) -> dict[str, str]:
    """This process's environment, in which the shell scripts use this Python; a variable that is None is left out."""
    environment = os.environ | {"VLM_PYTHON": sys.executable} | {name: str(value) for name, value in variables.items()}
    return {name: value for name, value in environment.items() if variables.get(name, "") is not None}


def run(script: str, *arguments: Any, cwd: Path | None = None, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in a process of its own."""
    return subprocess.run(
        command(script, *arguments),
        cwd=cwd,
        env=surroundings(**variables),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )


def in_process(main: Callable[[list[str]], int], *arguments: Any) -> int:
    """Call the `main` of a script here; returns the exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        return end.code


def train(*arguments: Any) -> int:
    """`python train_vlm.py ...` in this process."""
    import train_vlm

    return in_process(train_vlm.main, *arguments)


def classify(*arguments: Any) -> int:
    """`python inference_vlm.py ...` in this process."""
    import inference_vlm

    return in_process(inference_vlm.main, *arguments)


def names_in(folder: Path) -> set[str]:
    """The names of all that lies in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}
