"""The command line of `inference_vlm.py`. Needs no package, so that `--help` and a mistake are answered at once."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vlm.common import UsageError, process_count
from vlm.config import (
    MOST,
    MOST_AT_ONCE,
    PAGE,
    RESULTS,
    ClassifySettings,
    Parser,
    Settings,
    add_flag,
    can_be_a_path,
    classify_settings,
    flag_of,
    number,
    split_names,
    user_path,
    whole_number,
)
from vlm.inference.serve_arguments import add_serve_flags, check_serve

# The flags of the training that say how a dataset is read; they are fields of `Settings`. What is different here:
OF_A_DATASET: dict[str, dict[str, str]] = {
    "dataset": {
        "help": "classify the images of a dataset, any that the training reads; if they have labels, the model is "
        "tested: table, confusions and calibration as after a training"
    },
    "dataset_split": {
        "help": "with --dataset: the split, or a part of it, such as test[:100] (default: test, or the only one)",
        "metavar": "SPLIT",
    },
    "dataset_config": {},
    "image_column": {},
    "label_column": {
        "help": "column with the labels (default: found by its type, then by its name); none: classify without labels"
    },
    "no_header": {},
    "image_folder": {},
    "image_suffix": {},
    "class_names": {},
    "class_map": {"help": "JSON file: class name in the dataset -> class name of the model, if they differ"},
    "metrics": {"help": "your own metrics: FILE.py:FUNCTION(labels, predictions, probabilities, class_names)"},
}
REPORT = (PAGE, "confusion_matrix.png", "reliability.png")  # written into --report-dir with results.json
ENDINGS = (".csv", ".jsonl", ".parquet")  # of --output
LONGEST_NAME = 200  # bytes of the name of --output: most file systems allow 255, and .1of2.jsonl.part.json follows
OF_A_PUSH = ("push_to_hub", "public")


def build_parser() -> Parser:
    """The parser of `inference_vlm.py`."""
    parser = Parser(description="Classify images with a model that train_vlm.py has trained.")
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER", help="image files, or folders with image files")
    parser.add_argument(
        "--model-dir",
        default="vlm_results/best_model",
        metavar="FOLDER",
        help="the trained model, or owner/name of one on the hub (default: vlm_results/best_model)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write all probabilities to FILE.csv, FILE.jsonl or FILE.parquet, and print no table",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output where a command that was stopped or killed has left it",
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
    for name in ("device", "dtype"):  # the same flags as in the training
        add_flag(parser, name, default=getattr(Settings, name))
    group = parser.add_argument_group("a dataset instead of image files")
    for name, changes in OF_A_DATASET.items():
        add_flag(group, name, *({_shown_flag(name)} - {flag_of(name)}), **changes)
    group.add_argument(
        "--report-dir",
        metavar="FOLDER",
        help="write the page of the test, its figures and results.json into this folder",
    )
    add_serve_flags(parser)
    group = parser.add_argument_group("instead of classifying")
    for name in OF_A_PUSH:
        add_flag(group, name, default=getattr(Settings, name))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments, and expand the paths in them, before anything heavy is imported.

    Raises:
        UsageError: something that cannot be asked for.
    """
    if args.public:
        raise UsageError("--public says how to push, and not where to: add --push-to-hub OWNER/NAME, or leave it out.")
    check_serve(args)
    args.images, args.model_dir = [user_path(path) for path in args.images], user_path(args.model_dir)
    args.output = args.output and user_path(args.output)
    args.report_dir = args.report_dir and user_path(args.report_dir)
    if not args.serve:
        _check_what_is_classified(args)
    for name, value, most in (("batch-size", args.batch_size, MOST), ("threads", args.threads, MOST_AT_ONCE)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name} {value}: expected a whole number of at least 1, and at most {most:,}.")
    if args.abstain_below is not None and not 0 <= args.abstain_below <= 1:
        raise UsageError(f"--abstain-below {args.abstain_below}: expected a probability, 0 to 1.")
    for name in (args.model_dir, *args.images):
        if not can_be_a_path(name):
            raise UsageError(f"{name}: expected a name that is not too long for a file or folder.")
    processes = process_count()
    for what, asked in (("--resume", args.resume), (f"{processes} processes", processes > 1)):
        if asked and args.output is None:
            raise UsageError(f"{what}: name the file of the predictions with --output, such as predictions.csv.")
    if args.output is not None:
        check_output(Path(args.output), Path(args.model_dir))


