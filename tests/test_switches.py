"""What a program called from another one leaves as it was: global switches of Python and of libraries."""

import locale
import os
import random
import signal
import subprocess
import sys
import warnings
from threading import Thread

import accelerate.state
import datasets
import matplotlib
import numpy as np
import pytest
import torch
import transformers
from commands import ROOT, classify, train
from PIL import Image, ImageFile

from vlm.common import switches_as_before

LOUD = transformers.utils.logging


def switches():
    """All switches that a program of this kind may change, read without the help of the program."""
    mask = os.umask(0o022)
    os.umask(mask)
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": mask,
        "locale": locale.setlocale(locale.LC_ALL),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "generators": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "transformers": (LOUD.get_verbosity(), LOUD.is_progress_bar_enabled()),
        "datasets": (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()),
        "images": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "figures": dict(matplotlib.rcParams),
        "accelerate": dict(accelerate.state.AcceleratorState._shared_state),
    }


def change_all(folder):
    """Change what is in `switches`, and can be changed on any machine."""
    os.environ["NEW"] = "1"
    os.environ["HOME"] = "/elsewhere"
    del os.environ["PATH"]
    os.chdir(folder)
    locale.setlocale(locale.LC_ALL, "C")
    warnings.simplefilter("error")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    LOUD.set_verbosity_debug()
    LOUD.disable_progress_bar()
    datasets.logging.set_verbosity_debug()
    datasets.disable_progress_bars()
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = 7, True
    accelerate.state.AcceleratorState._shared_state["new"] = 1


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_switches_are_put_back(tmp_path, error):
    before = switches()
    try:
        with switches_as_before():
            change_all(tmp_path)
            assert [name for name, value in switches().items() if value == before[name]] == [
                "umask",
                "signals",
                "figures",
            ]
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert switches() == before


@pytest.mark.slow
def test_both_programs_work_in_a_thread_and_leave_no_switch_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA", raising=False)
    flags = ["--demo", "--max-samples", 20, "--epochs", 1, "--threads", 2, "--device", "cpu"]
    codes, before = [], switches()

    def programs():
        codes.append(train(*flags, "--output-dir", tmp_path / "results"))
        codes.append(train(*flags, "--label-column", "nothing", "--output-dir", tmp_path / "wrong", "--epochs", "-1"))
        codes.append(classify("--model-dir", tmp_path / "results/best_model", tmp_path / "results/demo_images"))

    thread = Thread(target=programs)
    thread.start()
    thread.join()
    assert codes == [0, 2, 0]
    assert switches() == before
    with monkeypatch.context() as patched:
        patched.setattr("vlm.training.running.set_up", lambda settings: 1 / 0)
        assert train(*flags, "--output-dir", tmp_path / "broken") == 1
    assert switches() == before


FRESH = """
import os, sys
import {program}

before = dict(os.environ)
code = {program}.main(sys.argv[1:])
import torch
assert dict(os.environ) == before, before.keys() ^ os.environ.keys()
print(code, torch.get_num_threads())
"""


@pytest.mark.slow
def test_a_program_that_imports_the_libraries_itself_leaves_them_as_they_were_then(demo_run):
    model, images = demo_run / "best_model", demo_run / "demo_images"
    flags = ["--threads", "3", "--model-dir", str(model), str(images), "--device", "cpu"]
    program = FRESH.format(program="inference_vlm")
    result = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 1", result.stderr  # OMP_NUM_THREADS is 1 in tests
