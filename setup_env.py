"""Makes a Python environment ready. Called by run_vlm_training.sh and run_tests.sh (see setup_env.sh), not by hand.

    python setup_env.py own|active|given [REQUIREMENT_FILE...]

The packages are those of requirements.txt and of the requirement files that are named.

own     .venv in this folder: made, filled under constraints.txt, and made again after an interruption
active  the environment of this Python, which is the user's: what is missing is installed, what fits is left as it is
given   the Python that VLM_PYTHON names: looked at only

Needs nothing but Python. Exit codes: 0 ready, 1 the set-up failed, 2 the user has to do something first, 130 stopped.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.machine import examine

ROOT = Path(__file__).resolve().parent
OWN = ROOT / ".venv"
OWN_PYTHON = OWN / "bin" / "python"
# Checksums of what is installed, one a line, or INTERRUPTED while somebody is at work. A .venv without this file is the
# user's.
STATE = OWN / "vlm-setup"
INTERRUPTED = "interrupted"
REQUIREMENTS, CONSTRAINTS = ROOT / "requirements.txt", ROOT / "constraints.txt"


def main(arguments: list[str]) -> int:
    """Make the environment ready and return the exit code."""
    kind, files = arguments[0], [REQUIREMENTS, *(ROOT / name for name in arguments[1:])]
    try:
        if kind == "own":
            return prepare_own(files)
        return prepare_users(files, may_install=kind == "active")
    except KeyboardInterrupt:
        say("the set-up was stopped; the next start begins it again.")
        return 130
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"error: the set-up failed: {error}")
        say(
            "Repair this and start again, or activate a virtual environment of your own first: it is used instead of "
            ".venv."
        )
        return 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare_own(files: list[Path]) -> int:
    """Make .venv ready; at once if it is. Whoever comes while another start is at it waits, and then has nothing to
    do."""
    wanted = checksum(files)
    if is_ready(wanted):
        return 0
    with one_at_a_time():
        if is_ready(wanted):
            return 0
        before = read_state()
        if INTERRUPTED in before or not own_python_runs():
            make_venv()
            before = [INTERRUPTED]
        STATE.write_text(INTERRUPTED)
        if not pip_install(OWN_PYTHON, files, "-c", str(CONSTRAINTS)):
            STATE.write_text("\n".join(before))
            say(
                "error: the packages could not be installed; pip says why above. Check the network and the free "
                "space, then start again."
            )
            return 1
        STATE.write_text("\n".join({wanted, checksum([REQUIREMENTS])}))
        say("The set-up is done.")
        return 0


def checksum(files: list[Path]) -> str:
    """Stands for all that decides what is installed: the requirement files, the constraints and the version of
    Python."""
    contents = [python_version().encode(), *(file.read_bytes() for file in (*files, CONSTRAINTS))]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def read_state() -> list[str]:
    return STATE.read_text().split() if STATE.exists() else []


def is_ready(wanted: str) -> bool:
    return wanted in read_state() and own_python_runs()


def own_python_runs() -> bool:
    """False for a .venv that is not there, or whose Python was removed from the machine."""
    if Path(sys.prefix).resolve() == OWN.resolve():
        return True
    return OWN_PYTHON.exists() and subprocess.run([OWN_PYTHON, "-c", ""], capture_output=True).returncode == 0


def make_venv() -> None:
    """An empty .venv in place of what is left of the one before, which is cleared only if this program made it."""
    try:
        import ensurepip  # noqa: F401 (Debian leaves it out)
        import venv
    except ImportError:
        cure = f"On Debian and Ubuntu: sudo apt install python{python_version()}-venv"
        raise OSError(f"{sys.executable} cannot make virtual environments. {cure}") from None
    say(f"Setting up {OWN} with Python {sys.version.split()[0]}: once, a few minutes.")
    OWN.mkdir(exist_ok=True)
    if STATE.exists():
        STATE.write_text(INTERRUPTED)
        for child in OWN.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child != STATE:
                child.unlink()
    STATE.write_text(INTERRUPTED)  # before bin/python, or a start meanwhile would take this .venv for the user's
    venv.EnvBuilder(with_pip=True, symlinks=True).create(OWN)


def prepare_users(files: list[Path], may_install: bool) -> int:
    """Make an environment of the user's ready, or say how. What fits is not replaced: so there are no constraints."""
    missing = [package for package in examine(*files) if not package.fits]
    if not missing:
        return 0
    names = ", ".join(
        f"{package.name} (found {package.found})" if package.found else package.name for package in missing
    )
    if not may_install:
        say(f"error: {sys.executable} lacks what {names_of(files)} asks for: {names}. Install it with:")
        say("  " + shlex.join([sys.executable, "-m", "pip", "install", *pip_options(files)]))
        return 2
    say(f"Installing into the environment {sys.prefix}: {names}")
    with one_at_a_time():
        if pip_install(Path(sys.executable), files):
            return 0
    say("error: the packages could not be installed; see above.")
    say("An environment without pip gets it by: python -m ensurepip")
    return 1


def pip_install(python: Path, files: list[Path], *more: str) -> bool:
    """Whether pip could install what requirement files ask for.

    pip's messages go to stderr. If nobody watches, only the important ones are shown.
    """
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    say(f"Installing what {names_of(files)} asks for. From nothing that is about 2 GB and takes a few minutes.")
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *pip_options(files), *more]
    return subprocess.run(command, stdout=sys.stderr, close_fds=False).returncode == 0


def pip_options(files: list[Path]) -> list[str]:
    return [word for file in files for word in ("-r", str(file))]


def names_of(files: list[Path]) -> str:
    return " and ".join(file.name for file in files)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Lets one set-up of this folder run at a time, where the system has flock and the file system can lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(REQUIREMENTS) as file:
        # pip holds the lock too: if only this process is killed, the next start waits until pip has ended.
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another start is setting up this folder: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no locks on this file system
            pass
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
