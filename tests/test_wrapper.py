"""run_vlm_training.sh and run_tests.sh, run in a copy of the project with a train_vlm.py that writes down how it was
called."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARS = json.loads((ROOT / "tests" / "data" / "mars.json").read_text())
SCRIPTS = ["run_vlm_training.sh", "run_vlm_inference.sh", "run_tests.sh", "setup_env.sh", "setup_env.py"]
FAKE_TRAINING = """
import json, os, sys
found = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "prefix": sys.prefix}
print(json.dumps(found))
sys.exit(7 if "--fail" in sys.argv else 0)
"""


def make_project(folder, requirements="packaging", constraints=""):
    """A copy of the scripts in a new folder; returns the folder."""
    shutil.copytree(ROOT / "vlm", folder / "vlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    (folder / "train_vlm.py").write_text(FAKE_TRAINING)
    (folder / "requirements.txt").write_text(requirements)
    (folder / "requirements-dev.txt").write_text("pytest\n")
    (folder / "constraints.txt").write_text(constraints)
    return folder


def make_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_wheel(folder, name, version):
    """A package with nothing in it."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def surroundings(**more):
    """The environment variables of a user without any environment of theirs, plus `more`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("VIRTUAL_ENV", "CONDA", "VLM_", "PIP_", "PYTORCH", "TOKENIZERS"))
    }
    return kept | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull} | {k: str(v) for k, v in more.items()}


def start(script, *arguments, cwd=None, **variables):
    environment = surroundings(**variables)
    return subprocess.run(
        [script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def report(result):
    """What the fake training wrote down."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "the project")


def test_the_long_mars_command_arrives_unchanged(project):
    arguments = [
        "--dataset",
        "Mirali33/mb-domars16k",
        "--class-names",
        MARS["class_names"],
        "--system-instructions",
        MARS["system_instructions"],
        "--prompt-template",
        MARS["prompt_template"],
        "--task-description",
        "",
        "--epochs",
        "3",
    ]
    assert (
        report(start(project / "run_vlm_training.sh", *arguments, VLM_PYTHON=sys.executable))["arguments"] == arguments
    )
    # And as it is typed into a shell, quotes and all.
    line = shlex.join([str(project / "run_vlm_training.sh"), *arguments])
    assert report(start("bash", "-c", line, VLM_PYTHON=sys.executable))["arguments"] == arguments


def test_it_runs_through_a_link_and_in_the_folder_of_the_user(project, tmp_path):
    elsewhere = tmp_path / "my pictures (new)"
    elsewhere.mkdir()
    link = elsewhere / "train"
    link.symlink_to(Path("..") / "the project" / "run_vlm_training.sh")
    seen = report(
        start(
            "./train", "--system-instructions", "@rules.txt", cwd=elsewhere, VLM_PYTHON=sys.executable, CDPATH=tmp_path
        )
    )
    assert Path(seen["folder"]) == elsewhere.resolve()
    assert seen["arguments"] == ["--system-instructions", "@rules.txt"]


def test_the_environment_variables_are_set_unless_the_user_set_them(project):
    script = project / "run_vlm_training.sh"
    wanted = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0",
        "PYTORCH_ENABLE_MPS_FALLBACK": "1",
    }
    assert wanted.items() <= report(start(script, VLM_PYTHON=sys.executable))["environment"].items()
    users = {
        "TOKENIZERS_PARALLELISM": "true",
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.7",
        "PYTORCH_ENABLE_MPS_FALLBACK": "",
    }
    assert users.items() <= report(start(script, VLM_PYTHON=sys.executable, **users))["environment"].items()


def test_the_exit_code_of_the_training_is_passed_on(project):
    assert start(project / "run_vlm_training.sh", "--fail", VLM_PYTHON=sys.executable).returncode == 7


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10"])
def test_a_python_that_is_too_old_is_one_line(project, tmp_path, version):
    old = make_program(tmp_path / "bin" / "python3", f"echo {version}")
    for variables in ({"VLM_PYTHON": old}, {"VIRTUAL_ENV": tmp_path}, {"PATH": f"{old.parent}:{tools(tmp_path)}"}):
        (tmp_path / "bin" / "python").unlink(missing_ok=True)
        (tmp_path / "bin" / "python").symlink_to(old)
        result = start(project / "run_vlm_training.sh", "--demo", **variables)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1 and version in result.stderr and "3.11" in result.stderr
    assert not (project / ".venv").exists()


