#!/usr/bin/env bash
# Classifies images, in the same environment as run_vlm_training.sh. Takes the same flags as inference_vlm.py:
#   ./run_vlm_inference.sh --model-dir vlm_results/best_model --output predictions.csv FOLDER
# VLM_PROCESSES=N shares the images among N processes, each on a GPU of its own if there are so many.

script=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null) || script=${BASH_SOURCE[0]}
here=$(CDPATH="" cd -- "$(dirname -- "$script")" && pwd)
# shellcheck source=setup_env.sh
. "$here/setup_env.sh"

start_program inference_vlm.py "$@"
