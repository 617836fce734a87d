"""What pip makes of the project: a wheel with all files, the requirements of the requirement files, and two programs
that work in any folder."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest
from commands import ROOT
from packaging.requirements import Requirement

from vlm import __version__

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = ["vlm", "train_vlm.py", "inference_vlm.py", "test_vlm_setup.py", "pyproject.toml", "README.md", "LICENSE"]
REQUIREMENT_FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def requirements_in(name):
    """The requirements that a file of the project asks for."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return {Requirement(line) for line in lines if line}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the project and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for name in REQUIREMENT_FILES:
        shutil.copy(ROOT / name, source / name)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel, and a function that runs one of its programs with this Python's packages."""
    place, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)], check=True)

    def run(program, *arguments):
        command = [str(place / "bin" / program), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=240)

    return place, run


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "vlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_asks_for_what_the_requirement_files_say(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "bench", "cluster", "serve", "track"}
    asked = {Requirement(line) for line in metadata.get_all("Requires-Dist")}
    assert {one for one in asked if one.marker is None} == requirements_in("requirements.txt")
    for extra in ("dev", "bench", "cluster", "serve", "track"):
        wanted = {Requirement(f'{one}; extra == "{extra}"') for one in requirements_in(f"requirements-{extra}.txt")}
        assert wanted <= asked, extra


@pytest.mark.slow
def test_the_installed_programs_train_and_classify_in_any_folder(installed, tmp_path):
    place, run = installed
    for program in ("vlm-train", "vlm-predict"):
        done = run(program, "--help")
        assert done.returncode == 0 and f"usage: {program}" in done.stdout, done.stderr
    train = run("vlm-train", "--demo", "--max-samples", 60, "--epochs", 1, "--output-dir", tmp_path / "out")
    assert train.returncode == 0, train.stderr
    images = tmp_path / "out" / "demo_images"
    table = tmp_path / "predictions.jsonl"
    predict = run("vlm-predict", "--model-dir", tmp_path / "out" / "best_model", images, "--output", table)
    assert f"{place / 'bin' / 'vlm-predict'} --model-dir" in train.stderr, "the hint names the installed program"
    assert predict.returncode == 0, predict.stderr
    answers = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == len(list(images.iterdir())) and all(len(one["probabilities"]) == 10 for one in answers)


@pytest.mark.slow
def test_the_functions_of_the_scripts_can_be_imported_where_the_wheel_is_installed(installed, tmp_path):
    place, _ = installed
    code = (
        "import train_vlm, inference_vlm, test_vlm_setup\n"
        "from train_vlm import evaluate_vlm_model, vlm_collate_fn\n"
        "from inference_vlm import load_model_and_metadata, predict_batch, predict_single_image\n"
        "print(train_vlm.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(place / "train_vlm.py"), done.stderr


@pytest.mark.parametrize(
    "program",
    ["import setup_env", "import train_vlm; train_vlm.main(['-h'])", "import inference_vlm; inference_vlm.main(['-h'])"]
    + ["from vlm.machine import CHECKS, examine_machine"],
)
def test_set_up_doctor_and_help_need_nothing_but_python(program):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"
    bare = [sys.executable, "-S", "-c", code]  # -S: without site-packages
    done = subprocess.run(bare, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def imported_packages():
    """The names of the packages that the program imports, those of Python itself and its own left out."""
    names = set()
    for path in [*(ROOT / "vlm").rglob("*.py"), *(ROOT / name for name in SOURCES if name.endswith(".py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"vlm"}


def test_every_package_that_is_imported_is_declared():
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "pillow_heif": "pillow-heif"}
    declared = {one.name for one in requirements_in("requirements.txt")}
    extras = requirements_in("requirements-track.txt") | requirements_in("requirements-serve.txt")
    optional = {one.name for one in extras} | {"bitsandbytes", "pillow-heif"}
    imported = {names.get(name, name) for name in imported_packages()}
    assert {"torch", "scikit-learn", "tokenizers", "scipy"} <= imported, "the search for imports works"
    assert imported <= declared | optional


def test_what_the_tests_run_with_is_pinned_inside_the_ranges():
    pins = {one.name.lower().replace("_", "-"): one.specifier for one in requirements_in("constraints.txt")}
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-bench.txt"):
        for wanted in requirements_in(file):
            (pin,) = pins[wanted.name.lower().replace("_", "-")]
            assert pin.operator == "==" and wanted.specifier.contains(pin.version, prereleases=True), wanted


def test_the_range_of_python_is_the_one_that_the_set_up_accepts():
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    set_up = (ROOT / "setup_env.sh").read_text(encoding="utf-8")
    assert "2.* | 3.? | 3.10) stop" in set_up


def test_the_workflow_runs_the_one_check_command_on_every_version_of_python_that_is_named():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert re.findall(r'"(3\.\d+)"', workflow) == named == ["3.11", "3.12", "3.13", "3.14"]
    assert "run: ./run_tests.sh\n" in workflow


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout by git")
def test_scripts_are_checked_out_with_line_ends_that_bash_can_read():
    names = ["run_tests.sh", "run_vlm_training.sh", "setup_env.sh", ".ci/run"]
    done = subprocess.run(
        ["git", "check-attr", "eol", "--", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == ["lf"] * len(names)