def tools(folder):
    """A folder with what the scripts call, and no Python."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("env", "bash", "sh", "readlink", "dirname"):
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(shutil.which(name))
    return tools


def test_no_python_at_all_is_one_line(project, tmp_path):
    result = start(project / "run_vlm_training.sh", PATH=tools(tmp_path))
    assert result.returncode == 2 and "none was found" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "variables", [{"VLM_PYTHON": "no-such-python"}, {"VLM_PROCESSES": "two"}, {"VLM_PROCESSES": "0"}]
)
def test_a_variable_that_makes_no_sense_is_one_line(project, variables):
    result = start(project / "run_vlm_training.sh", **variables)
    (name, value), lines = next(iter(variables.items())), result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 1 and name in lines[0] and value in lines[0]


def test_packages_that_vlm_python_lacks_are_named_with_the_command_that_installs_them(tmp_path):
    project = make_project(tmp_path / "the project", "packaging>=9999\npebble>=1\n")
    result = start(project / "run_vlm_training.sh", "--demo", VLM_PYTHON=sys.executable)
    assert (result.returncode, result.stdout) == (2, "")
    assert "packaging (found" in result.stderr and "pebble" in result.stderr
    assert (
        shlex.join([sys.executable, "-m", "pip", "install", "-r", str(project / "requirements.txt")]) in result.stderr
    )


def test_several_processes_are_started_by_accelerate(project, tmp_path):
    recorder = make_program(
        tmp_path / "recorder",
        f'case $1 in *launch_processes.py) printf "%s\\n" "$@";; *) exec {shlex.quote(sys.executable)} "$@";; esac',
    )
    lines = start(
        project / "run_vlm_training.sh", "--task-description", "a b", VLM_PYTHON=recorder, VLM_PROCESSES=3
    ).stdout.splitlines()
    launcher = str(project / "launch_processes.py")
    assert lines[0] == launcher and lines[lines.index("--num_processes") + 1] == "3"
    assert lines[-3:] == [str(project / "train_vlm.py"), "--task-description", "a b"]
    lines = start(project / "run_vlm_training.sh", VLM_PYTHON=recorder, VLM_PROCESSES="config").stdout.splitlines()
    assert lines == [launcher, str(project / "train_vlm.py")]
    lines = start(project / "run_vlm_inference.sh", "a b.png", VLM_PYTHON=recorder, VLM_PROCESSES=2).stdout.splitlines()
    assert lines[0] == launcher and lines[-2:] == [str(project / "inference_vlm.py"), "a b.png"]


@pytest.mark.parametrize(("arguments", "selection"), [([], []), (["--fast"], ["-m", "not slow"])])
def test_run_tests_runs_all_checks(project, tmp_path, arguments, selection):
    recorder = make_program(
        tmp_path / "recorder",
        f'case "$1 $2" in -m*|*importlinter*) echo "$@";; *) exec {shlex.quote(sys.executable)} "$@";; esac',
    )
    style, form, imports, types, tests = start(
        project / "run_tests.sh", *arguments, VLM_PYTHON=recorder
    ).stdout.splitlines()
    assert (style, form, types) == ("-m ruff check .", "-m ruff format --check .", "-m mypy")
    assert "lint_imports_command" in imports
    options = [*selection, "--numprocesses", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
    assert tests == " ".join(["-m", "pytest", *options])


def test_run_tests_with_arguments_runs_pytest_only(project, tmp_path):
    make_program(tmp_path / "recorder", f'case $1 in -m) echo "$@";; *) exec {shlex.quote(sys.executable)} "$@";; esac')
    result = start("the project/run_tests.sh", "-k", "a", cwd=tmp_path, VLM_PYTHON="./recorder")
    assert result.stdout.splitlines() == ["-m pytest -k a"]


def test_run_tests_stops_at_the_first_check_that_fails(project, tmp_path):
    recorder = make_program(
        tmp_path / "recorder",
        'case "$1 $2" in "-m mypy") exit 3;; -m*|*importlinter*) echo "$@";; '
        f'*) exec {shlex.quote(sys.executable)} "$@";; esac',
    )
    result = start(project / "run_tests.sh", VLM_PYTHON=recorder)
    assert result.returncode == 3 and "pytest" not in result.stdout


# From here on .venv is really made, once for all tests of this file: `pebble` stands for the packages.


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A project whose first set-up was interrupted, after two more starts at the same time; and the variables of that
    machine."""
    folder = tmp_path_factory.mktemp("machine")
    wheels = folder / "wheels"
    wheels.mkdir()
    for name, version in (("pebble", "1.0"), ("pebble", "2.0"), ("stone", "1.0")):
        make_wheel(wheels, name, version)
    make_program(folder / "bin" / "python3.13", f'exec {shlex.quote(sys.executable)} "$@"')
    project = make_project(folder / "the project", "pebble>=1\n", "pebble==1.0\n")
    variables = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PIP_FIND_LINKS": wheels.as_uri()}
    help_first = start(project / "run_vlm_training.sh", "--epochs", "3", "--help", **variables)
    assert report(help_first)["arguments"] == ["--help"] and not (project / ".venv").exists()
    (project / ".venv" / "lib").mkdir(parents=True)
    (project / ".venv" / "lib" / "half a package").touch()
    (project / ".venv" / "vlm-setup").write_text("interrupted")
    command, environment = [project / "run_vlm_training.sh", "--demo"], surroundings(**variables)
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("Setting up" in notes for _, notes in outputs) == [False, True]
    assert all(Path(json.loads(out)["prefix"]) == project / ".venv" for out, _ in outputs)
    return project, variables


