#!/usr/bin/env python3
"""Classify images with a trained model, from the command line or a notebook.

python inference_vlm.py --model-dir vlm_results/best_model image.png folder/
python inference_vlm.py --model-dir vlm_results/best_model --push-to-hub owner/name
from inference_vlm import load_model_and_metadata, predict_single_image, predict_batch
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.common import doing, exit_code, lazy_names, printable, switches_as_before
from vlm.inference import build_parser, check_arguments, check_push_arguments
from vlm.machine import wait_politely

if TYPE_CHECKING:
    from vlm.inference import (
        BatchPredictor,
        load_model_and_metadata,
        predict_batch,
        predict_each,
        predict_single_image,
    )

__all__ = [
    "BatchPredictor",
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
        command = push if args.push_to_hub else predict
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

    from vlm.common import note
    from vlm.data import find_images
    from vlm.inference import (
        Files,
        Job,
        Options,
        about_rows,
        check_all_read,
        check_replaceable,
        load_model_and_metadata,
        run_job,
        show_table,
    )
    from vlm.machine import Team, pick_threads

    switches.enter_context(switches_as_before())
    if args.output:
        check_replaceable(Path(args.output))
    torch.set_num_threads(pick_threads(args.threads))
    items, team = Files(find_images(args.images)), Team()
    with doing(f"loading --model-dir {args.model_dir}"):
        model, _, metadata = load_model_and_metadata(args.model_dir, args.device, args.dtype, args.abstain_below)
    options = Options(args.batch_size, args.explain, True, args.exhaustive_scoring, args.feature_cache)
    if args.output:
        readable = bool(model.prompts.readable_names)
        job = Job(Path(args.output), model.class_names, readable, team, about_rows(model, options), args.resume)
        tally = run_job(model, metadata, items, options, job)
        note(f"{tally.rows} rows in {printable(args.output)}")
    else:
        tally = show_table(model, metadata, items, options)
    check_all_read(tally)


if __name__ == "__main__":
    sys.exit(main())
