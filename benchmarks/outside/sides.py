"""What the programs outside share: a request with models is read, an answer with what they made of them is written.

These files run in the environment of another program, so they import nothing of this one. A request is JSON:

    models    name -> folder, image (files), prompt, special_tokens, words (the most to be written)
    answer    the file to write: versions, and for each model text, or error, and perhaps how
"""

import importlib
import importlib.metadata
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
MOST_OF_AN_ERROR = 200  # characters


def answer_all(answer: Callable[[dict[str, Any]], dict[str, Any]], packages: Sequence[str]) -> None:
    """Let a program answer each model of the request that the command line names.

    Args:
        answer: one model of the request -> its answer. What it raises is the answer too.
        packages: those whose versions matter.
    """
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = {}
    for name, model in request["models"].items():
        try:
            answers[name] = answer(model)
        except Exception as error:  # whatever the other program raises
            traceback.print_exc()
            answers[name] = {"error": said(error)}
    versions = {name: importlib.metadata.version(name) for name in packages}
    Path(request["answer"]).write_text(json.dumps({"versions": versions, "models": answers}), encoding="utf-8")


def said(error: BaseException) -> str:
    """An error in one line that is not too long, without folders of this machine."""
    text = re.sub(r"(/[^\s/:'\"]+)+/", ".../", f"{type(error).__name__}: {' '.join(str(error).split())}")
    half = MOST_OF_AN_ERROR // 2
    return text if len(text) <= MOST_OF_AN_ERROR else f"{text[:half]} ... {text[-half:]}"


def load_for_a_cpu() -> None:
    """Make do with packages that are not built for the torch that is installed.

    PyPI has torchvision, torchaudio and torchcodec for Linux only with CUDA. Next to a torch without it they cannot be
    imported, because their compiled operators are missing. The processing of images needs none of them.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
    except ImportError:
        pass
    for package in ("torchaudio", "torchcodec"):
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError):
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                del sys.modules[name]
            sys.modules[package] = None  # type: ignore[assignment]  # as if it were not installed


KEPT: list[Any] = []  # a library that is freed takes its operators back
