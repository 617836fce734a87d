"""Names and defaults that several settings depend on. All other defaults are in the fields of `Settings`."""

from typing import Any

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"
DEFAULT_DATASET = "Mirali33/mb-domars16k"

NO_LABELS = "none"  # as --label-column of inference_vlm.py: labels that are there are not used
IN_MEMORY = "(in memory)"  # the dataset of a run that a program has started with its own

# Defaults that depend on --tune.
TUNING_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-4, "epochs": 3},
    "connector": {"learning_rate": 5e-4, "epochs": 5},
    "full": {"learning_rate": 1e-5, "epochs": 3},
}
LORA, DORA, RSLORA, PISSA = "lora", "dora", "rslora", "pissa"  # of --lora-variant, by PEFT's names
RESPONSE, POSTERIOR, BOTH = "response", "posterior", "both"  # objectives, see vlm/classifier/objective.py
# The demo trains a very small model from scratch, which needs other values than fine-tuning.
DEMO_DEFAULTS: dict[str, Any] = {
    "tune": "full",
    "learning_rate": 1.5e-3,
    "weight_decay": 0.1,
    "objective": RESPONSE,  # as accurate there as both, and faster (docs/objectives.md)
    "epochs": 16,
    "batch_size": 16,
    "eval_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "threads": 1,  # more threads help so small a model little, and slow it down if the cores are busy
    "task_description": "handwritten digit recognition",
    "probe": True,
}
# For messages: how to train the demo's model, which a demo leaves in its output folder, on other images.
TRAIN_DEMO_MODEL = "--model {folder} --tune full --learning-rate 1.5e-3 --batch-size 16 --dataset YOURS"
AUTO = "auto"
TEXT, HEAD = "text", "head"  # what --evidence counts; BOTH is the third
PROMPTS_OF_MODEL, NEW_PROMPTS = "model", "new"  # --prompts
NO_TRACKER = "none"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # each writes to a folder of this name in the output folder
EVALUATIONS = 10  # of a run on a stream, unless --eval-steps says otherwise
IMAGES_PER_STEP = 8  # images of an optimizer step, unless flags say otherwise
FEW_VIEWS = 4  # of an image, if it is augmented and the vision encoder is frozen: each view goes through it once
# The objective is `both` by default if that adds at most so many tokens to each image: as many as an image of SmolVLM.
FEW_NODES = 64
