"""The names of the files and folders that a run writes into its output folder."""

METADATA = "training_metadata.json"
RESULTS = "results.json"
LOG = "log.jsonl"
PAGE = "report.html"
DATA_PAGE = "data.html"  # of --show-data; not part of a run
STATE = "resume_state"
PREVIOUS_STATE = "resume_state_previous"
BEST_MODEL = "best_model"
FINAL_MODEL = "final_model"
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
    "training_curves.png",
    "confusion_matrix.png",
    "reliability.png",
    PAGE,
)
