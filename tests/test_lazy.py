"""The faces of rooms and scripts that import their names when they are first used."""

import importlib
import subprocess
import sys

import pytest
from commands import ROOT

LAZY = ["vlm.common", "vlm.inference", "vlm.machine", "vlm.service", "vlm.training", "train_vlm", "inference_vlm"]


@pytest.mark.parametrize("module", LAZY)
def test_a_face_hands_on_every_name_that_it_lists(module):
    face = importlib.import_module(module)
    assert [name for name in face.__all__ if not hasattr(face, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = face.no_such_name


@pytest.mark.parametrize("module", [*LAZY, "vlm.config"])
def test_importing_a_face_imports_no_package(module):
    """`-S` leaves out the folder that packages are installed in."""
    done = subprocess.run([sys.executable, "-S", "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