def check_push_arguments(args: argparse.Namespace) -> None:
    """Check that --push-to-hub is given with nothing that it does not need, and expand the path of the model.

    Raises:
        UsageError: there is more.
    """
    usual, needed = vars(build_parser().parse_args([])), {"model_dir", "debug", *OF_A_PUSH}
    for name, value in vars(args).items():
        if name not in needed and value != usual[name]:
            given = args.images[0] if name == "images" else _shown_flag(name)
            raise UsageError(f"--push-to-hub uploads the model and classifies nothing: leave out {given}.")
    args.model_dir = user_path(args.model_dir)


def check_output(path: Path, model_dir: Path) -> None:
    """Check, before the work, that its results can be written after it, and that nothing of another kind is lost.

    Raises:
        UsageError: they cannot.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--output {path}: expected a name that ends in .csv, .jsonl or .parquet.")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageError(f"--output {path}: expected a name of at most {LONGEST_NAME} bytes.")
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {path} cannot be written: choose another place, in a folder that exists.")
    if path.resolve().parent == model_dir.resolve():
        raise UsageError(f"--output {path} is in the folder of the model: choose another place.")


def _check_what_is_classified(args: argparse.Namespace) -> None:
    """Check that either images or a dataset are named; `args.data` becomes the settings of the dataset, or None."""
    given = {name: getattr(args, name) for name in OF_A_DATASET if getattr(args, name) not in (None, False)}
    if args.dataset is None:
        if not args.images:
            raise UsageError(
                "nothing to classify: name images or folders (IMAGE_OR_FOLDER), or give --dataset or --serve."
            )
        flags = [_shown_flag(name) for name in given] + (["--report-dir"] if args.report_dir is not None else [])
        if flags:
            raise UsageError(f"{' and '.join(flags)}: only with --dataset. Leave out what is not needed.")
        args.data = None
        return
    if args.images:
        raise UsageError(f"--dataset and {args.images[0]} exclude each other: give a dataset, or images and folders.")
    if args.class_names:
        given["class_names"] = split_names(args.class_names)
    args.data = classify_settings(given)
    if args.report_dir is not None:
        check_report_dir(args.report_dir, Path(args.model_dir), args.data.dataset)


def _shown_flag(name: str) -> str:
    return ClassifySettings.split_flag if name == "dataset_split" else flag_of(name)


def check_report_dir(report_dir: str | Path, model_dir: Path, dataset: Any) -> None:
    """Check, before the work, that a report can be written into a folder, and that nothing of another kind is lost.

    Raises:
        UsageError: it cannot.
    """
    folder = Path(report_dir)
    if not str(report_dir).strip() or not can_be_a_path(str(folder)) or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--report-dir {report_dir}: expected the name of a folder.")
    if Path().absolute().is_relative_to(folder.absolute().resolve()):
        raise UsageError(
            f"--report-dir {folder} is the folder that you are in, or one above it. Name one for the {len(REPORT) + 1} "
            "files of the report, such as test_report."
        )
    for flag, other in (("--model-dir", model_dir), ("--dataset", dataset)):
        if other and Path(other).is_dir() and folder.resolve().is_relative_to(Path(other).resolve()):
            raise UsageError(f"--report-dir {folder} is in the folder of {flag}: choose another place.")
    there = [name for name in (*REPORT, RESULTS) if os.path.lexists(folder / name)]
    if there and not _is_report(folder / RESULTS):
        raise UsageError(f"--report-dir {folder} holds {there[0]} of something else: choose another folder.")


def _is_report(path: Path) -> bool:
    """Whether a `results.json` is that of a test of a saved model."""
    try:
        return path.is_file() and "tested" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
