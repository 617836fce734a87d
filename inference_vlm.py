#!/usr/bin/env python3
"""Classify images with a trained model, from the command line or a notebook.

python inference_vlm.py --model-dir vlm_results/best_model image.png folder/
python inference_vlm.py --model-dir vlm_results/best_model --dataset my_test_images/
python inference_vlm.py --model-dir vlm_results/best_model --push-to-hub owner/name
from inference_vlm import load_model_and_metadata, predict_single_image, predict_batch, evaluate
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import UsageError, doing, exit_code, lazy_names, printable, switches_as_before
from vlm.config import PAGE
from vlm.inference import build_parser, check_arguments, check_push_arguments
from vlm.machine import wait_politely
from vlm.service import run_server

if TYPE_CHECKING:
    from vlm.classifier import VLMClassifier
    from vlm.inference import (
        BatchPredictor,
        Options,
        evaluate,
        load_model_and_metadata,
        predict_batch,
        predict_each,
        predict_single_image,
    )

__all__ = [
    "BatchPredictor",
    "evaluate",
    "load_model_and_metadata",
    "main",
    "predict_batch",
    "predict_each",
    "predict_single_image",
]

# `from inference_vlm import predict_batch` works, and `--help` does not load torch.
__getattr__ = lazy_names(
    __name__,
    {
        "vlm.inference": [
            "BatchPredictor",
            "evaluate",
            "load_model_and_metadata",
            "predict_batch",
            "predict_each",
            "predict_single_image",
        ]
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if any image could not be read."""
    args = build_parser().parse_args(arguments)
    with ExitStack() as switches:
        switches.enter_context(switches_as_before())
        switches.enter_context(stopped_by_sigterm())
        command = push if args.push_to_hub is not None else run_server if args.serve else predict
        return exit_code(lambda: command(args, switches), debug=args.debug)


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


def push(args: argparse.Namespace, switches: ExitStack) -> None:
    """Upload the model; the arguments are those of `predict`."""
    check_push_arguments(args)
    from vlm.common import note
    from vlm.inference import read_metadata
    from vlm.sharing import push_model

    switches.enter_context(switches_as_before())
    folder = Path(args.model_dir)
    note(f"The model is at {push_model(folder, read_metadata(folder), args.push_to_hub, args.public)}")


def predict(args: argparse.Namespace, switches: ExitStack) -> None:
    """Classify what the arguments name and show or write it.

    Args:
        switches: gets what has to be put back afterwards of the libraries that are imported here.
    """
    check_arguments(args)
    wait_politely()
    import torch

    from vlm.inference import check_replaceable
    from vlm.machine import pick_threads

    switches.enter_context(switches_as_before())
    if args.output:
        check_replaceable(Path(args.output))
    torch.set_num_threads(pick_threads(args.threads))
    (classify_dataset if args.data else classify_files)(args)


def classify_files(args: argparse.Namespace) -> None:
    """Classify image files and folders of them."""
    from vlm.common import note
    from vlm.data import find_images
    from vlm.inference import Files, Job, about_rows, check_all_read, run_job, show_table
    from vlm.machine import Team

    items, team = Files(find_images(args.images)), Team()
    model, metadata, options = load(args)
    if args.output:
        readable = bool(model.prompts.readable_names)
        job = Job(Path(args.output), model.class_names, readable, team, about_rows(model, options), args.resume)
        tally = run_job(model, metadata, items, options, job)
        note(f"{tally.rows:,} rows in {printable(args.output)}")
    else:
        tally = show_table(model, metadata, items, options)
    check_all_read(tally)


def classify_dataset(args: argparse.Namespace) -> None:
    """Classify the images of a dataset and, if they have labels, test the model."""
    from vlm.common import format_table, note
    from vlm.evaluation import load_metric
    from vlm.inference import LABEL, SavedModelTest, check_all_read, match_items, print_results, read_images_for
    from vlm.machine import Team

    metrics = [load_metric(name) for name in args.metrics or ()]
    with doing(f"reading --dataset {args.dataset}"):
        images = read_images_for(args.model_dir, args.data)
    team = Team()
    model, metadata, options = load(args)
    items = match_items(images, args.data, model.prompts, metadata)
    note("\n" + format_table(items.summary) + "\n")
    if not items.has_labels and (args.report_dir or metrics):
        raise UsageError("--report-dir and --metrics are about a test, and no image has a label: leave them out.")
    test = SavedModelTest(model, metadata, args.model_dir, items, args.data, options)
    tally = test.run(team, args.output, args.resume, shows=lambda item: item.more[LABEL] is None)
    if args.output:
        note(f"{tally.rows:,} rows in {printable(args.output)}")
    if items.has_labels:
        print_results(test.results(metrics, args.report_dir))
        page = args.report_dir and Path(args.report_dir) / PAGE
        note(printable(f"The page is {page}." if page else "--report-dir FOLDER writes a page about it."))
    check_all_read(tally)


def load(args: argparse.Namespace) -> "tuple[VLMClassifier, dict[str, Any], Options]":
    """The model, its metadata, and how it is to classify."""
    from vlm.inference import Options, load_model_and_metadata

    with doing(f"loading --model-dir {args.model_dir}"):
        model, _, metadata = load_model_and_metadata(args.model_dir, args.device, args.dtype, args.abstain_below)
    return model, metadata, Options(args.batch_size, args.explain, True, args.exhaustive_scoring, args.feature_cache)


if __name__ == "__main__":
    sys.exit(main())
