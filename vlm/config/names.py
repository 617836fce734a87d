"""The names of the files and folders that a run writes into its output folder."""

from vlm.config.settings import TRACKERS

METADATA = "training_metadata.json"
RESULTS = "results.json"
LOG = "log.jsonl"
PAGE = "report.html"
STATE = "resume_state"
PREVIOUS_STATE = "resume_state_previous"
BEST_MODEL = "best_model"
FINAL_MODEL = "final_model"
DEMO_IMAGES = "demo_images"
DEMO_MODEL = "demo_model"
# All that a run writes, which is what --overwrite deletes. Earlier versions called the demo's images demo_pictures.
WRITTEN = (
    BEST_MODEL,
    FINAL_MODEL,
    DEMO_MODEL,
    DEMO_IMAGES,
    "demo_pictures",
    STATE,
    PREVIOUS_STATE,
    *TRACKERS,
    METADATA,
    RESULTS,
    LOG,
    "training_curves.png",
    "confusion_matrix.png",
    "reliability.png",
    PAGE,
)
