#!/usr/bin/env python3
"""Train a small vision-language model to classify images.

python train_vlm.py --demo
python train_vlm.py --model HuggingFaceTB/SmolVLM-256M-Instruct --dataset my_images/
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import UsageError, exit_code, lazy_names
from vlm.config import METADATA, RunSettings, Settings, parse_arguments, read_run, read_settings, resolve
from vlm.machine import wait_politely

if TYPE_CHECKING:
    from vlm.classifier import vlm_collate_fn
    from vlm.evaluation import evaluate_vlm_model

__all__ = ["evaluate_vlm_model", "main", "vlm_collate_fn"]


# `from train_vlm import vlm_collate_fn` works, and `--help` does not load torch.
__getattr__ = lazy_names(__name__, {"vlm.classifier": ["vlm_collate_fn"], "vlm.evaluation": ["evaluate_vlm_model"]})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: train(given), debug=given.get("debug", False))


def train(given: dict[str, Any]) -> None:
    """Train with the flags that were given.

    Args:
        given: values by field name of `Settings`.
    """
    if given.get("list_models"):
        from vlm.machine import list_models

        return list_models(resolve(given))
    output = Path(given.get("output_dir", Settings.output_dir))
    settings = resolve(given, saved_settings(output) if given.get("resume") else None)
    from vlm.training import StopSignals, check_output

    check_output(settings)
    signals = StopSignals(settings.output_dir)
    signals.listen()  # before the heavy imports, which take seconds
    wait_politely()
    from vlm.training import fit

    fit(settings, signals.should_stop, signals.enter)


def saved_settings(output: Path) -> RunSettings:
    """The settings of the interrupted run in a folder.

    Raises:
        UsageError: there is none, or its metadata are damaged.
    """
    if not (output / METADATA).is_file():
        raise UsageError(f"--resume: {output} holds no run to continue. Leave out --resume to start one.")
    return read_settings(read_run(output)["settings"])


if __name__ == "__main__":
    sys.exit(main())
