"""The checks of `test_vlm_setup.py`: whether this machine can train, and how to repair what keeps it from training.

A check is a function that yields findings. Packages are imported inside the checks, since they may be missing or
broken.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.common import dtype_name, size_text
from vlm.config import DEFAULT_DATASET, DEFAULT_MODEL, Settings
from vlm.machine.requirements import examine, examine_installed

ROOT = Path(__file__).resolve().parents[2]  # where the scripts are, next to the package
REQUIREMENTS = ROOT / "requirements.txt"  # not there if pip has installed the program
OK, WARNING, FAILURE = "ok", "warning", "failure"
COLORS = {OK: "\033[32m", WARNING: "\033[33m", FAILURE: "\033[31m"}
GIB = 2**30
# Estimates for the default model with 0.5 billion weights, 2 GB in float32: these, once more while a model is saved,
# activations, and PyTorch itself.
MEMORY_GIB = 6
OUTPUT_GIB = 7  # best_model, final_model, the checkpoint for --resume, and one more copy while one of them is written
DOWNLOADS_GIB = 4  # the model and the dataset
LEAST_GIB = 0.5  # less is not enough even for the demo
HUB_SECONDS = 3
TRAINING_SECONDS = 600


class Finding(NamedTuple):
    """What a check found. level: OK, WARNING or FAILURE; cure: what to do about it."""

    level: str
    text: str
    cure: str = ""


Check = Callable[[], Iterator[Finding]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def examine_machine(
    checks: Sequence[Check],
    last: Check | None,
    write: Callable[[str], object] = print,
    color: bool = False,
    debug: bool = False,
) -> int:
    """Run the checks and write a line for each finding.

    Args:
        last: a check that is left out after a failure, since it would fail for the same reason.
        debug: raise an error in a check; else it is a finding.

    Returns:
        the exit code: 0 this machine can train, 1 it cannot.
    """
    levels: list[str] = []

    def show(finding: Finding) -> None:
        levels.append(finding.level)
        write(_line(finding, color))

    for check in checks:
        for finding in _findings(check, debug):
            show(finding)
    if last and FAILURE in levels:
        show(Finding(WARNING, "training: not tried", "repair the failures first"))
    elif last:
        for finding in _findings(last, debug):
            show(finding)
    failures, warnings = levels.count(FAILURE), levels.count(WARNING)
    counts = ", ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in ((failures, FAILURE), (warnings, WARNING)) if n)
    verdict = "cannot train yet: " if failures else "can train, with " if counts else "can train"
    write(f"\nThis machine {verdict}{counts}.")
    return 1 if failures else 0


def _findings(check: Check, debug: bool) -> Iterator[Finding]:
    """What a check finds; an error in the check is a finding too."""
    try:
        yield from check()
    except Exception as error:
        if debug:
            raise
        name = getattr(check, "__name__", "check")
        yield Finding(
            FAILURE, f"{name}: {type(error).__name__}: {_last_line(str(error))}", "--debug shows the traceback"
        )


def _line(finding: Finding, color: bool) -> str:
    level = finding.level.ljust(9)
    if color:
        level = f"{COLORS[finding.level]}{level}\033[0m"
    cure = f"\n{'':9}cure: {finding.cure}" if finding.cure else ""
    return f"{level}{finding.text}{cure}"


def _last_line(text: str) -> str:
    """The line that says what went wrong: the last one that is not a hint."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("hint:")]
    return lines[-1] if lines else "no message"


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    """The version of Python, and where it is."""
    text = f"Python {'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 11):
        yield Finding(FAILURE, text, "install Python 3.11 or newer")
    elif version >= (3, 15):
        yield Finding(WARNING, f"{text}: the packages may not work on so new a version", "use Python 3.11 to 3.14")
    else:
        yield Finding(OK, text)


def packages(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """Each package that is required: whether it is installed, in a version that fits."""
    found = examine(requirements) if requirements.is_file() else examine_installed()
    for package in found:
        if package.fits:
            yield Finding(OK, f"{package.name} {package.found}")
        else:
            state = f"{package.found} is installed" if package.found else "not installed"
            text = f"{package.name}: {state}, {package.wanted} is needed"
            yield Finding(FAILURE, text, _pip("install", *_packages_for_pip(requirements, package.wanted)))


def _packages_for_pip(requirements: Path, wanted: str) -> list[str]:
    """What pip should install: all of the requirement file or, without one, the package that is wanted."""
    return ["-r", str(requirements)] if requirements.is_file() else [wanted]


def _pip(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *words])


