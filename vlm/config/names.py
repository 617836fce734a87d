"""The names of the files and folders that a run writes into its output folder."""

METADATA = "training_metadata.json"
RESULTS = "results.json"
LOG = "log.jsonl"
PREDICTIONS = "predictions.csv"  # of a cross-validation: out-of-fold predictions of all images
LABEL_ISSUES = "label_issues.csv"  # labels that may be wrong
FOLD_PREDICTIONS = "fold_predictions.jsonl"  # of one fold
PAGE = "report.html"
DATA_PAGE = "data.html"  # of --show-data; not part of a run
STATE = "resume_state"
PREVIOUS_STATE = "resume_state_previous"
BEST_MODEL = "best_model"
FINAL_MODEL = "final_model"
MODEL_CARD = "README.md"  # in a model folder
HEAD_FILE = "evidence/head.safetensors"  # in a model folder: the linear classifier on vision features
ADAPTER_FOLDER = "adapter"  # in a model folder: what LoRA learned, in PEFT's format
DEMO_IMAGES = "demo_images"
DEMO_MODEL = "demo_model"
MANIFEST = ".run_files.json"  # names what the run has written (vlm/training/run_files.py)
LOCK = ".run.lock"  # there while a run works in the folder (vlm/training/lock.py)
PREVIOUS_RUN = ".previous_run"  # an earlier run, until the one that overwrites it has a model
# All that a run writes, besides the folders of trackers. Earlier versions called the demo's images demo_pictures.
FOLDERS = (BEST_MODEL, FINAL_MODEL, DEMO_MODEL, DEMO_IMAGES, "demo_pictures", STATE, PREVIOUS_STATE)
WRITTEN = (
    *FOLDERS,
    METADATA,
    RESULTS,
    LOG,
    FOLD_PREDICTIONS,
    LABEL_ISSUES,
    "training_curves.png",
    "confusion_matrix.png",
    "reliability.png",
    PAGE,
)


def written_by(folds: int | None) -> tuple[str, ...]:
    """All that a run writes or, with `folds`, a cross-validation of so many, besides the folders of trackers."""
    if folds is None:
        return WRITTEN
    return (*(fold_folder(number) for number in range(1, folds + 1)), METADATA, RESULTS, PREDICTIONS, PAGE)


def fold_folder(number: int) -> str:
    """The folder of one fold, an ordinary run, in the output folder of a cross-validation."""
    return f"fold_{number}"
