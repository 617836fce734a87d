#!/usr/bin/env bash
# Trains. Takes the same flags as train_vlm.py:
#   ./run_vlm_training.sh --demo        tries everything out, with no data and no hub
#   ./run_vlm_training.sh --help        all flags
# The first start makes .venv in this folder and installs the packages; an active virtual or conda environment, or the Python
# named by VLM_PYTHON, is used instead. Files that you name, and vlm_results, are in the folder in which you call this.
# VLM_PROCESSES=N trains in N processes; VLM_PROCESSES=config does as `accelerate config` was told.

script=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null) || script=${BASH_SOURCE[0]}
here=$(CDPATH="" cd -- "$(dirname -- "$script")" && pwd)
# shellcheck source=setup_env.sh
. "$here/setup_env.sh"

start_program train_vlm.py "$@"