def transformers(load: Callable[[str], object] = importlib.import_module) -> Iterator[Finding]:
    """Whether transformers can be used: it loads its parts one by one, and other packages may break some of them."""
    try:
        library = load("transformers")
        for name in (
            "AutoModelForImageTextToText",
            "AutoProcessor",
            "Idefics3ForConditionalGeneration",
            "Idefics3Processor",
        ):
            getattr(library, name)
    except Exception as error:
        text = f"transformers cannot be imported: {type(error).__name__}: {_last_line(str(error))}"
        if is_installed("torchvision"):
            text += " (often because torchvision does not match torch)"
            yield Finding(FAILURE, text, _pip("uninstall", "torchvision"))
        else:
            again = _packages_for_pip(REQUIREMENTS, "transformers")
            yield Finding(FAILURE, text, _pip("install", "--force-reinstall", *again))
    else:
        yield Finding(OK, "transformers can be imported")


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def device() -> Iterator[Finding]:
    """The device that `--device auto` takes, whether it computes, and the number format that it computes in."""
    import psutil
    import torch

    from vlm.machine.device import pick_device, pick_dtype

    found, text = pick_device("auto")
    torch.ones(2, 2, device=found).matmul(torch.ones(2, 2, device=found)).sum().item()
    dtype = dtype_name(pick_dtype("auto", found))
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    yield Finding(OK, f"device: {text}, computing in {dtype}; {cores} physical CPU cores")
    if found.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield _enough("GPU memory", free, total, MEMORY_GIB, "a smaller --model, or --tune connector")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            WARNING,
            f"device: there is an NVIDIA driver, but PyTorch {torch.__version__} finds no GPU",
            "install a build of PyTorch for the CUDA version of the driver (https://pytorch.org/get-started/locally), "
            "or update the driver",
        )


def _enough(name: str, free: float, total: float, wanted_gib: float, cure: str, least_gib: float = 0.0) -> Finding:
    """Whether there is enough of something.

    Args:
        free, total: bytes.
        wanted_gib: what the default model needs; less is a warning.
        least_gib: less is a failure.
    """
    text = f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= wanted_gib * GIB:
        return Finding(OK, text)
    level = FAILURE if free < least_gib * GIB else WARNING
    return Finding(level, f"{text}; the default model needs about {wanted_gib} GiB", cure)