def installed(venv):
    """The packages of a .venv without pip, such as ["pebble-1.0"]."""
    names = {path.name.removesuffix(".dist-info") for path in venv.glob("lib/python*/site-packages/*.dist-info")}
    return sorted(name for name in names if not name.startswith(("pip-", "setuptools-")))


@pytest.mark.slow
def test_an_interrupted_set_up_is_begun_again(machine):
    assert not (machine[0] / ".venv" / "lib" / "half a package").exists()


@pytest.mark.slow
def test_the_first_start_installs_the_tested_versions(machine):
    assert installed(machine[0] / ".venv") == ["pebble-1.0"]


def test_a_later_start_skips_the_set_up(machine):
    project, variables = machine
    result = start(
        project / "run_vlm_training.sh", **variables | {"PIP_FIND_LINKS": "", "VIRTUAL_ENV": project / ".venv"}
    )
    assert Path(report(result)["prefix"]) == project / ".venv"
    assert result.stderr == ""


@pytest.mark.slow
def test_what_is_missing_is_installed_into_the_active_environment_and_what_fits_stays(machine, tmp_path):
    venv, variables = machine[0] / ".venv", machine[1]
    before = (venv / "vlm-setup").read_text()
    other = make_project(tmp_path / "other project", "pebble>=1\nstone\n", "pebble==2.0\n")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        result = start(other / "run_vlm_training.sh", **variables | {variable: venv})
        assert Path(report(result)["prefix"]) == venv and not (other / ".venv").exists()
        assert "Installing into the environment" in result.stderr
        assert installed(venv) == ["pebble-1.0", "stone-1.0"] and (venv / "vlm-setup").read_text() == before


@pytest.mark.slow
def test_after_a_set_up_that_failed_the_next_start_tries_again(machine):
    project, variables = machine
    keepsake = project / ".venv" / "keepsake"
    keepsake.touch()
    (project / "constraints.txt").write_text("pebble==2.0\n")
    result = start(project / "run_vlm_training.sh", **variables | {"PIP_FIND_LINKS": ""})
    assert result.returncode == 1 and "could not be installed" in result.stderr.splitlines()[-1]
    report(start(project / "run_vlm_training.sh", **variables))
    assert "pebble-2.0" in installed(project / ".venv")
    assert keepsake.exists()  # brought up to date, not made again
