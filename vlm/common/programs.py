"""How a user starts the programs from here, for messages that name a command."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from vlm.common.processes import process_count


def command_of(script: str, installed: str) -> str:
    """How to start a program from the current folder, with this Python.

    Files of folders below are named by their relative paths, such as .venv/bin/python.

    Args:
        script: its file in the folder of the program, such as train_vlm.py.
        installed: its name if the program was installed by pip, such as vlm-train.
    """
    if Path(sys.argv[0]).name.startswith("vlm-"):
        program = Path(sys.argv[0]).with_name(installed)
        return program.name if shutil.which(program.name) == str(program) else _from_here(program)
    python, file = _from_here(Path(sys.executable)), _from_here(Path(__file__).parents[2] / script)
    return f"{'python' if shutil.which('python') == sys.executable else python} {file}"


def resume_command(output: Path) -> str:
    """How to continue the run in an output folder, for messages.

    With several processes these are only the flags: they belong to the command that started the processes.
    """
    flags = f"--resume --output-dir {shlex.quote(str(output))}"
    if process_count() > 1:
        return flags
    return f"{command_of('train_vlm.py', 'vlm-train')} {flags}"


def _from_here(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative
