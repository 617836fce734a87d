"""The doctor, with machines that are ill in known ways."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.config import DEFAULT_DATASET, DEFAULT_MODEL
from vlm.machine import doctor
from vlm.machine.doctor import FAILURE, OK, WARNING, Finding

ROOT = Path(__file__).resolve().parent.parent


def levels(findings):
    return [finding.level for finding in findings]


def examine(*checks, last=None, **options):
    """The exit code and the lines of the report."""
    lines = []
    code = doctor.examine_machine(checks, last, write=lines.append, **options)
    return code, "\n".join(lines)


def test_warnings_do_not_keep_a_machine_from_training_and_a_failure_does():
    def well():
        yield Finding(OK, "this is well")
        yield Finding(WARNING, "this is slow", "buy a faster one")

    def ill():
        yield Finding(FAILURE, "this is broken", "mend it")

    code, report = examine(well, last=well)
    assert code == 0 and "can train, with 2 warnings." in report and "cure: buy a faster one" in report
    code, report = examine(well, ill, last=well)
    assert code == 1 and "cannot train yet: 1 failure, 2 warnings." in report and "training: not tried" in report
    assert "\033" not in report and "\033[31mfailure" in examine(ill, color=True)[1]


def test_a_check_that_breaks_is_a_failure_and_the_rest_goes_on():
    def breaks():
        yield Finding(OK, "so far so good")
        raise OSError("first line\nthe disk is on fire")

    def well():
        yield Finding(OK, "still here")

    code, report = examine(breaks, well)
    assert code == 1 and "breaks: OSError: the disk is on fire" in report and "still here" in report
    with pytest.raises(OSError):
        examine(breaks, debug=True)


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10, 14), FAILURE), ((3, 11, 0), OK), ((3, 14, 2), OK), ((3, 15, 0), WARNING)]
)
def test_the_version_of_python_is_judged(version, level):
    assert levels(doctor.python(version)) == [level]


def test_packages_that_are_missing_or_too_old_are_named_with_the_command_that_installs_them(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# a comment\nnumpy>=1,<99  # arrays\n\nno-such-package>=2\nnumpy>=99\n")
    findings = list(doctor.packages(file))
    assert levels(findings) == [OK, FAILURE, FAILURE]
    assert "not installed, no-such-package>=2 is needed" in findings[1].text
    assert "is installed, numpy>=99 is needed" in findings[2].text
    assert findings[1].cure == f"{sys.executable} -m pip install -r {file}"


def test_without_a_requirement_file_the_installed_program_says_what_it_needs(monkeypatch, tmp_path):
    wanted = ["numpy<99,>=1", "no-such-package>=2", 'no-such-tool; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    findings = list(doctor.packages(tmp_path / "requirements.txt"))
    assert levels(findings) == [OK, FAILURE]
    assert findings[1].cure == f"{sys.executable} -m pip install 'no-such-package>=2'"


def test_the_requirements_of_this_project_are_met_here():
    assert set(levels(doctor.packages())) == {OK}


def test_a_machine_without_torch_and_transformers_gets_a_whole_report(monkeypatch):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    code, report = examine(doctor.transformers, doctor.device, doctor.memory)
    assert (
        code == 1
        and "transformers cannot be imported" in report
        and "device: ModuleNotFoundError" in report
        and "memory: " in report
    )


@pytest.mark.parametrize("torchvision", [True, False])
def test_a_torchvision_that_breaks_transformers_is_told_from_other_causes(monkeypatch, torchvision):
    def load(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "is_installed", lambda name: torchvision)
    (finding,) = doctor.transformers(load)
    assert finding.level == FAILURE and "nms does not exist" in finding.text
    assert finding.cure.endswith("-m pip uninstall torchvision") == torchvision


def test_an_nvidia_driver_that_torch_does_not_use_is_a_warning(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert levels(doctor.device()) == [OK]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert levels(doctor.device()) == [OK, WARNING]


@pytest.mark.parametrize(("free_gb", "level"), [(8, OK), (3, WARNING), (0.1, FAILURE)])
def test_memory_and_disk_are_judged_by_what_is_free(monkeypatch, tmp_path, free_gb, level):
    free = int(free_gb * 1e9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=int(64e9), available=free))
    assert levels(doctor.memory(tmp_path / "no limit")) == [level]
    not_there_yet = tmp_path / "a" / "b"
    assert levels(doctor.disk(not_there_yet, usage=lambda folder: (int(500e9), 0, free))) == [level, level]


def test_the_memory_limit_of_a_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=int(64e9), available=int(60e9)))
    for text, level in (("max\n", OK), ("2000000000\n", WARNING)):
        (tmp_path / "memory.max").write_text(text)
        assert levels(doctor.memory(tmp_path / "memory.max")) == [level]


def test_an_output_folder_that_cannot_be_written_is_a_failure(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    assert levels(doctor.output_folder(tmp_path / "new" / "results")) == [OK]
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    (finding,) = doctor.output_folder(tmp_path)
    assert finding.level == FAILURE and "Permission denied" in finding.text


def answers(returncode, stderr=""):
    """A stand-in for subprocess.run."""
    return lambda command, **options: subprocess.CompletedProcess(command, returncode, "", stderr)


def test_a_hub_that_cannot_be_reached_is_a_warning_with_a_cure():
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    assert levels(doctor.hub(answers(0))) == [OK, OK, OK]
    broken = list(doctor.hub(answers(1, "Traceback ...\nConnectError: Name or service not known\n")))
    assert (
        levels(broken) == [WARNING] * 3 and "Name or service not known" in broken[0].text and "--demo" in broken[0].cure
    )
    assert levels(doctor.hub(hangs)) == [WARNING] * 3


def test_what_is_in_the_cache_is_seen(monkeypatch, tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).touch()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file, **options: str(tmp_path / file))
    _, model, data = doctor.hub(answers(1, "no network"))
    assert model == Finding(OK, f"default model {DEFAULT_MODEL}: in the cache")
    assert data == Finding(OK, f"default dataset {DEFAULT_DATASET}: in the cache")


TRAIN = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--demo", action="store_true", required=True)
parser.add_argument("--max-samples", type=int)
parser.add_argument("--epochs", type=int)
parser.add_argument("--output-dir", type=pathlib.Path)
(parser.parse_args().output_dir / "best_model").mkdir(parents=True)
"""
PREDICT = """
import json, pathlib, sys
model, image, table = sys.argv[2], sys.argv[3], sys.argv[5]
assert pathlib.Path(model).is_dir() and pathlib.Path(image).is_file()
pathlib.Path(table).write_text(json.dumps({"path": image, "prediction": ANSWER}))
"""


@pytest.mark.parametrize(
    ("train", "answer", "expected"),
    [
        (TRAIN, '"zero"', [OK, OK]),
        ("import sys; sys.exit('error: no disk\\nhint: run it again')", '"zero"', [FAILURE]),
        (TRAIN, "None", [OK, OK, FAILURE]),
    ],
)
def test_the_training_check_runs_the_two_commands(tmp_path, train, answer, expected):
    (tmp_path / "train_vlm.py").write_text(train)
    (tmp_path / "inference_vlm.py").write_text(PREDICT.replace("ANSWER", answer))
    findings = list(doctor.trial_training(root=tmp_path))
    assert levels(findings) == expected
    assert expected != [FAILURE] or "exit code 1: error: no disk" in findings[0].text


def test_a_training_that_never_ends_is_a_failure():
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    assert levels(doctor.trial_training(hangs)) == [FAILURE]


def test_the_doctor_says_when_python_is_too_old_and_is_not_collected_as_a_test():
    code = "import runpy, sys; sys.version_info = (3, 9, 0); sys.argv[1:] = ['--quick']; sys.prefix = '/active'; "
    code += f"runpy.run_path({str(ROOT / 'test_vlm_setup.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("failure  Python 3.9\n") and "cure:" in result.stderr
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", ".", "--ignore=tests"]
    assert "no tests collected" in subprocess.run(collect, cwd=ROOT, capture_output=True, text=True).stdout


def test_the_size_of_the_vision_features_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    (found,) = doctor.vision_features()
    assert found == Finding(
        OK, f"vision features ({tmp_path / 'features'}): 0.0 kB, and never more than 20 GB (--cache-size)"
    )
    (tmp_path / "features" / "an encoder").mkdir(parents=True)
    with (tmp_path / "features" / "an encoder" / "image").open("wb") as file:
        file.truncate(1_500_000_000)  # takes no room
    assert ": 1.5 GB, " in next(doctor.vision_features()).text


def test_an_unreachable_hub_is_said_in_words():
    found = next(doctor.hub(answers(1, "Traceback ...\nhttpx2.ConnectError: [Errno -2] Name or service not known\n")))
    assert found.text == "hub: cannot be reached ([Errno -2] Name or service not known)"
