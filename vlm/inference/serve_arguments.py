"""The flags of `--serve`, and what does not go together with it. Needs no package, as `arguments.py`."""

import argparse

from vlm.common import UsageError, process_count
from vlm.config import can_be_a_path, flag_of, user_path, whole_number

HOST, PORT, LAST_PORT = "127.0.0.1", 7860, 65535
ONLY_SERVED = ("host", "port", "examples")
# What a server takes of all flags.
SERVED = (
    *("serve", *ONLY_SERVED, "model_dir", "device", "dtype", "threads", "debug"),
    *("abstain_below", "batch_size", "exhaustive_scoring"),
)


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--serve` and what belongs to it."""
    group = parser.add_argument_group("a page and a service instead of image files")
    group.add_argument(
        "--serve",
        action="store_true",
        help="classify what is dropped on a page or posted to /predict (docs/service.md)",
    )
    group.add_argument(
        "--host", metavar="ADDRESS", help=f"with --serve: the address to listen at (default: only this machine, {HOST})"
    )
    group.add_argument(
        "--port", type=whole_number, metavar="N", help=f"with --serve: its port; 0: a free one (default: {PORT})"
    )
    group.add_argument(
        "--examples",
        metavar="FOLDER",
        help="with --serve: images to choose on the page (default: demo_images next to the model, if it is there)",
    )


def check_serve(args: argparse.Namespace) -> None:
    """Check that what is asked for belongs to `--serve`, or to images that are named; fill in host and port.

    Raises:
        UsageError: it does not.
    """
    given = [name for name, value in vars(args).items() if value is not None and value is not False and value != []]
    for name in given:
        flag = "images" if name == "images" else flag_of(name)
        if args.serve and name not in SERVED:
            raise UsageError(
                f"--serve does not take {flag}: images come to the page, which shows all of their results."
            )
        if not args.serve and name in ONLY_SERVED:
            raise UsageError(f"{flag} needs --serve.")
    if args.serve and (processes := process_count()) > 1:
        raise UsageError(f"--serve is one process, and these are {processes}: leave out VLM_PROCESSES.")
    args.host, args.port = args.host or HOST, PORT if args.port is None else args.port
    if not 0 <= args.port <= LAST_PORT:
        raise UsageError(f"--port {args.port}: expected a whole number from 0 to {LAST_PORT}.")
    args.examples = args.examples and user_path(args.examples)
    if args.examples and not can_be_a_path(args.examples):
        raise UsageError(f"--examples {args.examples}: expected a name that is not too long for a folder.")
