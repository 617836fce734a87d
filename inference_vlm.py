#!/usr/bin/env python3
"""Classify images with a trained model, from the command line or a notebook.

python inference_vlm.py --model-dir vlm_results/best_model image.png folder/
from inference_vlm import load_model_and_metadata, predict_single_image, predict_batch
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.common import RunError, Stopped, UsageError, doing, exit_code, lazy_names, printable, switches_as_before
from vlm.config import MOST, MOST_AT_ONCE, Parser, Settings, can_be_a_path, number, user_path, whole_number
from vlm.machine import wait_politely

if TYPE_CHECKING:
    from vlm.inference import load_model_and_metadata, predict_batch, predict_each, predict_single_image

__all__ = ["load_model_and_metadata", "main", "predict_batch", "predict_each", "predict_single_image"]

LONGEST_NAME = 240  # bytes of the name of --output: most file systems allow 255, and `.part` is put after it


# `from inference_vlm import predict_batch` works, and `--help` does not load torch.
__getattr__ = lazy_names(
    __name__,
    {"vlm.inference": ["load_model_and_metadata", "predict_batch", "predict_each", "predict_single_image"]},
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
        type=number,
        metavar="P",
        help="give no prediction if its confidence is below this; 0: always give one (default: as trained)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
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
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="threads of the CPU (default: its physical cores)"
    )
    for setting in fields(Settings):
        if setting.name in ("device", "dtype"):  # the same flags as in the training
            choices, text = setting.metadata["choices"], setting.metadata["help"]
            parser.add_argument(f"--{setting.name}", default=setting.default, choices=choices, help=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if any image could not be read."""
    args = build_parser().parse_args(arguments)
    with ExitStack() as switches:
        switches.enter_context(switches_as_before())
        switches.enter_context(stopped_by_sigterm())
        return exit_code(lambda: predict(args, switches), debug=args.debug)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, which clusters and `kill` send, does what Ctrl-C does, so that what was computed is kept. In another
    thread than the main one, Python handles no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def predict(args: argparse.Namespace, switches: ExitStack) -> None:
    """Classify what the arguments name and show or write it.

    Args:
        switches: gets what has to be put back afterwards of the libraries that are imported here.
    """
    args.images, args.model_dir = [user_path(path) for path in args.images], user_path(args.model_dir)
    args.output = args.output and user_path(args.output)
    for name, value, most in (("batch-size", args.batch_size, MOST), ("threads", args.threads, MOST_AT_ONCE)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name} {value}: expected a whole number of at least 1, and at most {most:,}.")
    if args.abstain_below is not None and not 0 <= args.abstain_below <= 1:
        raise UsageError(f"--abstain-below {args.abstain_below}: expected a probability, 0 to 1.")
    for name in (args.model_dir, *args.images):
        if not can_be_a_path(name):
            raise UsageError(f"{name}: expected a name that is not too long for a file or folder.")
    if args.output is not None:
        check_output(Path(args.output), Path(args.model_dir))
    wait_politely()
    import torch

    from vlm.common import note
    from vlm.data import find_images
    from vlm.inference import PredictionFile, PredictionTable, check_replaceable, load_model_and_metadata, predict_each
    from vlm.machine import pick_threads

    switches.enter_context(switches_as_before())
    if args.output:
        check_replaceable(Path(args.output))
    torch.set_num_threads(pick_threads(args.threads))
    paths = list(dict.fromkeys(map(str, find_images(args.images))))
    with doing(f"loading --model-dir {args.model_dir}"):
        model, processor, metadata = load_model_and_metadata(
            args.model_dir, args.device, args.dtype, args.abstain_below
        )
    options = {"exhaustive": args.exhaustive_scoring, "feature_cache": args.feature_cache}
    rows = predict_each(model, processor, paths, metadata, args.batch_size, args.explain, **options)
    readable = bool(model.prompts.readable_names)
    shown = PredictionFile(args.output, model.class_names, readable) if args.output else PredictionTable(args.explain)
    failed = []
    try:
        with shown, closing(rows):
            for path, result in rows:
                shown.add(path, result)
                if "error" in result:
                    failed.append(path)
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped after {shown.rows:,} of {len(paths):,} images. {shown.kept()}".rstrip()) from stop
    except Exception as error:
        if shown.rows and not isinstance(error, BrokenPipeError):
            note(f"{shown.rows:,} of {len(paths):,} images were classified before the error. {shown.kept()}")
        raise
    if args.output:
        note(f"{shown.rows} rows in {printable(args.output)}")
    if failed:
        others = "; the others are classified" if len(failed) < len(paths) else ""
        raise RunError(f"{len(failed)} of {len(paths)} images could not be read, such as {failed[0]}{others}.")


def check_output(path: Path, model_dir: Path) -> None:
    """Check, before the work, that its results can be written after it, and that nothing of another kind is lost.

    Raises:
        UsageError: they cannot.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UsageError(f"--output {path}: expected a name that ends in .csv or .jsonl.")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageError(f"--output {path}: expected a name of at most {LONGEST_NAME} bytes.")
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {path} cannot be written: choose another place, in a folder that exists.")
    if path.resolve().parent == model_dir.resolve():
        raise UsageError(f"--output {path} is in the folder of the model: choose another place.")


if __name__ == "__main__":
    sys.exit(main())
