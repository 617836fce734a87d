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

for argument in "$@"; do
  case $argument in
    -h | --help) # needs no packages
      choose_python
      exec "$python" "$here/train_vlm.py" --help
      ;;
  esac
done

launch=()
case ${VLM_PROCESSES:-1} in
  1) ;;
  config) launch=("$here/launch_processes.py") ;;
  # --multi_gpu stands for several processes: without it, accelerate starts only one on a machine without GPUs.
  [2-9] | [1-9][0-9]*)
    launch=("$here/launch_processes.py" --multi_gpu --num_processes "$VLM_PROCESSES" --num_machines 1
      --mixed_precision no --dynamo_backend no)
    ;;
  *) stop "VLM_PROCESSES is $VLM_PROCESSES; expected a whole number of at least 1, or config." ;;
esac

prepare_python
# The MPS lines: all of the memory may be used, and what Apple's GPU cannot do is done by the CPU.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM-false}"
export PYTORCH_MPS_HIGH_WATERMARK_RATIO="${PYTORCH_MPS_HIGH_WATERMARK_RATIO-0.0}"
export PYTORCH_ENABLE_MPS_FALLBACK="${PYTORCH_ENABLE_MPS_FALLBACK-1}"
exec "$python" "${launch[@]}" "$here/train_vlm.py" "$@"
