"""`inference_vlm.py --serve`, from its arguments to a server that answers. Imports torch when all else is in order."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from vlm.common import doing, switches_as_before
from vlm.inference import check_arguments
from vlm.machine import wait_politely
from vlm.service.server import check_packages, open_port, serve


def run_server(args: argparse.Namespace, switches: ExitStack) -> None:
    """Answer images on a page and as JSON, until Ctrl-C or SIGTERM.

    Args:
        switches: gets what has to be put back afterwards of the libraries that are imported here.

    Raises:
        UsageError: the arguments do not go together, Gradio is missing, the port cannot be used, or the folders hold no
            model or no images.
        Stopped: it was ended.
    """
    check_arguments(args)
    check_packages()
    with open_port(args.host, args.port) as port:
        wait_politely()
        import torch

        from vlm.inference import load_model_and_metadata
        from vlm.machine import pick_threads
        from vlm.service.model import Served, find_examples, served_name, test_accuracy

        switches.enter_context(switches_as_before())
        torch.set_num_threads(pick_threads(args.threads))
        folder = Path(args.model_dir)
        examples = find_examples(args.examples, folder)
        with doing(f"loading --model-dir {args.model_dir}"):
            model, _, metadata = load_model_and_metadata(folder, args.device, args.dtype, args.abstain_below)
        name = served_name(args.model_dir)
        served = Served(model, metadata, test_accuracy(folder, metadata), args.exhaustive_scoring, name)
        serve(port, args.host, served, examples, args.batch_size)
