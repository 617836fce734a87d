"""The settings of the output: where it is written, what goes on from there, and who else gets it."""

from dataclasses import dataclass

from vlm.config.declare import flag
from vlm.config.defaults import NO_TRACKER, TRACKERS


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """See `Settings`."""

    output_dir: str = flag("vlm_results", "output", "folder of the results (default: vlm_results)")
    overwrite: bool = flag(
        False, "output", "replace the run in the output folder; it is deleted when the new one has a model"
    )
    resume: bool = flag(False, "output", "continue the interrupted run in the output folder, with its settings")
    save_minutes: float = flag(
        10.0, "output", "save a checkpoint for --resume at least this often, in minutes (default: 10)"
    )
    push_to_hub: str | None = flag(
        None,
        "output",
        "upload the tested model with its card and metadata, and no data, to this repository on the hub, which is made "
        "if there is none; needs a login (`hf auth login`)",
        metavar="OWNER/NAME",
    )
    public: bool = flag(
        False, "output", "with --push-to-hub: everybody may see the repository (without it, it is private)"
    )
    metrics: list[str] | None = flag(
        None,
        "output",
        "your own metrics: FILE.py:FUNCTION(labels, predictions, probabilities, class_names); a resumed run has to be "
        "given them again, or none",
        nargs="+",
        metavar="FILE:FUNCTION",
    )
    track: list[str] | None = flag(
        None,
        "output",
        f"trackers that the run is reported to: {', '.join(TRACKERS)}, several of them, or none; --track is the same",
        choices=(*TRACKERS, NO_TRACKER),
        nargs="+",
        metavar="NAME",
        aliases=("--track",),
    )
    use_wandb: bool = flag(False, "output", "report to Weights & Biases: the same as --report-to wandb")
    wandb_project: str = flag(
        "vlm-classification", "output", "project of the run in all trackers (default: vlm-classification)"
    )