def memory(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> Iterator[Finding]:
    """Free memory of the machine, or of the container if it has a limit."""
    import psutil

    machine = psutil.virtual_memory()
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    total = min(machine.total, int(limit)) if limit.isdigit() else machine.total
    cure = "close other programs, or take a smaller model: --model HuggingFaceTB/SmolVLM-256M-Instruct"
    yield _enough("memory", min(machine.available, total), total, MEMORY_GIB, cure, LEAST_GIB)


def disk(
    output: Path | None = None, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
) -> Iterator[Finding]:
    """Free space for the results, and for the files of the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = (
        ("results", output or Path(Settings.output_dir), OUTPUT_GIB, "give an --output-dir on another disk"),
        ("downloads", Path(HF_HUB_CACHE), DOWNLOADS_GIB, "set HF_HOME to a folder on another disk"),
    )
    for name, folder, wanted, other_place in places:
        total, _, free = usage(_existing(folder))
        text, cure = f"disk for {name} ({folder.absolute()})", f"free some space, or {other_place}"
        yield _enough(text, free, total, wanted, cure, LEAST_GIB)


def vision_features() -> Iterator[Finding]:
    """The folder of the feature cache, its size, and the size that it may have."""
    from vlm.families import cache_root

    folder = cache_root()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    limit = f"never more than {Settings.cache_size:g} GB (--cache-size)"
    yield Finding(OK, f"vision features ({folder}): {size_text(size)}, and {limit}")


def _existing(folder: Path) -> Path:
    """The folder or, if it does not exist, the nearest one above it that does."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def output_folder(output: Path | None = None) -> Iterator[Finding]:
    """Whether the results can be written."""
    output = output or Path(Settings.output_dir)
    try:
        with tempfile.TemporaryFile(dir=_existing(output)):
            yield Finding(OK, f"results can be written to {output.absolute()}")
    except OSError as error:
        text = f"results cannot be written to {output.absolute()}: {error.strerror}"
        yield Finding(FAILURE, text, "give another folder with --output-dir")


def hub(run: Run = subprocess.run) -> Iterator[Finding]:
    """Whether the hub can be reached, and whether the default model and dataset are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    missing = _why_unreachable(run)
    if missing:
        cure = "check the network and HTTPS_PROXY; without the hub, --demo, local data and the cache still work"
        yield Finding(WARNING, f"hub: cannot be reached ({missing})", cure)
    else:
        yield Finding(OK, "hub: can be reached")
    config = try_to_load_from_cache(DEFAULT_MODEL, "config.json")
    cached_model = isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))
    cached_data = isinstance(try_to_load_from_cache(DEFAULT_DATASET, "README.md", repo_type="dataset"), str)
    for kind, name, cached in (("model", DEFAULT_MODEL, cached_model), ("dataset", DEFAULT_DATASET, cached_data)):
        if cached:
            yield Finding(OK, f"default {kind} {name}: in the cache")
        elif missing:
            cure = f"train once while the hub can be reached, or give --{kind} a folder"
            yield Finding(WARNING, f"default {kind} {name}: not in the cache", cure)
        else:
            yield Finding(OK, f"default {kind} {name}: not in the cache yet; the first run downloads it")


def _why_unreachable(run: Run) -> str:
    """Empty if the hub answers. A process of its own asks, since the look-up of a name has no time limit."""
    ask = f"from huggingface_hub import HfApi; HfApi().model_info({DEFAULT_MODEL!r}, timeout={HUB_SECONDS})"
    try:
        result = run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=HUB_SECONDS + 5)
    except subprocess.TimeoutExpired:
        return f"no answer within {HUB_SECONDS + 5} seconds"
    if not result.returncode:
        return ""
    return re.sub(r"^[\w.]+: ", "", _last_line(result.stderr))  # without the name of the exception


def trial_training(run: Run = subprocess.run, root: Path = ROOT, debug: bool = False) -> Iterator[Finding]:
    """Train the demo on a few images, save, load and predict, as a user would.

    Args:
        root: the folder of the scripts.
        debug: show all that they print.
    """
    with tempfile.TemporaryDirectory(prefix="vlm_check_") as name:
        folder = Path(name)
        image, table = folder / "digit.png", folder / "predictions.jsonl"
        _draw_digit(image)
        model = folder / "run" / "best_model"
        train = ["train_vlm.py", "--demo", "--max-samples", "100", "--epochs", "1", "--output-dir", str(folder / "run")]
        predict = ["inference_vlm.py", "--model-dir", str(model), str(image), "--output", str(table)]
        for what, (script, *flags) in (("train and save", train), ("load and predict", predict)):
            start = time.monotonic()
            problem = _try([sys.executable, str(root / script), *flags], run, folder, debug)
            if problem:
                again = "python test_vlm_setup.py --debug shows all that it printed"
                yield Finding(FAILURE, f"{what}: {problem}", again)
                return
            yield Finding(OK, f"{what}: {time.monotonic() - start:.0f} s")
        answer = json.loads(table.read_text(encoding="utf-8").splitlines()[0])
        if answer.get("prediction") is None:
            text = f"load and predict: no prediction in {answer}"
            yield Finding(FAILURE, text, "report this: it is a mistake in the program")


def _try(command: list[str], run: Run, folder: Path, debug: bool) -> str:
    """Empty if the command worked, else what went wrong. What it prints is shown only with `debug`."""
    try:
        result = run(command, cwd=folder, text=True, timeout=TRAINING_SECONDS, capture_output=not debug)
    except subprocess.TimeoutExpired:
        return f"not done after {TRAINING_SECONDS} seconds"
    return f"exit code {result.returncode}: {_last_line(result.stderr or '')}" if result.returncode else ""


def _draw_digit(path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    Image.fromarray((digits.images[0] * 255 / 16).astype("uint8")).save(path)


CHECKS: tuple[Check, ...] = (python, packages, transformers, device, memory, disk, vision_features, output_folder, hub)
