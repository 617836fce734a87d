#!/usr/bin/env python3
"""Classify images with a trained model, from the command line or a notebook.

python inference_vlm.py --model-dir vlm_results/best_model image.png folder/
from inference_vlm import load_model_and_metadata, predict_single_image, predict_batch
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import RunError, UsageError, WriteError, exit_code, lazy_names
from vlm.config import Parser, Settings
from vlm.machine import wait_politely

if TYPE_CHECKING:
    from vlm.inference import load_model_and_metadata, predict_batch, predict_single_image

__all__ = ["load_model_and_metadata", "main", "predict_batch", "predict_single_image"]


# `from inference_vlm import predict_batch` works, and `--help` does not load torch.
__getattr__ = lazy_names(
    __name__,
    {"vlm.inference": ["load_model_and_metadata", "predict_batch", "predict_single_image"]},
)


def build_parser() -> Parser:
    """The parser of `inference_vlm.py`."""
    parser = Parser(description="Classify images with a model that train_vlm.py has trained.")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, or folders with image files")
    parser.add_argument(
        "--model-dir",
        default="vlm_results/best_model",
        metavar="FOLDER",
        help="the trained model (default: vlm_results/best_model)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write all probabilities to FILE.csv or FILE.jsonl, and print no table"
    )
    parser.add_argument(
        "--explain", action="store_true", help="also show a text for each image, whose answer is the prediction"
    )
    parser.add_argument(
        "--abstain-below",
        type=float,
        metavar="P",
        help="give no prediction if its confidence is below this; 0: always give one (default: as trained)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images in one forward pass (default: what fits into the free memory)",
    )
    parser.add_argument(
        "--exhaustive-scoring", action="store_true", help="score every class to the end, also improbable ones (slower)"
    )
    parser.add_argument(
        "--feature-cache",
        action="store_true",
        help="cache the vision features of the images, so that the next call on them is faster",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: its physical cores)")
    for setting in fields(Settings):
        if setting.name in ("device", "dtype"):  # the same flags as in the training
            choices, text = setting.metadata["choices"], setting.metadata["help"]
            parser.add_argument(f"--{setting.name}", default=setting.default, choices=choices, help=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if any image could not be read."""
    args = build_parser().parse_args(arguments)
    return exit_code(lambda: predict(args), debug=args.debug)


def predict(args: argparse.Namespace) -> None:
    """Classify what the arguments name and show or write it."""
    for name, value in (("batch-size", args.batch_size), ("threads", args.threads)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected a whole number of at least 1.")
    if args.abstain_below is not None and not 0 <= args.abstain_below <= 1:
        raise UsageError(f"--abstain-below {args.abstain_below}: expected a probability, 0 to 1.")
    if args.output:
        check_output(Path(args.output))
    wait_politely()
    import torch

    from vlm.data import find_images
    from vlm.inference import load_model_and_metadata, predict_batch
    from vlm.machine import pick_threads

    torch.set_num_threads(pick_threads(args.threads))
    paths = find_images(args.images)
    model, processor, metadata = load_model_and_metadata(args.model_dir, args.device, args.dtype, args.abstain_below)
    options = {"exhaustive": args.exhaustive_scoring, "feature_cache": args.feature_cache}
    results = predict_batch(model, processor, paths, metadata, args.batch_size, args.explain, **options)
    if args.output:
        write_results(Path(args.output), results)
    else:
        print_results(results, args.explain)
    failed = [path for path, result in results.items() if "error" in result]
    if failed:
        others = "; the others are classified" if len(failed) < len(results) else ""
        raise RunError(f"{len(failed)} of {len(results)} images could not be read, such as {failed[0]}{others}.")


def check_output(path: Path) -> None:
    """Check, before the work, that its results can be written after it.

    Raises:
        UsageError: they cannot.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UsageError(f"--output {path}: expected a name that ends in .csv or .jsonl.")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {path} cannot be written: choose another place, in a folder that exists.")


def print_results(results: dict[str, dict[str, Any]], explain: bool) -> None:
    """Print a table to stdout: path, prediction, confidence, and the second-best class (if abstained, the two best).

    Args:
        explain: print the texts after the table.
    """
    from vlm.common import format_table

    rows = []
    for path, result in results.items():
        if "error" in result:
            rows.append((path, "-", "-", f"error: {result['error']}"))
            continue
        first, second = (
            f"{name} {p:.4f}" for name, p in sorted(result["probabilities"].items(), key=lambda item: -item[1])[:2]
        )
        if result.get("abstained"):
            rows.append((path, "(abstained)", f"{result['confidence']:.4f}", f"{first}, {second}"))
        else:
            rows.append((path, result["prediction"], f"{result['confidence']:.4f}", second))
    print(format_table(rows, headers=("image", "prediction", "confidence", "next")))
    if explain:
        for path, result in results.items():
            print(
                f"\n{path}\n{'(abstained)' if result.get('abstained') else result.get('full_response', '(not read)')}"
            )
    sys.stdout.flush()  # before what is said of errors


def write_results(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write one row an image, whole or not at all: CSV with a column a class, or JSON lines."""
    from vlm.common import replacing

    try:
        with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                file.writelines(
                    json.dumps({"path": name, **result}, ensure_ascii=False) + "\n" for name, result in results.items()
                )
            else:
                _write_csv(file, results)
    except WriteError as error:
        raise UsageError(f"--output {path} cannot be written ({error.reason}): choose another place.") from error
    print(f"{len(results)} rows in {path}", file=sys.stderr)


def _write_csv(file: Any, results: dict[str, dict[str, Any]]) -> None:
    classes = next((list(result["probabilities"]) for result in results.values() if "probabilities" in result), [])
    writer = csv.writer(file)
    figures = ("prediction", "confidence", "error_bound", "abstained", "error", "full_response")
    writer.writerow(["path", *figures, *(f"p({name})" for name in classes)])
    for name, result in results.items():
        probabilities = result.get("probabilities", {})
        writer.writerow([name, *map(result.get, figures), *(probabilities.get(class_name) for class_name in classes)])


if __name__ == "__main__":
    sys.exit(main())
